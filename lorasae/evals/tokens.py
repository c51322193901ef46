"""Which tokens the adapters help (paper §6.1, Figure 8): CE_sae - CE_adapted of every token.

    python eval.py RUN_DIR --suite tokens

Both losses are with the SAEs spliced in (Figure 8's "base" is the model with SAE, not adapted), in
nats, over all T - 1 predictions of each sequence. In the paper 37 % of the tokens become worse, and
most of the improvement comes from changes of 0.01 to 1 nats. Intervals are 90 %, over documents.
"""
import math

import numpy as np
import torch

from lorasae.evals.common import (batches, count_documents, evaluating, interval, progress, ratio,
                                  with_ci90, without_interval)
from lorasae.evals.fidelity import losses_by_setting
from lorasae.evals.report import Table, percent, with_interval

EDGES = np.logspace(-5, 1, 50)                          # nats; the paper's bins
SIZES = (0, 1e-4, 1e-3, 1e-2, 1e-1, 1, math.inf)        # the table's
MIDDLE = (1e-2, 1)                                      # where the paper finds most of the gain


def evaluate(setting):
    """Both losses of every held-out token -> the numbers of `statistics`."""
    model, change = setting.model, []
    with evaluating(model):
        for tokens in progress(batches(setting), "tokens"):
            losses = losses_by_setting(model, setting.saes, tokens, ("sae", "adapted"))
            change.append((losses["sae"].ce - losses["adapted"].ce).cpu())
    return statistics(torch.cat(change), setting.text.documents)


def statistics(change, documents):
    """The numbers of Figure 8 for change [n, T - 1]: nats won per token, below 0 if it gets worse.

    gained and lost are sums over the tokens that become better and worse, divided by the number
    of all tokens: their difference is the improvement. from_middle is the part of the improvement
    that comes from changes of 0.01 to 1 nats. documents: [n] int, the document of each sequence.
    """
    change = change.double()
    size = change.abs()
    middle = change * ((size >= MIDDLE[0]) & (size < MIDDLE[1]))
    estimates = with_ci90({
        "improvement": interval(change.mean(1), documents),
        "share_worse": interval((change < 0).double().mean(1), documents),
        "from_middle": ratio(middle.mean(1), change.mean(1), documents),
    })
    gains, losses = change[change > 0], -change[change < 0]

    def between(low, high):
        better = gains[(gains >= low) & (gains < high)]
        worse = losses[(losses >= low) & (losses < high)]
        return {
            "share_better": len(better) / change.numel(),
            "share_worse": len(worse) / change.numel(),
            "gained": better.sum().item() / change.numel(),
            "lost": worse.sum().item() / change.numel(),
        }

    return {
        "tokens": change.numel(),
        "documents": count_documents(documents),
        **between(0, math.inf),
        **estimates,
        "by_size": [{"from": low, **between(low, high)} for low, high in zip(SIZES, SIZES[1:])],
        "histogram": {
            "edges": EDGES.tolist(),
            "better": np.histogram(gains, EDGES)[0].tolist(),
            "worse": np.histogram(losses, EDGES)[0].tolist(),
        },
    }


def tables(numbers):
    names = [f"{low:g} to {high:g}" for low, high in zip(SIZES, SIZES[1:])]
    rows = []
    for name, row in zip([*names, "all"], [*numbers["by_size"], numbers]):
        shares = [percent(row["share_better"]), percent(row["share_worse"])]
        rows.append([name, *shares, row["gained"], row["lost"], row["gained"] - row["lost"]])

    def part(name, form=".1%"):
        return with_interval(numbers[name], numbers["ci90"][name], form)

    notes = [f"{part('share_worse')} of {numbers['tokens']:,} tokens become worse; the mean "
             f"improvement is {part('improvement', '.4f')} nats per token"]
    if numbers["from_middle"] is not None:
        notes.append(f"of it, from changes of 0.01 to 1 nats: {part('from_middle')}")
    if numbers["ci90"]["improvement"] is None:
        notes.append(without_interval(numbers["documents"]))
    headings = ["change (nats)", "tokens better", "tokens worse", "nats gained", "nats lost", "net"]
    caption = "Change of every token's loss by adapting (nats per token; the paper's Figure 8)"
    return [Table(caption, headings, rows, notes)]


def draw(numbers, figure):
    """Figure 8: histograms of the size of improvements and of degradations."""
    figure.set_size_inches(6, 3.6)
    axes, histogram = figure.subplots(), numbers["histogram"]
    for side, label in (("better", "loss improves"), ("worse", "loss degrades")):
        axes.stairs(histogram[side], histogram["edges"], fill=True, alpha=0.5,
                    label=f"{label}: {numbers[f'share_{side}']:.0%} of tokens")
    axes.set(xscale="log", xlabel="size of the change, |CE with SAE − CE with SAE + LoRA| (nats)",
             ylabel="held-out tokens", title="Change of every token's loss (the paper's Figure 8)")
    axes.legend()
