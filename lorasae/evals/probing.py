"""Sparse probing: do a few latents tell the classes of a text apart? (§5.1 and A.2, Tables 3, 6)

    python eval.py RUN_DIR --suite probing                        the standard library's packages
    python eval.py RUN_DIR --suite probing --labelled saebench    SAEBench's eight data sets

For each class against the rest, a logistic regression on the k latents with the largest

    | mean_positive z - mean_negative z |       z: means over the tokens of a training text

and its accuracy on test texts: the mean over classes, then over data sets. "All" (the paper's
"Test") is a probe on every latent, trained by gradient descent. The same on the residual stream
shows what there is to find without an SAE.
"""
from functools import partial

import torch

from lorasae.evals import saebench
from lorasae.evals.probes import (accuracy, hold_out, logistic, mean_difference, one_against_rest,
                                  scikit_learn, train_probes)

KS = (1, 2, 5, 10, 20, 50)
LABELS = {
    **{f"sae_top_{k}": f"latents, top {k}" for k in KS},
    "sae_all": "latents, all",
    **{f"residual_top_{k}": f"residual, top {k}" for k in KS},
    "residual_all": "residual, all",
}
PAPER = {                                               # (LoRA, base)
    "sae_top_1": (0.760, 0.732),
    "sae_top_2": (0.833, 0.832),
    "sae_top_5": (0.875, 0.875),
    "sae_top_10": (0.910, 0.907),
    "sae_top_20": (0.930, 0.930),
    "sae_top_50": (0.946, 0.946),
    "sae_all": (0.956, 0.955),
}
TOLERANCE = 0.04
ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.01, fused=True)

add_options = saebench.add_options                      # of probing, scr, tpp and absorption


def evaluate(setting, labelled, seeds):
    """Table 6's rows on probing, for the first SAE of a setting."""
    scikit_learn()                                      # refuses before any work if it is missing
    found = saebench.compare(setting, "probing", labelled, seeds, measure)
    return saebench.summary(setting, labelled, seeds, found, saebench.over_sets(found))


def measure(sae, train, test, cut, seed):
    """{metric: accuracy, mean over classes} of one model on one Cut."""
    device = train.latents.device
    train_task = one_against_rest(cut.train, seed, device)
    test_task = one_against_rest(cut.test, seed, device)
    scores = {}

    # A few latents or dimensions, those with the largest mean difference first
    sides = {"sae": (train.latents, test.latents), "residual": (train.residual, test.residual)}
    for name, (features, tests) in sides.items():
        best = mean_difference(features, train_task).abs().argsort(descending=True)
        for k in KS:
            scores[f"{name}_top_{k}"] = regress(features, train_task, tests, test_task, best[:, :k])
    scores["residual_all"] = regress(features, train_task, tests, test_task, best)

    # All latents, in as many steps per epoch as SAEBench's batches of 250 make of its 4,000 texts
    part, held = hold_out(train_task, seed)
    batch = min(250, max(16, part.rows.shape[1] // 16))
    probe = train_probes(train.latents, part, held, optimizer=ADAMW, batch=batch, epochs=100,
                         patience=10, seed=seed)
    scores["sae_all"] = accuracy(probe, test.latents, test_task).mean().item()
    return scores


def regress(features, train, tests, test, columns):
    """Test accuracy, mean over tasks, of logistic regressions on columns [P, k] of the features."""
    found = []
    for i, chosen in enumerate(columns):
        x = features[train.rows[i, :, None], chosen]
        positive = logistic(x, train.labels[i], tests[test.rows[i, :, None], chosen])
        right = positive == test.labels[i].cpu()
        found.append(right.double().mean().item())
    return sum(found) / len(found)


def tables(numbers):
    caption = "Sparse probing: test accuracy, one class against the rest"
    return [saebench.table(numbers, caption, LABELS, PAPER, TOLERANCE)]


def draw(numbers, figure):
    """Accuracy against k, on latents and residual stream of both models."""
    features = {"sae_top": "latents, ", "residual_top": "residual stream, "}
    saebench.curves(numbers, figure, KS, features, xlabel="features of the probe, k",
                    ylabel="test accuracy", title="Sparse probing")
