"""Sparse probing: do a few latents tell classes of text apart? (§5.1 and A.2, Tables 3, 6)

    python eval.py RUN_DIR --suite probing                        the standard library's packages
    python eval.py RUN_DIR --suite probing --labelled saebench    SAEBench's eight data sets

A logistic regression tells each class from the rest, using the k latents with the largest

    | mean_positive z - mean_negative z |       z: means over the tokens of a training text

The score is its accuracy on test texts: the mean over classes, then over data sets. "All" (the
paper's "Test") is a probe on all latents, trained by gradient descent.
"""
from lorasae.evals import saebench
from lorasae.evals.probes import (accuracy, hold_out, logistic, mean_difference, one_against_rest,
                                  scikit_learn, train_probes)

KS = (1, 2, 5, 10, 20, 50)

add_options = saebench.add_options                      # for all SAEBench suites


def evaluate(setting, labelled, seeds):
    """Table 6's probing rows for the first SAE of a run."""
    scikit_learn()                                      # fails before any work if it is missing
    return saebench.compare(setting, "probing", labelled, seeds, measure)


def measure(sae, train, test, cut, seed):
    """{metric: accuracy, mean over classes} of one model on one Cut."""
    z, z_test = train.latents, test.latents
    task = one_against_rest(cut.train, seed, z.device)
    test_task = one_against_rest(cut.test, seed, z.device)
    scores = {}

    # A few latents: those with the largest mean difference.
    best = mean_difference(z, task).abs().argsort(descending=True)
    for k in KS:
        scores[f"sae_top_{k}"] = regress(z, task, z_test, test_task, best[:, :k])

    # All latents, in as many steps per epoch as in SAEBench: 4,000 texts in batches of 250.
    part, held = hold_out(task, seed)
    batch = min(250, max(16, part.rows.shape[1] // 16))
    probe = train_probes(z, part, held, lr=1e-2, batch=batch, epochs=100, patience=10, seed=seed)
    scores["sae_all"] = accuracy(probe, z_test, test_task).mean().item()
    return scores


def regress(features, train, tests, test, columns):
    """Test accuracy, mean over tasks, of logistic regressions on columns [P, k] of the features."""
    found = []
    for i, chosen in enumerate(columns):
        x = features[train.rows[i, :, None], chosen]
        positive = logistic(x, train.labels[i], tests[test.rows[i, :, None], chosen])
        found.append((positive == test.labels[i].cpu()).double().mean().item())
    return sum(found) / len(found)


def tables(numbers):
    caption = "Sparse probing: test accuracy, one class against the rest"
    return [saebench.table(numbers, "probing", caption)]
