"""Fidelity (paper §4): what splicing the SAEs in costs, and how much of it training wins back.

    base     the base model
    before   the original SAEs, if the run trains them: before the first step, without adapters
    sae      the SAEs spliced in, without adapters
    adapted  the SAEs spliced in, with adapters
    lora     the adapters without SAEs: what adapting did to the model itself

    gap            CE_sae - CE_base; CE_before - CE_base if the SAEs trained
    gap closed     (gap - (CE_end - CE_base)) / gap         end: adapted, or sae without adapters
    KL gap closed  (KL - KL_end) / KL                       KL: of the original SAEs
    won back       (CE_sae - CE_adapted) / (CE_sae - CE_base), if the SAEs trained too

CE is next-token cross-entropy and KL is KL(base ‖ ·), both in nats per token over the T - 1
predictions of a sequence, the one at BOS included, as in the paper. All SAEs are spliced in at once
(§4.3's compound loss). There is a CE gap only if CE rises by more than its interval.

Intervals are 90 %, over documents (common.py); differences are paired by sequence.

    python eval.py RUN_DIR --suite fidelity

Shapes: B batch, T tokens, D d_model, n sequences.
"""
import torch

from lorasae.adapt import first_differing
from lorasae.errors import InputError
from lorasae.evals.common import (as_model, batches, interval, progress, ratio, with_ci90,
                                  without_interval)
from lorasae.evals.report import Table, percent, plus_minus, with_interval
from lorasae.io.files import damage, read_json, write_json
from lorasae.lora import base
from lorasae.objectives import token_losses
from lorasae.sae import StandIn, norms, splice

SETTINGS = {
    "base": "base model",
    "before": "with original SAE",
    "sae": "with SAE",
    "adapted": "with SAE + LoRA",
    "lora": "LoRA, no SAE",
}
ADAPTED = ("adapted", "lora")                           # settings with adapters on
WITH_SAE = ("sae", "adapted")                           # settings with SAEs spliced in
SEQUENCES = "sequences.json"                            # the file's name
SUFFIX = {"before": "_before", "sae": "_sae", "adapted": ""}        # of keys in results.json
L0_OF = {"before": "L0, original", "sae": "L0", "adapted": "L0, adapted"}     # in the table


# ---- Measuring ---------------------------------------------------------------------------------

def evaluate(setting):
    """Measures a run -> `summary`'s numbers, and eval_tokens. Writes fidelity/sequences.json."""
    config, text = setting.config, setting.text
    results = measure(setting.model, setting.saes, batches(setting), settings_of(config))

    # If the run trained its SAE, the losses with the original SAE are in the run's file.
    if config.method == "finetune" or config.train_sae:
        found = read_sequences(setting.folder)
        before = results["before"] = found.get("before", {})
        same_text = torch.equal(found["documents"], text.documents)
        if not same_text or before.keys() != results["sae"].keys():
            raise InputError(f"{setting.folder / SEQUENCES} has no losses of the original SAE on "
                             "this text: restore the file, or train the run again")
    write_sequences(setting.folder / "fidelity", results, text.documents)
    return {**summary(results, text.documents), "eval_tokens": text.held_out.numel()}


def settings_of(config):
    """The settings of a run; those with adapters only if it trained adapters."""
    return ("base", "sae", *ADAPTED) if config.method == "lora" else ("base", "sae")


def measure(model, saes, batches, settings, gather=lambda found: found, others={}):
    """Runs each setting over batches of tokens [B, T] -> {setting: {"ce", "kl", ...}}.

    ce and kl: [n] fp64, means over each sequence. Settings with SAEs also have {layer: value} for
    l0 (active latents), ev (explained variance, 1 - Σ‖x - x̂‖² / Σ‖x - mean x‖²) and left_out: the
    share of positions that l0 and ev leave out, namely BOS, EOS and norms beyond the SAE's
    max_norm. gather: merges the results (dicts of dicts of lists) of several processes, if each
    runs some of the batches. others: {extra setting: its SAEs}, at the same layers.
    """
    found = {name: {key: [] for key in ("ce", "kl", *saes)} for name in settings}
    for tokens in progress(batches, "fidelity"):
        by_setting = losses_by_setting(model, saes, tokens, settings, found, others)
        for name, losses in by_setting.items():
            for key, values in losses.items():
                found[name][key].append(values.double().mean(1).cpu())

    results = {}
    for name, parts in gather(found).items():
        results[name] = {key: torch.cat(parts[key]) for key in ("ce", "kl")}
        if name in WITH_SAE or name in others:
            facts = {layer: facts_of(sum(parts[layer])) for layer in saes}
            for fact in ("l0", "ev", "left_out"):
                results[name][fact] = {layer: facts[layer][fact] for layer in saes}
    return results


@torch.no_grad()
def losses_by_setting(model, saes, tokens, settings, seen=None, others={}):
    """{setting: {"ce", "kl"}}, each [B, T - 1], for tokens [B, T]; KL is from the base model."""
    labels = tokens[:, 1:].to(model.device)
    in_order = dict.fromkeys(("base", *settings))       # the base model first, no duplicates
    made = hidden_by_setting(model, saes, tokens, in_order, seen, others)
    hidden = torch.stack([state[:, :-1] for _, state in made])
    losses = token_losses(hidden, labels, model.head, model.softcap)
    return {name: {"ce": ce, "kl": kl}
            for name, ce, kl in zip(in_order, *losses) if name in settings}


def hidden_by_setting(
        model, saes, tokens, settings=("base", "sae", "adapted"), seen=None, others={}):
    """Yields (setting, final hidden state [B, T, D] after the last norm) for tokens [B, T].

    The settings differ in SAEs and adapters; blocks before the first difference run once. seen:
    {setting: {layer: a list}}, to which a `Watched` SAE appends. others: as in `measure`.
    """
    tokens = tokens.to(model.device)
    special = model.special(tokens)
    first = first_differing(model, saes)
    with base(model):
        shared = model.run(model.embed(tokens), 0, first)

    for name in settings:
        spliced = others.get(name, saes if name in WITH_SAE else {})
        if seen:
            spliced = {layer: Watched(sae, special, seen[name][layer])
                       for layer, sae in spliced.items()}
        with as_model(model, name):
            x = shared
            if first - 1 in spliced:                    # its block is the last one of the prefix
                x = splice(x, spliced[first - 1], special)
            hidden = model.norm(model.run(x, first, len(model.layers), spliced, special))
        yield name, hidden


class Watched(StandIn):
    """An SAE that keeps statistics, except at BOS, EOS and norms beyond its max_norm.

    Each call appends sums to `seen`, fp64 [5 + D]: the number of all positions, then over those
    that count: their number, active latents, Σ‖x - x̂‖², Σ‖x‖², Σ x.
    """

    def __init__(self, sae, special, seen):
        super().__init__(sae)
        self.special, self.seen = special, seen

    def __call__(self, x):
        x_hat = self.sae(x)
        ordinary = ~self.special
        if self.max_norm is not None:
            ordinary &= norms(x) <= self.max_norm
        read = x[ordinary].float()
        active = sum((self.sae.encode(part) > 0).sum() for part in read.split(256))     # [256, M]
        read, error = read.double(), (x - x_hat)[ordinary].double()
        sums = torch.stack([active, error.square().sum(), read.square().sum()])
        counts = sums.new_tensor([ordinary.numel(), len(read)])
        self.seen.append(torch.cat([counts, sums, read.sum(0)]).cpu())
        return x_hat


def facts_of(sums):
    """The total of Watched's sums -> {"l0", "ev", "left_out"} as in `measure`."""
    everywhere, positions, active, error, square = sums[:5]
    variance = square - sums[5:].square().sum() / positions
    return {
        "l0": (active / positions).item(),
        "ev": (1 - error / variance).item(),
        "left_out": (1 - positions / everywhere).item(),
    }


# ---- Results as files ---------------------------------------------------------------------------

def write_sequences(folder, results, documents):
    """Writes what `measure` returned to folder/sequences.json, to compare runs in pairs."""
    plain = {"documents": documents.tolist()}
    for name, values in results.items():
        plain[name] = {key: value.tolist() if isinstance(value, torch.Tensor) else value
                       for key, value in values.items()}
    write_json(folder / SEQUENCES, plain)


def read_sequences(folder):
    """Reads exactly what write_sequences wrote. "documents" is an int tensor [n]."""
    path = folder / SEQUENCES
    with damage(path):
        results = read_json(path)
        documents = torch.tensor(results.pop("documents"))
        for values in results.values():
            for key, value in values.items():
                if key in ("ce", "kl"):
                    values[key] = torch.tensor(value, dtype=torch.float64).view_as(documents)
                else:
                    values[key] = {int(layer): float(number) for layer, number in value.items()}
    return {"documents": documents, **results}


# ---- Summing up --------------------------------------------------------------------------------

def summary(results, documents):
    """The numbers of results.json: losses, gap closed, each layer's L0 and explained variance.

    "ci90" has half the widths of their intervals, each None if there are too few documents. Then
    gap_closed is the plain ratio, if the SAEs raise CE at all.

    results: what `measure` returned; "before" in it is "sae" before the SAEs were trained.
    documents: [n] int, the document of each sequence.
    """
    ce = {name: values["ce"] for name, values in results.items()}
    kl = {name: values["kl"] for name, values in results.items()}
    found = {}

    def closed(start, end):
        """The share of the gap at `start` that is closed at `end`; no value if there is no gap."""
        gap, half = found[f"excess_{start}"]
        if gap <= (half or 0):
            return None, None
        return ratio(ce[start] - ce[end], ce[start] - ce["base"], documents)

    # What each setting costs, in nats per token.
    for name in results:
        found[f"ce_{name}"] = interval(ce[name], documents)
        if name != "base":
            found[f"kl_{name}"] = interval(kl[name], documents)
            found[f"excess_{name}"] = interval(ce[name] - ce["base"], documents)

    # How much of the original SAEs' gap training closed.
    start = "before" if "before" in results else "sae"
    end = "adapted" if "adapted" in results else "sae"
    if start != end:
        found["gap_closed"] = closed(start, end)
        found["kl_gap_closed"] = ratio(kl[start] - kl[end], kl[start], documents)

    # How much of the trained SAEs' cost the adapters win back; it is not part of the gap.
    if {"before", "adapted"} <= results.keys():
        found["won_back_by_adapters"] = closed("sae", "adapted")

    numbers = with_ci90(found)
    for name, suffix in SUFFIX.items():
        if name in results:
            numbers["l0" + suffix] = results[name]["l0"]
            numbers["explained_variance" + suffix] = results[name]["ev"]
            numbers["left_out" + suffix] = results[name]["left_out"]
    return {**numbers, "documents": len(documents.unique())}


# ---- Showing -----------------------------------------------------------------------------------

def tables(numbers):
    """The cost of each setting; then the SAEs, with the gap closed in the notes."""
    half = {name: plus_minus(width) for name, width in numbers["ci90"].items()}
    rows, sae_headings = [], [""]
    sae_rows = [[f"SAE at layer {layer}"] for layer in numbers["l0_sae"]]
    for name, label in SETTINGS.items():
        if f"ce_{name}" not in numbers:
            continue
        row = [label, numbers[f"ce_{name}"]]
        for key in (f"excess_{name}", f"kl_{name}"):
            row += [numbers.get(key, 0.0), half.get(key, "")]
        rows.append(row)

        if name in SUFFIX:
            l0 = numbers["l0" + SUFFIX[name]]
            explained = numbers["explained_variance" + SUFFIX[name]]
            sae_headings += [L0_OF[name], "explained variance"]
            for row, layer in zip(sae_rows, l0):
                row += [f"{l0[layer]:.2f}", percent(explained[layer])]

    headings = ["", "CE (nats)", "above base", "90 % CI", "KL (nats)", "90 % CI"]
    return [Table("", headings, rows), Table("", sae_headings, sae_rows, notes(numbers))]


def notes(numbers):
    """[what L0 leaves out; the gap closed, and why intervals are missing, if they are]"""
    half, parts = numbers["ci90"], []
    left_out = ", ".join(map(percent, numbers["left_out_sae"].values()))
    first = ("L0 and explained variance leave out BOS, EOS and outliers: "
             f"{left_out} of the positions")

    def part(name):
        return with_interval(numbers[name], half[name], ".1%")

    if "gap_closed" in numbers:
        parts.append(f"gap closed {part('gap_closed')}" if numbers["gap_closed"] is not None else
                     "the SAE does not measurably raise the cross-entropy: no gap to close")
        parts.append(f"KL gap closed {part('kl_gap_closed')}")
    if numbers.get("won_back_by_adapters") is not None:
        parts.append(f"adapters win back {part('won_back_by_adapters')} of the trained SAE's cost")
    if half["ce_base"] is None:
        parts.append(f"({without_interval(numbers['documents'])})")
    return [first, "   ".join(parts)] if parts else [first]
