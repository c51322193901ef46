"""Sparse probing: do a few latents tell the classes of a text apart? (paper §5.1 and A.2, Tables 3 and 6; SAEBench)

    python eval.py RUN_DIR --suite probing                          packages of the standard library
    python eval.py RUN_DIR --suite probing --labelled saebench      SAEBench's eight data sets

For each class against the rest, a logistic regression on the k latents with the largest

    | mean_positive z - mean_negative z |       z: means over the tokens of a training text

and its accuracy on test texts, mean over classes, then over data sets. "All" (the paper's "Test") is a probe on every
latent, trained by gradient. The same on the residual stream shows what there is to find without an SAE.
"""
import torch

from lorasae.evals import saebench
from lorasae.evals.common import error_bar
from lorasae.evals.probes import accuracy, hold_out, logistic, train_probes
from lorasae.evals.saebench import one_against_rest

KS = (1, 2, 5, 10, 20, 50)
LABELS = {**{f"sae_top_{k}": f"latents, top {k}" for k in KS}, "sae_all": "latents, all",
          **{f"residual_top_{k}": f"residual, top {k}" for k in KS}, "residual_all": "residual, all"}
PAPER = {"sae_top_1": (0.760, 0.732), "sae_top_2": (0.833, 0.832), "sae_top_5": (0.875, 0.875),
         "sae_top_10": (0.910, 0.907), "sae_top_20": (0.930, 0.930), "sae_top_50": (0.946, 0.946),
         "sae_all": (0.956, 0.955)}
TOLERANCE = 0.04

add_options = saebench.add_options                      # shared by probing, scr, tpp and absorption


def evaluate(setting, options):
    """Table 6's rows on probing, for the first SAE of a setting, and all they are made of."""
    sets = saebench.class_sets(options.labelled, "probing")
    found = saebench.compare(setting, options, "probing", sets, measure)
    return {"layer": next(iter(setting.saes)), "seeds": options.seeds, "sets": list(found), "by_set": found,
            "rows": saebench.rows(saebench.over_sets(found))}


def measure(sae, train, test, cut, seed):
    """The accuracies of one model on one Cut: {metric of LABELS: mean over classes}."""
    device = train.latents.device
    train_task = one_against_rest([len(texts) for texts in cut.train.values()], seed, device)
    test_task = one_against_rest([len(texts) for texts in cut.test.values()], seed, device)
    scores = {}

    # A few features: logistic regression
    for name, features, tests in (("sae", train.latents, test.latents), ("residual", train.residual, test.residual)):
        for k in KS:
            if k <= features.shape[1]:
                scores[f"{name}_top_{k}"] = sparse_accuracy(features, train_task, tests, test_task, k)

    # All latents: by gradient, in as many steps an epoch as SAEBench's batch of 250 makes of its 4,000 texts
    part, held = hold_out(train_task, seed)
    batch = min(250, max(16, part.rows.shape[1] // 16))
    probe = train_probes(train.latents, part, held, lr=1e-2, batch=batch, epochs=100, patience=10, seed=seed)
    scores["sae_all"] = accuracy(probe, test.latents, test_task).mean().item()

    scores["residual_all"] = dense_accuracy(train.residual, train_task, test.residual, test_task)
    return scores


def best_features(features, task, k):
    """The k features [P, k] that differ most between the positives and negatives of each task."""
    apart = []
    for rows, labels in zip(*task):
        positive = features[rows[labels > 0]].mean(0)
        negative = features[rows[labels == 0]].mean(0)
        apart.append((positive - negative).abs())
    return torch.stack(apart).topk(k).indices


def sparse_accuracy(features, train, tests, test, k):
    """Test accuracy, mean over tasks, of logistic regressions on each task's k best features."""
    columns = best_features(features, train, k)[:, None]                        # [P, 1, k]
    probe = logistic(features[train.rows[..., None], columns], train.labels)    # on [P, N, k]

    x = tests[test.rows[..., None], columns].double()
    logits = (x @ probe.weight[..., None]).squeeze(-1) + probe.bias[:, None]
    return right(logits, test.labels)


def dense_accuracy(features, train, tests, test):
    """The same on all features; a task at a time, since a table of each would be large."""
    found = []
    for rows, labels, test_rows, test_labels in zip(*train, *test):
        probe = logistic(features[rows][None], labels[None])
        logits = tests[test_rows].double() @ probe.weight[0] + probe.bias[0]
        found.append(right(logits, test_labels))
    return sum(found) / len(found)


def right(logits, labels):
    """The share of texts on the right side."""
    return ((logits > 0) == (labels > 0)).double().mean().item()


def show(numbers):
    print("sparse probing: test accuracy, one class against the rest")
    saebench.show_rows(numbers, LABELS, PAPER, TOLERANCE)


def draw(numbers, figure):
    """Accuracy against k, latents and residual stream of both models."""
    figure.set_size_inches(7, 3.8)
    axes = figure.subplots()
    for features, name, style in (("sae", "latents", "-"), ("residual", "residual stream", "--")):
        for model, label, colour in (("base", "base", "C0"), ("lora", "LoRA", "C1")):
            shown = [k for k in KS if f"{features}_top_{k}" in numbers["rows"]]
            points = [numbers["rows"][f"{features}_top_{k}"] for k in shown]
            means = [point[model] for point in points]
            errors = [error_bar(point[f"{model}_ci90"]) for point in points]
            axes.errorbar(shown, means, errors, color=colour, linestyle=style, marker="o", capsize=3,
                          label=f"{name}, {label}")

    title = ", ".join(numbers["sets"][:3]) + (", …" if len(numbers["sets"]) > 3 else "")
    axes.set(xscale="log", xlabel="features of the probe, k", ylabel="test accuracy", title=f"Sparse probing, {title}")
    axes.set_xticks(KS, [str(k) for k in KS])
    axes.minorticks_off()
    axes.legend()
