"""SCR and TPP: do a few latents represent one concept, and no other? (§5.1, A.2, Tables 3 and 6)

Linear probes learn concepts from a text's mean residual stream. A latent's effect on probe w is

    effect_i = (mean_positive z_i - mean_negative z_i) · (W_dec,i · w)

on training texts. The n latents with the largest effects are ablated on test texts:

    x' = x - Σ_i z_i W_dec,i

at every token; the SAE's error term stays. (The paper's A.2 says the opposite, that all but these
latents are ablated; the published code ablates these.) Probes see means over tokens and ablation is
linear, so the means are enough. SAEBench also ablates the latents that an SAE finds in its zero
padding (evals/scr_and_tpp/main.py, ablated_precomputed_activations); here padding does not count.
"""
import torch

from lorasae.evals.probes import hold_out, train_probes

BATCH, LEAST_STEPS = 16, 2000                           # SAEBench's 4,000 texts make 5,000 steps
THRESHOLDS = (2, 5, 10, 20, 50, 100, 500)               # how many latents are ablated


def concept_probes(features, task, seed):
    """Probes as SAEBench trains them: AdamW, 0.001 · ‖w‖₁, 20 epochs or more.

    The batch decides how much of a spurious correlation a probe picks up. Small data sets get more
    epochs: at this rate a few hundred steps leave a probe close to its random start.
    """
    part, held = hold_out(task, seed)
    steps_per_epoch = -(-part.rows.shape[1] // BATCH)
    epochs = max(20, LEAST_STEPS // steps_per_epoch)
    return train_probes(features, part, held, lr=1e-3, batch=BATCH, epochs=epochs, l1=1e-3,
                        seed=seed)


def strongest(effects, n):
    """The indices of the n largest effects [M], or of all nonzero ones if there are fewer."""
    n = min(n, int((effects != 0).sum()))
    return effects.topk(n).indices


def ablate(sae, means, latents):
    """The mean residual stream [N, D] with some latents set to zero; means: Means."""
    return means.residual - means.latents[:, latents] @ sae.W_dec[latents].float()


def over_thresholds(metrics):
    """Table 3's maximum, and the average, of {"top_2": values [seeds], ...}."""
    by_threshold = torch.stack([metrics[f"top_{n}"] for n in THRESHOLDS])
    return {"max": by_threshold.amax(0), "average": by_threshold.mean(0)}
