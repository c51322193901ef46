"""Which block's adapters matter (§6.3, Figure 9): on one block after the SAE, against on all of them."""
from lorasae.evals.common import error_bar
from lorasae.io.models import load_config
from lorasae.io.presets import PRESETS
from lorasae.paper.findings import Claim, Table, over_seeds, rising, with_interval
from lorasae.paper.study import adapters, results

TITLE = "Adapters on a single block"
FIGURES = ("fig9",)
ABOUT = (
    "CE improvement of adapters (rank 64) on one block alone after the preset's JumpReLU SAE, and "
    "its share of the improvement by adapters on all blocks after it. Each is trained on its own, "
    "with the same tokens and rate.")

GEMMA_2_2B_BLOCKS = 26                                  # known without asking the Hub


def blocks_of(study):
    """(the SAE's block, those after it)"""
    model = study.models.main
    layer = PRESETS[model].layer
    depth = load_config(model).num_hidden_layers if study.miniature else GEMMA_2_2B_BLOCKS
    return layer, range(layer + 1, depth)


def adapters_of(study, block, seed):
    """block: its number, or "after" for all."""
    name = f"one-block-{block}-seed-{seed}"
    return adapters(study, name, study.models.main, [], rank=(64,), adapt=(str(block),), seed=seed)


def trainings(study):
    _, after = blocks_of(study)
    needed = []
    for seed in study.seeds:
        needed += [adapters_of(study, block, seed) for block in ("after", *after)]
    return needed


def measure(study):
    """{"sae_layer", "blocks", "improvement": {block or "after": [nats, a seed's]}}"""
    layer, after = blocks_of(study)
    gains = {}
    for block in ("after", *after):
        found = [results(study, adapters_of(study, block, seed)) for seed in study.seeds]
        gains[str(block)] = [each["ce_sae"] - each["ce_adapted"] for each in found]
    return {"sae_layer": layer, "blocks": list(after), "improvement": gains}


# ---- What it comes to ----------------------------------------------------------------------------

def share(numbers, block):
    """Of the improvement by all blocks, a value per seed; None if all blocks improved nothing."""
    by_one, by_all = numbers["improvement"][str(block)], numbers["improvement"]["after"]
    return [one / whole if whole > 0 else None for one, whole in zip(by_one, by_all)]


def tables(numbers):
    gains = numbers["improvement"]
    rows = [["all after", with_interval(gains["after"], ".4f"), ""]]
    for block in numbers["blocks"]:
        gain = with_interval(gains[str(block)], ".4f")
        rows.append([f"block {block}", gain, with_interval(share(numbers, block))])

    headings = ["adapters on", "improvement", "of all after"]
    return [Table("CE improvement (nats per token; ± 90 % over seeds)", headings, rows)]


def claims(numbers):
    by_block = [share(numbers, block) for block in numbers["blocks"]]
    if any(None in shares for shares in by_block):
        return [Claim("A single block does most of what all do, the less the farther it is",
                      "88 %",
                      "no improvement",
                      direction=None,
                      why="adapters on all blocks do not improve the loss: nothing to divide by")]

    means = [over_seeds(shares)[0] for shares in by_block]
    first = means[0]
    return [
        Claim("The first block after the SAE alone does most of what all do",
              "88 %",
              with_interval(by_block[0]),
              direction=first > 0.5,
              size=abs(first - 0.88) < 0.1),
        Claim("Performance falls with the distance from the SAE",
              "falls",
              ", ".join(f"{mean:.0%}" for mean in means),
              direction=rising(means[::-1])),
    ]


def draw(numbers, figure):
    """Figure 9."""
    blocks, gains = numbers["blocks"], numbers["improvement"]
    distance = [block - numbers["sae_layer"] for block in blocks]
    by_block = [over_seeds(gains[str(block)]) for block in blocks]
    means = [mean for mean, _ in by_block]
    halves = [error_bar(half) for _, half in by_block]
    whole, _ = over_seeds(gains["after"])

    figure.set_size_inches(6, 3.6)
    axes = figure.subplots()
    axes.errorbar(distance, means, halves, marker="o", capsize=4, label="one block")
    for block, x, y in zip(blocks, distance, means):
        text = with_interval(share(numbers, block), ".0%")
        axes.annotate(text, (x, y), (8, 5), textcoords="offset points", fontsize=8)
    axes.axhline(whole, linestyle="--", color="C1", label="all blocks after the SAE")

    axes.set(xlabel="blocks after the SAE", ylabel="CE improvement (nats/token)", ylim=(min(0, *means), None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.15)
    axes.legend(loc="lower left")
