"""Spurious correlation removal (paper §5.1 and A.2, Tables 3 and 6; SAEBench): can the SAE cure a biased probe?

    python eval.py RUN_DIR --suite scr                          pairs of packages, each in code and in documentation
    python eval.py RUN_DIR --suite scr --labelled saebench      professions and genders, products and ratings

Texts have two concepts, the class (professor, nurse) and the attribute (male, female). A biased probe is trained on
male professors and female nurses alone. One concept's latents are ablated, and the biased probe is asked for the other:

    S = (A_ablated - A_biased) / (A_clean - A_biased)

with A_clean the accuracy of a probe trained on that concept, balanced. 1: cured, 0: no change. Reported is the
direction in which the biased probe does worse. Mean over pairs, then the maximum and average over numbers of latents.
"""
import torch

from lorasae.errors import InputError
from lorasae.evals import saebench, scr_tpp
from lorasae.evals.probes import Probe, accuracy
from lorasae.evals.saebench import halves
from lorasae.evals.scr_tpp import THRESHOLDS, ablate, concept_probes, mean_difference, strongest

ATTRIBUTE, CLASS, BIASED = range(3)                     # the three probes
LABELS = {"max": "SCR, maximum", "average": "SCR, average", **{f"top_{n}": f"SCR @{n}" for n in THRESHOLDS},
          "clean": "clean probe's accuracy", "biased": "biased probe's accuracy"}
PAPER = {"max": (0.526, 0.448), "average": (0.314, 0.289), "top_2": (0.094, 0.097), "top_5": (0.196, 0.177),
         "top_10": (0.260, 0.253), "top_20": (0.336, 0.327), "top_50": (0.447, 0.448), "top_100": (0.526, 0.400),
         "top_500": (0.342, 0.325)}
TOLERANCE = 0.08
LEAST_LOST = 0.05       # from clean to biased probe; below it S is mostly noise


def evaluate(setting, options):
    """Table 6's rows on SCR, for the first SAE of a setting, and all they are made of."""
    found = saebench.compare(setting, options, "scr", saebench.pair_sets(options.labelled), measure)
    return scr_tpp.summary(setting, options, found)


def measure(sae, train, test, cut, seed, count_padding=False):
    """The scores of one model on one Cut of quadrants."""
    device = train.latents.device
    train_task = training_tasks(cut.train, device)
    test_task = test_tasks(cut.test, device)

    # What the probes know
    probes = concept_probes(train.residual, train_task, seed)
    clean = accuracy(Probe(probes.weight[:2], probes.bias[:2]), test.residual, test_task)
    biased = Probe(probes.weight[BIASED].expand(2, -1), probes.bias[BIASED].expand(2))
    before = accuracy(biased, test.residual, test_task)

    worse = CLASS if before[CLASS] < before[ATTRIBUTE] else ATTRIBUTE

    # What is left of the bias without one concept's n latents
    effects = []
    for concept in (ATTRIBUTE, CLASS):
        difference = mean_difference(train.latents, train_task.rows[concept], train_task.labels[concept])
        effects.append((difference * (sae.W_dec.float() @ probes.weight[concept])).abs())

    scores = {"clean": clean[worse].item(), "biased": before[worse].item()}
    for n in THRESHOLDS:
        after = torch.empty_like(before)
        for ablated, asked in ((ATTRIBUTE, CLASS), (CLASS, ATTRIBUTE)):
            x = ablate(sae, test, strongest(effects[ablated], n), count_padding)
            after[asked] = accuracy(biased, x, test_task)[asked]
        dir1, dir2, reported = shift(clean.tolist(), before.tolist(), after.tolist())
        scores |= {f"top_{n}": reported, f"dir1_{n}": dir1, f"dir2_{n}": dir2}
    return scores


def shift(clean, biased, ablated):
    """Accuracies on the (attribute, class) -> S of both directions, and the reported one.

    dir1 ablates the attribute's latents and asks for the class, dir2 the reverse. 0 where the biased probe is as good
    as the clean one to 0.001: there is nothing to cure. (So does SAEBench today; the version the paper ran divides.)
    """
    def score(concept):
        lost = clean[concept] - biased[concept]
        return (ablated[concept] - biased[concept]) / lost if lost >= 0.001 else 0.0

    dir1, dir2 = score(CLASS), score(ATTRIBUTE)
    return dir1, dir2, dir1 if biased[CLASS] < biased[ATTRIBUTE] else dir2


# ---- The three tasks -----------------------------------------------------------------------------

def quadrant_rows(quadrants):
    """{(class, attribute): texts} -> the rows of the table of all texts that each of P m, P f, N m, N f has."""
    starts, at = {}, 0
    for quadrant, texts in quadrants.items():
        starts[quadrant] = torch.arange(at, at + len(texts))
        at += len(texts)

    first, second = dict.fromkeys(label for label, _ in quadrants)
    m, f = dict.fromkeys(attribute for _, attribute in quadrants)
    return [starts[first, m], starts[first, f], starts[second, m], starts[second, f]]


def training_tasks(quadrants, device="cpu"):
    """n texts a quadrant for the clean probes, 2n of two quadrants for the biased one: 4n texts each, half positive."""
    pm, pf, nm, nf = quadrant_rows(quadrants)
    n = min(len(pm) // 2, len(pf), len(nm), len(nf) // 2)
    if n < 1:
        raise InputError("a quadrant of class and attribute has no texts: SCR needs all four")
    rows = [torch.cat([pm[:n], nm[:n], pf[:n], nf[:n]]),
            torch.cat([pm[:n], pf[:n], nm[:n], nf[:n]]),
            torch.cat([pm[:2 * n], nf[:2 * n]])]
    return halves(rows, device)


def test_tasks(quadrants, device="cpu"):
    """The same texts, n a quadrant, once by attribute and once by class."""
    pm, pf, nm, nf = quadrant_rows(quadrants)
    n = min(len(pm), len(pf), len(nm), len(nf))
    rows = [torch.cat([pm[:n], nm[:n], pf[:n], nf[:n]]),
            torch.cat([pm[:n], pf[:n], nm[:n], nf[:n]])]
    return halves(rows, device)


def show(numbers):
    print("spurious correlation removal: 1 where ablating n latents cures the biased probe, 0 where it changes nothing")
    saebench.show_rows(numbers, LABELS, PAPER, TOLERANCE)

    for name, models in numbers["by_set"].items():
        scores = saebench.mean_scores(models["base"])
        lost = scores["clean"] - scores["biased"]
        if lost < LEAST_LOST:
            print(f"{name}: the biased probe is only {lost:.3f} worse than the clean one; "
                  "S divides by it and is noise")


def draw(numbers, figure):
    """S against the number of ablated latents."""
    scr_tpp.draw(numbers, figure, "Spurious correlation removal; thin: each pair")
