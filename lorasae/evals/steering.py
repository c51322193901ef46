"""Steering with a latent (paper §5.2, Table 4, Figures 7 and 10): does it work better once adapted?

    python eval.py RUN_DIR --suite steering                 latents and texts from held-out text
    python eval.py RUN_DIR --suite steering --latents 8421 2195 --positives FOLDER \\
        --negatives law.json recipes.json

    x ← x + α (x·v) v                                                                       (Eq. 8)

x is the output of the SAE's block at every position, v the latent's decoder row at unit length; no
SAE is spliced in. Eq. 8 allows any real α; only α >= 0 are tried here.

A text's likelihood is the mean over its tokens of log p(token | those before), with BOS in front.
For each model and set of texts it is scaled so that the unsteered texts span 0 to 100; d is its
change by steering. Each model gets the α that, on half of the texts, raises d on positives and not
on negatives. Table 4 is d_LoRA - d_base on the other half, paired by text: it should be above 0 on
positives and about 0 on negatives. Its 90 % interval is over texts, as in the paper. Texts from one
document are alike, so the number of documents stands beside it.

Positives are the held-out texts in which the latent fires most. Those of the paper were written by
a chat model, with the prompt in its A.1.2: --positives takes such texts.

Shapes: N texts, B of them at a time, T tokens, D d_model, M latents.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lorasae.errors import InputError
from lorasae.evals.common import as_model, evaluating, interval, progress
from lorasae.evals.report import Table, with_interval
from lorasae.io.files import damage, read_json
from lorasae.objectives import token_losses

ALPHAS = (0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 12, 20)     # 0: not to steer
WINDOW = 24                     # tokens of a held-out text (the paper's have twelve words)
LEAST = 8                       # positives and negatives that a comparison needs
COMMON = 0.1                    # a latent that fires in more of the texts stands for no topic
BATCH = 32                      # texts at a time
SIDES = ("positive", "negative")
MODELS = {"base": "base model", "lora": "LoRA model"}


class Text(NamedTuple):
    tokens: list                        # ids, BOS first
    document: int                       # where it is from


# ---- Steering ------------------------------------------------------------------------------------

def steer(x, v, alpha):
    """Eq. 8 for x [.., D] and v [D] of unit length: adds α times what already lies along v."""
    return x + alpha * (x @ v)[..., None] * v


@torch.no_grad()
def log_likelihoods(model, texts, layer, v, alphas):
    """Mean log p(token | those before) of every text at every α, fp64 [len(alphas), N].

    The published code takes p(token) one row too late, from the prediction of the token after it
    (run_steering.py:66). The blocks up to `layer` run once for all α.
    """
    found = torch.empty(len(alphas), len(texts), dtype=torch.float64)
    lengths = torch.tensor([len(text.tokens) for text in texts])
    for length in lengths.unique():                     # texts of one length need no padding
        for chosen in (lengths == length).nonzero()[:, 0].split(BATCH):
            tokens = torch.tensor([texts[i].tokens for i in chosen], device=model.device)
            x = model.run(model.embed(tokens), 0, layer + 1)
            for row, alpha in enumerate(alphas):
                hidden = model.norm(model.run(steer(x, v, alpha), layer + 1, len(model.layers)))
                loss = token_losses(hidden[:, :-1], tokens[:, 1:], model.head, model.softcap).ce
                found[row, chosen] = -loss.double().mean(1).cpu()
    return found


def change(steered, unsteered):
    """d: the change of likelihoods [.., N], in units in which the unsteered [N] span 100."""
    return 100 * (steered - unsteered) / (unsteered.max() - unsteered.min())


def tune(positive, negative, alphas=ALPHAS):
    """One model's best α: the highest mean d of positives, minus that of negatives if they rise.

    positive, negative [len(alphas), N]: likelihoods, unsteered in the first row.
    """
    gained = change(positive, positive[0]).mean(1)
    lost = change(negative, negative[0]).mean(1).clamp(min=0)
    return alphas[(gained - lost).argmax()]


def compare(model, layer, v, sets):
    """Steers base and adapted model along v -> each one's α and d, and Table 4's differences.

    sets: {"positive" and "negative": [Text]}. Every other text tunes α, for each model its own, and
    the rest test it. The published code tunes one α for both models, on the test texts, and sorts
    each model's values before it pairs them (run_steering.py:190).
    """
    tuning = {side: texts[::2] for side, texts in sets.items()}
    testing = {side: texts[1::2] for side, texts in sets.items()}
    row = {side: {"d": {}} for side in SIDES}
    for name in MODELS:
        with as_model(model, name):
            tried = [log_likelihoods(model, tuning[side], layer, v, ALPHAS) for side in SIDES]
            alpha = row[f"alpha_{name}"] = tune(*tried)
            for side in SIDES:
                unsteered, steered = log_likelihoods(model, testing[side], layer, v, (0, alpha))
                row[side]["d"][name] = change(steered, unsteered)

    for side in SIDES:
        d = row[side]["d"]
        delta, half = interval(d["lora"] - d["base"])
        is_steered = row["alpha_base"] > 0 or row["alpha_lora"] > 0
        row[side] = {
            "d": {name: values.tolist() for name, values in d.items()},
            "delta": delta,
            "ci90": half if is_steered else None,       # not 0 ± 0
            "documents": len({text.document for text in testing[side]}),
        }
    return row


# ---- Latents and texts ---------------------------------------------------------------------------

def windows(text):
    """The held-out text in pieces -> (tokens [N, 1 + WINDOW], BOS first; the document of each [N]).

    Each piece is from one document, and no two are equal.
    """
    chunks = text.held_out[:, 1:]
    count = chunks.shape[1] // WINDOW
    pieces = chunks[:, :count * WINDOW].reshape(-1, WINDOW)
    documents = text.documents.repeat_interleave(count)
    special = ((pieces == text.bos) | (pieces == text.eos)).any(1)

    _, first = np.unique(pieces, axis=0, return_index=True)
    kept = torch.from_numpy(np.sort(first))
    kept = kept[~special[kept]]
    return F.pad(pieces[kept], (1, 0), value=text.bos), documents[kept]


@torch.no_grad()
def peaks(model, sae, layer, texts):
    """Yields [B, M]: each latent's highest activation in each text [N, T], BOS aside, in the base
    model.
    """
    with as_model(model, "base"):
        for tokens in progress(texts.to(model.device).split(BATCH), "latents"):
            yield sae.encode(model.read(tokens, sae, layer)[:, 1:]).amax(1)


def choose_latents(model, sae, layer, texts, count=4, least=4 * LEAST):
    """The latents that fire hardest, of those that fire in `least` or more of the texts [N, T] but
    in few (COMMON).
    """
    fired, total = 0, 0
    for peak in peaks(model, sae, layer, texts):
        fired = fired + (peak > 0).sum(0)
        total = total + peak.double().sum(0)
    eligible = (fired >= least) & (fired <= COMMON * len(texts))
    if not eligible.any():
        raise InputError(f"of {len(texts):,} texts of {WINDOW} held-out tokens, no latent fires in "
                         f"{least} or more and at most {COMMON:.0%}: name some with --latents, or "
                         "evaluate a run with more --eval-tokens")
    strength = torch.where(eligible, total / fired, 0)
    return strength.topk(min(count, int(eligible.sum()))).indices.tolist()


def examples_of(model, sae, layer, latents, texts, documents, count):
    """{latent: {"positive": [Text] in which it fires most, "negative": [Text] in which it is
    silent}}, at most `count` of each; texts [N, T], documents [N].
    """
    found = torch.cat([peak[:, latents].cpu() for peak in peaks(model, sae, layer, texts)])
    examples = {}
    for latent, peak in zip(latents, found.T):
        order = peak.argsort(descending=True, stable=True)
        fires, silent = order[peak[order] > 0], order[peak[order] <= 0]
        silent = silent[::max(1, len(silent) // count)]                 # from everywhere
        examples[latent] = {
            side: [Text(texts[i].tolist(), documents[i].item()) for i in chosen[:count]]
            for side, chosen in zip(SIDES, (fires, silent))}
    return examples


def read_texts(path):
    """The strings in a .json file (a list, or {"examples": a list}), or the lines of any other."""
    if path.suffix != ".json":
        with damage(path):
            return path.read_text(encoding="utf-8-sig").splitlines()
    found = read_json(path)
    if isinstance(found, dict):
        found = found.get("examples")
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise InputError(f'{path} should be a JSON list of texts, or {{"examples": [...]}}')
    return found


def texts_of(paths, text):
    """The distinct texts of files, each a document -> [Text]."""
    lines = [line for path in paths for line in read_texts(path) if line.strip()]
    encoded = text.tokenizer.encode_batch(list(dict.fromkeys(lines)), add_special_tokens=False)
    return [Text([text.bos, *one.ids], number) for number, one in enumerate(encoded)]


# ---- The evaluation ------------------------------------------------------------------------------

def add_options(add):
    add("--latents", type=int, nargs="+", metavar="ID",
        help="latents of the first SAE, also for autointerp (default for steering: four that fire "
        "hard, but in few of the held-out texts)")
    add("--examples", type=int, default=100, metavar="N",
        help="texts in which a latent fires, and as many in which it does not; half of them tune "
        "alpha (default: %(default)s; paper: 500)")
    add("--positives", type=Path, metavar="PATH",
        help="texts with the feature: a file, or a folder of latent_ID.json (default: held-out "
        "texts in which the latent fires most)")
    add("--negatives", type=Path, nargs="+", metavar="FILE",
        help="texts without it (default: held-out texts in which the latent is silent)")


def evaluate(setting, latents=None, examples=100, positives=None, negatives=None):
    """Table 4 for the first SAE of a run -> {"layer", "rows": what `compare` finds for each latent,
    with "latent" and "examples", three of its positives}.
    """
    model, text = setting.model, setting.text
    layer, sae = next(iter(setting.saes.items()))
    if positives and not latents:
        raise InputError("--positives needs --latents, to say what the texts are positive for")

    # The latents, and the held-out texts in which each fires or is silent
    texts, documents = windows(text)
    latents = latents or choose_latents(model, sae, layer, texts)
    for latent in latents:
        if not 0 <= latent < len(sae.W_dec):
            raise InputError(f"--latents {latent}: the SAE at layer {layer} has latents 0 to "
                             f"{len(sae.W_dec) - 1}")
    found = examples_of(model, sae, layer, latents, texts, documents, examples)

    rows = []
    for latent in progress(latents, "steering"):
        # Its texts, those from files in place of held-out ones
        sets = found[latent]
        if positives:
            in_folder = positives / f"latent_{latent}.json"
            path = in_folder if positives.is_dir() else positives
            sets["positive"] = texts_of([path], text)
        if negatives:
            sets["negative"] = texts_of(negatives, text)
        for side, some in sets.items():
            if len(some) < LEAST:
                raise InputError(f"latent {latent} has {len(some)} {side} texts, fewer than "
                                 f"{LEAST}: choose another latent, give files, or evaluate a run "
                                 "with more --eval-tokens")

        # Both models
        v = F.normalize(sae.W_dec[latent].float(), dim=0).to(model.head.dtype)
        with evaluating(model):
            row = compare(model, layer, v, sets)
        shown = [text.tokenizer.decode(one.tokens[1:]) for one in sets["positive"][:3]]
        rows.append({"latent": latent, "examples": shown, **row})
    return {"layer": layer, "rows": rows}


def tables(numbers):
    headings = [f"layer {numbers['layer']}", "α base", "α LoRA"]
    for side in SIDES:
        headings += [f"{side}: d base", "d LoRA", "Δ", "texts", "documents"]
    rows = []
    for row in numbers["rows"]:
        cells = [f"latent {row['latent']}", f"{row['alpha_base']:g}", f"{row['alpha_lora']:g}"]
        for found in (row["positive"], row["negative"]):
            d = found["d"].values()
            cells += [f"{sum(values) / len(values):+.2f}" for values in d]
            cells.append(with_interval(found["delta"], found["ci90"], "+.2f"))
            cells += [str(len(found["d"]["base"])), str(found["documents"])]
        rows.append(cells)
    notes = [
        "d: change by steering, if the unsteered texts span 100; α 0: steering does not help",
        "Δ: d LoRA - d base, paired by text, ± 90 % over texts; texts of one document are alike",
    ]
    notes += [f"latent {row['latent']}: {row['examples'][0]!r}" for row in numbers["rows"]]
    return [Table("Steering with a latent (the paper's Table 4)", headings, rows, notes)]


def draw(numbers, figure):
    """Figures 7 and 10: d over the test texts in both models, a row of panels for each latent."""
    rows = numbers["rows"]
    figure.set_size_inches(8, 0.8 + 2 * len(rows))
    for panels, row in zip(figure.subplots(len(rows), 2, squeeze=False), rows):
        for axes, side in zip(panels, SIDES):
            d = row[side]["d"]
            labels = [f"{MODELS[name]}, α {row[f'alpha_{name}']:g}" for name in d]
            axes.hist(list(d.values()), 25, histtype="stepfilled", alpha=0.5, label=labels)
            axes.set(title=f"latent {row['latent']}, {side} texts", ylabel="texts",
                     xlabel="d, if the unsteered texts span 100")
            axes.legend()
    figure.suptitle("Change of likelihood by steering (the paper's Figures 7 and 10)", fontsize=10)
