"""Does the adapted model compute what the original did? (§6.2, Figure 11)"""
from lorasae.evals import distances
from lorasae.paper.findings import Claim, Table, opposite, sign, with_interval
from lorasae.paper.study import around_topk_of_seeds, opened

TITLE = "Distance to the original activations"
FIGURES = ("fig11",)
ABOUT = (
    "Cosine similarity and L2 distance between each block's output and that of the original model "
    "without SAE: after adapting minus before, around a TopK SAE with adapters on all blocks, on "
    "the text that the SAE's run holds out (the paper took the Pile). The picture is the first "
    "seed's, with intervals over documents.")

RATE = ("the tuned rate is 60 times the published one: with that one, at as many tokens (one "
        "seed), the last block's output comes closer (cosine +0.0018, L2 -0.22), if not those "
        "before it")


trainings = around_topk_of_seeds


def cost(study):
    """{kind of work: tokens}: original, with the SAE, with adapters."""
    return {"forward": 3 * len(study.seeds) * study.held_out}


def measure(study):
    """{"seeds": [what evals/distances.py finds]}"""
    found = [distances.evaluate(opened(study, training), None) for training in trainings(study)]
    return {"seeds": found}


def changes(numbers, measure, positions="all"):
    """The change by adapting, [a value per seed] for every block from the SAE's on.

    measure, positions: of distances.MEASURES and distances.POSITIONS.
    """
    by_seed = [found[positions][measure]["change"] for found in numbers["seeds"]]
    return list(zip(*by_seed))


def tables(numbers):
    layers = numbers["seeds"][0]["layers"]
    headings = ["output of", *distances.POSITIONS.values()]

    made = []
    for measure, label in distances.MEASURES.items():
        rows = [[f"block {layer}"] for layer in layers]
        for positions in distances.POSITIONS:
            for row, values in zip(rows, changes(numbers, measure, positions)):
                row.append(with_interval(values, "+.4f"))
        made.append(Table(f"Change in {label} by adapting (± 90 % over seeds)", headings, rows))
    return made


def claims(numbers):
    cosine = mean_after(numbers, "cosine")
    distance = mean_after(numbers, "l2")
    alike, closer = sign(cosine), opposite(sign(distance))
    return [
        claim("The adapted model's activations are closer to the original's: cosine similarity",
              "slightly higher", cosine, "+.4f", alike),
        claim("... and L2 distance", "slightly smaller", distance, "+.3f", closer),
    ]


def claim(says, paper, changes, form, closer):
    """The Claim that adapting brings activations closer; changes: a value per seed."""
    return Claim(says,
                 paper,
                 with_interval(changes, form),
                 direction=closer,
                 why="one seed has no interval over seeds" if len(changes) == 1 else "",
                 why_in_miniature="" if closer else RATE)


def mean_after(numbers, measure):
    """The mean change over the blocks after the SAE's, a value per seed."""
    after = changes(numbers, measure)[1:]
    return [sum(values) / len(values) for values in zip(*after)]


def draw(numbers, figure):
    """Figure 11."""
    distances.draw(numbers["seeds"][0], figure)
