"""The benchmark runs, refuses wrong answers, and its memory column is what a call really adds."""
import sys

import pytest
import torch

from lorasae import bench, topk
from lorasae.files import read_json


def test_topk_section_runs_and_writes_its_rows(tmp_path, capsys):
    bench.main(["topk", "--quick", "--device", "cpu", "--json", str(tmp_path / "bench.json")])
    rows = read_json(tmp_path / "bench.json")["sections"]["topk"]
    assert {row["what"].split(",")[0] for row in rows} == {"top-k", "encoder", "SAE step"}
    assert [row["contender"] for row in rows][-3:] == ["dense autograd", "sparsify-style", "lorasae"]
    for row in rows:
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"] and row["ours_faster"] > 0
        assert row["contender"] != "lorasae" or row["ours_faster"] == 1
    printed = capsys.readouterr().out
    assert all(row["what"] in printed and row["contender"] in printed for row in rows)


@pytest.mark.parametrize("spoil", [lambda v, i: (v, i.flip(-1)), lambda v, i: (v + 1e-6, i),
                                   lambda v, i: (v[:, :1].expand_as(v), i[:, :1].expand_as(i))])
def test_a_wrong_topk_ends_the_benchmark(monkeypatch, spoil):
    exact = topk.topk
    monkeypatch.setattr(topk, "topk", lambda x, k: spoil(*exact(x, k)))
    with pytest.raises(RuntimeError, match="top-k, N 64 M 4096: lorasae disagrees with torch.topk"):
        bench.bench_topk("cpu", quick=True)


def test_a_wrong_gradient_ends_the_benchmark(monkeypatch):
    class Wrong(topk._ByLatent):
        def sum(self, weights, rows=None):
            return super().sum(weights, rows) * 1.0001
    monkeypatch.setattr(topk, "_ByLatent", Wrong)
    with pytest.raises(RuntimeError, match="SAE step.*lorasae disagrees with dense autograd: .* is off by"):
        bench.bench_topk("cpu", quick=True)


def allocating(device):
    kept = torch.ones(30_000_000)                                       # an input: not counted
    return {"120 MB": lambda: (kept[:10_000_000] + kept[:10_000_000]) * torch.ones(10_000_000) + 1}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_what_the_call_adds():
    assert 0.95 * 120e6 < bench.peak_memory(allocating, "120 MB", "cpu") < 1.1 * 120e6
