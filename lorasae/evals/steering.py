"""Steering with a latent (paper §5.2, Table 4, Figures 7 and 10): does x ← x + α (x·v) v work better once adapted?

    python eval.py RUN_DIR --suite steering                         latents and examples found in held-out text
    python eval.py RUN_DIR --suite steering --latents 8421 2195 --positives FOLDER --negatives facts.json law.json
    python eval.py RUN_DIR --suite steering --positives http://localhost:8000/v1 --chat-model NAME

v is the latent's decoder row at unit length, x the output of the SAE's block at every position; no SAE is spliced in. A
text's likelihood is the mean over its tokens of log p(token | those before), BOS in front. For each model and set of
texts it is scaled so that the unsteered texts span 0 to 100; d is its change by steering. α is chosen for each model on
its own half of the examples, to raise d on positives and not on negatives. The table shows d_LoRA - d_base, paired by
text, on the other half: positive should be > 0, negative about 0.

Texts are lists of token ids, BOS first. Shapes: N texts, B of them at a time, T tokens, D d_model, M latents.
"""
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from lorasae.errors import InputError
from lorasae.evals.chat import chat
from lorasae.evals.common import evaluating, interval, plus_minus, print_table, progress
from lorasae.io.files import read_json, write_json
from lorasae.lora import base
from lorasae.objectives import token_losses

ALPHAS = (0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 12, 20)     # 0: where no α helps, not to steer is best
WINDOW = 24                                             # tokens of a text cut from a corpus (the paper's: twelve words)
LEAST = 8                                # positives and negatives without which there is no verdict
COMMON = 0.1                          # a latent that fires in more of the texts stands for no topic
PROMPT = """The same latent of a sparse autoencoder fires strongly in each of these texts:

{examples}

Write {n} new texts that share this feature, one a line and nothing else. Each has about twelve words; vary the content,
and do not begin with what they share."""


class Examples(NamedTuple):
    """The texts for one latent."""
    tuning_positive: list
    tuning_negative: list
    positive: list
    negative: list


def steer(x, v, alpha):
    """x + α (x·v) v (Eq. 8) for x [.., D] and v [D] of unit length: α times more of what is there along v."""
    return x + alpha * (x @ v)[..., None] * v


def naive_log_likelihood(log_probs, tokens):
    """Mean log p(token | those before) of a text: row t of log_probs [T, V] predicts tokens[t + 1]; tokens [T].

    The published code reads row t + 1 there, which asks for the token after (run_steering.py:66).
    """
    return log_probs[:-1].gather(-1, tokens[1:, None]).mean()


@torch.no_grad()
def log_likelihoods(model, texts, layer, v, alphas, batch=32):
    """naive_log_likelihood of every text at every α, fp64 [len(alphas), N].

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
    """d: steered - unsteered likelihoods [.., N], in units of which the unsteered ones, lowest to highest, span 100."""
    return 100 * (steered - unsteered) / (unsteered.max() - unsteered.min())


def tune(positive, negative, alphas=ALPHAS):
    """The best α of one model: the highest mean d of positives, less that of negatives where they rise.

    positive, negative [len(alphas), N]: likelihoods, the first row unsteered.
    """
    d_positive, d_negative = change(positive, positive[0]).mean(1), change(negative, negative[0]).mean(1)
    return alphas[(d_positive - d_negative.clamp(min=0)).argmax()]


def compare(model, layer, v, examples):
    """Steers the base and the adapted model along v -> α and d of each, and the paired differences of Table 4.

    Paired by text, and α tuned on other texts than it is tested on, for each model its own; the published code sorts each
    model's values before pairing them, and tunes one α for both on the test texts (run_steering.py:190).
    """
    out = {"positive": {}, "negative": {}, "alphas": list(ALPHAS), "tuning": {}}
    d = {}
    for name in ("base", "lora"):
        with base(model) if name == "base" else nullcontext():
            positive = log_likelihoods(model, examples.tuning_positive, layer, v, ALPHAS)
            negative = log_likelihoods(model, examples.tuning_negative, layer, v, ALPHAS)
            alpha = out[f"alpha_{name}"] = tune(positive, negative)
            out["tuning"][name] = {"positive": change(positive, positive[0]).mean(1).tolist(),
                                   "negative": change(negative, negative[0]).mean(1).tolist()}

            for side, texts in (("positive", examples.positive), ("negative", examples.negative)):
                unsteered, steered = log_likelihoods(model, texts, layer, v, (0, alpha))
                d[side, name] = change(steered, unsteered)
                out[side][name] = {"d": d[side, name].tolist(), "nats": (steered - unsteered).mean().item()}

    for side in ("positive", "negative"):
        out[side]["delta"], out[side]["ci90"] = interval(d[side, "lora"] - d[side, "base"])
    return out


# ---- Where latents and examples come from --------------------------------------------------------

def windows(chunks, bos, eos, length=WINDOW):
    """Packed chunks [n, T] -> texts [N, 1 + length], each BOS and `length` tokens of one document, no two alike."""
    pieces = chunks[:, 1:]
    pieces = pieces[:, :pieces.shape[1] // length * length].reshape(-1, length)
    pieces = pieces[((pieces != bos) & (pieces != eos)).all(1)].unique(dim=0)
    return torch.cat([torch.full((len(pieces), 1), bos), pieces], 1)


@torch.no_grad()
def peaks(model, sae, layer, texts, batch=32):
    """Yields [B, M]: the highest activation of every latent in each of B texts, BOS aside, in the base model."""
    with base(model):
        for tokens in progress(texts.to(model.device).split(batch), "latents"):
            yield sae.encode(model.run(model.embed(tokens), 0, layer + 1)[:, 1:]).amax(1)


def choose_latents(model, sae, layer, texts, count=4, least=4 * LEAST):
    """The `count` latents that fire hardest, of those that fire in `least` texts [N, T] or more, but in few (COMMON)."""
    fired, total = 0, 0
    for peak in peaks(model, sae, layer, texts):
        fired, total = fired + (peak > 0).sum(0), total + peak.double().sum(0)
    strength = torch.where((fired >= least) & (fired <= COMMON * len(texts)), total / fired.clamp(min=1), 0)
    best = strength.topk(min(count, len(strength)))
    if not best.values[0] > 0:
        raise InputError(f"of {len(texts):,} texts of {WINDOW} held-out tokens, no latent fires in {least} or more and at "
                         f"most {COMMON:.0%}: name some with --latents, or evaluate a run with more --eval-tokens")
    return best.indices[best.values > 0].tolist()


def text_examples(model, sae, layer, latents, texts, count):
    """{latent: (positives, negatives)}, at most `count` each of texts [N, T]: where it fires most, where not at all."""
    out, found = {}, torch.cat([peak[:, latents].cpu() for peak in peaks(model, sae, layer, texts)])
    for latent, peak in zip(latents, found.T):
        order = peak.argsort(descending=True, stable=True)
        fires, silent = order[peak[order] > 0], order[peak[order] <= 0]
        silent = silent[::max(1, len(silent) // count)]                 # from everywhere
        out[latent] = texts[fires[:count]].tolist(), texts[silent[:count]].tolist()
    return out


def read_texts(path):
    """The strings in a .json file (a list, or {"examples": a list}), or the lines of any other."""
    path = Path(path)
    try:
        found = read_json(path) if path.suffix == ".json" else path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the examples in {path}: {error}") from None
    found = found.get("examples") if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise InputError(f'{path} should be a JSON list of texts, or {{"examples": [...]}}')
    return found


def generate(ask, seeds, count):
    """Texts like the seeds from a chat model, asked for 25 at a time; fewer than `count` where it repeats itself."""
    texts, message = {}, {"role": "user", "content": PROMPT.format(examples="\n".join(seeds), n=25)}
    for _ in range(2 * -(-count // 25)):
        for line in ask([message], max_tokens=2000).splitlines():
            texts[re.sub(r"^\s*(\d+[.)]|[-*])\s", "", line).strip(" \t\"'")] = True      # without numbering and quotes
        texts.pop("", None)
        if len(texts) >= count:
            break
    return list(texts)[:count]


# ---- The evaluation ------------------------------------------------------------------------------

def add_options(add):
    add("--latents", type=int, nargs="+", metavar="ID", help="latents of the first SAE, also for autointerp and latents "
        "(default: here four that fire in few of the held-out texts, but hard)")
    add("--examples", type=int, default=100, metavar="N", help="texts with a latent's feature, and as many without, half "
        "of them to tune alpha on (default: %(default)s; paper: 500)")
    add("--positives", metavar="WHERE", help="texts with the feature: a file, a folder of latent_ID.json, or the http(s) "
        "address of an OpenAI-compatible endpoint (…/v1) to write them (default: held-out text where it fires most)")
    add("--negatives", nargs="+", metavar="FILE", help="texts without it: two files or more, the first to tune alpha on "
        "(default: held-out text where the latent is silent)")
    add("--chat-model", default="gpt-4o-mini", help="model to ask at that endpoint (default: the paper's, %(default)s)")


def evaluate(setting, options):
    positives = options.positives or ""
    if positives.startswith(("http://", "https://")):
        source = {"ask": partial(chat, positives, options.chat_model)}
    else:
        source = {"positives": options.positives}
    return measure(setting, setting.folder, options.latents, options.examples, negatives=options.negatives, **source)


def measure(setting, folder, latents=None, count=100, positives=None, negatives=None, ask=None):
    """Table 4 for the first SAE of a setting: `count` positives and negatives a latent, half of them for tuning.

    latents: None chooses four. positives: None (text where the latent fires most), a file, or a folder with a
    latent_ID.json each; or `ask`, a chat model, whose answers are kept in `folder`. negatives: None (text where the
    latent is silent), or files, the first for tuning.
    """
    model, saes, corpus = setting.model, setting.saes, setting.text
    layer, sae = next(iter(saes.items()))
    if positives and not latents:
        raise InputError("--positives from files needs --latents, to say what they are positive for")
    if negatives and len(negatives) < 2:
        raise InputError("--negatives takes two files or more: the first to tune α on, the others to test on")

    def encode(texts):
        distinct = list(dict.fromkeys(text for text in texts if text.strip()))
        ids = corpus.tokenizer.encode_batch(distinct, add_special_tokens=False)
        return [[corpus.bos, *encoding.ids] for encoding in ids]

    files = [encode(read_texts(path)) for path in negatives or []]
    texts = windows(corpus.held_out, corpus.bos, corpus.eos)
    latents = latents or choose_latents(model, sae, layer, texts)
    for latent in latents:
        if not 0 <= latent < len(sae.W_dec):
            raise InputError(f"--latents {latent}: the SAE at layer {layer} has latents 0 to {len(sae.W_dec) - 1}")
    found, rows = text_examples(model, sae, layer, latents, texts, count), []
    with evaluating(model):
        for latent in progress(latents, "steering"):
            positive, silent = found[latent]
            if positives:
                path = Path(positives)
                positive = encode(read_texts(path / f"latent_{latent}.json" if path.is_dir() else path))
            elif ask:
                written = generate(ask, [corpus.tokenizer.decode(text[1:]) for text in positive[:10]], count)
                write_json(Path(folder) / "steering" / f"latent_{latent}.json", {"examples": written})
                positive = encode(written)
            tuning, testing = (files[0], sum(files[1:], [])) if files else (silent[::2], silent[1::2])
            if min(len(positive), 2 * len(tuning), 2 * len(testing)) < LEAST:
                raise InputError(f"latent {latent} has {len(positive)} positive and {len(tuning)} + {len(testing)} "
                                 f"negative examples, fewer than {LEAST}: choose another latent, give files, or evaluate "
                                 "a run with more --eval-tokens")
            v = F.normalize(sae.W_dec[latent].float(), dim=0).to(model.head.dtype)
            rows.append({"latent": latent, "examples": [corpus.tokenizer.decode(text[1:]) for text in positive[:3]],
                         **compare(model, layer, v, Examples(positive[::2], tuning, positive[1::2], testing))})
    return {"layer": layer, "rows": rows}


def show(numbers):
    table = []
    for row in numbers["rows"]:
        cells = [f"latent {row['latent']}", f"{row['alpha_base']:g}", f"{row['alpha_lora']:g}"]
        for side in (row["positive"], row["negative"]):
            means = [sum(side[name]["d"]) / len(side[name]["d"]) for name in ("base", "lora")]
            cells += [*(f"{mean:+.2f}" for mean in means), f"{side['delta']:+.2f}", plus_minus(side["ci90"], ".2f")]
        table.append(cells)
    print_table(table, [f"layer {numbers['layer']}", "α base", "α LoRA", "positive d base", "LoRA", "Δ", "90 % CI",
                        "negative d base", "LoRA", "Δ", "90 % CI"])
    print("d: change by steering, in units where the unsteered texts span 100; α 0: no α of the grid helped\n")
    for row in numbers["rows"]:
        print(f"latent {row['latent']}: {row['examples'][0]!r}")


def draw(numbers, figure):
    """Figures 7 and 10, a row of panels a latent: d over the test texts; and d of the tuning texts against α."""
    rows = numbers["rows"]
    figure.set_size_inches(12, 0.8 + 1.9 * len(rows))
    for panels, row in zip(figure.subplots(len(rows), 3, squeeze=False), rows):
        for axes, side in zip(panels, ("positive", "negative")):
            draw_changes(axes, row, side)
        draw_tuning(panels[2], row)
    for axes in panels[:2]:
        axes.set_xlabel("d, the unsteered texts spanning 100")
    panels[2].set_xlabel("α")
    panels[0].legend()
    panels[2].legend(fontsize=8)
    figure.suptitle("Change in normalised log-likelihood by steering (the paper's Figures 7 and 10)", fontsize=10)


def draw_changes(axes, row, side):
    """The distribution of d over the test texts of one side, in both models."""
    values = [row[side][name]["d"] for name in ("base", "lora")]
    low, high = min(map(min, values)), max(map(max, values))
    for d, label in zip(values, ("base model", "LoRA model")):
        axes.hist(d, 25, (low, max(high, low + 1)), alpha=0.5, label=label)
    alphas = f"α {row['alpha_base']:g} and {row['alpha_lora']:g}"
    axes.set_title(f"latent {row['latent']}, {side} examples; {alphas}", fontsize=9)
    axes.set_ylabel("texts")


def draw_tuning(axes, row):
    """Mean d of the tuning texts at every α of the grid."""
    for name, colour in (("base", "C0"), ("lora", "C1")):
        for side, line in (("positive", "-"), ("negative", "--")):
            axes.plot(row["alphas"], row["tuning"][name][side], line, color=colour, marker=".", label=f"{name}, {side}")
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xticks([0, 0.1, 1, 10], ["0", "0.1", "1", "10"])
    axes.set_title(f"latent {row['latent']}, tuning examples", fontsize=9)
    axes.set_ylabel("mean d")
