"""How much of the gap adapters close, over grids of runs.

    SCALING     §4.1, Figures 3 and 4: sparsity, width, layer and size of the model; rank
    SEVERAL     §4.3, Figure 6: several SAEs at once, the compound cross-entropy
    ONE_BLOCK   §6.3, Figure 9: adapters on a single block after the SAE

    python -m lorasae.paper --only fig3,fig4,fig6,fig9

Improvement is CE with SAE - CE with SAE and adapters; the gap is CE with SAE - CE of the model by
itself; the gap closed is their ratio. A part's numbers hold one row for each run and rank, {axis,
x, rank, seed, Estimates}, and the differences between runs that its claims are about.
"""
import math
from typing import NamedTuple

import torch

from lorasae.errors import InputError
from lorasae.evals.common import Estimate, interval, linearised, over_documents
from lorasae.evals.report import Table, lines
from lorasae.io.models import load_config
from lorasae.io.presets import PRESETS
from lorasae.paper.results import Claim, Part, cell, group, intervals, over_seeds, where
from lorasae.paper.study import adapters, budget, new_sae, results, sequences


# ---- What all grids share ------------------------------------------------------------------------

class Run(NamedTuple):
    """What a finished run found: of every held-out sequence [n], in nats per token."""
    found: dict                         # results.json
    documents: torch.Tensor             # the document of each
    sae: torch.Tensor                   # CE with SAE
    adapted: torch.Tensor               # CE with SAE and adapters; without adapters, with SAE
    gap: torch.Tensor
    gap_closed: torch.Tensor            # its mean is the gap closed; NaN if there is no gap

    @property
    def improvement(self):
        return self.sae - self.adapted


def read(study, training, variant=None):
    """The Run of a finished Training."""
    seen = sequences(study, training, variant)
    documents, sae = seen["documents"], seen["sae"]["ce"]
    adapted = seen.get("adapted", seen["sae"])["ce"]
    gap = sae - seen["base"]["ce"]
    closed = part_of(sae - adapted, gap, documents)
    return Run(results(study, training, variant), documents, sae, adapted, gap, closed)


def part_of(values, whole, documents):
    """Values [n] with the mean of mean(values) / mean(whole), and its interval to first order.

    NaN unless the mean of the whole lies above 0, by more than its interval if it has one.
    """
    mean, half = interval(whole, documents)
    if mean <= 0 or (half is not None and mean <= half):
        return whole * math.nan
    return linearised(values, whole)


def paired(values, *runs):
    """The Estimate of the mean of values [n] that were made from runs on the same text."""
    documents = runs[0].documents
    if not all(torch.equal(documents, run.documents) for run in runs):
        raise InputError("runs did not see the same held-out text, so they cannot be compared")
    if values.isnan().any():
        return Estimate(None, None, "nothing to divide by")
    return over_documents(values, documents)


def row_of(run, **place):
    """A run's row: its place in the grid, and Estimates of what it found."""
    levels = {name: run.found[name] for name in ("ce_base", "ce_sae", "ce_adapted")}
    for name in ("l0_sae", "l0"):                       # the mean of its SAEs
        levels[name] = sum(run.found[name].values()) / len(run.found[name])
    return {
        **place,
        **{name: Estimate(value, None, "held-out text") for name, value in levels.items()},
        "improvement": paired(run.improvement, run),
        "gap_closed": paired(run.gap_closed, run),
    }


def by_x(rows, field):
    """{x: the Estimate of a field, over the seeds there}"""
    return {x: over_seeds([row[field] for row in own]) for x, own in group(rows, "x").items()}


COLUMNS = {                             # of a table: heading, its field and how it is shown
    "CE base": ("ce_base", ".4f"),
    "CE with SAE": ("ce_sae", ".4f"),
    "measured L0": ("l0_sae", ".1f"),
    "L0, adapted": ("l0", ".1f"),
    "improvement": ("improvement", ".4f"),
}


def table(rows, first):
    """A Table with a row for each x, whose heading is `first`: levels at rank 64, then the gap
    closed at each rank.
    """
    ranks = group(rows, "rank")
    columns = [(by_x(ranks[64], field), form) for field, form in COLUMNS.values()]
    spread = intervals(columns[-1][0].values())         # of the improvement
    columns += [(by_x(own, "gap_closed"), ".1%") for own in ranks.values()]
    made = [[str(x), *(cell(column[x], form) for column, form in columns)]
            for x in group(rows, "x")]
    headings = [first, *COLUMNS, *(f"gap closed, rank {rank}" for rank in ranks)]
    return Table(f"Gap closed over {first} (nats per token; {spread})", headings, made)


def curve(axes, estimates, label, scale=1):
    """Draws {x: Estimate} with its intervals, at evenly spaced places."""
    places = range(len(estimates))
    lines(axes, places, {label: estimates.values()}, scale)
    names = [str(x).removeprefix("tiny-gemma-2-") for x in estimates]
    axes.set_xticks(places, names, fontsize=8)


# ---- Figures 3 and 4 -----------------------------------------------------------------------------

RANKS = (1, 4, 16, 64, 256)

SMALL = """
    L0      tiny-gemma-2            2   1024    4
    L0      tiny-gemma-2            2   1024    8
    L0      tiny-gemma-2            2   1024    16
    L0      tiny-gemma-2            2   1024    32
    width   tiny-gemma-2            2   256     8
    width   tiny-gemma-2            2   512     8
    width   tiny-gemma-2            2   1024    8
    width   tiny-gemma-2            2   2048    8
    layer   tiny-gemma-2            0   1024    8
    layer   tiny-gemma-2            1   1024    8
    layer   tiny-gemma-2            2   1024    8
    layer   tiny-gemma-2            3   1024    8
    layer   tiny-gemma-2            4   1024    8
    model   tiny-gemma-2-small      1   1024    8
    model   tiny-gemma-2-medium     1   1024    8
    model   tiny-gemma-2            2   1024    8
"""

# As in the published scaling.py, whose models have SAEs of 131k latents
PUBLISHED = """
    L0      gemma-2-2b      12  16k     22
    L0      gemma-2-2b      12  16k     41
    L0      gemma-2-2b      12  16k     82
    L0      gemma-2-2b      12  16k     176
    L0      gemma-2-2b      12  16k     445
    width   gemma-2-2b      12  16k     82
    width   gemma-2-2b      12  32k     76
    width   gemma-2-2b      12  65k     72
    width   gemma-2-2b      12  131k    67
    width   gemma-2-2b      12  262k    67
    width   gemma-2-2b      12  524k    65
    layer   gemma-2-2b      6   16k     70
    layer   gemma-2-2b      9   16k     73
    layer   gemma-2-2b      12  16k     82
    layer   gemma-2-2b      15  16k     78
    layer   gemma-2-2b      18  16k     74
    model   gemma-2-2b      12  131k    67
    model   gemma-2-9b      20  131k    62
    model   gemma-2-27b     22  131k    82
"""


class Trend(NamedTuple):
    """A claim about an axis: a weighted sum of gaps closed at some points is positive."""
    weights: dict                       # {place on the axis: weight}
    figure: str
    says: str
    paper: str


TRENDS = {
    "L0": Trend({0: 1, -1: -1}, "Fig. 3", "More of the gap is closed at the lowest L0 than at the "
                "highest", "falls from L0 22 to 445"),
    "width": Trend({0: 1, -1: -1}, "Fig. 3", "More is closed at the smallest width than at the "
                   "largest", "falls a little from 16k to 524k latents"),
    "layer": Trend({2: 1, 0: -0.5, -1: -0.5}, "Fig. 3", "More is closed at the middle layer than "
                   "at the two ends", "most at layer 9, of 6 to 18; mostly unaffected"),
    "model": Trend({-1: 1, 0: -1}, "Fig. 4", "More is closed on the largest model than on the "
                   "smallest", "rises from 2B over 9B to 27B parameters"),
}


class Point(NamedTuple):
    """An SAE of Figures 3 and 4."""
    axis: str
    model: str
    layer: str
    width: str                          # latents
    L0: str                             # as asked for

    @property
    def name(self):
        """The same on every axis that it lies on."""
        return f"{self.model}, block {self.layer}, {self.width} latents, L0 {self.L0}"


def points(study):
    grid = SMALL if study.miniature else PUBLISHED
    return [Point(*line.split()) for line in grid.strip().splitlines()]


def adapters_at(study, point):
    """The Training of a point's adapters, all ranks side by side."""
    _, model, layer, width, l0 = point
    name = f"scaling-{model}-layer-{layer}-{width}-l0-{l0}"
    if study.miniature:
        sae = new_sae(study, "jumprelu", model, layer, width=width, l0=l0)
        return adapters(study, name, model, [sae], rank=RANKS, adapt="after")
    return adapters(study, name, model, [], layer=layer, width=width, l0=l0, rank=RANKS)


def trainings_of_scaling(study):
    return [adapters_at(study, point) for point in points(study)]


def about_scaling(study):
    saes = "an SAE of Gemma Scope"
    if study.miniature:
        saes = (f"a JumpReLU SAE trained here, on {study.sae_tokens:,} tokens, for the L0 on the "
                "axis; the tables have the measured one")
    return (
        "CE improvement is CE with SAE - CE with SAE and adapters, in nats per token; the gap "
        "closed is its ratio to the gap, CE with SAE - CE of the model by itself. Each point is "
        f"{saes}. "
        "Adapters are on the blocks after the SAE, all ranks side by side in one pass. "
        f"{budget(study, trainings_of_scaling(study)[0], '15M')} alpha is 32 at every rank, as in "
        "the paper, so the step size changes with the rank. All points see the same held-out text "
        "and are compared sequence by sequence.")


def measure_scaling(study):
    """{rows; ranks: {point: CE at rank 1 - CE at rank 256}; trends: {axis: its weighted sum}}"""
    rows, ranks, at_64 = [], {}, {}
    for point in points(study):
        runs = [read(study, adapters_at(study, point), f"rank-{rank}") for rank in RANKS]
        least, *_, most = runs
        ranks[point.name] = paired(least.adapted - most.adapted, least, most)
        at_64.setdefault(point.axis, []).append(runs[RANKS.index(64)])
        for rank, run in zip(RANKS, runs):
            place = {"axis": point.axis, "x": getattr(point, point.axis), "point": point.name}
            rows.append(row_of(run, **place, rank=rank, seed=None))

    trends = {}
    for axis, runs in at_64.items():
        weights = TRENDS[axis].weights
        total = sum(weight * runs[i].gap_closed for i, weight in weights.items())
        trends[axis] = paired(total, *runs)
    return {"rows": rows, "ranks": ranks, "trends": trends}


def claims_of_scaling(numbers):
    closed = {row["point"]: row["gap_closed"] for row in where(numbers["rows"], rank=64)}
    made = [
        Claim("Fig. 3", "At least 30 % of the gap is closed, at every point (rank 64)",
              "30 to 55 %", closed, threshold=0.3, paper_values=(0.3, 0.55), form=".1%",
              unit="of the gap"),
        Claim("Fig. 3", "Rank 256 ends lower than rank 1, at every point",
              "larger ranks reliably lower the loss", numbers["ranks"], form="+.4f"),
    ]
    for axis, (_, figure, says, paper) in TRENDS.items():
        made.append(Claim(figure, says, paper, {axis: numbers["trends"][axis]}, form="+.1%",
                          unit="of the gap"))
    return made


def draw_scaling(numbers, figure):
    """Figures 3 and 4: improvement in nats above, gap closed in percent below."""
    by_axis = group(numbers["rows"], "axis")
    figure.set_size_inches(12, 5.5)
    panels = figure.subplots(2, len(by_axis), sharex="col", squeeze=False)
    for (above, below), (axis, rows) in zip(panels.T, by_axis.items()):
        for rank, own in group(rows, "rank").items():
            curve(above, by_x(own, "improvement"), f"rank {rank}")
            curve(below, by_x(own, "gap_closed"), f"rank {rank}", scale=100)
        below.set_xlabel(axis)
    panels[0, 0].set_ylabel("CE improvement (nats/token)")
    panels[1, 0].set_ylabel("of the gap (%)")
    panels[0, 0].legend(fontsize=8)


SCALING = Part(
    name="scaling",
    title="Scaling laws for the downstream loss",
    figures=("fig3", "fig4"),
    about=about_scaling,
    trainings=trainings_of_scaling,
    measure=measure_scaling,
    tables=lambda numbers: [table(rows, axis)
                            for axis, rows in group(numbers["rows"], "axis").items()],
    claims=claims_of_scaling,
    draw=draw_scaling,
    caption="Error bars: 90 %, over held-out documents.",
)


# ---- Figure 6 ------------------------------------------------------------------------------------

MINIATURE = ("2", "1 3", "0 2 4", "0 1 3 4", "0 1 2 3 4")       # blocks that have an SAE
REAL = ("16", "10 20 30", "6 12 18 24 30", "4 8 12 16 20 24 28", "3 6 9 12 15 18 21 24 27 30",
        "2 4 6 8 10 12 14 16 18 20 22 24 26 28 30")


def sets(study):
    """{number of SAEs: their blocks}"""
    chosen = [blocks.split() for blocks in (MINIATURE if study.miniature else REAL)]
    return {len(blocks): blocks for blocks in chosen}


def single(study, block):
    """The Training whose run tells what one SAE costs by itself.

    It is the SAE's own, or one step of adapters around an SAE that exists already.
    """
    model = study.models.several
    if study.miniature:
        return new_sae(study, "topk", model, block)
    return adapters(study, f"several-single-{block}", model, [], layer=block, rank=1, tokens=1)


def adapters_on(study, blocks, seed):
    saes = [single(study, block) for block in blocks if study.miniature]    # else Llama Scope's
    return adapters(study, f"several-{'-'.join(blocks)}-seed-{seed}", study.models.several, saes,
                    layer=blocks, rank=64, adapt="all", seed=seed)


def trainings_of_several(study):
    chosen = sets(study)
    made = [single(study, block) for block in chosen[5]]
    for blocks in chosen.values():
        made += [adapters_on(study, blocks, seed) for seed in study.seeds]
    return made


def about_several(study):
    blocks = "; ".join(", ".join(chosen) for chosen in sets(study).values())
    return (
        "Compound cross-entropy (Lai & Heimersheim 2024) is CE of the model with all SAEs "
        "inserted. The SAEs are TopK (Llama Scope's were trained as such, and act by a threshold), "
        "adapters are on all blocks, and all SAEs are inserted during training, at blocks far from "
        f"each other: {blocks}. {budget(study, trainings_of_several(study)[-1], '15M')} The "
        "published code hooks the SAE of block i at block i + 1, which inflates the paper's losses "
        "without adapters; here it acts at block i.")


def measure_several(study):
    """{rows; excess: gap of five SAEs - the gaps of each by itself; three: CE with one SAE - CE
    with three SAEs and adapters}
    """
    chosen, rows, three = sets(study), [], []
    for seed in study.seeds:
        runs = {count: read(study, adapters_on(study, blocks, seed))
                for count, blocks in chosen.items()}
        rows += [row_of(run, axis="SAEs", x=count, rank=64, seed=seed)
                 for count, run in runs.items()]
        three.append(paired(runs[1].sae - runs[3].adapted, runs[1], runs[3]))

    singles = [read(study, single(study, block)) for block in chosen[5]]
    excess = runs[5].gap - sum(run.gap for run in singles)      # of any seed: without adapters
    return {"rows": rows, "three": over_seeds(three), "excess": paired(excess, runs[5], *singles)}


def claims_of_several(numbers):
    improvement = by_x(numbers["rows"], "improvement")
    return [
        Claim("Fig. 6", "Five SAEs at once cost more than each by itself, added up",
              "the loss grows extremely rapidly, to almost 10 nats with 5 SAEs",
              {"5 SAEs": numbers["excess"]}),
        Claim("Fig. 6", "Adapting lowers the compound loss, at every number of SAEs",
              "3 SAEs: 3.55 → 2.45 nats; 7 SAEs: 7.83 → 2.78",
              {f"SAEs: {count}": found for count, found in improvement.items()},
              paper_values=(1.10, 5.05)),
        Claim("Fig. 6", "Three SAEs with adapters cost less than one without",
              "2.45 nats with three, less than with one", {"one - three": numbers["three"]}),
    ]


def draw_several(numbers, figure):
    """Figure 6."""
    figure.set_size_inches(6, 3.8)
    axes = figure.subplots()
    for field, label in ("ce_sae", "TopK"), ("ce_adapted", "TopK + LoRA"), ("ce_base", "no SAE"):
        curve(axes, by_x(numbers["rows"], field), label)
    axes.set(xlabel="number of SAEs", ylabel="compound CE (nats/token)")
    axes.legend()


SEVERAL = Part(
    name="several",
    title="Adapting to several SAEs at once",
    figures=("fig6",),
    about=about_several,
    trainings=trainings_of_several,
    measure=measure_several,
    tables=lambda numbers: [table(numbers["rows"], "number of SAEs")],
    claims=claims_of_several,
    draw=draw_several,
    caption="Error bars: 90 %, over seeds; of one seed there are none.",
)


# ---- Figure 9 ------------------------------------------------------------------------------------

def adapters_by_block(study, seed):
    """{"all", or how far a block is after the SAE: the Training of adapters there}"""
    model = study.models.main
    layer, depth = PRESETS[model].layer, load_config(model, offline=True).num_hidden_layers
    blocks = {"all": "after", **{block - layer: block for block in range(layer + 1, depth)}}
    return {x: adapters(study, f"one-block-{block}-seed-{seed}", model, [], rank=64, adapt=block,
                        seed=seed) for x, block in blocks.items()}


def trainings_of_one_block(study):
    made = []
    for seed in study.seeds:
        made += adapters_by_block(study, seed).values()
    return made


def about_one_block(study):
    return (
        "CE improvement of adapters (rank 64) on only one block after the preset's JumpReLU SAE, "
        "or on all blocks after it. Each is a training of its own, with the same tokens and rate. "
        f"{budget(study, trainings_of_one_block(study)[0], '15M')}")


def measure_one_block(study):
    """{rows; share: the first block's improvement as a part of that by all; falls: improvement by
    the first block - by the last}
    """
    rows, shares, falls = [], [], []
    for seed in study.seeds:
        runs = {x: read(study, each) for x, each in adapters_by_block(study, seed).items()}
        rows += [row_of(run, axis="blocks after the SAE", x=x, rank=64, seed=seed)
                 for x, run in runs.items()]
        whole, first, *_, last = runs.values()
        share = part_of(first.improvement, whole.improvement, whole.documents)
        shares.append(paired(share, first, whole))
        falls.append(paired(first.improvement - last.improvement, first, last))
    return {"rows": rows, "share": over_seeds(shares), "falls": over_seeds(falls)}


def claims_of_one_block(numbers):
    return [
        Claim("Fig. 9", "The first block after the SAE does most of what all blocks after it do",
              "88 %", {"first block": numbers["share"]}, threshold=0.5, paper_values=(0.8814,),
              form=".1%", unit="of the improvement"),
        Claim("Fig. 9", "The first block after the SAE improves more than the last",
              "falls with the distance from the SAE", {"first - last": numbers["falls"]},
              form="+.4f"),
    ]


def draw_one_block(numbers, figure):
    """Figure 9."""
    found = by_x(numbers["rows"], "improvement")
    whole = found.pop("all")
    figure.set_size_inches(6, 3.6)
    axes = figure.subplots()
    curve(axes, found, "one block")
    axes.axhline(whole.mean, linestyle="--", color="C1", label="all blocks after the SAE")
    axes.set(xlabel="blocks after the SAE", ylabel="CE improvement (nats/token)")
    axes.legend()


ONE_BLOCK = Part(
    name="one_block",
    title="Adapters on a single block",
    figures=("fig9",),
    about=about_one_block,
    trainings=trainings_of_one_block,
    measure=measure_one_block,
    tables=lambda numbers: [table(numbers["rows"], "blocks after the SAE")],
    claims=claims_of_one_block,
    draw=draw_one_block,
    caption="Error bars: 90 %, over seeds (of one seed, over documents).",
)
