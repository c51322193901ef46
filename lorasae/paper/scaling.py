"""How much of the gap adapters close, over sparsity, width, layer, rank and the size of the model (§4.1, Figures 3 and 4)."""
import math
from pathlib import Path
from typing import NamedTuple

from lorasae.evals.common import percent
from lorasae.paper.findings import Claim, Table
from lorasae.paper.study import adapters, new_sae, results

TITLE = "Scaling laws for the downstream loss"
FIGURES = ("fig3", "fig4")
ABOUT = ("CE improvement = CE with SAE - CE with SAE and adapters, in nats a token; in percent of the gap, CE with SAE - "
         "CE of the model alone. One JumpReLU SAE for each point, adapters on the blocks after it, all ranks side by side "
         "in one pass. In miniature the SAEs are trained here for the asked L0; their measured one is on the axis. alpha "
         "is 32 at every rank, as in the paper, so a rank's step size changes with it. One seed; intervals are over "
         "held-out sequences, and a difference within them is not called one.")

RANKS = (1, 4, 16, 64, 256)
MAIN_RANK = 64                                          # whose figures the claims are about
AXES = {"l0": "sparsity (L0)", "width": "width (latents)", "layer": "layer", "size": "parameters"}


class Point(NamedTuple):
    """An SAE of Figures 3 and 4."""
    model: str
    layer: int
    width: str | int
    l0: int


def points(study):
    """{axis: [Point]}: the grid of the published code (scaling.py; its size axis has SAEs of 131k latents), or a small one."""
    if study.miniature:
        small, medium, model = study.models.sizes
        return {"l0": [Point(model, 2, 1024, l0) for l0 in (4, 8, 16, 32)],
                "width": [Point(model, 2, width, 8) for width in (256, 512, 1024, 2048)],
                "layer": [Point(model, layer, 1024, 8) for layer in range(5)],
                "size": [Point(small, 1, 1024, 8), Point(medium, 1, 1024, 8), Point(model, 2, 1024, 8)]}
    model = study.models.main
    widths = {"16k": 82, "32k": 76, "65k": 72, "131k": 67, "262k": 67, "524k": 65}
    layers = {6: 70, 9: 73, 12: 82, 15: 78, 18: 74}
    return {"l0": [Point(model, 12, "16k", l0) for l0 in (22, 41, 82, 176, 445)],
            "width": [Point(model, 12, width, l0) for width, l0 in widths.items()],
            "layer": [Point(model, layer, "16k", l0) for layer, l0 in layers.items()],
            "size": [Point("gemma-2-2b", 12, "131k", 67), Point("gemma-2-9b", 20, "131k", 62),
                     Point("gemma-2-27b", 22, "131k", 82)]}


def sae_of(study, point):
    """The Training of a point's SAE, in miniature; Gemma Scope has the others."""
    return new_sae(study, "jumprelu", point.model, point.layer, width=point.width, l0=point.l0)


def adapters_of(study, point):
    name = f"scaling-{point.model}-layer-{point.layer}-{point.width}-l0-{point.l0}"
    if study.miniature:
        return adapters(study, name, point.model, [sae_of(study, point)], rank=RANKS, adapt=("after",))
    return adapters(study, name, point.model, [], layer=(point.layer,), width=point.width, l0=point.l0, rank=RANKS)


def trainings(study):
    needed = {}
    for chosen in points(study).values():
        for point in chosen:
            pair = [sae_of(study, point)] if study.miniature else []
            needed |= {training.name: training for training in (*pair, adapters_of(study, point))}
    return list(needed.values())


def measure(study):
    """{axis: [{model, layer, width, l0 (measured), parameters, ce_base, ce_sae, ranks: {rank: {improvement, gap_closed, ...}}}]}"""
    numbers = {"ranks": list(RANKS)}
    for axis, chosen in points(study).items():
        numbers[axis] = [measured(study, point) for point in chosen]
    return numbers


def measured(study, point):
    training = adapters_of(study, point)
    ranks = {}
    for rank in RANKS:
        found = results(study, training, f"rank-{rank}")
        ranks[str(rank)] = {"improvement": found["ce_sae"] - found["ce_adapted"], "gap_closed": found["gap_closed"],
                            "kl_gap_closed": found["kl_gap_closed"], "ci90": found["ci90"]["gap_closed"]}
    return {**point._asdict(), "l0": found["l0"][str(point.layer)], "ce_base": found["ce_base"], "ce_sae": found["ce_sae"],
            "train_tokens": found["train_tokens"], "ranks": ranks}


# ---- What it comes to --------------------------------------------------------------------------------------------------

def place(axis, row):
    """A point's place on its axis."""
    return Path(row["model"]).name if axis == "size" else row[axis]


def tables(numbers):
    made = []
    for axis, label in AXES.items():
        rows = []
        for row in numbers[axis]:
            where = place(axis, row)
            cells = [f"{where:.1f}" if axis == "l0" else str(where), row["ce_base"], row["ce_sae"]]
            rows.append(cells + [closed(row["ranks"][str(rank)]) for rank in numbers["ranks"]])
        headings = ["model" if axis == "size" else label, "CE base", "CE with SAE", *(f"rank {rank}" for rank in numbers["ranks"])]
        made.append(Table(f"Gap closed over {'model size' if axis == 'size' else label} (± 90 % over held-out sequences)",
                          headings, rows))
    return made


def closed(found):
    if found["gap_closed"] is None:
        return "no gap"
    return f"{percent(found['gap_closed'])} ± {percent(found['ci90'])}"


def claims(numbers):
    rows = [row for axis in AXES for row in numbers[axis]]
    everything = [share(row) for row in rows]
    if None in everything:
        return [Claim("At least 30 % and up to 55 % of the gap is closed, at every point", "30 to 55 %", "no gap at some points", None)]
    low, high = min(everything), max(everything)

    larger = 0
    for row in rows:
        gains = [row["ranks"][str(rank)]["improvement"] for rank in numbers["ranks"]]
        larger += all(more > less for less, more in zip(gains, gains[1:]))

    sparsity, width, layer, size = (numbers[axis] for axis in AXES)
    best = max(layer, key=share)
    ends = share(layer[0]), share(layer[-1])
    return [
        Claim(f"At least 30 % and up to 55 % of the gap is closed, at every point (rank {MAIN_RANK})", "30 to 55 %", f"{low:.0%} to {high:.0%}",
              low > 0, low >= 0.3 and high <= 0.6, why="" if low >= 0.3 else "a fraction of the paper's training"),
        Claim("Larger ranks reliably close more", "at every point", f"every larger rank at {larger} of {len(rows)} points", larger == len(rows)),
        Claim("The effect in percent is largest at low sparsity", "falls from L0 22 to 445", between(sparsity, "L0 {l0:.0f}"),
              ahead(sparsity[0], sparsity[-1])),
        Claim("... and at low width", "falls from 16k to 524k, a little", between(width, "{width} latents"), ahead(width[0], width[-1])),
        Claim("Middle layers gain most, though mostly unaffected by layer", "layer 9 of 26, of 6 to 18",
              f"layer {best['layer']} of 0 to {layer[-1]['layer']}: {share(best):.0%}, ends {ends[0]:.0%} and {ends[1]:.0%}",
              best not in (layer[0], layer[-1])),
        Claim("It works increasingly well on larger models", "rises from 2B to 27B", " → ".join(f"{share(row):.0%}" for row in size),
              ahead(size[-1], size[0])),
    ]


def share(row):
    """The part of the gap closed at a point, by the rank that the claims are about; None where there is no gap."""
    return row["ranks"][str(MAIN_RANK)]["gap_closed"]


def ahead(first, second):
    """Whether more is closed at one point than at another; None where the difference is within its 90 % interval."""
    difference = share(first) - share(second)
    half = math.hypot(*(row["ranks"][str(MAIN_RANK)]["ci90"] or 0 for row in (first, second)))
    return None if abs(difference) <= half else difference > 0


def between(rows, form):
    """The first and last value of an axis, and where they are."""
    return " → ".join(f"{share(row):.0%} at {form.format(**row)}" for row in (rows[0], rows[-1]))


def draw(numbers, figure):
    """Figures 3 and 4: improvement in nats above, in percent of the gap below."""
    figure.set_size_inches(12, 5.5)
    panels = figure.subplots(2, len(AXES), sharex="col")
    for column, (axis, label) in enumerate(AXES.items()):
        rows = numbers[axis]
        where = [place(axis, row) for row in rows]
        ticks = list(range(len(rows)))
        for rank in numbers["ranks"]:
            found = [row["ranks"][str(rank)] for row in rows]
            panels[0, column].plot(ticks, [each["improvement"] for each in found], marker="o", label=f"rank {rank}")
            panels[1, column].errorbar(ticks, [100 * (each["gap_closed"] or 0) for each in found],
                                       [100 * (each["ci90"] or 0) for each in found], marker="o", capsize=3)
        shown = [f"{x:.1f}" if axis == "l0" else str(x).removeprefix("tiny-gemma-2-") for x in where]
        panels[1, column].set_xticks(ticks, shown, fontsize=8)
        panels[1, column].set_xlabel("model" if axis == "size" else label)
    panels[0, 0].set_ylabel("CE improvement (nats/token)")
    panels[1, 0].set_ylabel("of the gap (%)")
    panels[0, 0].legend(fontsize=8)
