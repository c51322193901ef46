"""Does the adapted model compute what the original did? (§6.2, Figure 11)"""
from lorasae.evals import distances
from lorasae.paper.findings import Claim, Table, sign, with_interval
from lorasae.paper.study import around_topk
from lorasae.runs.opening import open_run

TITLE = "Distance to the original activations"
FIGURES = ("fig11",)
ABOUT = ("Cosine similarity and L2 distance of each block's output to that of the original model without SAE, after "
         "adapting less before, around a TopK SAE with adapters on all blocks. The picture is the first seed's, with "
         "intervals over sequences.")


def trainings(study):
    return [around_topk(study, seed) for seed in study.seeds]


def cost(study):
    """{kind of work: tokens}: original, with the SAE, with adapters."""
    return {"forward": 3 * len(study.seeds) * (study.eval_tokens or 0)}


def measure(study):
    """{"seeds": [what evals/distances.py finds]}"""
    return {"seeds": [distances.evaluate(open_run(study.folder / training.name), None) for training in trainings(study)]}


def changes(numbers, measure, positions="all"):
    """[the change by adapting, a value a seed] of every block from the SAE's on."""
    return list(zip(*(found[positions][measure]["change"] for found in numbers["seeds"])))


def tables(numbers):
    made = []
    for measure, label in distances.MEASURES.items():
        rows = []
        for i, layer in enumerate(numbers["seeds"][0]["layers"]):
            cells = [with_interval(changes(numbers, measure, positions)[i], "+.4f") for positions in distances.POSITIONS]
            rows.append([f"block {layer}", *cells])
        made.append(Table(f"Change in {label} by adapting (± 90 % over seeds)", ["output of", *distances.POSITIONS.values()], rows))
    return made


def claims(numbers):
    cosine, distance = (mean_after(numbers, measure) for measure in distances.MEASURES)
    return [
        Claim("The adapted model's activations are closer to the original's: cosine similarity", "slightly higher", with_interval(cosine, "+.4f"),
              sign(cosine)),
        Claim("... and L2 distance", "slightly smaller", with_interval(distance, "+.3f"), closer(sign(distance))),
    ]


def mean_after(numbers, measure):
    """The mean change over the blocks after the SAE's, a value a seed."""
    return [sum(values) / len(values) for values in zip(*changes(numbers, measure)[1:])]


def closer(grows):
    """A distance that does not grow shrinks, where anything can be said."""
    return None if grows is None else not grows


def draw(numbers, figure):
    """Figure 11."""
    distances.draw(numbers["seeds"][0], figure)
