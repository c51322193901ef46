"""Which tokens the adapters help (paper §6.1, Figure 8): CE_sae - CE_adapted for every token.

    python eval.py RUN_DIR --suite tokens

Both losses are with the SAEs spliced in (Figure 8's "base" is the model with SAE, unadapted), in
nats, over all T - 1 predictions of each sequence. In the paper 37 % of the tokens get worse, and
most of the improvement comes from changes of 0.01 to 1 nats. Intervals are 90 %, over documents.
"""
import numpy as np
import torch

from lorasae.evals.common import batches, interval, progress, ratio, with_ci90, without_interval
from lorasae.evals.fidelity import losses_by_setting
from lorasae.evals.report import Table, with_interval

EDGES = np.logspace(-5, 1, 50)                          # nats; the paper's bins
MIDDLE = (1e-2, 1)                                      # where the paper finds most of the gain


def evaluate(setting):
    """Both losses of every held-out token -> the numbers of `statistics`."""
    model, change = setting.model, []
    for tokens in progress(batches(setting), "tokens"):
        losses = losses_by_setting(model, setting.saes, tokens, ("sae", "adapted"))
        change.append((losses["sae"]["ce"] - losses["adapted"]["ce"]).cpu())
    return statistics(torch.cat(change), setting.text.documents)


def statistics(change, documents):
    """The numbers of Figure 8 for change [n, T - 1]: nats gained per token, negative if worse."""
    change = change.double()
    size, better, worse = change.abs(), change > 0, change < 0
    middle = change * ((size >= MIDDLE[0]) & (size < MIDDLE[1]))
    return {
        "tokens": change.numel(),
        "documents": len(documents.unique()),
        **with_ci90({
            "improvement": interval(change.mean(1), documents),
            "share_better": interval(better.double().mean(1), documents),
            "share_worse": interval(worse.double().mean(1), documents),
            "from_middle": ratio(middle.mean(1), change.mean(1), documents),
        }),
        "histogram": {
            "edges": EDGES.tolist(),
            "better": np.histogram(size[better], EDGES)[0].tolist(),
            "worse": np.histogram(size[worse], EDGES)[0].tolist(),
        },
    }


def tables(numbers):
    shown = (("improvement", "mean improvement (nats per token)", ".4f"),
             ("share_better", "tokens that get better", ".1%"),
             ("share_worse", "tokens that get worse", ".1%"),
             ("from_middle", "improvement from changes of 0.01 to 1 nats", ".1%"))
    rows = [[label, with_interval(numbers[name], numbers["ci90"][name], form)]
            for name, label, form in shown]
    notes = [f"{numbers['tokens']:,} tokens"]
    if numbers["ci90"]["improvement"] is None:
        notes.append(without_interval(numbers["documents"]))
    caption = "Change in each token's loss due to adapting (the paper's Figure 8)"
    return [Table(caption, ["", "± 90 % over documents"], rows, notes)]


def draw(numbers, figure):
    """Figure 8: histograms of the size of improvements and of degradations."""
    figure.set_size_inches(6, 3.6)
    axes, histogram = figure.subplots(), numbers["histogram"]
    for side, label in (("better", "loss improves"), ("worse", "loss degrades")):
        axes.stairs(histogram[side], histogram["edges"], fill=True, alpha=0.5,
                    label=f"{label}: {numbers[f'share_{side}']:.0%} of tokens")
    axes.set(xscale="log", xlabel="size of the change, |CE with SAE − CE with SAE + LoRA| (nats)",
             ylabel="held-out tokens", title="Change in each token's loss (the paper's Figure 8)")
    axes.legend()
