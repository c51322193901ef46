"""Which tokens the adapters help (paper §6.1, Figure 8): the change of loss of every token, CE_sae - CE_adapted, in nats.

    python eval.py RUN_DIR --suite tokens

Both losses are with the SAEs spliced in (Figure 8's "base" is the model with SAE, not adapted), fp32, over all T - 1
predictions of each sequence. The paper: 37 % of the tokens become worse, and most of the improvement comes from changes
of 0.01 to 1 nats.
"""
import numpy as np
import torch

from lorasae.evals.common import evaluating, interval, plus_minus, progress
from lorasae.evals.fidelity import losses_by_setting
from lorasae.run import print_table

EDGES = np.logspace(-5, 1, 50)                          # nats; the paper's bins
DECADES = [0, 1e-4, 1e-3, 1e-2, 1e-1, 1, np.inf]


def evaluate(model, saes, batches, keep_special=False):
    """Improvements over batches of tokens [B, T] -> shares, histograms of their sizes, and what each size contributes."""
    changes = []
    with evaluating(model):
        for tokens in progress(batches, "tokens"):
            losses = losses_by_setting(model, saes, tokens, ("sae", "adapted"), keep_special)
            changes.append((losses["sae"].ce - losses["adapted"].ce).cpu())
    return statistics(torch.cat(changes))


def statistics(change):
    """change [n, T - 1]: the improvement of each token in nats, worse tokens negative. Intervals are over the n sequences."""
    mean, mean_half = interval(change.double().mean(1))
    worse, worse_half = interval((change < 0).double().mean(1))
    flat = change.double().flatten().numpy()
    gains, losses = flat[flat > 0], -flat[flat < 0]
    sizes = []
    for low, high in zip(DECADES, DECADES[1:]):
        gained, lost = (x[(x >= low) & (x < high)] for x in (gains, losses))
        sizes.append({"from": low, "to": high if high < np.inf else None, "share_better": len(gained) / len(flat),
                      "share_worse": len(lost) / len(flat), "gained": gained.sum() / len(flat), "lost": lost.sum() / len(flat)})
    return {"tokens": len(flat), "improvement": mean, "share_worse": worse, "share_better": (flat > 0).mean().item(),
            "gained": gains.sum() / len(flat), "lost": losses.sum() / len(flat), "by_size": sizes,
            "ci90": {"improvement": mean_half, "share_worse": worse_half},
            "histogram": {"edges": EDGES.tolist(), "better": np.histogram(gains, EDGES)[0].tolist(),
                          "worse": np.histogram(losses, EDGES)[0].tolist()}}


def show(numbers):
    total = numbers["improvement"] or np.nan
    rows = []
    for part in numbers["by_size"]:
        name = f"{part['from']:g} to {part['to']:g}" if part["to"] else f"above {part['from']:g}"
        rows.append([name, f"{part['share_better']:.1%}", f"{part['share_worse']:.1%}", f"{part['gained']:.4f}",
                     f"{part['lost']:.4f}", f"{(part['gained'] - part['lost']) / total:.1%}"])
    rows.append(["all", f"{numbers['share_better']:.1%}", f"{numbers['share_worse']:.1%}", f"{numbers['gained']:.4f}",
                 f"{numbers['lost']:.4f}", "100.0%"])
    print_table(rows, ["change (nats)", "better", "worse", "gained", "lost", "of the improvement"])
    ci = numbers["ci90"]
    print(f"\n{numbers['share_worse']:.1%} {plus_minus(ci['share_worse'], '.1%')} of {numbers['tokens']:,} tokens become worse; "
          f"mean improvement {numbers['improvement']:.4f} {plus_minus(ci['improvement'])} nats a token")


def draw(numbers, figure):
    """Figure 8: histograms of the size of improvements and of degradations."""
    figure.set_size_inches(6, 3.6)
    axes, histogram = figure.subplots(), numbers["histogram"]
    for side, label, color in (("better", "loss improves", "C0"), ("worse", "loss degrades", "C1")):
        axes.stairs(histogram[side], histogram["edges"], fill=True, alpha=0.5, color=color,
                    label=f"{label}: {numbers[f'share_{side}']:.0%} of tokens")
    axes.set_xscale("log")
    axes.set(xlabel="size of the change, |CE with SAE − CE with SAE + LoRA| (nats)", ylabel="held-out tokens",
             title="Change of loss a token (the paper's Figure 8)")
    axes.legend()
