"""Fidelity (paper §4.1): what splicing the SAEs in costs, and how much of that the adapters win back.

    base     the untouched model                      zero   the SAEs' layers set to zero: the worst a reconstruction can do
    sae      the SAEs spliced in                      lora   adapted, without SAEs: what adapting did to the model itself
    adapted  SAEs spliced in and adapters on

    gap closed = (CE_sae - CE_adapted) / (CE_sae - CE_base),   loss recovered = (CE_zero - CE_·) / (CE_zero - CE_base)

CE is the next-token cross-entropy and KL is KL(base ‖ ·), both in nats a token, over the T - 1 predictions of each sequence
(BOS is a predictor). Exercised by `python eval.py RUN_DIR --suite fidelity`. Shapes: B batch, T tokens, D d_model.
"""
from contextlib import nullcontext

import torch

from lorasae.adapt import first_differing
from lorasae.data import special_mask
from lorasae.lora import adapters, base
from lorasae.objectives import token_losses
from lorasae.sae import splice

Z90 = 1.6448536                                         # 90 % of a normal distribution lies within ± this many deviations


def evaluate(model, saes, batches, settings=("base", "sae", "adapted"), keep_special=False):
    """Runs each setting over the batches of tokens [B, T]; returns {setting: {"ce": [n], "kl": [n], "l0", "ev"}}.

    ce and kl are sequence means, fp64, one a sequence; l0 and ev (explained variance) are {layer: mean over the positions
    that are not BOS or EOS}, for the settings with SAEs.
    """
    depth, first = len(model.layers), first_differing(model, saes)
    sums = {name: {"ce": [], "kl": [], "stats": {layer: torch.zeros(4, dtype=torch.float64) for layer in saes}} for name in settings}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for tokens in batches:
            tokens = tokens.to(model.device)
            special = special_mask(tokens, model.config.bos_token_id, model.config.eos_token_id)
            keep = special if keep_special else None
            with base(model):
                x = model.run(model.embed(tokens), 0, first)            # shared by every setting
                target = model.norm(model.run(x, first, depth))
            for name in settings:
                adapters_on = name in ("adapted", "lora")
                with nullcontext() if adapters_on else base(model):
                    if name == "base":
                        hidden = target
                    elif name == "lora":
                        hidden = model.norm(model.run(x, first, depth))
                    else:
                        spliced = {layer: torch.zeros_like for layer in saes} if name == "zero" else saes
                        stats = sums[name]["stats"] if name != "zero" else {}
                        hidden = model.norm(walk(model, x, first, spliced, keep if name != "zero" else None, special, stats))
                losses = token_losses(hidden[:, :-1], tokens[:, 1:], model.head, model.softcap, target[:, :-1])
                sums[name]["ce"] += losses.ce.double().mean(1).tolist()
                sums[name]["kl"] += losses.kl.double().mean(1).tolist()
    model.train(was_training)
    out = {}
    for name, values in sums.items():
        out[name] = {"ce": torch.tensor(values["ce"]), "kl": torch.tensor(values["kl"])}
        if name in ("sae", "adapted"):
            out[name]["l0"] = {layer: (active / n).item() for layer, (active, n, _, _) in values["stats"].items()}
            out[name]["ev"] = {layer: (1 - lost / total).item() for layer, (_, _, lost, total) in values["stats"].items()}
    return out


def walk(model, x, start, saes, keep, special, stats):
    """model.run(x, start, depth, saes, keep), pausing before each SAE to add to its stats.

    stats[layer] sums active latents, positions, ‖x - x̂‖² and ‖x - mean x‖² over the positions that are not special.
    """
    for layer in sorted(saes):
        if layer >= start:
            x = model.run(x, start, layer + 1)
            start = layer + 1
        if layer in stats:
            seen = x[~special]
            x_hat, mean = saes[layer](seen), seen.float().mean(0)
            active = torch.cat([(saes[layer].encode(part) > 0).sum(-1) for part in seen.split(256)]).sum()
            stats[layer] += torch.stack([active.double(), torch.tensor(len(seen)).to(active), (seen - x_hat).float().pow(2).sum(),
                                         (seen.float() - mean).pow(2).sum()]).double().cpu()
        x = splice(x, saes[layer], keep)
    return model.run(x, start, len(model.layers))


def summary(results):
    """The plain numbers of results.json: token means, the part of the gap closed, L0 a layer."""
    mean = {name: {loss: values[loss].mean().item() for loss in ("ce", "kl")} for name, values in results.items()}
    out = {f"{loss}_{name}": mean[name][loss] for name in mean for loss in ("ce", "kl") if (name, loss) != ("base", "kl")}
    if {"base", "sae", "adapted"} <= mean.keys():
        out["gap_closed"] = gap_closed(*(mean[name]["ce"] for name in ("base", "sae", "adapted")))
    for name in ("sae", "adapted"):
        if name in results:
            out["l0" if name == "adapted" else "l0_sae"] = results[name]["l0"]
            out["explained_variance" if name == "adapted" else "explained_variance_sae"] = results[name]["ev"]
    return out


def gap_closed(base, sae, adapted):
    """The part of the loss that the SAE cost which adapting wins back, a fraction; None where the SAE costs nothing."""
    return (sae - adapted) / (sae - base) if sae != base else None


def table(numbers):
    """Rows and headings for run.print_table: one row a setting."""
    settings = [("base", "base model"), ("sae", "with SAE"), ("adapted", "with SAE + LoRA"), ("lora", "LoRA, no SAE"),
                ("zero", "SAE layers zeroed")]
    rows = [(label, numbers[f"ce_{name}"], numbers.get(f"kl_{name}", 0.0)) for name, label in settings if f"ce_{name}" in numbers]
    return rows, ("", "CE (nats)", "KL (nats)")
