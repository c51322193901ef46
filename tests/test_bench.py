"""The benchmark runs, rejects wrong answers, and counts FLOPs and memory correctly."""
import json
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from helpers import command, refusal
from lorasae import adapt, attention, objectives, topk
from lorasae.bench import kernels, race, steps
from lorasae.bench.__main__ import LIMIT, SECTIONS
from lorasae.bench.race import peak_memory
from lorasae.bench.workloads import TINY, flops_per_token, random_setting
from lorasae.linear import linear
from lorasae.lora import LoRALinear, base

MAIN = "lorasae.bench.__main__"
SPARSIFY = ["sparsify"] * bool(find_spec("sparsify"))

needs_peers = pytest.mark.skipif(not all(map(find_spec, ("transformers", "peft"))),
                                 reason="the peers need transformers and peft")


@pytest.fixture
def section(tmp_path, capsys):
    """Runs `python -m lorasae.bench NAME --quick` -> the rows of its file, which it also prints."""
    def run(name):
        path = tmp_path / f"{name}.jsonl"
        command(MAIN, name, "--quick", "--device", "cpu", "--json", path)
        rows, printed = [json.loads(line) for line in path.open()], capsys.readouterr().out
        for row in rows:
            assert row.pop("section") == name
            assert row["what"] in printed and row.get("contender", "") in printed
            if "ms" in row:
                assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
            if "utilisation" in row:
                assert row["tokens_per_s"] * row["ms"] / 1e3 == pytest.approx(2 * 16)
                assert 0 < row["utilisation"] < 1 and row["peak_tflops"] > 0
            if row.get("contender") == "lorasae":
                ours = row
            if "ours_faster" in row:
                assert row["ours_faster"] == pytest.approx(row["ms"] / ours["ms"])
        return rows
    return run


@pytest.mark.parametrize("name, contenders", [
    ("kl", ["lorasae", "naive"]),
    ("headline", ["lorasae"]),
    ("topk", ["lorasae", "torch.topk", "lorasae", *SPARSIFY, "dense autograd"])])
def test_each_section_without_peers_times_its_contenders(section, name, contenders):
    rows = section(name)
    assert [row["contender"] for row in rows] == contenders
    assert ("tokens_per_s" in rows[0]) == (name == "headline")


def test_a_row_is_printed_and_saved_as_soon_as_it_is_measured(monkeypatch, tmp_path, capsys):
    """The command fails while it measures the second row's memory."""
    memory = iter([1e6])
    monkeypatch.setattr(race, "peak_memory", lambda build, name, device: next(memory))
    monkeypatch.setitem(SECTIONS, "kl", lambda device, quick: race.race(
        "KL", partial(kernels.kl_contenders, 64, 32, 4096), device, quick=False))
    with pytest.raises(RuntimeError, match="StopIteration"):
        command(MAIN, "kl", "--device", "cpu", "--json", tmp_path / "rows.jsonl")
    row, = (tmp_path / "rows.jsonl").open()
    shown = capsys.readouterr()
    assert json.loads(row)["contender"] == "lorasae" and json.loads(row)["peak_mb"] == 1
    assert shown.out.startswith("\nKL\n\ncontender ") and "\nlorasae " in shown.out
    assert "round 0 of 5: naive" in shown.err


@needs_peers
def test_the_step_section_compares_ours_with_the_peers(section):
    rows = section("step")
    flops = {row["model"]: row for row in rows if row["what"] == "GFLOPs per token"}
    for name, attended in (("tiny gemma2", "eager"), ("tiny llama", "sdpa")):
        found = {row["contender"]: row for row in rows if row["what"] == f"LoRA step, {name}"}
        assert list(found) == ["lorasae", "lorasae, dropout 0.1", f"tuned, {attended}", "official"]
        assert flops[name]["ours"] == found["lorasae"]["gflop_per_token"]
        assert flops[name]["recipe"] == found["official"]["gflop_per_token"]
        assert flops[name]["ratio"] < 1 < flops[name]["five_gain"] < 5
    ranks = [row["contender"] for row in rows if row["what"].startswith("five ranks")]
    assert ranks == ["lorasae", "five runs"]


def test_gpu_runs_each_section_as_a_command_even_if_others_fail(tmp_path, monkeypatch, capsys):
    """One section succeeds, one times out, and the others fail."""
    started, run, path = [], subprocess.run, tmp_path / "gpu.jsonl"

    def spy(words, **how):
        if how != {"timeout": LIMIT, "check": True}:
            return run(words, **how)                    # PyTorch's report on the machine
        started.append(words[3])
        if words[3] == "headline":
            raise subprocess.TimeoutExpired(words, LIMIT)
        return run(words if words[3] == "kl" else ["false"], check=True)

    monkeypatch.setattr(subprocess, "run", spy)
    line = refusal(MAIN, "gpu", "--quick", "--device", "cpu", "--json", path)
    assert started == list(SECTIONS) and line.startswith("these sections failed: headline (")
    assert {json.loads(line)["section"] for line in path.open()} == {"kl"}
    assert f"PyTorch version: {torch.__version__}" in capsys.readouterr().out


def test_without_the_peers_ours_is_still_timed(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "lorasae.bench.peers", raising=False)
    monkeypatch.delattr("lorasae.bench.peers", raising=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    contenders = steps.lora_contenders(TINY["tiny llama"], "cpu")
    assert "pip install transformers peft" in capsys.readouterr().err
    assert list(contenders) == ["lorasae, dropout 0.1", "lorasae"]
    contenders["lorasae"]()


# ---- Wrong answers -------------------------------------------------------------------------------

exact, kl, low_rank, linear_kl = (topk.topk, objectives.linear_kl, LoRALinear.low_rank,
                                  adapt.linear_kl)


class WrongSums(topk.ByLatent):
    def sum(self, weights, rows=None):
        return super().sum(weights, rows) * 1.0001


@pytest.mark.parametrize("section, module, name, wrong, complaint", [
    (kernels.bench_topk, topk, "topk", lambda x, k: (exact(x, k)[0], exact(x, k)[1].flip(-1)),
     "torch.topk: tensor 1"),
    (kernels.bench_topk, topk, "topk", lambda x, k: [t[:, :1].expand_as(t) for t in exact(x, k)],
     "torch.topk: tensor 0"),
    (kernels.bench_topk, topk, "topk", lambda x, k: exact(x + 1e-6, k), "torch.topk: tensor 0"),
    (kernels.bench_topk, topk, "ByLatent", WrongSums, "dense autograd: tensor"),
    (kernels.bench_kl, objectives, "linear_kl",
     lambda p, q, head, softcap, **how: kl(q, p, head, softcap) + 0 * q.sum(), "naive: tensor"),
    (kernels.bench_kl, objectives, "linear_kl", lambda p, q, *rest, **how: q.sum() * torch.nan,
     "naive: tensor 0")])
def test_a_wrong_kernel_stops_the_benchmark(monkeypatch, section, module, name, wrong, complaint):
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(RuntimeError, match=f"lorasae disagrees with {complaint}.* is off by"):
        list(section("cpu", quick=True))


@needs_peers
@pytest.mark.parametrize("spoil", [
    (LoRALinear, "low_rank", lambda self, x: 0.99 * low_rank(self, x)),
    (adapt, "splice", lambda x, sae, special: x),
    (adapt, "linear_kl", lambda base, *rest, **how: linear_kl(base * 1.01, *rest, **how))])
def test_a_wrong_step_stops_the_benchmark_before_anything_is_timed(monkeypatch, spoil):
    monkeypatch.setattr(*spoil)
    monkeypatch.setattr(race, "timed", None)
    monkeypatch.setattr(steps, "matmul_peak", lambda *_: 1.0)
    with pytest.raises(RuntimeError, match="step, tiny gemma2: lorasae.* disagrees with official"):
        list(steps.bench_step("cpu", quick=True))


# ---- FLOPs and memory ----------------------------------------------------------------------------

def counted_flops(function):
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("case", TINY.values(), ids=TINY)
def test_flop_counts_match_torchs(case, monkeypatch):
    model, sae, tokens = random_setting(case, "cpu")
    step = steps.Ours(case, model, sae, tokens, (2, case.rank))

    def published():
        with torch.no_grad(), base(model):
            model(tokens[:1])
        model(tokens[:1], {case.layer: sae}).sum().backward()

    # Ours, one query at a time, so that it computes no score that the mask hides.
    monkeypatch.setattr(attention, "attention", lambda *inputs: attention.blockwise_attention(
        *inputs[:6], rows=1))
    (_, smaller), (shared, own) = [flops_per_token(replace(case, rank=r)) for r in (2, case.rank)]
    assert counted_flops(step.answer) == case.context * (shared + smaller + own)

    # The recipe, which computes all scores.
    monkeypatch.setattr(attention, "attention", lambda *inputs: attention.naive_attention(
        *inputs[:6]))
    assert counted_flops(published) == case.context * sum(flops_per_token(case, recipe=True))


def allocating(device):
    kept = torch.ones(30_000_000)                                       # an input: not counted
    return {"120 MB": lambda: (kept[:10_000_000] + kept[:10_000_000]) * torch.ones(10_000_000)}


def dying(device):
    os._exit(9)                                         # as if killed for lack of memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_what_the_call_adds_and_a_killed_process_raises():
    assert 0.95 * 120e6 < peak_memory(allocating, "120 MB", "cpu") < 1.1 * 120e6
    with pytest.raises(BrokenProcessPool):
        peak_memory(dying, "120 MB", "cpu")


@pytest.mark.parametrize("onednn", [True, False])
def test_the_floor_is_a_calls_matrix_products(monkeypatch, onednn):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", onednn)
    bias = torch.randn(5)
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    q = torch.randn(2, 3, 16, 8)
    called = []

    def call():
        called.append(True)
        attended = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        (linear(x, weight, bias).sum() + attended.sum() + (q @ q.mT).sum()).backward()

    floor = race.Floor(call)
    assert floor.answer() == [] and not called          # a memory measurement must not run it
    floor()
    floor()
    assert len(called) == 1
    found = {tuple(multiply().shape): number for multiply, number in floor.products}
    # forward, both gradients (oneDNN's of the weight: transposed); half of attention's, all of q qᵀ
    of_weight = (4, 5) if onednn else (5, 4)
    assert found == {(6, 5): 1, (6, 4): 1, of_weight: 1, (6, 16, 16): 2, (6, 16, 8): 0}
