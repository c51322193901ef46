"""How much of the gap adapters close, over sparsity, width, layer, rank and model size (§4.1, Figures 3 and 4)."""
import math
from pathlib import Path
from typing import NamedTuple

from lorasae.evals.common import error_bar, without_interval
from lorasae.paper.findings import Claim, Table, rising, unless_said, written
from lorasae.paper.study import adapters, new_sae, results

TITLE = "Scaling laws for the downstream loss"
FIGURES = ("fig3", "fig4")
ABOUT = (
    "CE improvement = CE with SAE - CE with SAE and adapters, in nats per token; in percent of the "
    "gap, CE with SAE - CE of the model alone. Each point is one JumpReLU SAE, with adapters on "
    "the blocks after it, all ranks side by side in one pass. In miniature the SAEs are trained "
    "here for the requested L0; the axis shows the measured one. alpha is 32 at every rank, as in "
    "the paper, so a rank's step size changes with it. One seed; intervals are over held-out "
    "documents, and a difference within them is not called one.")

RANKS = (1, 4, 16, 64, 256)
MAIN_RANK = 64                                          # whose figures the claims are about
AXES = {"l0": "sparsity (L0)", "width": "width (latents)", "layer": "layer", "size": "parameters"}


class Point(NamedTuple):
    """An SAE of Figures 3 and 4."""
    model: str
    layer: int
    width: str | int                                    # latents: Gemma Scope's name such as "16k", or their number
    l0: int                                             # the asked one


def points(study):
    """{axis: [Point]}: the grid of the published code, or a small one."""
    if study.miniature:
        return small_grid(study.models.sizes)
    return published_grid(study.models.main)


def small_grid(models):
    small, medium, model = models
    return {
        "l0": [Point(model, 2, 1024, l0) for l0 in (4, 8, 16, 32)],
        "width": [Point(model, 2, width, 8) for width in (256, 512, 1024, 2048)],
        "layer": [Point(model, layer, 1024, 8) for layer in range(5)],
        "size": [
            Point(small, 1, 1024, 8),
            Point(medium, 1, 1024, 8),
            Point(model, 2, 1024, 8),
        ],
    }


def published_grid(model):
    """As in the published scaling.py, whose size axis has SAEs of 131k latents."""
    l0_of_width = {"16k": 82, "32k": 76, "65k": 72, "131k": 67, "262k": 67, "524k": 65}
    l0_of_layer = {6: 70, 9: 73, 12: 82, 15: 78, 18: 74}
    return {
        "l0": [Point(model, 12, "16k", l0) for l0 in (22, 41, 82, 176, 445)],
        "width": [Point(model, 12, width, l0) for width, l0 in l0_of_width.items()],
        "layer": [Point(model, layer, "16k", l0) for layer, l0 in l0_of_layer.items()],
        "size": [
            Point("gemma-2-2b", 12, "131k", 67),
            Point("gemma-2-9b", 20, "131k", 62),
            Point("gemma-2-27b", 22, "131k", 82),
        ],
    }


def sae_of(study, point):
    """The Training of a point's SAE, in miniature; Gemma Scope has the others."""
    return new_sae(study, "jumprelu", point.model, point.layer, width=point.width, l0=point.l0)


def adapters_of(study, point):
    """The Training of a point's adapters, all ranks side by side."""
    name = f"scaling-{point.model}-layer-{point.layer}-{point.width}-l0-{point.l0}"
    if study.miniature:
        return adapters(study, name, point.model, [sae_of(study, point)], rank=RANKS, adapt=("after",))
    return adapters(study, name, point.model, [], layer=(point.layer,), width=point.width, l0=point.l0, rank=RANKS)


def trainings(study):
    needed = {}                                         # by name: axes cross in a point
    for chosen in points(study).values():
        for point in chosen:
            if study.miniature:
                sae = sae_of(study, point)
                needed[sae.name] = sae
            training = adapters_of(study, point)
            needed[training.name] = training
    return list(needed.values())


def measure(study):
    """{"ranks": [rank], and of each axis [a point's `measured`]}"""
    numbers = {"ranks": list(RANKS)}
    for axis, chosen in points(study).items():
        numbers[axis] = [measured(study, point) for point in chosen]
    return numbers


def measured(study, point):
    """{model, layer, width, l0, ce_base, ce_sae, documents, train_tokens;
    ranks: {rank: {improvement, gap_closed, kl_gap_closed, ci90}}}

    l0 is the measured one. CE and improvement are in nats per token, the parts of the gap that are
    closed are of 1. ci90 is half of the 90 % interval of gap_closed, over documents; None if they
    are too few.
    """
    training = adapters_of(study, point)
    ranks = {}
    for rank in RANKS:
        found = results(study, training, f"rank-{rank}")
        ranks[str(rank)] = {
            "improvement": found["ce_sae"] - found["ce_adapted"],
            "gap_closed": found["gap_closed"],
            "kl_gap_closed": found["kl_gap_closed"],
            "ci90": found["ci90"]["gap_closed"],
        }
    return {
        **point._asdict(),
        "l0": found["l0"][str(point.layer)],           # without adapters, so the same of every rank
        "ce_base": found["ce_base"],
        "ce_sae": found["ce_sae"],
        "documents": found["documents"],
        "train_tokens": found["train_tokens"],
        "ranks": ranks,
    }


# ---- What it comes to ----------------------------------------------------------------------------

def place(axis, row):
    """A point's place on its axis, as text."""
    if axis == "size":
        return Path(row["model"]).name
    return f"{row['l0']:.1f}" if axis == "l0" else str(row[axis])


def of_rank(row, rank):
    """What was measured of a point at a rank."""
    return row["ranks"][str(rank)]


def tables(numbers):
    ranks = numbers["ranks"]
    made = []
    for axis, label in AXES.items():
        rows = []
        for row in numbers[axis]:
            shares = [closed(of_rank(row, rank)) for rank in ranks]
            rows.append([place(axis, row), row["ce_base"], row["ce_sae"], *shares])

        first, over = ("model", "model size") if axis == "size" else (label, label)
        headings = [first, "CE base", "CE with SAE", *(f"rank {rank}" for rank in ranks)]
        made.append(Table(f"Gap closed over {over} ({intervals(numbers[axis])})", headings, rows))
    return made


def intervals(rows):
    """What the intervals of points are over, or that some have none, in words."""
    few = [row["documents"] for row in rows if has_no_interval(row)]
    return without_interval(min(few)) if few else "± 90 % over documents"


def has_no_interval(row):
    """Whether a part of a gap was closed at a point whose text has too few documents."""
    found = row["ranks"].values()
    return any(each["gap_closed"] is not None and each["ci90"] is None for each in found)


def closed(found):
    """The part of the gap that was closed, as text."""
    if found["gap_closed"] is None:
        return "no gap"
    return written(found["gap_closed"], found["ci90"], ".1%")


def claims(numbers):
    rows = distinct(numbers)
    shares = [share(row) for row in rows]
    if None in shares:
        return [Claim("At least 30 % and up to 55 % of the gap is closed, at every point",
                      "30 to 55 %",
                      "no gap at some points",
                      direction=None)]

    return [
        everywhere(shares),
        larger_ranks(rows, numbers["ranks"]),
        *sparsity_and_width(numbers["l0"], numbers["width"]),
        middle_layers(numbers["layer"]),
        larger_models(numbers["size"]),
    ]


def distinct(numbers):
    """The points of all axes, those where axes cross once."""
    found = {}
    for axis in AXES:
        for row in numbers[axis]:
            found[row["model"], row["layer"], row["width"], row["l0"]] = row
    return list(found.values())


def everywhere(shares):
    low, high = min(shares), max(shares)
    return Claim(f"At least 30 % and up to 55 % of the gap is closed, at every point (rank {MAIN_RANK})",
                 "30 to 55 %",
                 f"{low:.0%} to {high:.0%}",
                 direction=low > 0,
                 size=low >= 0.3 and high <= 0.6,
                 why_in_miniature="" if low >= 0.3 else "a fraction of the paper's training")


def larger_ranks(rows, ranks):
    agree = 0
    for row in rows:
        agree += rising([of_rank(row, rank)["improvement"] for rank in ranks])
    return Claim("Larger ranks reliably close more",
                 "at every point",
                 f"every larger rank at {agree} of {len(rows)} points",
                 direction=agree == len(rows))


def sparsity_and_width(sparsity, width):
    by_sparsity = ahead(sparsity[0], sparsity[-1])
    by_width = ahead(width[0], width[-1])
    return [
        Claim("The effect in percent is largest at low sparsity",
              "falls from L0 22 to 445",
              between(sparsity, "L0 {l0:.0f}"),
              direction=by_sparsity,
              why=why(by_sparsity, sparsity)),
        Claim("... and at low width",
              "falls from 16k to 524k, a little",
              between(width, "{width} latents"),
              direction=by_width,
              why=why(by_width, width)),
    ]


def middle_layers(rows):
    first, last = rows[0], rows[-1]
    best = max(rows, key=share)
    ends = f"ends {share(first):.0%} and {share(last):.0%}"
    return Claim("Middle layers gain most, though mostly unaffected by layer",
                 "layer 9 of 26, of 6 to 18",
                 f"layer {best['layer']} of {first['layer']} to {last['layer']}: {share(best):.0%}, {ends}",
                 direction=best not in (first, last))


def larger_models(rows):
    better = ahead(rows[-1], rows[0])
    return Claim("It works increasingly well on larger models",
                 "rises from 2B to 27B",
                 " → ".join(f"{share(row):.0%}" for row in rows),
                 direction=better,
                 why=why(better, rows))


def share(row):
    """The part of the gap closed at a point, at the claims' rank; None if there is no gap."""
    return of_rank(row, MAIN_RANK)["gap_closed"]


def ahead(first, second):
    """Whether more is closed at one point than at another.

    None if the difference is within its 90 % interval, or has none.
    """
    difference = share(first) - share(second)
    halves = [of_rank(row, MAIN_RANK)["ci90"] for row in (first, second)]
    if None in halves or abs(difference) <= math.hypot(*halves):
        return None
    return difference > 0


def why(direction, rows):
    """Why nothing can be said of the first and last point of an axis; "" if something can."""
    few = [row["documents"] for row in (rows[0], rows[-1]) if has_no_interval(row)]
    if direction is None and few:
        return without_interval(min(few))
    return unless_said(direction)


def between(rows, form):
    """The first and last value of an axis, and where they are."""
    return " → ".join(f"{share(row):.0%} at {form.format(**row)}" for row in (rows[0], rows[-1]))


def draw(numbers, figure):
    """Figures 3 and 4: improvement in nats above, in percent of the gap below."""
    figure.set_size_inches(12, 5.5)
    panels = figure.subplots(2, len(AXES), sharex="col")
    for (above, below), (axis, label) in zip(panels.T, AXES.items()):
        rows = numbers[axis]
        ticks = range(len(rows))
        for rank in numbers["ranks"]:
            found = [of_rank(row, rank) for row in rows]
            gains = [each["improvement"] for each in found]
            shares = [error_bar(each["gap_closed"], 100) for each in found]
            halves = [error_bar(each["ci90"], 100) for each in found]
            above.plot(ticks, gains, marker="o", label=f"rank {rank}")
            below.errorbar(ticks, shares, halves, marker="o", capsize=3)

        labels = [place(axis, row).removeprefix("tiny-gemma-2-") for row in rows]
        below.set_xticks(ticks, labels, fontsize=8)
        below.set_xlabel("model" if axis == "size" else label)

    panels[0, 0].set_ylabel("CE improvement (nats/token)")
    panels[1, 0].set_ylabel("of the gap (%)")
    panels[0, 0].legend(fontsize=8)
