"""How much of the gap adapters close, over grids of runs.

    SCALING     §4.1, Figures 3 and 4: sparsity, width, layer and size of the model; rank
    SEVERAL     §4.3, Figure 6: several SAEs at once, the compound cross-entropy
    ONE_BLOCK   §6.3, Figure 9: adapters on a single block after the SAE

    python -m lorasae.paper --only fig3,fig4,fig6,fig9

Improvement is CE with SAE - CE with SAE and adapters; the gap is CE with SAE - CE of the base
model; the gap closed is improvement / gap. A part's numbers have one row for each run and rank,
{axis, x, rank, Estimates}, and the differences between runs that its claims are about.
"""
import math
from typing import NamedTuple

import torch

from lorasae.errors import InputError
from lorasae.evals.common import Estimate, interval, linearised, over_documents
from lorasae.evals.fidelity import read_sequences, summary
from lorasae.evals.report import Table, line
from lorasae.paper.results import PAPER, Part, cell, group, intervals, over_seeds
from lorasae.paper.study import adapters, around, long_sae, new_sae


# ---- What all grids share ------------------------------------------------------------------------

class Run(NamedTuple):
    """A finished run. Its tensors have a value per held-out sequence [n], in nats per token."""
    found: dict                         # tokens, seconds, and the numbers of fidelity.summary
    documents: torch.Tensor             # the document of each sequence
    sae: torch.Tensor                   # CE with SAE
    adapted: torch.Tensor               # CE with SAE and adapters; with SAE if there are none
    gap: torch.Tensor
    gap_closed: torch.Tensor            # its mean is the gap closed; NaN if there is no gap

    @property
    def improvement(self):
        return self.sae - self.adapted


def read(job, variant=""):
    """The Run of a finished training, whose gap is that of the original SAE."""
    seen = read_sequences(job.folder / variant)
    return run_of(job.found(variant), seen, seen.get("before", seen["sae"]))


def run_of(cost, seen, before):
    """A Run from what it cost, the results of fidelity.measure, and those of the original SAE."""
    documents, base, end = seen["documents"], seen["base"], seen.get("adapted", seen["sae"])
    settings = {**seen, "sae": before, "adapted": end}
    del settings["documents"]
    found = {**cost, **summary(settings, documents)}

    gap = before["ce"] - base["ce"]
    closed = part_of(before["ce"] - end["ce"], gap, documents)
    return Run(found, documents, before["ce"], end["ce"], gap, closed)


def part_of(values, whole, documents):
    """Values [n] whose mean and interval are those of mean(values) / mean(whole), to first order.

    NaN unless mean(whole) is above 0, by more than its interval if it has one.
    """
    mean, half = interval(whole, documents)
    if mean <= (half or 0):
        return whole * math.nan
    return linearised(values, whole)


def paired(values, *runs):
    """The Estimate of the mean of values [n], which were computed from runs on the same text."""
    documents = runs[0].documents
    if not all(torch.equal(documents, run.documents) for run in runs):
        raise InputError("runs did not see the same held-out text, so they cannot be compared")
    if values.isnan().any():
        return Estimate(None, None, "nothing to divide by")
    return over_documents(values, documents)


LEVELS = PAPER["levels"]                # field of results.json: (heading, format)


def row_of(run, axis, x, rank=64):
    """A run's row: its place in the grid, and Estimates of its results."""
    row = {"axis": axis, "x": x, "rank": rank}
    for name in LEVELS:
        value = run.found.get(name)                     # None: this run did not measure it
        if isinstance(value, dict):                     # a value per SAE: take the mean
            value = sum(value.values()) / len(value)
        row[name] = Estimate(value, None, "")
    row["improvement"] = paired(run.improvement, run)
    row["gap_closed"] = paired(run.gap_closed, run)
    return row


def by_x(rows, field):
    """{x: the Estimate of a field, over the seeds at that x}"""
    return {x: over_seeds([row[field] for row in own]) for x, own in group(rows, "x").items()}


def tables(numbers):
    """A Table per axis, a row per x: levels and improvement at rank 64, gap closed at each rank."""
    made = []
    for axis, rows in group(numbers["rows"], "axis").items():
        ranks = group(rows, "rank")
        columns = {heading: (by_x(ranks[64], name), form)
                   for name, (heading, form) in LEVELS.items() if rows[0][name][0] is not None}
        improvement = by_x(ranks[64], "improvement")
        columns["improvement"] = improvement, ".4f"
        for rank, own in ranks.items():
            which = f", rank {rank}" if len(ranks) > 1 else ""
            columns[f"gap closed{which}"] = by_x(own, "gap_closed"), ".1%"

        cells = []
        for x in group(rows, "x"):
            own = [cell(found[x], form) if x in found else "" for found, form in columns.values()]
            cells.append([str(x), *own])
        caption = f"Gap closed, by {axis} (nats per token; {intervals(improvement.values())})"
        made.append(Table(caption, [axis, *columns], cells))
    return made


def curve(axes, estimates, label, scale=1):
    """Draws {x: Estimate} with error bars, at evenly spaced places."""
    names = [str(x) for x in estimates]
    line(axes, names, estimates.values(), label, scale)
    axes.tick_params("x", rotation=90 if len(max(names, key=len)) > 9 else 0)


def draw_grid(numbers, figure):
    """For each axis, the improvement in nats above and the gap closed in percent below."""
    by_axis = group(numbers["rows"], "axis")
    figure.set_size_inches(12, 5.5)
    panels = figure.subplots(2, len(by_axis), sharex="col", squeeze=False)
    for (above, below), (axis, rows) in zip(panels.T, by_axis.items()):
        for rank, own in group(rows, "rank").items():
            curve(above, by_x(own, "improvement"), f"rank {rank}")
            curve(below, by_x(own, "gap_closed"), f"rank {rank}", scale=100)
        below.set_xlabel(axis)
    panels[0, 0].set_ylabel("CE improvement (nats/token)")
    panels[1, 0].set_ylabel("gap closed (%)")
    panels[0, 0].legend()


# ---- Figures 3 and 4 -----------------------------------------------------------------------------

TRENDS = {                              # gap closed along an axis -> the value claimed to be > 0
    "L0": lambda closed: closed[0] - closed[-1],
    "width": lambda closed: closed[0] - closed[-1],
    "layer": lambda closed: closed[len(closed) // 2] - (closed[0] + closed[-1]) / 2,
    "model": lambda closed: closed[-1] - closed[0],
}


class Point(NamedTuple):
    """An SAE of Figures 3 and 4."""
    axis: str
    model: str
    layer: str
    width: str                          # latents
    L0: str                             # the L0 asked for
    kind: str = "jumprelu"
    ranks: tuple = (1, 4, 16, 64, 256)

    @property
    def name(self):
        """The same on every axis that includes this SAE."""
        return f"{self.model}, block {self.layer}, {self.width} latents, {self.kind} L0 {self.L0}"


def points(study):
    return [Point(*row) for row in study.plan.grid]


def adapters_at(study, point):
    """The Job that trains a point's adapters, all ranks side by side."""
    _, model, layer, width, l0, kind, ranks = point
    name = f"scaling-{model}-layer-{layer}-{width}-l0-{l0}"
    model = study.model if model == study.name else model           # may be a folder
    if study.full:
        return adapters(study, name, model, layer=layer, width=width, l0=l0, rank=ranks)
    active = {"k" if kind == "topk" else "l0": l0}
    sae = new_sae(study, kind, model, layer=layer, width=width, **active)
    return around(study, f"{name}-{kind}", [sae], rank=ranks, adapt="after")


def measure_scaling(study):
    """Cases: each point's gap closed; its CE at the lowest rank - at the highest; each trend."""
    rows, closed, ranks, at_64 = [], {}, {}, {}
    for point in points(study):
        axis, job, at = point.axis, adapters_at(study, point), point.ranks
        runs = {rank: read(job, f"rank-{rank}" if len(at) > 1 else "") for rank in at}
        rows += [row_of(run, axis, getattr(point, axis), rank) for rank, run in runs.items()]
        closed[point.name] = paired(runs[64].gap_closed, runs[64])
        low, high = runs[min(runs)], runs[max(runs)]
        if len(runs) > 1:
            ranks[point.name] = paired(low.adapted - high.adapted, low, high)
        at_64.setdefault(axis, []).append(runs[64])

    cases = {"closed": closed, "ranks": ranks}
    for axis, runs in at_64.items():
        if axis in TRENDS:
            trend = TRENDS[axis]([run.gap_closed for run in runs])
            cases[axis] = {axis: paired(trend, *runs)}
    return {"rows": rows, "cases": cases}


SCALING = Part(
    "scaling", lambda study: [adapters_at(study, point) for point in points(study)],
    measure_scaling, draw_grid, tables)


# ---- Figure 6 ------------------------------------------------------------------------------------

def sets(study):
    """{number of SAEs: their blocks}"""
    return {len(blocks): blocks for blocks in study.plan.sets}


def single(study, block):
    """The Job that shows an SAE's cost. It trains it or, if published, adapters for one step."""
    model = study.plan.several or study.model
    if not study.full:
        return new_sae(study, "topk", model, layer=block)
    return adapters(study, f"several-single-{block}", model, layer=block, rank=1, tokens=1,
                    seed=study.seeds[0])


def adapters_on(study, blocks, seed):
    name = f"several-{'-'.join(blocks)}-seed-{seed}"
    how = {"layer": blocks, "rank": 64, "adapt": "all", "seed": seed}
    if not study.full:
        return around(study, name, [single(study, block) for block in blocks], **how)
    return adapters(study, name, study.plan.several, **how)


def jobs_of_several(study):
    chosen = sets(study)
    made = [single(study, block) for block in chosen[5]]
    for blocks in chosen.values():
        made += [adapters_on(study, blocks, seed) for seed in study.seeds]
    return made


def measure_several(study):
    """Cases: the gap of five SAEs - the sum of the gaps of each alone; the improvement for each
    number of SAEs; CE with one SAE - CE with three SAEs and adapters.
    """
    chosen, rows, three = sets(study), [], []
    for seed in study.seeds:
        runs = {count: read(adapters_on(study, blocks, seed)) for count, blocks in chosen.items()}
        rows += [row_of(run, "number of SAEs", count) for count, run in runs.items()]
        three.append(paired(runs[1].sae - runs[3].adapted, runs[1], runs[3]))

    singles = [read(single(study, block)) for block in chosen[5]]
    excess = runs[5].gap - sum(run.gap for run in singles)      # the same for every seed
    improvement = by_x(rows, "improvement")
    return {"rows": rows, "cases": {
        "excess": {"5 SAEs": paired(excess, runs[5], *singles)},
        "improvement": {f"SAEs: {count}": found for count, found in improvement.items()},
        "three": {"one - three": over_seeds(three)},
    }}


def draw_several(numbers, figure):
    """Figure 6."""
    figure.set_size_inches(6, 3.8)
    axes = figure.subplots()
    for field, label in ("ce_sae", "TopK"), ("ce_adapted", "TopK + LoRA"), ("ce_base", "no SAE"):
        curve(axes, by_x(numbers["rows"], field), label)
    axes.set(xlabel="number of SAEs", ylabel="compound CE (nats/token)")
    axes.legend()


SEVERAL = Part("several", jobs_of_several, measure_several, draw_several, tables)


# ---- Figure 9 ------------------------------------------------------------------------------------

def adapters_by_block(study, seed):
    """{"all", or a block's distance from the SAE: the Job that trains adapters there}"""
    blocks, made = study.plan.blocks, {}
    for block in ["after", *blocks]:
        name, how = f"one-block-{block}-seed-{seed}", {"rank": 64, "adapt": block, "seed": seed}
        x = "all" if block == "after" else block - blocks[0] + 1
        if study.laptop:
            made[x] = around(study, name, [long_sae(study)], **how)
        else:
            made[x] = adapters(study, name, study.model, **how)
    return made


def measure_one_block(study):
    """Cases: improvement from the first block / from all blocks; from the first - from the last."""
    rows, shares, falls = [], [], []
    for seed in study.seeds:
        runs = {x: read(job) for x, job in adapters_by_block(study, seed).items()}
        rows += [row_of(run, "blocks after the SAE", x) for x, run in runs.items()]
        whole, first, *_, last = runs.values()
        share = part_of(first.improvement, whole.improvement, whole.documents)
        shares.append(paired(share, first, whole))
        falls.append(paired(first.improvement - last.improvement, first, last))
    return {"rows": rows, "cases": {
        "share": {"first block": over_seeds(shares)},
        "falls": {"first - last": over_seeds(falls)},
    }}


ONE_BLOCK = Part(
    "one_block", lambda study: [job for seed in study.seeds
                                for job in adapters_by_block(study, seed).values()],
    measure_one_block, draw_grid, tables)
