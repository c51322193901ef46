"""Does the adapted model compute what the original did? (§6.2, Figure 11)"""
from lorasae.evals import distances
from lorasae.paper.findings import Claim, Table, over_seeds, with_interval
from lorasae.paper.study import around_topk
from lorasae.runs.opening import open_run

TITLE = "Distance to the original activations"
FIGURES = ("fig11",)
ABOUT = ("Cosine similarity and L2 distance of each block's output to that of the original model without SAE, after adapting less "
         "before, around a TopK SAE with adapters on all blocks. The picture is the first seed's, with intervals over sequences.")


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
    after = {}
    for measure in distances.MEASURES:
        after[measure] = [over_seeds(values)[0] for values in changes(numbers, measure)[1:]]      # those after the SAE's
    cosine, distance = after["cosine"], after["l2"]
    return [
        Claim("The adapted model's activations are closer to the original's: cosine", "slightly higher in every block after the SAE",
              f"{min(cosine):+.4f} to {max(cosine):+.4f}", min(cosine) > 0),
        Claim("... and L2 distance", "slightly smaller", f"{min(distance):+.3f} to {max(distance):+.3f}", max(distance) < 0),
    ]


def draw(numbers, figure):
    """Figure 11."""
    distances.draw(numbers["seeds"][0], figure)
