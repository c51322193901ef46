"""Which tokens the adapters help (paper §6.1, Figure 8): CE_sae - CE_adapted of every token.

    python eval.py RUN_DIR --suite tokens

Both losses are with the SAEs spliced in (Figure 8's "base" is the model with SAE, not adapted), in
nats, fp32, over all T - 1 predictions of each sequence. In the paper 37 % of the tokens become
worse, and most of the improvement comes from changes of 0.01 to 1 nats.
"""
import math

import numpy as np
import torch

from lorasae.evals.common import (count_documents, evaluating, interval, percent, plus_minus,
                                  print_table, progress, without_interval)
from lorasae.evals.fidelity import losses_by_setting

EDGES = np.logspace(-5, 1, 50)                          # nats; the paper's bins
SIZES = (0, 1e-4, 1e-3, 1e-2, 1e-1, 1, math.inf)        # the table's


def evaluate(setting, options):
    """Both losses of every held-out token -> statistics()."""
    batches = setting.text.held_out.split(setting.config.eval_batch)
    change = changes(setting.model, setting.saes, batches)
    return statistics(change, setting.text.documents)


def changes(model, saes, batches):
    """CE_sae - CE_adapted of every prediction, for batches of tokens [B, T] -> [n, T - 1] nats."""
    found = []
    with evaluating(model):
        for tokens in progress(batches, "tokens"):
            losses = losses_by_setting(model, saes, tokens, ("sae", "adapted"))
            found.append((losses["sae"].ce - losses["adapted"].ce).cpu())
    return torch.cat(found)


def statistics(change, documents=None):
    """change [n, T - 1]: improvements in nats, below 0 if a token becomes worse -> what Figure 8
    shows.

    gained and lost are sums over the tokens that become better and worse, divided by the number
    of all tokens, so their difference is the mean improvement. Intervals are over documents, [n]
    int, the document of each sequence; None: each sequence is one of its own.
    """
    mean, mean_half = interval(change.double().mean(1), documents)
    _, worse_half = interval((change < 0).double().mean(1), documents)
    flat = change.double().flatten().numpy()
    gains = flat[flat > 0]
    losses = -flat[flat < 0]

    def between(low, high):
        better = gains[(gains >= low) & (gains < high)]
        worse = losses[(losses >= low) & (losses < high)]
        return {
            "share_better": len(better) / len(flat),
            "share_worse": len(worse) / len(flat),
            "gained": float(better.sum() / len(flat)),
            "lost": float(worse.sum() / len(flat)),
        }

    by_size = [{"from": low, **between(low, high)} for low, high in zip(SIZES, SIZES[1:])]
    histogram = {
        "edges": EDGES.tolist(),
        "better": np.histogram(gains, EDGES)[0].tolist(),
        "worse": np.histogram(losses, EDGES)[0].tolist(),
    }
    return {
        "tokens": len(flat),
        "documents": len(change) if documents is None else count_documents(documents),
        "improvement": mean,
        **between(0, math.inf),
        "ci90": {"improvement": mean_half, "share_worse": worse_half},
        "by_size": by_size,
        "histogram": histogram,
    }


def show(numbers):
    mean, half = numbers["improvement"], numbers["ci90"]
    names = [f"{low:g} to {high:g}" for low, high in zip(SIZES, SIZES[1:-1])]
    names += ["1 and more", "all"]
    rows = []
    for name, row in zip(names, numbers["by_size"] + [numbers]):
        share = (row["gained"] - row["lost"]) / mean if mean else None
        shares = [percent(row["share_better"]), percent(row["share_worse"])]
        rows.append([name, *shares, row["gained"], row["lost"], percent(share)])
    print_table(rows, ["change (nats)", "tokens better", "tokens worse", "nats gained", "nats lost",
                       "of the improvement"])

    worse = f"{percent(numbers['share_worse'])} {plus_minus(half['share_worse'], '.1%')}".rstrip()
    gain = f"{mean:.4f} {plus_minus(half['improvement'])}".rstrip()
    why = ""
    if half["improvement"] is None:
        why = f" ({without_interval(numbers['documents'])})"
    print(f"\n{worse} of {numbers['tokens']:,} tokens become worse; "
          f"mean improvement {gain} nats per token{why}")


def draw(numbers, figure):
    """Figure 8: histograms of the size of improvements and of degradations."""
    figure.set_size_inches(6, 3.6)
    axes, histogram = figure.subplots(), numbers["histogram"]
    for side, label in (("better", "loss improves"), ("worse", "loss degrades")):
        axes.stairs(histogram[side], histogram["edges"], fill=True, alpha=0.5,
                    label=f"{label}: {numbers[f'share_{side}']:.0%} of tokens")
    axes.set(xscale="log", xlabel="size of the change, |CE with SAE − CE with SAE + LoRA| (nats)",
             ylabel="held-out tokens", title="Change in loss of each token (the paper's Figure 8)")
    axes.legend()
