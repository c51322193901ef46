"""The benchmark runs, refuses wrong answers, and counts FLOPs and memory rightly."""
import math
import os
import sys
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from lorasae import adapt, objectives, topk
from lorasae.bench import __main__ as bench
from lorasae.bench import gpu, loss, race, sparse, step
from lorasae.errors import InputError
from lorasae.io.files import read_json
from lorasae.io.presets import PRESETS
from lorasae.lora import LoRALinear
from lorasae.runs.adapting import Adapting
from lorasae.runs.config import Config
from lorasae.bench.race import differing_tensors, peak_memory
from lorasae.bench.workloads import REAL, TINY, flops_per_token


@pytest.fixture
def peers():
    for package in "transformers", "peft":
        pytest.importorskip(package, reason="the peers are built over it")


@pytest.fixture
def section(tmp_path, capsys):
    """Runs `python -m lorasae.bench NAME --quick`: the rows of its JSON file and its table."""
    def run(name):
        path = tmp_path / "bench.json"
        bench.main([name, "--quick", "--device", "cpu", "--json", str(path)])
        written, printed = read_json(path), capsys.readouterr().out
        assert list(written["sections"]) == [name]
        assert written["torch"] == torch.__version__ and "threads" in written["hardware"]
        rows = written["sections"][name]
        for row in rows:
            assert row["what"] in printed and row["contender"] in printed
            if "ms" in row:
                assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
            if row["contender"] == "lorasae":
                assert row.get("ours_faster", 1) == 1
        return rows
    return run


@pytest.mark.parametrize("name, contenders", [
    ("kl", ["naive", "lorasae"]), ("data", ["one piece at a time", "lorasae", "lorasae"])])
def test_sections_of_the_loss_and_of_text(section, name, contenders):
    rows = section(name)
    assert [row["contender"] for row in rows] == contenders
    assert name == "kl" or all(row["tokens_per_s"] > 0 for row in rows)


def test_topk_section(section):
    rows = section("topk")
    assert {row["what"].split(",")[0] for row in rows} == {"top-k", "encoder", "SAE step"}
    assert [row["contender"] for row in rows][-3:] == ["dense autograd", "sparsify-style",
                                                       "lorasae"]


def test_step_section_beside_the_peers(section, peers):
    rows = section("step")
    for name, attention in (("tiny gemma", "eager"), ("tiny llama", "sdpa")):
        contenders = {row["contender"]: row for row in rows if row["what"] == f"LoRA step, {name}"}
        assert list(contenders) == ["official", f"tuned, {attention}", "lorasae, dropout 0.1",
                                    "lorasae"]
        for row in contenders.values():
            assert row["s_15M"] * row["tokens_per_s"] == pytest.approx(15e6)
            assert row["tokens_per_s"] * row["ms"] / 1e3 == pytest.approx(2 * 16)
            assert 0 < row["utilisation"] < 1
        recipe, ours, of_five = (row for row in rows if row["what"] == f"FLOPs, {name}")
        assert ours["contender"] == "lorasae" and recipe["ours_flops"] < 1
        assert of_five["contender"] == "lorasae, each of five" and 1 < of_five["ours_flops"] < 5
        assert ours["gflop_per_token"] == contenders["lorasae"]["gflop_per_token"]
        assert recipe["gflop_per_token"] == contenders["official"]["gflop_per_token"]
    assert [row["contender"] for row in rows
            if row["what"].startswith("ranks 1 2 3 4 5")] == ["5 runs", "lorasae"]


def test_without_the_peers_ours_is_still_timed(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "lorasae.bench.peers", raising=False)
    monkeypatch.delattr("lorasae.bench.peers", raising=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert not step.load_peers()
    assert "pip install transformers peft" in capsys.readouterr().err
    contenders = step.lora_contenders(TINY["tiny llama"], False, "cpu")
    assert list(contenders) == ["lorasae, dropout 0.1", "lorasae"]
    contenders["lorasae"]()


def test_sae_section(section):
    rows = section("sae")
    assert [row["what"].split(", ")[1] for row in rows] == ["topk", "jumprelu", "e2e"]
    assert all(row["tokens_per_s"] > 0 for row in rows)


# ---- Wrong answers -------------------------------------------------------------------------------

@pytest.mark.parametrize("spoil", [lambda v, i: (v, i.flip(-1)), lambda v, i: (v + 1e-6, i),
                                   lambda v, i: (v[:, :1].expand_as(v), i[:, :1].expand_as(i))])
def test_a_wrong_topk_ends_the_benchmark(monkeypatch, spoil):
    exact = topk.topk
    monkeypatch.setattr(topk, "topk", lambda x, k: spoil(*exact(x, k)))
    with pytest.raises(RuntimeError, match="top-k, N 64 M 4096: lorasae disagrees with torch.topk"):
        sparse.bench_topk("cpu", quick=True)


def test_a_wrong_gradient_ends_the_benchmark(monkeypatch):
    class Wrong(topk.ByLatent):
        def sum(self, weights, rows=None):
            return super().sum(weights, rows) * 1.0001
    monkeypatch.setattr(topk, "ByLatent", Wrong)
    with pytest.raises(RuntimeError,
                       match="SAE step.*lorasae disagrees with dense autograd: .* is off by"):
        sparse.bench_topk("cpu", quick=True)


def test_a_wrong_kl_ends_the_benchmark(monkeypatch):
    exact = objectives.linear_kl
    monkeypatch.setattr(objectives, "linear_kl", lambda target, hidden, head, softcap, **how:
                        # KL(adapted ‖ base)
                        exact(hidden, target, head, softcap) + 0 * hidden.sum())
    with pytest.raises(RuntimeError, match="lorasae disagrees with naive"):
        loss.bench_kl("cpu", quick=True)


low_rank, linear_kl = LoRALinear.low_rank, adapt.linear_kl


@pytest.mark.parametrize("spoil", [
    (LoRALinear, "low_rank", lambda self, x: 0.99 * low_rank(self, x)),
    (adapt, "splice", lambda x, sae, special: x),
    (adapt, "linear_kl", lambda base, *rest, **how: linear_kl(base * 1.01, *rest, **how))])
def test_a_wrong_step_ends_the_benchmark_before_anything_is_timed(monkeypatch, spoil, peers):
    monkeypatch.setattr(*spoil)
    monkeypatch.setattr(race, "timed", None)
    monkeypatch.setattr(step, "matmul_peak", lambda *_: 1.0)
    with pytest.raises(RuntimeError,
                       match="LoRA step, tiny gemma: lorasae.* disagrees with official"):
        step.bench_step("cpu", quick=True)


def test_adapters_of_another_rank_are_not_taken_for_their_own_run(monkeypatch):
    exact = Adapting.losses

    def exchanged(self, part):
        losses, values = exact(self, part)
        return losses.flip(0) if len(self.adapters) > 1 else losses, values

    monkeypatch.setattr(Adapting, "losses", exchanged)
    contenders = step.sweep_contenders(TINY["tiny gemma"], (1, 2), "cpu")
    alone, together = (contender.answer() for contender in contenders.values())
    assert step.differing_steps(TINY["tiny gemma"], together, alone)


# ---- An hour of a GPU, in small on a CPU ---------------------------------------------------------

@pytest.fixture
def on_a_gpu(tmp_path, capsys):
    """Runs `python -m lorasae.bench gpu --quick`: its sections as the JSON file holds them."""
    def run(*arguments, fails=()):
        path = tmp_path / "gpu.json"
        command = ["gpu", "--quick", "--device", "cpu", "--json", str(path), *arguments]
        if fails:
            with pytest.raises(InputError, match=", ".join(fails)):
                bench.main(command)
        else:
            bench.main(command)
        sections = read_json(path)["sections"]
        printed = capsys.readouterr().out
        for rows in sections.values():
            assert all(row["what"] in printed for row in rows) and rows[-1]["seconds"] > 0
        return sections
    return run


def test_every_part_of_gpu_runs_from_end_to_end(on_a_gpu):
    sections = on_a_gpu("--part", *gpu.PARTS)
    assert list(sections) == [f"gpu {name}" for name in gpu.PARTS]
    facts = {row["what"]: row.get("value") for row in sections["gpu environment"]}
    assert facts["torch"] == torch.__version__ and facts["hardware"]
    assert all(row["tflops"] > 0 for row in sections["gpu peak"][:-1])

    headline = sections["gpu headline"]
    steps = [row for row in headline if row["what"] == "headline step"]
    names = ("as train.py runs it", "no dropout", "no TF32")
    assert [row["contender"] for row in steps] == [f"lorasae, {name}" for name in names]
    for row in steps:
        assert row["tokens_per_s"] == pytest.approx(16 / (row["ms"] / 1e3))
        assert 0 < row["utilisation"] < 1
        assert row["launches"] == row["syncs"] == 0 and row["issue_ms"] <= row["ms_max"]
    values = {row["contender"]: row["value"] for row in headline if "value" in row}
    # a CPU knows neither
    assert values["compiled, plain"] == 0 and values["fp32"] == values["TF32"] > 0
    assert sum(row["part"] for row in headline if "part" in row) > 0.5
    assert sections["gpu peers"][-2]["contender"] == "lorasae"


def test_a_part_that_fails_is_a_row_and_the_others_run(on_a_gpu, monkeypatch, capsys):
    monkeypatch.setitem(gpu.PARTS, "headline", lambda device, quick: 1 / 0)
    sections = on_a_gpu("--part", "headline", "peak", fails=["headline"])
    assert sections["gpu headline"][0]["error"] == "ZeroDivisionError: division by zero"
    assert sections["gpu peak"][0]["tflops"] > 0


def test_by_default_each_part_has_a_process_of_its_own(on_a_gpu, monkeypatch):
    started, exact = [], gpu.in_a_process

    def spy(name, device, quick):
        started.append(name)
        if name != "environment":
            raise RuntimeError("a crash")
        return exact(name, device, quick)

    monkeypatch.setattr(gpu, "in_a_process", spy)
    sections = on_a_gpu(fails=list(gpu.PARTS)[1:])
    assert started == list(gpu.PARTS)
    assert {row["what"] for row in sections["gpu environment"]} >= {"hardware", "torch", "triton"}
    assert "error" in sections["gpu topk"][0]


def test_a_crash_of_a_parts_process_is_its_error(monkeypatch):
    monkeypatch.setattr(gpu.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="status 1"):
        gpu.in_a_process("peak", "cpu", True)


def test_gpu_on_a_cpu_is_refused_but_for_its_small_shapes():
    with pytest.raises(InputError, match="--quick"):
        bench.main(["gpu", "--device", "cpu"])
    with pytest.raises(InputError, match="--part"):
        bench.main(["kl", "--part", "peak", "--quick", "--device", "cpu"])


def test_the_benchmarks_saes_have_the_dtype_of_the_presets():
    for name, case in REAL.items():
        expected = PRESETS[name].lora.get("sae_dtype", Config.sae_dtype)
        assert str(case.sae_dtype) == f"torch.{expected}"


# ---- FLOPs and memory ----------------------------------------------------------------------------

def closed_form(case, recipe):
    """FLOPs per token of the step with adapters after the SAE.

    A product of [.., n] and [n, m] costs 2nm per token; a backward pass to the inputs costs it once
    more, and to an adapter's weights again. Nothing before the first adapted block trains: its q,
    k, v pass no gradient on.
    """
    c, after = case.config, len(case.blocks)
    D, before = c.hidden_size, c.num_hidden_layers - after
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes = [(D, q), (D, kv), (D, kv), (q, D), *[(D, c.intermediate_size)] * 2,
              (c.intermediate_size, D)]
    layer, adapter = (2 * sum(map(cost, shapes))
                      for cost in (math.prod, lambda shape: case.rank * sum(shape)))
    head, sae, scores = 2 * D * c.vocab_size, 4 * D * case.width, 4 * case.context * q
    runs = 2 * before + 3 * after if recipe else before + 3 * after  # base, adapted, gradient
    causal = (1 + 64 / case.context) / 2                # half of the scores
    scores *= 2 * before + 4 * after if recipe else (before + 4 * after) * causal
    return runs * layer - 2 * D * (q + 2 * kv) + 3 * head + 3 * after * adapter + sae + scores


def test_flops_of_gemma_2_2b_are_the_closed_forms_and_0_85_of_the_published_recipes():
    case = REAL["gemma-2-2b"]
    ours, recipe = (flops_per_token(case, recipe=recipe) for recipe in (False, True))
    assert ours == pytest.approx(closed_form(case, recipe=False), rel=2e-3)
    assert recipe == pytest.approx(closed_form(case, recipe=True), rel=2e-3)
    assert ours / recipe <= 0.85


def test_relative_error_is_of_the_worst_tensor():
    right = {"a": torch.ones(4), "b": torch.ones(4)}
    assert differing_tensors({"a": torch.ones(4), "b": torch.full((4,), 1.01)},
                             right) == "b is off by 1.0e-02"
    assert differing_tensors(right, right) is None


def allocating(device):
    kept = torch.ones(30_000_000)                                       # an input: not counted
    return {"120 MB": lambda: (kept[:10_000_000] + kept[:10_000_000]) * torch.ones(10_000_000) + 1}


def dying(device):
    os._exit(9)                                         # as if it were killed for its memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_what_the_call_adds_and_a_killed_process_is_not_waited_for():
    assert 0.95 * 120e6 < peak_memory(allocating, "120 MB", "cpu") < 1.1 * 120e6
    with pytest.raises(BrokenProcessPool):
        peak_memory(dying, "120 MB", "cpu")
