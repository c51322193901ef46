"""What SCR and TPP share (paper §5.1 and A.2, Tables 3 and 6; SAEBench): do a few latents carry a concept, and only it?

Linear probes learn concepts from a text's mean residual stream. A latent's effect on probe w is

    effect_i = (mean_positive z_i - mean_negative z_i) · (W_dec,i · w)

on training texts. The n latents of the greatest effect are ablated on test texts: x' = x - Σ_i z_i W_dec,i at every
token, the SAE's error staying where it is. (The paper's A.2 has it the other way round, all but these latents ablated;
the published code does this.) As probes see means over tokens, and ablating is linear, the means are enough.
"""
import torch

from lorasae.evals import saebench
from lorasae.evals.common import error_bar
from lorasae.evals.probes import hold_out, train_probes

BATCH, LEAST_STEPS = 16, 2000                           # SAEBench's 4,000 texts make 5,000 steps
THRESHOLDS = (2, 5, 10, 20, 50, 100, 500)               # how many latents are ablated


def concept_probes(features, task, seed):
    """Probes as SAEBench trains them: AdamW, lr 1e-3, 0.001 · ‖w‖₁, batches of 16, 20 epochs.

    The batch decides how much of a spurious correlation a probe picks up, so it is the same on every machine. Small
    data sets get more epochs: at this learning rate a few hundred steps leave a probe close to its random start.
    """
    part, held = hold_out(task, seed)
    steps_an_epoch = -(-part.rows.shape[1] // BATCH)
    epochs = max(20, LEAST_STEPS // steps_an_epoch)
    return train_probes(features, part, held, lr=1e-3, batch=BATCH, epochs=epochs, l1=1e-3, seed=seed)


def mean_difference(latents, rows, labels):
    """latents [n, M] -> [M]: the mean over the positive texts of `rows`, less that over the negative ones."""
    return latents[rows[labels > 0]].mean(0) - latents[rows[labels == 0]].mean(0)


def strongest(effects, n):
    """The indices of the n largest effects [M]; fewer where fewer are not zero."""
    n = min(n, int((effects != 0).sum()))
    return effects.topk(n).indices


def ablate(sae, means, latents, count_padding=False):
    """The mean residual [N, D] with some latents at zero: mean_t x - Σ_i mean_t z_i · W_dec,i.

    count_padding: as published (SAEBench, evals/scr_and_tpp/main.py, ablated_precomputed_activations), where texts are
    padded to 128 tokens with zero vectors: encode(0) is not zero for a TopK SAE, and what is "ablated" there moves the
    mean of a text by how short it is. Only tests ask for it.
    """
    z = means.latents[:, latents]
    if count_padding:
        at_zero = sae.encode(torch.zeros_like(means.residual[:1])).float()
        padding = saebench.LENGTH - means.counted[:, None]
        z = z + padding / means.counted[:, None] * at_zero[:, latents]
    return means.residual - z @ sae.W_dec[latents].float()


def naive_ablate(sae, x, counted, latents):
    """The same token by token, as SAEBench writes it: x [N, T, D], counted [N, T] bool -> [N, D]."""
    z = sae.encode(x)
    error = x - sae.decode(z)

    z[..., latents] = 0
    ablated = sae.decode(z) + error
    return (ablated * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)


def summary(setting, options, found):
    """What an evaluation returns: Table 3's maximum and average over the thresholds, Table 6's rows."""
    by_seed = saebench.over_sets(found)
    for scores in by_seed["base"] + by_seed["lora"]:
        values = [scores[f"top_{n}"] for n in THRESHOLDS]
        scores["max"] = max(values)
        scores["average"] = sum(values) / len(values)

    return {"layer": next(iter(setting.saes)), "seeds": options.seeds, "sets": list(found), "by_set": found,
            "rows": saebench.rows(by_seed)}


def draw(numbers, figure, title):
    """The score against the number of ablated latents: the mean of both models, and each data set as a thin line."""
    figure.set_size_inches(7, 3.8)
    axes = figure.subplots()

    for model, colour, label in (("base", "C0", "base"), ("lora", "C1", "LoRA")):
        for models in numbers["by_set"].values():
            one = saebench.mean_scores(models[model])
            axes.plot(THRESHOLDS, [one[f"top_{n}"] for n in THRESHOLDS], color=colour, linewidth=0.6, alpha=0.5)
        points = [numbers["rows"][f"top_{n}"] for n in THRESHOLDS]
        means = [point[model] for point in points]
        errors = [error_bar(point[f"{model}_ci90"]) for point in points]
        axes.errorbar(THRESHOLDS, means, errors, color=colour, marker="o", capsize=3, label=label)

    axes.axhline(0, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="ablated latents, n", ylabel="score", title=title)
    axes.set_xticks(THRESHOLDS, [str(n) for n in THRESHOLDS])
    axes.minorticks_off()
    axes.legend()
