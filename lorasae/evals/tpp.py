"""Targeted probe perturbation: does ablating a class hurt only that class? (§5.1, Tables 3 and 6)

    python eval.py RUN_DIR --suite tpp                        the standard library's packages
    python eval.py RUN_DIR --suite tpp --labelled saebench    professions, products

A_j is the accuracy of class j's probe against the rest, A_ij that after ablating class i's latents:

    TPP = mean_i (A_i - A_ii) - mean_{i≠j} (A_j - A_ij)

This is the intended drop minus the unintended one. (The paper's A.2 prints the opposite sign; its
numbers have this one.) Scores are means over data sets, then maxima and averages over thresholds.
"""
import torch

from lorasae.evals import saebench
from lorasae.evals.concepts import THRESHOLDS, ablate, concept_probes, over_thresholds, strongest
from lorasae.evals.probes import accuracy, mean_difference, one_against_rest


def evaluate(setting, labelled, seeds):
    """Table 6's TPP rows for the first SAE of a run."""
    return saebench.compare(setting, "tpp", labelled, seeds, measure, further=over_thresholds)


def measure(sae, train, test, cut, seed):
    """{metric: value} of one model on one Cut."""
    device = train.latents.device
    train_task = one_against_rest(cut.train, seed, device)
    test_task = one_against_rest(cut.test, seed, device)

    probes = concept_probes(train.residual, train_task, seed)
    clean = accuracy(probes, test.residual, test_task)
    more = mean_difference(train.latents, train_task).clamp(min=0)      # more active in the class
    effects = more * (probes.weight @ sae.W_dec.float().T)

    scores = {"clean": clean.mean().item()}
    for n in THRESHOLDS:
        ablated = [accuracy(probes, ablate(sae, test, strongest(effect, n)), test_task)
                   for effect in effects]
        scores[f"top_{n}"] = perturbation(clean, torch.stack(ablated))
    return scores


def perturbation(clean, ablated):
    """clean A_j [m], ablated A_ij [m, m] -> TPP."""
    drops = clean - ablated
    others = ~torch.eye(len(clean), dtype=bool, device=drops.device)
    intended, unintended = drops.diagonal().mean(), drops[others].mean()
    return (intended - unintended).item()


def tables(numbers):
    caption = ("Targeted probe perturbation: what the probe of a class loses without its n "
               "latents, minus what the others lose")
    return [saebench.table(numbers, "tpp", caption)]

