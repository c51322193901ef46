"""Steering with a latent (paper §5.2, Table 4, Figures 7 and 10): does x ← x + α (x·v) v work better in the adapted model?

    python eval.py RUN_DIR --suite steering                                 latents and examples found in held-out text
    python eval.py RUN_DIR --suite steering --latents 8421 2195 --positives FOLDER --negatives facts.json law.json ...
    python eval.py RUN_DIR --suite steering --positives http://localhost:8000/v1 --chat-model NAME

v is the latent's decoder row at unit length, x the output of the SAE's block at every position; no SAE is spliced in. A
text's likelihood is the mean over its tokens of log p(token | those before), BOS in front. For each model and set of texts
it is scaled so that the unsteered texts span 0 to 100; d is its change by steering (§5.2 after Pres et al. 2024). α is
chosen for each model on its own half of the examples, to raise d on positives and not on negatives. The table shows
d_LoRA - d_base, paired by text, on the other half: positive should be > 0, negative about 0.

Texts are lists of token ids that begin with BOS. Shapes: B texts, T tokens, D d_model, M latents, L chosen latents.
"""
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from lorasae.errors import InputError
from lorasae.evals.common import evaluating, interval, plus_minus, progress
from lorasae.files import read_json, write_json
from lorasae.lora import base
from lorasae.objectives import token_losses
from lorasae.run import print_table

ALPHAS = (0, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 12, 20)     # 0: where no α helps, not to steer is best
WINDOW = 24                                             # tokens of an example cut from text; the paper's have about 12 words
LEAST = 8                                               # examples without which there is no interval worth printing
COMMON = 0.1                                            # a latent that fires in more texts than this stands for no topic
PROMPT = """Each of the following texts has one feature in common: the same latent of a sparse autoencoder fires strongly in it.

{examples}

Write {n} new texts with this feature, one a line, nothing else. Each has about twelve words; vary the content, and do not
begin with what they have in common."""


class Examples(NamedTuple):
    """The texts for one latent."""
    tune_positive: list
    tune_negative: list
    positive: list
    negative: list


def steer(x, v, alpha):
    """x [.., D] + α (x·v) v (Eq. 8), v [D] of unit length: α times more of what is there along v."""
    return x + alpha * (x @ v)[..., None] * v


def naive_log_likelihood(log_probs, tokens):
    """Mean log p(token | those before): log_probs [T, V] of a text's tokens [T]. Row t predicts token t + 1."""
    return log_probs[:-1].gather(-1, tokens[1:, None]).mean()


@torch.no_grad()
def log_likelihoods(model, texts, layer, v, alphas, batch=32):
    """naive_log_likelihood of every text at every α, fp64 [len(alphas), len(texts)].

    The blocks up to `layer` run once for all α. Padding is on the right, where a causal model cannot see it.
    """
    out = torch.empty(len(alphas), len(texts), dtype=torch.float64)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for chosen in (order[start:start + batch] for start in range(0, len(order), batch)):
        tokens = pad_sequence([torch.tensor(texts[i]) for i in chosen], batch_first=True).to(model.device)
        predictions = torch.tensor([len(texts[i]) - 1 for i in chosen], device=model.device)
        real = torch.arange(tokens.shape[1] - 1, device=model.device) < predictions[:, None]
        x = model.run(model.embed(tokens), 0, layer + 1)
        for row, alpha in enumerate(alphas):
            hidden = model.norm(model.run(steer(x, v, alpha), layer + 1, len(model.layers)))
            loss = token_losses(hidden[:, :-1], tokens[:, 1:], model.head, model.softcap).ce
            out[row, chosen] = (-(loss.double() * real).sum(1) / predictions).cpu()
    return out


def change(steered, unsteered):
    """d: steered - unsteered likelihoods [.., n], in units of which the unsteered texts span 100."""
    return 100 * (steered - unsteered) / (unsteered.max() - unsteered.min())


def tune(positive, negative, alphas=ALPHAS):
    """The best α for one model: the highest mean d of the positives, less that of the negatives where it is a rise.

    positive, negative [len(alphas), n]: likelihoods, the first row unsteered.
    """
    d_positive, d_negative = change(positive, positive[0]).mean(1), change(negative, negative[0]).mean(1)
    return alphas[(d_positive - d_negative.clamp(min=0)).argmax()]


def compare(model, layer, v, examples):
    """Steers the base and the adapted model along v; -> α and d of each, and the paired differences of Table 4."""
    out, d = {}, {}
    for name in ("base", "lora"):
        with base(model) if name == "base" else nullcontext():
            alpha = tune(*(log_likelihoods(model, texts, layer, v, ALPHAS) for texts in examples[:2]))
            found = [log_likelihoods(model, texts, layer, v, (0, alpha)) for texts in examples[2:]]
        d[name] = [change(steered, unsteered) for unsteered, steered in found]
        out[f"alpha_{name}"] = alpha
        out[f"nats_{name}"] = {side: (steered - unsteered).mean().item()
                               for side, (unsteered, steered) in zip(("positive", "negative"), found)}
    for i, side in enumerate(("positive", "negative")):
        mean, half = interval(d["lora"][i] - d["base"][i])
        out[side] = {"texts": len(d["base"][i]), "delta": mean, "ci90": half, "base": d["base"][i].tolist(),
                     "lora": d["lora"][i].tolist()}
    return out


# ---- Where the latents and the examples come from ------------------------------------------------------------------------

def windows(chunks, bos, eos, length=WINDOW):
    """Packed chunks [n, T] -> texts [N, 1 + length], each BOS and `length` tokens of one document, no two alike."""
    pieces = chunks[:, 1:]
    pieces = pieces[:, :pieces.shape[1] // length * length].reshape(-1, length)
    pieces = pieces[((pieces != bos) & (pieces != eos)).all(1)].unique(dim=0)
    return torch.cat([torch.full((len(pieces), 1), bos), pieces], 1)


@torch.no_grad()
def firing(model, sae, layer, texts, batch=32):
    """Yields the highest activation of every latent in each of `batch` texts [N, T] (BOS aside), in the base model: [B, M]."""
    with base(model):
        for tokens in progress(texts.to(model.device).split(batch), "latents"):
            yield sae.encode(model.run(model.embed(tokens), 0, layer + 1)[:, 1:]).amax(1)


def choose_latents(model, sae, layer, texts, count=4, least=4 * LEAST):
    """The `count` latents that fire hardest among those that fire in `least` texts or more, but in few (COMMON) of all."""
    fired, total = 0, 0
    for peak in firing(model, sae, layer, texts):
        fired, total = fired + (peak > 0).sum(0), total + peak.double().sum(0)
    strength = torch.where((fired >= least) & (fired <= COMMON * len(texts)), total / fired.clamp(min=1), 0)
    best = strength.topk(min(count, len(strength)))
    latents = best.indices[best.values > 0].tolist()
    if not latents:
        raise InputError(f"no latent fires in {least} to {COMMON * len(texts):.0f} of the {len(texts):,} texts of {WINDOW} held-out "
                         "tokens: name some with --latents, or evaluate a run with more --eval-tokens")
    return latents


def text_examples(model, sae, layer, latents, texts, count):
    """{latent: (positives, negatives)}, each at most `count` of texts [N, T]: where it fires most, and where not at all."""
    peaks = torch.cat([peak[:, latents].cpu() for peak in firing(model, sae, layer, texts)])        # [N, L]
    out = {}
    for latent, peak in zip(latents, peaks.T):
        order = peak.argsort(descending=True, stable=True)
        fires, silent = order[:int((peak > 0).sum())], order[int((peak > 0).sum()):]
        silent = silent[::max(1, len(silent) // count)]                 # from everywhere
        out[latent] = texts[fires[:count]].tolist(), texts[silent[:count]].tolist()
    return out


def read_texts(path, tokenizer, bos):
    """Texts from a .json (a list of strings, or {"examples": list}) or from the lines of any other file."""
    path = Path(path)
    try:
        found = read_json(path) if path.suffix == ".json" else path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the examples in {path}: {error}") from None
    found = found.get("examples") if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise InputError(f'{path} should be a JSON list of texts, or {{"examples": [...]}}')
    return encode(found, tokenizer, bos)


def encode(texts, tokenizer, bos):
    ids = (encoding.ids for encoding in tokenizer.encode_batch([text for text in texts if text.strip()], add_special_tokens=False))
    return [[bos, *text] for text in ids if text]


def generate(ask, seeds, count):
    """Texts like the seeds from a chat model (chat.py), 25 at a time, no two alike; fewer than `count` if it repeats itself."""
    texts = {}
    for _ in range(2 * -(-count // 25)):
        lines = ask([{"role": "user", "content": PROMPT.format(examples="\n".join(seeds), n=25)}], max_tokens=2000).splitlines()
        texts |= dict.fromkeys(line.strip(" \t0123456789.-*\"'") for line in lines)         # numbering, bullets, quotes
        texts.pop("", None)
        if len(texts) >= count:
            break
    return list(texts)[:count]


# ---- The evaluation ------------------------------------------------------------------------------------------------------

def evaluate(setting, folder, latents=None, count=100, positives=None, negatives=None, ask=None):
    """Table 4 for the first SAE of a setting, `count` positives and negatives a latent, half of them for tuning.

    latents: None chooses four. positives: None (text where the latent fires most), one file, or a folder of
    latent_ID.json; or else ask, a chat model. negatives: None (text where it is silent), or files, the first for tuning.
    """
    model, saes, corpus, _ = setting
    layer, sae = next(iter(saes.items()))
    texts = windows(corpus.validation, corpus.bos, corpus.eos)
    latents = latents or choose_latents(model, sae, layer, texts)
    for latent in latents:
        if not 0 <= latent < len(sae.W_dec):
            raise InputError(f"--latents {latent}: the SAE at layer {layer} has latents 0 to {len(sae.W_dec) - 1}")
    found = text_examples(model, sae, layer, latents, texts, count)
    files = [read_texts(path, corpus.tokenizer, corpus.bos) for path in negatives or []]
    if len(files) == 1:
        raise InputError("--negatives takes two files or more: the first to tune α on, the others to test on")
    rows = []
    with evaluating(model):
        for latent in progress(latents, "steering"):
            positive, silent = found[latent]
            if positives:
                path = Path(positives)
                positive = read_texts(path / f"latent_{latent}.json" if path.is_dir() else path, corpus.tokenizer, corpus.bos)
            elif ask:
                written = generate(ask, [corpus.tokenizer.decode(text[1:]) for text in positive[:10]], count)
                write_json(Path(folder) / "steering" / f"latent_{latent}.json", {"examples": written})  # for --positives
                positive = encode(written, corpus.tokenizer, corpus.bos)
            tuning, testing = (files[0], sum(files[1:], [])) if files else (silent[::2], silent[1::2])
            examples = Examples(positive[::2], tuning, positive[1::2], testing)
            if min(map(len, examples)) < LEAST // 2:
                raise InputError(f"latent {latent} has {len(positive)} positive and {len(tuning) + len(testing)} negative examples, "
                                 f"{LEAST} each needed: choose another, give files, or evaluate a run with more --eval-tokens")
            v = torch.nn.functional.normalize(sae.W_dec[latent].float(), dim=0).to(model.head.dtype)
            rows.append({"latent": latent, **compare(model, layer, v, examples),
                         "examples": [corpus.tokenizer.decode(text[1:]) for text in positive[:3]]})
    return {"layer": layer, "rows": rows}


def show(numbers):
    print_table([[f"latent {row['latent']}", *(cell for side in ("positive", "negative") for cell in (
                      f"{row[side]['delta']:+.2f}", plus_minus(row[side]["ci90"], ".2f"))),
                  f"{row['alpha_base']:g}", f"{row['alpha_lora']:g}",
                  *(f"{sum(row['positive'][name]) / row['positive']['texts']:+.2f}" for name in ("base", "lora"))]
                 for row in numbers["rows"]],
                [f"layer {numbers['layer']}", "Δ positive", "90 % CI", "Δ negative", "90 % CI", "α base", "α LoRA",
                 "d positive, base", "d positive, LoRA"])
    print("\nd: change by steering, in units where the unsteered texts span 100; Δ: d of LoRA - d of base")
    for row in numbers["rows"]:
        print(f"latent {row['latent']}: {row['examples'][0]!r}")


def draw(numbers, figure):
    """Figures 7 and 10: the distribution of d over texts, a row of panels a latent."""
    rows = numbers["rows"]
    figure.set_size_inches(8, 0.8 + 1.8 * len(rows))
    for panels, row in zip(figure.subplots(len(rows), 2, squeeze=False), rows):
        for axes, side in zip(panels, ("positive", "negative")):
            values = [row[side]["base"], row[side]["lora"]]
            low, high = min(map(min, values)), max(map(max, values))
            bins = torch.linspace(low, max(high, low + 1e-6), 26).tolist()
            for name, d in zip(("base model", "LoRA model"), values):
                axes.hist(d, bins, alpha=0.5, label=name)
            axes.set_title(f"latent {row['latent']}, {side} examples", fontsize=9)
            axes.set_ylabel("texts")
    for axes in panels:
        axes.set_xlabel("change by steering (unsteered likelihoods span 100)")
    panels[0].legend()
    figure.suptitle("Change in normalised log-likelihood after steering (the paper's Figures 7 and 10)", fontsize=10)
