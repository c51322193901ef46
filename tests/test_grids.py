"""Figures 1, 3, 4, 5, 6 and 9 from the files of finished runs: pairs of runs on the same text."""
from dataclasses import replace

import pytest
import torch

from helpers import read
from lorasae.evals.common import interval
from lorasae.io.files import write_json
from lorasae.paper import frontier, gap
from lorasae.paper.study import Study, tokens_of


def miniature(folder):
    return Study(folder, sae_tokens=400_000, frontier_tokens=2_000_000, lora_tokens=60_000,
                 long_tokens=300_000, eval_tokens=12_000, seeds=(0, 1), recipe="tuned")


@pytest.fixture
def study(tmp_path):
    return miniature(tmp_path)


# ---- Pairs of runs -------------------------------------------------------------------------------

def made_up(rng, documents, difference=0.0, shared=None):
    """A gap.Run whose adapters close 30 % of a gap of 0.5 nats, + difference."""
    n = len(documents)
    hard = torch.randn(documents.max() + 1, generator=rng)[documents] if shared is None else shared
    base = 2.5 + 0.5 * hard
    sae = base + 0.5 + 0.2 * hard + 0.05 * torch.randn(n, generator=rng)
    adapted = sae - (0.3 + difference) * (sae - base) + 0.02 * torch.randn(n, generator=rng)
    return run_of(documents, base.double(), sae.double(), adapted.double()), hard


def run_of(documents, base, sae, adapted):
    closed = gap.part_of(sae - adapted, sae - base, documents)
    return gap.Run({}, documents, sae, adapted, sae - base, closed)


def test_a_difference_of_shares_on_the_same_text_is_paired_and_covers():
    rng = torch.Generator().manual_seed(0)
    documents = torch.arange(12).repeat_interleave(4)
    covered, halves = 0, []
    for _ in range(300):
        first, hard = made_up(rng, documents, difference=0.05)
        second, _ = made_up(rng, documents, shared=hard)
        mean, half, over = gap.paired(first.gap_closed - second.gap_closed, first, second)
        covered += abs(mean - 0.05) <= half
        unpaired = [interval(run.sae - run.adapted, documents)[1] for run in (first, second)]
        halves.append((half * first.gap.mean().item(), torch.tensor(unpaired).norm().item()))
    assert 0.85 <= covered / 300 <= 0.95 and over == "12 documents"
    paired, unpaired = torch.tensor(halves).mean(0)
    assert paired < unpaired / 2

    moved = second._replace(documents=documents.roll(1))
    with pytest.raises(ValueError, match="did not see the same held-out text"):
        gap.paired(first.gap_closed - moved.gap_closed, first, moved)


def test_a_share_of_nothing_is_no_number():
    documents = torch.arange(10)
    ones = torch.ones(10, dtype=torch.float64)
    noise = torch.linspace(-1, 1.2, 10).double()
    for whole in (-ones, ones * 0, noise):              # noise: above 0 by less than its interval
        found = gap.part_of(ones, whole, documents)
        estimate = gap.paired(found, run_of(documents, ones, ones, ones))
        assert estimate == (None, None, "nothing to divide by")
    few = torch.zeros(10, dtype=torch.int64)            # one document: no interval to be within
    assert gap.part_of(ones, ones * 2, few).mean() == 0.5


# ---- Grids, from files ---------------------------------------------------------------------------

def finish(folder, seconds=10.0, **ce):
    """Writes the files of a finished run, whose CE in each setting has this mean."""
    wave = torch.linspace(-0.5, 0.5, 20).double()       # held-out sequences differ, and alike
    losses = {}
    for name, mean in ce.items():                       # a trace of spread, also in differences
        own = mean + wave * (1 + 1e-9 * mean)
        losses[name] = {"ce": own.tolist(), "kl": [0.0] * 20}
    write_json(folder / "sequences.json", {"documents": list(range(20)), **losses})
    write_json(folder / "results.json", {
        **{f"ce_{name}": mean for name, mean in ce.items()}, "l0_sae": {"2": 8.0}, "l0": {"2": 9.0},
        "train_tokens": 1000, "seconds": seconds})


def shown(part, numbers):
    """The claims of a part, whose tables and picture are made from what its file would hold."""
    figures = pytest.importorskip("matplotlib.figure", reason="draws the pictures")
    part.draw(numbers, figures.Figure())
    text = " ".join(str(table) for table in part.tables(numbers))
    return part.claims(numbers), text


def kept(study, part):
    """What the file of numbers of a part would hold."""
    write_json(study.folder / "numbers.json", part.measure(study))
    return read(study.folder / "numbers.json")


def test_scaling(study):
    for point in gap.points(study):
        share = 0.4 + 0.1 * (point.L0 == "4") + 0.05 * (point.layer == "2")
        folder = study.folder / gap.adapters_at(study, point).name
        for rank in gap.RANKS:
            adapted = 3.0 - share + 0.1 / rank
            finish(folder / f"rank-{rank}", base=2.0, sae=3.0, adapted=adapted)
    numbers = kept(study, gap.SCALING)
    claims, text = shown(gap.SCALING, numbers)

    assert len(numbers["rows"]) == 16 * 5 and numbers["rows"][0]["x"] == "4"
    assert numbers["trends"]["L0"] == [pytest.approx(0.1), pytest.approx(0, abs=1e-9),
                                       "20 documents"]
    assert numbers["trends"]["layer"][0] == pytest.approx(0.05)
    closed, ranks, *trends = claims
    assert len(closed.cases) == len(ranks.cases) == 13 and closed.verdict == "agrees"
    assert all(case.mean == pytest.approx(0.1 - 0.1 / 256) for case in ranks.cases.values())
    assert [trend.figure for trend in trends] == ["Fig. 3"] * 3 + ["Fig. 4"]
    assert "gap closed, rank 256" in text and "± 90 % over 20 documents" in text


def test_several(study):
    for count, blocks in gap.sets(study).items():
        for seed in study.seeds:
            folder = study.folder / gap.adapters_on(study, blocks, seed).name
            finish(folder, base=2.0, sae=2.0 + count ** 2, adapted=2.0 + count + seed / 10)
    for block in range(5):
        finish(study.folder / gap.single(study, block).name, base=2.0, sae=2.5 + block)
    numbers = kept(study, gap.SEVERAL)
    (grows, lowers, three), text = shown(gap.SEVERAL, numbers)

    assert numbers["excess"][0] == pytest.approx(25 - (5 * 0.5 + 10)) and grows.verdict == "agrees"
    assert lowers.cases["SAEs: 3"].mean == pytest.approx(9 - 3.05)
    assert lowers.cases["SAEs: 3"].over == "2 seeds"
    assert three.cases["one - three"].mean == pytest.approx(3 - 5.05) and "8.0', '9.0" in text


def test_one_block(study):
    gains = {"all": 0.2, 1: 0.16, 2: 0.1, 3: 0.02}
    for seed in study.seeds:
        for x, training in gap.adapters_by_block(study, seed).items():
            finish(study.folder / training.name, base=2, sae=3, adapted=3 - gains[x] * (1 + seed))
    first, falls = shown(gap.ONE_BLOCK, kept(study, gap.ONE_BLOCK))[0]
    assert first.cases["first block"].mean == pytest.approx(0.8) and first.verdict == "agrees"
    assert falls.cases["first - last"].mean == pytest.approx(0.14 * 1.5)
    assert falls.cases["first - last"].over == "2 seeds"
    for training in gap.adapters_by_block(study, 0).values():       # shares of nothing
        finish(study.folder / training.name, base=2.0, sae=3.0, adapted=3.01)
    assert shown(gap.ONE_BLOCK, kept(study, gap.ONE_BLOCK))[0][0].verdict == "no interval"


def test_frontier(study):
    curves = {"topk": lambda i: (10.0 * i, 4 - 0.1 * i), "e2e": lambda i: (50.0 * i, 3.5 - 0.1 * i)}
    for model in frontier.models(study).values():
        for name, sae in frontier.saes(study, model).items():
            points = [curves[name](i) for i in range(1, 11)]
            rows = [{"percent": 10 * i, "seconds": seconds, "ce": ce}
                    for i, (seconds, ce) in enumerate(points, start=1)]
            write_json(study.folder / sae.name / "eval-tenths.json", {"layer": 2, "rows": rows})
            finish(study.folder / sae.name, base=2.0, sae=points[-1][1])
        for i, training in enumerate(frontier.adapters_of(study, model), start=1):
            finish(study.folder / training.name, base=2.0, sae=3.0, adapted=2.9 - 0.05 * i)
    numbers = kept(study, frontier.FRONTIER)
    (sooner, lower, *_, ends), text = shown(frontier.FRONTIER, numbers)

    found = numbers["fig1"]
    assert found["curves"]["topk_lora"][4]["seconds"] == 60         # the SAE's 50 and its own 10
    assert frontier.reached(found["curves"]["topk_lora"], 2.65) == 60
    assert frontier.reached(found["curves"]["topk_lora"], 2.3) is None
    last = frontier.table_of(found).rows[-1]
    assert last[0] == "100 % (e2e's last loss)" and last[-3:] == ["90.0", "-", "5.56x"]
    # 500 s / 3.05 are enough for all of TopK + LoRA, which then ends at 2.4 nats, e2e at 2.5
    assert sooner.cases["tiny-gemma-2"].mean == pytest.approx(0.1) and sooner.verdict == "agrees"
    assert lower.verdict == "agrees" and ends.verdict == "differs"
    assert "20.01x" in text and "156-213" in text

    for training in frontier.adapters_of(study, "tiny-gemma-2"):
        finish(study.folder / training.name, seconds=400, base=2.0, sae=3.0, adapted=2.4)
    sooner, *_ = shown(frontier.FRONTIER, kept(study, frontier.FRONTIER))[0]
    assert sooner.verdict == "no interval" and sooner.ours.startswith("no TopK + LoRA")

    assert tokens_of(training) == 20_000                # the paper's share, but not too few
    large = replace(study, frontier_tokens=10 ** 7, lora_tokens=10 ** 6)
    assert tokens_of(frontier.adapters_of(large, "tiny-gemma-2")[0]) == 75_000
