"""Threads and matmul library: chosen once, recorded and reused; oneDNN against F.linear."""
import time

import pytest
import torch
import torch.nn.functional as F

from lorasae import linear as module
from lorasae.linear import Linear, by_onednn, linear
from lorasae.runs import machine
from lorasae.runs.config import Config


@pytest.fixture(autouse=True)
def as_before():
    threads = torch.get_num_threads()
    machine.faster_library.cache_clear()
    yield
    machine.faster_library.cache_clear()
    torch.set_num_threads(threads)
    torch.backends.mkldnn.enabled = True


def test_recorded_settings_are_reused_without_measuring(monkeypatch):
    monkeypatch.setattr(machine, "free_cores", None)
    monkeypatch.setattr(machine, "faster_library", None)
    monkeypatch.setattr(machine, "cores", lambda: range(3))
    x = torch.ones(2, 2)
    for threads, used, products in ((2, 2, "mkl"), (3, 3, "onednn"), (8, 3, "onednn")):
        config = Config(threads=threads, products=products)
        assert machine.settled(config) == config
        assert torch.get_num_threads() == used
        assert by_onednn(x, x) == (products == "onednn")
    assert machine.settled(config, threads=1).threads == 1 == torch.get_num_threads()


@pytest.mark.parametrize("slow, chosen", [("onednn", "mkl"), ("mkl", "onednn"), ("", "onednn")])
def test_mkl_is_chosen_only_if_it_is_clearly_faster(monkeypatch, slow, chosen):
    def multiply(x, weight):
        library = "onednn" if torch.backends.mkldnn.enabled else "mkl"
        end = time.process_time() + (0.006 if library == slow else 0.003)
        while time.process_time() < end:
            pass

    monkeypatch.setattr(machine, "linear", multiply)
    config = machine.settled(Config(threads=1))
    assert config.products == chosen and by_onednn(torch.ones(1, 1), torch.ones(1, 1)) == (
        chosen == "onednn")
    assert machine.settled(Config(threads=1, device="cuda")).products is None


@pytest.mark.parametrize("idle, free", [(0.0, 1), (1.4, 1), (2.6, 3), (9.0, 4)])
def test_by_default_a_run_uses_the_idle_cores(monkeypatch, idle, free):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(machine, "cores", lambda: range(4))
    seconds = iter([5.0, 5.0 + idle * machine.LOOK])
    monkeypatch.setattr(machine, "idle_seconds", lambda: next(seconds))
    assert machine.free_cores() == free

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert machine.free_cores() == torch.get_num_threads()


def test_only_the_cores_of_this_process_count(monkeypatch, tmp_path):
    stat = tmp_path / "stat"
    lines = "cpu 9 9 9 900 9/cpu0 1 1 1 100 1/cpu1 1 1 1 300 1/cpu2 1 1 1 500 1/intr 7"
    stat.write_text(lines.replace("/", "\n"))
    monkeypatch.setattr(machine, "Path", lambda name: stat)
    monkeypatch.setattr(machine, "cores", lambda: {0, 2})
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 100)
    assert machine.idle_seconds() == 6.0


# ---- oneDNN's products against F.linear ----------------------------------------------------------

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(),
                            reason="this PyTorch was built without oneDNN")


@onednn
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("out", [4, 6])
def test_values_and_every_gradient_match_the_formula(shape, bias, transposed, out):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(5, out).T if transposed else torch.randn(out, 5)
    weight, b = weight.requires_grad_(), torch.randn(out, requires_grad=True) if bias else None
    inputs = [t for t in (x, weight, b) if t is not None]
    y = linear(x, weight, b)
    expected = F.linear(x.double(), weight.double(), b.double() if bias else None)
    assert by_onednn(x, weight) and y.shape == expected.shape
    assert type(y.grad_fn).__name__ == "OneDNNLinearBackward"
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    g = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, g),
                            torch.autograd.grad(expected, inputs, g.double())):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@onednn
def test_a_frozen_weight_saves_no_input_for_the_backward_pass():
    layer, saved = Linear(5, 4, bias=False).requires_grad_(False), []
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert len(saved) == 1 and saved[0].data_ptr() == layer.weight.data_ptr()
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 5))


def test_all_other_inputs_go_through_f_linear(monkeypatch):
    monkeypatch.setattr(module, "product", None)
    for dtype in (torch.float64, torch.bfloat16):
        x, weight = torch.randn(3, 5, dtype=dtype), torch.randn(4, 5, dtype=dtype)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(linear(x.float(), weight.float()), F.linear(x.float(), weight.float()))
    assert linear(x[:0].float(), weight.float()).shape == (0, 4)
    assert linear(x.float().to("meta"), weight.float().to("meta")).is_meta
