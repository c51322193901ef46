"""Targeted probe perturbation (paper §5.1 and A.2, Tables 3 and 6; SAEBench): does ablating a class hurt it alone?

    python eval.py RUN_DIR --suite tpp                          packages of the standard library
    python eval.py RUN_DIR --suite tpp --labelled saebench      professions, products

A_j is the accuracy of the probe for class j against the rest, A_ij that after ablating the latents of class i:

    TPP = mean_i (A_i - A_ii) - mean_{i≠j} (A_j - A_ij)

The drop that was intended, less the one that was not. (The paper's A.2 prints the opposite sign; its numbers have this
one.) Mean over data sets, and then the maximum and the average over the numbers of latents.
"""
import torch

from lorasae.evals import saebench, scr_tpp
from lorasae.evals.probes import accuracy
from lorasae.evals.saebench import one_against_rest
from lorasae.evals.scr_tpp import THRESHOLDS, ablate, concept_probes, mean_difference, strongest

LABELS = {"max": "TPP, maximum", "average": "TPP, average", **{f"top_{n}": f"TPP @{n}" for n in THRESHOLDS},
          "clean": "probes' accuracy"}
PAPER = {"max": (0.412, 0.372), "average": (0.145, 0.111), "top_2": (0.013, 0.007), "top_5": (0.023, 0.014),
         "top_10": (0.035, 0.023), "top_20": (0.085, 0.039), "top_50": (0.184, 0.128), "top_100": (0.266, 0.194),
         "top_500": (0.412, 0.372)}
TOLERANCE = 0.04


def evaluate(setting, options):
    """Table 6's rows on TPP, for the first SAE of a setting, and all they are made of."""
    found = saebench.compare(setting, options, "tpp", saebench.class_sets(options.labelled, "tpp"), measure)
    return scr_tpp.summary(setting, options, found)


def measure(sae, train, test, cut, seed, count_padding=False):
    """The scores of one model on one Cut of classes."""
    device = train.latents.device
    train_task = one_against_rest([len(texts) for texts in cut.train.values()], seed, device)
    test_task = one_against_rest([len(texts) for texts in cut.test.values()], seed, device)

    probes = concept_probes(train.residual, train_task, seed)
    clean = accuracy(probes, test.residual, test_task)

    effects = []
    for rows, labels, weight in zip(*train_task, probes.weight):
        difference = mean_difference(train.latents, rows, labels).clamp(min=0)          # what the class has more of
        effects.append(difference * (sae.W_dec.float() @ weight))

    scores = {"clean": clean.mean().item()}
    for n in THRESHOLDS:
        ablated = []
        for effect in effects:
            x = ablate(sae, test, strongest(effect, n), count_padding)
            ablated.append(accuracy(probes, x, test_task))
        total, intended, unintended = perturbation(clean, torch.stack(ablated))
        scores |= {f"top_{n}": total, f"intended_{n}": intended, f"unintended_{n}": unintended}
    return scores


def perturbation(clean, ablated):
    """clean A_j [m], ablated A_ij [m, m] -> (TPP, the mean drop that was intended, the one that was not)."""
    drops = clean - ablated
    others = ~torch.eye(len(clean), dtype=bool, device=drops.device)
    intended = drops.diagonal().mean().item()
    unintended = drops[others].mean().item()
    return intended - unintended, intended, unintended


def show(numbers):
    print("targeted probe perturbation: what a class's probe loses without its n latents, less what the others lose")
    saebench.show_rows(numbers, LABELS, PAPER, TOLERANCE)


def draw(numbers, figure):
    """TPP against the number of ablated latents."""
    scr_tpp.draw(numbers, figure, "Targeted probe perturbation; thin: each data set")
