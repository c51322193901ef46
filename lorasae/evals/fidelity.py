"""Fidelity (paper §4): what splicing the SAEs in costs, and how much of that the adapters win back.

    base     the untouched model                zero   the SAEs' layers set to zero: the worst a reconstruction can do
    sae      the SAEs spliced in                lora   adapted, without SAEs: what adapting did to the model itself
    adapted  SAEs spliced in and adapters on

    gap closed = (CE_sae - CE_adapted) / (CE_sae - CE_base),   loss recovered = (CE_zero - CE_·) / (CE_zero - CE_base)
    KL gap closed = (KL_sae - KL_adapted) / KL_sae

CE is the next-token cross-entropy and KL is KL(base ‖ ·), both in nats a token, over the T - 1 predictions of each
sequence (BOS is a predictor, as in the paper). All SAEs are spliced in at once (§4.3's compound loss). Where an SAE does
not raise CE by more than its interval there is no CE gap to close a part of; the KL gap is always there. Intervals are
90 %, over sequences; differences are paired.

    python eval.py RUN_DIR --suite fidelity

Shapes: B batch, T tokens, D d_model, n sequences.
"""
import json
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from lorasae.adapt import first_differing
from lorasae.evals.common import evaluating, interval, percent, plus_minus, print_table, progress, ratio
from lorasae.lora import base
from lorasae.objectives import token_losses
from lorasae.sae import splice

SETTINGS = {"base": "base model", "sae": "with SAE", "adapted": "with SAE + LoRA", "lora": "LoRA, no SAE",
            "zero": "SAE layers zeroed"}
ADAPTED = ("adapted", "lora")                           # the settings with adapters on
WATCHED = ("sae", "adapted")                            # the settings whose SAEs are measured too


# ---- Measuring ---------------------------------------------------------------------------------------------------------

def evaluate(setting, options):
    """Every setting that the run has -> what eval-fidelity.json holds."""
    adapts = setting.config.method == "lora"
    settings = ("base", "sae", "adapted", "lora", "zero") if adapts else ("base", "sae", "zero")
    held_out = setting.text.held_out
    results = measure(setting.model, setting.saes, held_out.split(setting.config.eval_batch), settings)
    return {**summary(results), "eval_tokens": held_out.numel(), "training": training_curve(setting.folder)}


def measure(model, saes, batches, settings=("base", "sae", "adapted"), gather=lambda found: found):
    """Runs each setting over the batches of tokens [B, T]; returns {setting: {"ce": [n], "kl": [n], "l0", "ev"}}.

    ce and kl are sequence means, fp64; l0 (active latents) and ev (explained variance, 1 - Σ‖x - x̂‖² / Σ‖x - mean x‖²)
    are {layer: value} over the positions that are not BOS or EOS, for the settings `sae` and `adapted`. gather: of
    several processes, puts together what each found in its part of the batches (dicts of dicts of lists).
    """
    found = {name: {"ce": [], "kl": []} for name in settings}
    seen = {name: {layer: [] for layer in saes} for name in settings}
    with evaluating(model):
        for tokens in progress(batches, "fidelity"):
            for name, losses in losses_by_setting(model, saes, tokens, settings, seen).items():
                found[name]["ce"].append(losses.ce.double().mean(1).cpu())
                found[name]["kl"].append(losses.kl.double().mean(1).cpu())
    found, seen = gather(found), gather(seen)

    results = {}
    for name in settings:
        results[name] = {loss: torch.cat(parts) for loss, parts in found[name].items()}
        if name in WATCHED:
            totals = {layer: total(sums) for layer, sums in seen[name].items()}
            results[name]["l0"] = {layer: sums.l0 for layer, sums in totals.items()}
            results[name]["ev"] = {layer: sums.explained_variance for layer, sums in totals.items()}
    return results


@torch.no_grad()
def losses_by_setting(model, saes, tokens, settings, seen=None):
    """{setting: TokenLosses of [B, T - 1]} for tokens [B, T]. seen: {setting: {layer: a list to add Sums to}}."""
    tokens = tokens.to(model.device)
    first = first_differing(model, saes)
    with base(model):
        x = model.run(model.embed(tokens), 0, first)            # shared by every setting
        target = model.norm(model.run(x, first, len(model.layers)))

    losses = {}
    for name in settings:
        watched = seen[name] if seen is not None and name in WATCHED else None
        with nullcontext() if name in ADAPTED else base(model):
            hidden = target if name == "base" else final_hidden(model, saes, tokens, x, first, name, watched)
        other = None if name == "base" else target[:, :-1]
        losses[name] = token_losses(hidden[:, :-1], tokens[:, 1:], model.head, model.softcap, other)
    if "base" in losses:
        losses["base"] = losses["base"]._replace(kl=torch.zeros_like(losses["base"].ce))
    return losses


def final_hidden(model, saes, tokens, x, first, name, watched=None):
    """The final hidden state [B, T, D] of a setting, from the shared x before block `first`."""
    special = model.special(tokens)
    if name == "lora":
        saes = {}
    elif name == "zero":
        saes = dict.fromkeys(saes, Zero())
    elif watched is not None:
        saes = {layer: Watched(sae, special, watched[layer]) for layer, sae in saes.items()}
    if first - 1 in saes:
        x = splice(x, saes[first - 1], special)
    return model.norm(model.run(x, first, len(model.layers), saes, special))


class Zero:
    """In place of an SAE: the worst reconstruction."""

    def __call__(self, x):
        return torch.zeros_like(x)


class Sums(NamedTuple):
    """What an SAE did at the positions that are not BOS or EOS, in sums that can be added up; all fp64."""
    positions: torch.Tensor
    active: torch.Tensor                                # latents
    error: torch.Tensor                                 # Σ‖x - x̂‖²
    square: torch.Tensor                                # Σ‖x‖²
    x: torch.Tensor                                     # [D] Σ x

    @property
    def l0(self):
        return (self.active / self.positions).item()

    @property
    def explained_variance(self):
        """1 - Σ‖x - x̂‖² / Σ‖x - mean x‖²"""
        variance = self.square - self.x.square().sum() / self.positions
        return (1 - self.error / variance).item()


def total(parts):
    """The sum of several Sums."""
    return Sums(*(sum(column) for column in zip(*parts)))


class Watched:
    """An SAE that notes what it does: calling it adds a Sums to `notes`."""

    def __init__(self, sae, special, notes):
        self.sae, self.special, self.notes = sae, special, notes
        self.on_special = getattr(sae, "on_special", True)

    def __call__(self, x):
        x_hat = self.sae(x)
        read = x[~self.special].float()
        error = (x - x_hat)[~self.special].float()
        active = sum((self.sae.encode(part) > 0).sum() for part in read.split(256))        # [256, M] at a time
        sums = Sums(
            positions=torch.tensor(len(read)), active=torch.as_tensor(active),
            error=error.square().sum(dtype=torch.float64), square=read.square().sum(dtype=torch.float64),
            x=read.sum(0, dtype=torch.float64))
        self.notes.append([value.double().cpu() for value in sums])
        return x_hat


# ---- Summing up --------------------------------------------------------------------------------------------------------

def summary(results):
    """The plain numbers of results.json: token means, the part of the gap closed, L0 a layer, and under "ci90" the half
    widths of their confidence intervals (None for a single sequence)."""
    numbers, widths = {}, {}
    ce = {name: values["ce"] for name, values in results.items()}
    kl = {name: values["kl"] for name, values in results.items()}

    def note(name, value_and_half):
        numbers[name], widths[name] = value_and_half

    for name in results:
        note(f"ce_{name}", interval(ce[name]))
        if name != "base":
            note(f"kl_{name}", interval(kl[name]))
        if name != "base" and "base" in ce:
            note(f"excess_{name}", interval(ce[name] - ce["base"]))             # what the setting costs, in nats a token
        if name not in ("base", "zero") and {"base", "zero"} <= ce.keys():
            note(f"loss_recovered_{name}", ratio(ce["zero"] - ce[name], ce["zero"] - ce["base"]))

    if {"base", "sae", "adapted"} <= ce.keys():
        if costs(numbers["excess_sae"], widths["excess_sae"]):
            note("gap_closed", ratio(ce["sae"] - ce["adapted"], ce["sae"] - ce["base"]))
        else:
            note("gap_closed", (None, None))
        note("kl_gap_closed", ratio(kl["sae"] - kl["adapted"], kl["sae"]))
    for name, suffix in (("sae", "_sae"), ("adapted", "")):
        if name in results:
            numbers["l0" + suffix] = results[name]["l0"]
            numbers["explained_variance" + suffix] = results[name]["ev"]
    return {**numbers, "ci90": widths}


def costs(excess, half):
    """Whether the SAE raises CE at all: by more than its interval, or by anything where there is none."""
    return excess > (half or 0)


def training_curve(folder):
    """The loss that metrics.jsonl holds, for a picture: {"name", "tokens": [..], "loss": [..]}; None without the file."""
    path = folder and Path(folder) / "metrics.jsonl"
    if not path or not path.exists():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    key, label = ("fvu", "FVU") if "fvu" in lines[0] else ("kl", "KL in training (nats/token)")
    if key not in lines[0]:
        return None                                     # several adapters in one pass: each has its own run's folder
    return {"name": label, "tokens": [line["tokens"] for line in lines], "loss": [line[key] for line in lines]}


# ---- Showing -----------------------------------------------------------------------------------------------------------

def table(numbers):
    """Rows and headings for print_table: one row a setting."""
    half = {name: plus_minus(width) for name, width in numbers["ci90"].items()}
    zeroed = "ce_zero" in numbers
    rows = []
    for name, label in SETTINGS.items():
        if f"ce_{name}" not in numbers:
            continue
        excess, kl = f"excess_{name}", f"kl_{name}"
        row = [label, numbers[f"ce_{name}"]]
        row += [numbers.get(excess, 0.0), half.get(excess, "")]
        row += [numbers.get(kl, 0.0), half.get(kl, "")]
        if zeroed:
            row.append(percent(numbers.get(f"loss_recovered_{name}")))
        rows.append(row)
    headings = ["", "CE (nats)", "above base", "90 % CI", "KL (nats)", "90 % CI"]
    return rows, headings + ["loss recovered"] * zeroed


def closed(numbers):
    """The line on how much of the gap the adapters close."""
    kl = f"KL gap closed {percent(numbers['kl_gap_closed'])} {plus_minus(numbers['ci90']['kl_gap_closed'], '.1%')}"
    if numbers["gap_closed"] is not None:
        return f"gap closed {numbers['gap_closed']:.1%} {plus_minus(numbers['ci90']['gap_closed'], '.1%')}   {kl}"
    if numbers["excess_sae"] < 0:
        return f"the SAE lowers the cross-entropy here, so there is no gap in it to close   {kl}"
    return f"the SAE costs no cross-entropy beyond its interval, so there is no gap in it to close   {kl}"


def show(numbers):
    print_table(*table(numbers))
    sides = [side for side in ("_sae", "") if "l0" + side in numbers]
    rows = []
    for layer in numbers["l0_sae"]:
        row = [f"SAE at layer {layer}"]
        for side in sides:
            row += [f"{numbers['l0' + side][layer]:.2f}", percent(numbers["explained_variance" + side][layer])]
        rows.append(row)
    print()
    print_table(rows, ["", "L0", "explained variance", "L0, adapted", "explained variance"][:1 + 2 * len(sides)])
    if "gap_closed" in numbers:
        print(f"\n{closed(numbers)}")


def draw(numbers, figure):
    """CE above the base model's and KL of each setting: one point of Figures 3, 4 and 6; and the loss during training."""
    training = numbers.get("training")
    figure.set_size_inches(12 if training else 8, 2.6)
    first, second, *rest = figure.subplots(1, 3 if training else 2)
    names = [name for name in ("lora", "adapted", "sae") if f"kl_{name}" in numbers]
    labels = [SETTINGS[name] for name in names]
    panels = (first, "excess", "cross-entropy above the base model's"), (second, "kl", "KL from the base model")
    for axes, key, label in panels:
        values = [numbers[f"{key}_{name}"] for name in names]
        halves = [numbers["ci90"][f"{key}_{name}"] or 0 for name in names]
        axes.errorbar(values, labels, xerr=halves, fmt="o", capsize=4)
        axes.axvline(0, color="grey", linewidth=1)
        axes.set_xlabel(f"{label} (nats/token)")
        axes.margins(y=0.3)
    second.tick_params(labelleft=False)
    for axes in rest:
        axes.plot(training["tokens"], training["loss"], linewidth=1)
        axes.set(xlabel="training tokens", ylabel=training["name"])
    title = "Fidelity, 90 % intervals over sequences (a point of the paper's Figures 3, 4 and 6)"
    if numbers.get("kl_gap_closed") is not None:
        title += f"; {closed(numbers).replace('   ', '; ')}"
    figure.suptitle(title, fontsize=9)
