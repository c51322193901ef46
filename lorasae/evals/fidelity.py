"""Fidelity (paper §4): what splicing the SAEs in costs, and how much of that the adapters win back.

    base     the untouched model                zero   the SAEs' layers set to zero: the worst a reconstruction can do
    sae      the SAEs spliced in                lora   adapted, without SAEs: what adapting did to the model itself
    adapted  SAEs spliced in and adapters on

    gap closed = (CE_sae - CE_adapted) / (CE_sae - CE_base),   loss recovered = (CE_zero - CE_·) / (CE_zero - CE_base)

CE is the next-token cross-entropy and KL is KL(base ‖ ·), both in nats a token, over the T - 1 predictions of each
sequence (BOS is a predictor, as in the paper). All SAEs are spliced in at once (§4.3's compound loss); BOS and EOS keep
their activation where the SAEs were trained without them. Intervals are 90 %, over sequences; differences are paired.

Exercised by `python eval.py RUN_DIR --suite fidelity`. Shapes: B batch, T tokens, D d_model, n sequences.
"""
from contextlib import nullcontext

import torch

from lorasae.runs import distributed
from lorasae.adapt import first_differing
from lorasae.io.corpus import special_mask
from lorasae.evals.common import evaluating, interval, percent, plus_minus, progress, ratio
from lorasae.lora import base
from lorasae.objectives import token_losses
from lorasae.runs.folder import print_table
from lorasae.sae import splice

SETTINGS = {"base": "base model", "sae": "with SAE", "adapted": "with SAE + LoRA", "lora": "LoRA, no SAE",
            "zero": "SAE layers zeroed"}


def evaluate(model, saes, batches, settings=("base", "sae", "adapted"), keep_special=False):
    """Runs each setting over the batches of tokens [B, T]; returns {setting: {"ce": [n], "kl": [n], "l0", "ev"}}.

    ce and kl are sequence means, fp64; l0 (active latents) and ev (explained variance, 1 - Σ‖x - x̂‖² / Σ‖x - mean x‖²)
    are {layer: value} over the positions that are not BOS or EOS, for the settings `sae` and `adapted`.
    """
    found = {name: {"ce": [], "kl": []} for name in settings}
    seen = {name: {layer: [] for layer in saes} for name in settings}
    with evaluating(model):
        for tokens in progress(distributed.portion(batches, model), "fidelity"):
            for name, losses in losses_by_setting(model, saes, tokens, settings, keep_special, seen).items():
                found[name]["ce"].append(losses.ce.double().mean(1).cpu())
                found[name]["kl"].append(losses.kl.double().mean(1).cpu())
    found, seen = distributed.merge(found, model), distributed.merge(seen, model)
    out = {name: {loss: torch.cat(parts) for loss, parts in values.items()} for name, values in found.items()}
    for name in {"sae", "adapted"} & out.keys():
        sums = {layer: [sum(column) for column in zip(*rows)] for layer, rows in seen[name].items()}
        out[name]["l0"] = {layer: (active / n).item() for layer, (n, active, *_) in sums.items()}
        out[name]["ev"] = {layer: (1 - error / (square - total.square().sum() / n)).item()
                           for layer, (n, _, error, square, total) in sums.items()}
    return out


@torch.no_grad()
def losses_by_setting(model, saes, tokens, settings, keep_special=False, seen=None):
    """{setting: TokenLosses of [B, T - 1]} for tokens [B, T]. seen: {setting: {layer: a list for walk's sums}}."""
    tokens = tokens.to(model.device)
    depth, first = len(model.layers), first_differing(model, saes)
    special = special_mask(tokens, model.config.bos_token_id, model.config.eos_token_id)
    keep = special if keep_special else None
    with base(model):
        x = model.run(model.embed(tokens), 0, first)            # shared by every setting
        target = model.norm(model.run(x, first, depth))
    out = {}
    for name in settings:
        with nullcontext() if name in ("adapted", "lora") else base(model):
            if name == "base":
                hidden = target
            elif name == "lora":
                hidden = model.norm(model.run(x, first, depth))
            elif name == "zero":
                hidden = model.norm(walk(model, x, first, {layer: torch.zeros_like for layer in saes}))
            else:
                hidden = model.norm(walk(model, x, first, saes, keep, special, seen and seen[name]))
        other = None if name == "base" else target[:, :-1]
        out[name] = token_losses(hidden[:, :-1], tokens[:, 1:], model.head, model.softcap, other)
    if "base" in out:
        out["base"] = out["base"]._replace(kl=torch.zeros_like(out["base"].ce))
    return out


def walk(model, x, start, saes, keep=None, special=None, seen=None):
    """model.run(x, start, depth, saes, keep), also where an SAE of block start - 1 has yet to be applied to x.

    seen[layer] gets, for what the SAE reads at positions that are not special: their number, Σ active latents,
    Σ‖x - x̂‖², Σ‖x‖² and Σx, in fp64.
    """
    for layer in sorted(saes):
        if layer >= start:
            x = model.run(x, start, layer + 1)
            start = layer + 1
        x_hat = saes[layer](x)
        if seen is not None:
            read, error = x[~special].float(), (x - x_hat)[~special].float()
            active = sum((saes[layer].encode(part) > 0).sum() for part in read.split(256))     # [256, M] at a time
            sums = (len(read), active, *(y.square().sum(dtype=torch.float64) for y in (error, read)),
                    read.sum(0, dtype=torch.float64))
            seen[layer].append([torch.as_tensor(value, dtype=torch.float64).cpu() for value in sums])
        x = splice(x, lambda _: x_hat, keep)
    return model.run(x, start, len(model.layers))


def summary(results):
    """The plain numbers of results.json: token means, the part of the gap closed, L0 a layer, and under "ci90" the half
    widths of their confidence intervals (None for a single sequence)."""
    out, widths, ce = {}, {}, {name: values["ce"] for name, values in results.items()}

    def note(name, value_and_half):
        out[name], widths[name] = value_and_half

    for name in results:
        note(f"ce_{name}", interval(ce[name]))
        if name != "base":
            note(f"kl_{name}", interval(results[name]["kl"]))
        if name != "base" and "base" in ce:
            note(f"excess_{name}", interval(ce[name] - ce["base"]))             # what the setting costs, in nats a token
        if name not in ("base", "zero") and {"base", "zero"} <= ce.keys():
            note(f"loss_recovered_{name}", ratio(ce["zero"] - ce[name], ce["zero"] - ce["base"]))
    if {"base", "sae", "adapted"} <= ce.keys():
        note("gap_closed", ratio(ce["sae"] - ce["adapted"], ce["sae"] - ce["base"]))
    for name, suffix in (("sae", "_sae"), ("adapted", "")):
        if name in results:
            out["l0" + suffix], out["explained_variance" + suffix] = results[name]["l0"], results[name]["ev"]
    return {**out, "ci90": widths}


def table(numbers):
    """Rows and headings for run.print_table: one row a setting."""
    rows, half = [], {name: plus_minus(width) for name, width in numbers["ci90"].items()}
    for name, label in SETTINGS.items():
        if f"ce_{name}" in numbers:
            excess, kl = f"excess_{name}", f"kl_{name}"
            rows.append([label, numbers[f"ce_{name}"], numbers.get(excess, 0.0), half.get(excess, ""),
                         numbers.get(kl, 0.0), half.get(kl, "")])
            if "ce_zero" in numbers:
                rows[-1].append(percent(numbers.get(f"loss_recovered_{name}")))
    more = ["loss recovered"] if "ce_zero" in numbers else []
    return rows, ["", "CE (nats)", "above base", "90 % CI", "KL (nats)", "90 % CI", *more]


def show(numbers):
    print_table(*table(numbers))
    sides = [side for side in ("_sae", "") if "l0" + side in numbers]
    rows = [[f"SAE at layer {layer}"] for layer in numbers["l0_sae"]]
    for row, layer in zip(rows, numbers["l0_sae"]):
        for side in sides:
            row += [f"{numbers['l0' + side][layer]:.2f}", percent(numbers["explained_variance" + side][layer])]
    print()
    print_table(rows, ["", "L0", "explained variance", "L0, adapted", "explained variance"][:1 + 2 * len(sides)])
    if "gap_closed" in numbers:
        closed, half = numbers["gap_closed"], numbers["ci90"]["gap_closed"]
        print("\nthe SAE costs nothing" if closed is None else f"\ngap closed {closed:.1%} {plus_minus(half, '.1%')}")


def draw(numbers, figure):
    """CE above the base model's and KL of each setting: one point of Figures 3, 4 and 6; and the loss during training."""
    training = numbers.get("training")
    figure.set_size_inches(12 if training else 8, 2.6)
    first, second, *rest = figure.subplots(1, 3 if training else 2)
    names = [name for name in ("lora", "adapted", "sae") if f"kl_{name}" in numbers]
    for axes, key, label in ((first, "excess", "cross-entropy above the base model's"), (second, "kl", "KL from the base model")):
        values, halves = zip(*((numbers[f"{key}_{name}"], numbers["ci90"][f"{key}_{name}"] or 0) for name in names))
        axes.errorbar(values, [SETTINGS[name] for name in names], xerr=halves, fmt="o", capsize=4)
        axes.axvline(0, color="grey", linewidth=1)
        axes.set_xlabel(f"{label} (nats/token)")
        axes.margins(y=0.3)
    second.tick_params(labelleft=False)
    for axes in rest:
        axes.plot(training["tokens"], training["loss"], linewidth=1)
        axes.set(xlabel="training tokens", ylabel=training["name"])
    figure.suptitle("Fidelity, 90 % intervals over sequences (a point of the paper's Figures 3, 4 and 6)", fontsize=10)
