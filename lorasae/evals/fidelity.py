"""Fidelity (paper §4): what splicing the SAEs in costs, and how much of that training wins back.

    base     the untouched model
    before   SAEs that a run trained, as they came: without adapters, before the first step
    sae      the SAEs spliced in, without adapters
    adapted  the SAEs spliced in and the adapters on
    lora     the adapters on, without SAEs: what adapting did to the model itself
    zero     zeros in place of every activation that the SAEs replace: the worst reconstruction

    gap            CE_sae - CE_base, of the SAEs as they came: CE_before - CE_base if they trained
    gap closed     (gap - (CE_end - CE_base)) / gap        end: adapted, or sae without adapters
    KL gap closed  (KL - KL_end) / KL                      KL: of the SAEs as they came
    won back       (CE_sae - CE_adapted) / (CE_sae - CE_base) around SAEs that trained too
    by adapters
    loss recovered (CE_zero - CE_·) / (CE_zero - CE_base)

"Gap" means the gap of the SAEs as they came, and nothing else. CE is the next-token cross-entropy
and KL is KL(base ‖ ·), both in nats per token, over the T - 1 predictions of each sequence (BOS is
a predictor, as in the paper). All SAEs are spliced in at once (§4.3's compound loss). If an SAE
does not raise CE by more than its interval, there is no CE gap to close; there is always a KL gap.

Intervals are 90 %, over documents: sequences of one document are not independent (common.py).
Differences are paired by sequence.

    python eval.py RUN_DIR --suite fidelity

Shapes: B batch, T tokens, D d_model, n sequences.
"""
from contextlib import nullcontext
from typing import NamedTuple

import torch

from lorasae.adapt import first_differing
from lorasae.evals.common import (count_documents, error_bar, evaluating, interval, percent,
                                  plus_minus, print_table, progress, ratio, without_interval)
from lorasae.io.files import read_json, read_metrics
from lorasae.lora import base
from lorasae.objectives import token_losses
from lorasae.sae import splice

SETTINGS = {
    "base": "base model",
    "before": "with SAE as it came",
    "sae": "with SAE",
    "adapted": "with SAE + LoRA",
    "lora": "LoRA, no SAE",
    "zero": "SAE layers zeroed",
}
ADAPTED = ("adapted", "lora")                           # the settings with adapters on
WATCHED = ("sae", "adapted")                            # the settings whose SAEs are measured too
SUFFIX = {"before": "_before", "sae": "_sae", "adapted": ""}        # of their L0 in results.json


# ---- Measuring ---------------------------------------------------------------------------------

def evaluate(setting, options):
    """Every setting of the run -> what eval-fidelity.json holds."""
    config, text = setting.config, setting.text
    names = ["base", "sae", "zero"]
    if config.method == "lora":
        names += ["adapted", "lora"]
    batches = text.held_out.split(config.eval_batch)
    results = measure(setting.model, setting.saes, batches, names)

    # An SAE that the run trained has changed since: what it cost as it came is on file
    before = None
    if config.method == "finetune" or config.train_sae:
        before = read_results(setting.folder / "before.json")

    return {
        **summary(results, text.documents, before),
        "eval_tokens": text.held_out.numel(),
        "training": training_curve(setting.folder),
    }


def measure(model, saes, batches, settings=("base", "sae", "adapted"), gather=lambda found: found):
    """Runs each setting over batches of tokens [B, T] -> {setting: {"ce": [n], "kl": [n], "l0",
    "ev"}}.

    ce and kl are means over a sequence, fp64. l0 (active latents) and ev (explained variance,
    1 - Σ‖x - x̂‖² / Σ‖x - mean x‖²) are {layer: value} over all positions but BOS and EOS, for the
    settings `sae` and `adapted`. gather: with several processes, joins what each found in its part
    of the batches (dicts of dicts of lists).
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
    """{setting: TokenLosses of [B, T - 1]} for tokens [B, T].

    seen: {setting: {layer: a list to add Sums to}}.
    """
    tokens = tokens.to(model.device)
    first = first_differing(model, saes)
    with base(model):
        x = model.run(model.embed(tokens), 0, first)            # shared by every setting
        target = model.norm(model.run(x, first, len(model.layers)))

    losses = {}
    for name in settings:
        watched = seen[name] if seen is not None and name in WATCHED else None
        if name == "base":
            hidden, other = target, None
        else:
            with nullcontext() if name in ADAPTED else base(model):
                hidden = final_hidden(model, saes, tokens, x, first, name, watched)
            other = target[:, :-1]
        found = token_losses(hidden[:, :-1], tokens[:, 1:], model.head, model.softcap, other)
        if name == "base":
            found = found._replace(kl=torch.zeros_like(found.ce))
        losses[name] = found
    return losses


def final_hidden(model, saes, tokens, x, first, name, watched=None):
    """The final hidden state [B, T, D] of a setting, from the shared x before block `first`."""
    special = model.special(tokens)
    if name == "lora":
        saes = {}
    elif name == "zero":
        saes = {layer: Zero(sae) for layer, sae in saes.items()}
    elif watched is not None:
        saes = {layer: Watched(sae, special, watched[layer]) for layer, sae in saes.items()}
    if first - 1 in saes:
        x = splice(x, saes[first - 1], special)
    return model.norm(model.run(x, first, len(model.layers), saes, special))


class InPlaceOf:
    """Stands where an SAE stands, with another reconstruction.

    `splice` alone decides which positions are replaced. Whatever it asks of the SAE (`on_special`)
    the SAE itself answers, so that BOS and EOS are treated alike in every setting.
    """

    def __init__(self, sae):
        self.sae = sae

    def __getattr__(self, name):
        return getattr(self.sae, name)


class Zero(InPlaceOf):
    """The worst reconstruction: zeros at every position that the SAE replaces.

    An SAE that leaves BOS and EOS alone leaves them alone here too.
    """

    def __call__(self, x):
        return torch.zeros_like(x)


class Sums(NamedTuple):
    """What an SAE did at all positions but BOS and EOS, in sums that can be added up; all fp64."""
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


class Watched(InPlaceOf):
    """The SAE itself, which notes what it does: each call adds a Sums to `notes`."""

    def __init__(self, sae, special, notes):
        super().__init__(sae)
        self.special, self.notes = special, notes

    def __call__(self, x):
        x_hat = self.sae(x)
        read = x[~self.special].float()
        error = (x - x_hat)[~self.special].float()
        active = sum((self.sae.encode(part) > 0).sum() for part in read.split(256))     # [256, M]
        sums = Sums(
            positions=torch.tensor(len(read)),
            active=torch.as_tensor(active),
            error=error.square().sum(dtype=torch.float64),
            square=read.square().sum(dtype=torch.float64),
            x=read.sum(0, dtype=torch.float64),
        )
        self.notes.append([value.double().cpu() for value in sums])
        return x_hat


# ---- Results as files ---------------------------------------------------------------------------

def as_json(results):
    """What `measure` returns, as plain values. read_results gives back every bit of them."""
    plain = {}
    for name, values in results.items():
        plain[name] = {key: value.tolist() if isinstance(value, torch.Tensor) else value
                       for key, value in values.items()}
    return plain


def read_results(path):
    """What `measure` returned, from a file of its as_json."""
    results = {}
    for name, values in read_json(path).items():
        found = {loss: torch.tensor(values[loss], dtype=torch.float64) for loss in ("ce", "kl")}
        for key in ("l0", "ev"):
            if key in values:
                found[key] = {int(layer): value for layer, value in values[key].items()}
        results[name] = found
    return results


# ---- Summing up --------------------------------------------------------------------------------

def summary(results, documents=None, before=None):
    """The plain numbers of results.json: means over tokens, the parts of the gap closed, L0 and
    explained variance of each layer, and under "ci90" the half widths of their intervals.

    results: what `measure` found after training. documents: [n] int, the document of each
    sequence; None: each sequence is a document of its own. before: of SAEs that trained, the
    settings base and sae as `measure` found them before the first step.

    A half width is None if there are too few documents for an interval. Then gap_closed is the
    plain ratio of an SAE that raises CE at all.
    """
    if before is not None:
        results = {**results, "before": before["sae"]}
    ce = {name: values["ce"] for name, values in results.items()}
    kl = {name: values["kl"] for name, values in results.items()}
    numbers, widths = {}, {}

    def note(name, value_and_half):
        numbers[name], widths[name] = value_and_half

    # What each setting costs, in nats per token
    for name in results:
        note(f"ce_{name}", interval(ce[name], documents))
        if name != "base":
            note(f"kl_{name}", interval(kl[name], documents))
        if name != "base" and "base" in ce:
            note(f"excess_{name}", interval(ce[name] - ce["base"], documents))
        if name not in ("base", "zero") and {"base", "zero"} <= ce.keys():
            recovered = ratio(ce["zero"] - ce[name], ce["zero"] - ce["base"], documents)
            note(f"loss_recovered_{name}", recovered)

    # What training closed of the gap of the SAEs as they came
    start = "sae" if before is None else "before"
    end = "adapted" if "adapted" in results else "sae"
    if {"base", start, end} <= ce.keys() and start != end:
        gap = ce[start] - ce["base"]
        closed = (None, None)
        if costs(numbers[f"excess_{start}"], widths[f"excess_{start}"]):
            closed = ratio(ce[start] - ce[end], gap, documents)
        note("gap_closed", closed)
        note("kl_gap_closed", ratio(kl[start] - kl[end], kl[start], documents))

    # What adapters won back of the cost of SAEs that trained beside them: no part of the gap
    if before is not None and {"base", "sae", "adapted"} <= ce.keys():
        won = ratio(ce["sae"] - ce["adapted"], ce["sae"] - ce["base"], documents)
        note("won_back_by_adapters", won)

    for name, suffix in SUFFIX.items():
        if name in results:
            numbers["l0" + suffix] = results[name]["l0"]
            numbers["explained_variance" + suffix] = results[name]["ev"]
    if documents is not None:
        numbers["documents"] = count_documents(documents)
    return {**numbers, "ci90": widths}


def costs(excess, half):
    """Whether SAEs raise CE beyond the interval; if there is none, whether they raise it at all."""
    return excess > 0 if half is None else excess > half


def training_curve(folder):
    """The losses in metrics.jsonl, for a picture: {"name", "tokens": [..], "loss": [..]}.

    None if there is no such file, or no single loss in it.
    """
    lines = read_metrics(folder) if folder else []
    if not lines:
        return None
    key, label = ("fvu", "FVU") if "fvu" in lines[0] else ("kl", "KL in training (nats/token)")
    if key not in lines[0]:
        return None                                     # several adapters: each has its own folder
    tokens = [line["tokens"] for line in lines]
    return {"name": label, "tokens": tokens, "loss": [line[key] for line in lines]}


# ---- Showing -----------------------------------------------------------------------------------

def table(numbers):
    """Rows and headings for print_table: a row for each setting."""
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
    """What was closed of the gap of the SAE as it came, in one line."""
    half = numbers["ci90"]

    def part(name):
        return f"{percent(numbers[name])} {plus_minus(half[name], '.1%')}".rstrip()

    kl = f"KL gap closed {part('kl_gap_closed')}"
    excess = numbers.get("excess_before", numbers["excess_sae"])
    if numbers["gap_closed"] is not None:
        line = f"gap closed {part('gap_closed')}   {kl}"
    elif excess <= 0:
        line = f"the SAE does not raise the cross-entropy here: no gap to close   {kl}"
    else:
        line = f"the SAE costs no more cross-entropy than its interval: no gap to close   {kl}"
    if "won_back_by_adapters" in numbers:
        line += f"   of what the SAE costs now, adapters win back {part('won_back_by_adapters')}"
    reason = no_interval(numbers)
    return f"{line}   {reason}" if reason else line


def no_interval(numbers):
    """Why a summary has no intervals, in words; "" if it has them."""
    if numbers["ci90"]["ce_base"] is not None:
        return ""
    return f"({without_interval(numbers.get('documents', 1))})"


def show(numbers):
    print_table(*table(numbers))
    print()
    print_table(*sae_table(numbers))
    if "gap_closed" in numbers:
        print(f"\n{closed(numbers)}")
    elif no_interval(numbers):
        print(f"\n{no_interval(numbers)}")


def sae_table(numbers):
    """Rows and headings for print_table: a row for each SAE."""
    suffixes = {name: suffix for name, suffix in SUFFIX.items() if f"ce_{name}" in numbers}
    headings = [""]
    for name in suffixes:
        of = {"before": ", as it came", "sae": "", "adapted": ", adapted"}[name]
        headings += [f"L0{of}", "explained variance"]
    rows = []
    for layer in numbers["l0_sae"]:
        row = [f"SAE at layer {layer}"]
        for suffix in suffixes.values():
            row.append(f"{numbers['l0' + suffix][layer]:.2f}")
            row.append(percent(numbers["explained_variance" + suffix][layer]))
        rows.append(row)
    return rows, headings


def draw(numbers, figure):
    """CE above the base model's and KL of each setting, as in Figures 3, 4 and 6; the training."""
    training = numbers.get("training")
    figure.set_size_inches(12 if training else 8, 2.6)
    first, second, *rest = figure.subplots(1, 3 if training else 2)
    names = [name for name in ("lora", "adapted", "sae", "before") if f"kl_{name}" in numbers]
    labels = [SETTINGS[name] for name in names]
    panels = [
        (first, "excess", "cross-entropy above the base model's"),
        (second, "kl", "KL from the base model"),
    ]
    for axes, key, label in panels:
        values = [numbers[f"{key}_{name}"] for name in names]
        halves = [error_bar(numbers["ci90"][f"{key}_{name}"]) for name in names]
        axes.errorbar(values, labels, xerr=halves, fmt="o", capsize=4)
        axes.axvline(0, color="grey", linewidth=1)
        axes.set_xlabel(f"{label} (nats/token)")
        axes.margins(y=0.3)
    second.tick_params(labelleft=False)
    for axes in rest:
        axes.plot(training["tokens"], training["loss"], linewidth=1)
        axes.set(xlabel="training tokens", ylabel=training["name"])

    title = "Fidelity, 90 % intervals over documents (a point of the paper's Figures 3, 4 and 6)"
    if no_interval(numbers):
        title = "Fidelity (a point of the paper's Figures 3, 4 and 6)"
    if numbers.get("kl_gap_closed") is not None:
        title += f"; {closed(numbers).replace('   ', '; ')}"
    figure.suptitle(title, fontsize=9)
