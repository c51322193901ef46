"""Feature absorption (paper §5.1 and A.2, Tables 3 and 6; Chanin et al. 2024): does "starts with S" fire on "snake"?

    python eval.py RUN_DIR --suite absorption                       2,000 words of the model's own vocabulary a seed
    python eval.py RUN_DIR --suite absorption --words 8000          more: on a GPU it is worth it

The residual stream x is read at the last token of a word, in a prompt that asks for first letters. A linear probe finds
the direction u of each letter; logistic regressions on 1, 2, .. latents find those that stand for it (more of them as
long as each adds 0.03 to F1). Where the probe sees the letter and these are silent, a single other latent may carry it:

    z_i W_dec,i · u >= 0.4 x · u >= 0   and   W_dec,i · u / ‖W_dec,i‖ >= 0.025      i: the largest z_i W_dec,i · u

It has absorbed the letter. The rate of a letter is absorbed words / words the probe gets right; lower is better. The
score is the mean over letters, those without a candidate counting 0. SAEBench leaves these out; its mean stands beside.

Shapes: N words, D d_model, M latents, 26 letters.
"""
import random
import re
import string
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from lorasae.errors import InputError
from lorasae.evals import saebench
from lorasae.evals.common import evaluating, progress
from lorasae.evals.probes import Probe, logistic
from lorasae.evals.saebench import FIRST_SEED, MODELS
from lorasae.lora import base

QUESTION = " has the first letter:"
EXAMPLES = 10                                          # words answered before the one that is asked
LEAST_WORDS = 200
MOST_LATENTS = 10                                       # that may stand for one letter
F1_GAIN, SILENT, LEAST_COSINE, LEAST_SHARE = 0.03, 1e-8, 0.025, 0.4

KNOWN = 0.6                                      # F1 of the probe; SAEBench now drops letters below

LABELS = {
    "absorption": "absorption",
    "saebench": "absorption, SAEBench's mean",
    "probe_f1": "F1 of the probe on x",
    "known": "letters with that F1 > 0.6",
    "one_f1": "F1 of one latent",
    "sparse_f1": "F1 of the letter's latents",
    "latents": "latents a letter",
    "true_positives": "test words the probe sees",
    "candidates": "of them, missed by the latents",
    "survivors": "of them, silent when asked again",
    "absorbed": "of them, absorbed",
}
PAPER = {"saebench": (0.210, 0.205)}
TOLERANCE = 0.06


def add_options(add):
    add("--words", type=int, default=2000, metavar="N", help="words of the vocabulary to ask for, other ones with each "
        "seed (default: %(default)s; SAEBench: all)")


def evaluate(setting, options):
    """Table 6's row on absorption, for the first SAE of a setting, and each letter's counts."""
    layer, sae = saebench.reading(setting, "absorption")
    if options.seeds < 1 or options.words < LEAST_WORDS:
        raise InputError(f"--seeds {options.seeds} --words {options.words}: expected 1 and {LEAST_WORDS}, or more")
    model, corpus = setting.model, setting.text
    vocabulary = words(corpus.tokenizer)
    if len(vocabulary) < LEAST_WORDS:
        raise InputError(f"the tokenizer has {len(vocabulary)} tokens of ASCII letters alone, too few to ask for first "
                         f"letters (at least {LEAST_WORDS} are needed)")

    by_seed, letters = {name: [] for name in MODELS}, {name: [] for name in MODELS}
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    jobs = [(seed, name) for seed in seeds for name in MODELS]

    with evaluating(model):
        for seed, name in progress(jobs, "absorption"):
            asked = ask(vocabulary, corpus.tokenizer, options.words, seed)
            with base(model) if name == "base" else nullcontext():
                counts = one_model(model, sae, layer, asked, seed)
            letters[name].append(counts)
            by_seed[name].append(scores(counts))
    return {"layer": layer, "seeds": options.seeds, "sets": [f"{len(asked.train)} + {len(asked.test)} words"],
            "words_of_the_vocabulary": len(vocabulary), "tokens_after_the_word": asked.offset, "letters": letters,
            "rows": saebench.rows(by_seed)}


# ---- Words and prompts ---------------------------------------------------------------------------

def words(tokenizer):
    """{word: token id} of every token that is ASCII letters alone, with or without one space before them."""
    found = {}
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token], skip_special_tokens=False)
        piece = tokenizer.id_to_token(token) or ""
        if piece.startswith("▁"):                             # whose decoder may drop a first space
            text = piece.replace("▁", " ")
        if re.fullmatch(" ?[A-Za-z]+", text):
            found.setdefault(text, token)
    return found


def letter(word):
    """0 to 25."""
    return string.ascii_uppercase.index(word.strip()[0].upper())


class Asked(NamedTuple):
    """The words of one seed, four fifths of them to train, and their prompts."""
    train: list
    test: list
    prompts: list                            # of train, then of test: token ids, BOS not among them
    again: list                               # other prompts for test, with examples from all words
    offset: int                                    # tokens between the word and the end of a prompt


def ask(vocabulary, tokenizer, count, seed):
    """Draws `count` words and writes their prompts. Words that do not stay one token in their prompt are left out.

    SAEBench reads at the sixth token from the end. How many tokens follow the word is the tokenizer's affair: here it
    is looked up, and each prompt is checked to have the word's own token there.
    """
    rng = random.Random(seed)
    drawn = rng.sample(sorted(vocabulary), min(count, len(vocabulary)))
    cut = len(drawn) * 4 // 5
    train, test = drawn[:cut], drawn[cut:]
    question = tokenizer.encode(QUESTION, add_special_tokens=False).ids

    def prompts(asked, examples):
        """{word: token ids} of those that can be read."""
        texts = [prompt(word, examples, rng) for word in asked]
        found = {}
        for word, encoding in zip(asked, tokenizer.encode_batch(texts, add_special_tokens=False)):
            ids = encoding.ids
            if ids[-len(question):] == question and ids[-len(question) - 1] == vocabulary[word]:
                found[word] = ids
        return found

    of_train, of_test, again = prompts(train, train), prompts(test, test), prompts(test, drawn)
    of_test = {word: ids for word, ids in of_test.items() if word in again}
    if len(of_train) + len(of_test) < len(drawn) / 2:
        raise InputError(f"in most prompts the tokenizer joins the word with what follows, {QUESTION!r}: --suite "
                         "absorption cannot find where to read")

    first = [*of_train.values(), *of_test.values()]
    second = [again[word] for word in of_test]
    return Asked(list(of_train), list(of_test), first, second, len(question))


def prompt(word, examples, rng):
    """Ten other words with their first letters, and the question for this one's."""
    lines = []
    while len(lines) < EXAMPLES:
        example = rng.choice(examples)
        if word not in example:
            lines.append(f"{example}{QUESTION} {example.strip()[0].upper()}")
    return "\n".join([*lines, f"{word}{QUESTION}"])


@torch.no_grad()
def read_at_word(model, layer, prompts, offset, batch=64):
    """Prompts (token ids) -> x [N, D] fp32 at the last token of the word asked for."""
    out = torch.empty(len(prompts), model.head.shape[1], device=model.device)
    bos = model.config.bos_token_id
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        chosen = order[start:start + batch]
        rows = [torch.tensor([bos, *prompts[i]]) for i in chosen]
        tokens = pad_sequence(rows, batch_first=True).to(model.device)          # on the right: unseen from the left
        x = model.run(model.embed(tokens), 0, layer + 1)
        at = torch.tensor([len(row) - offset - 1 for row in rows], device=model.device)
        out[chosen] = x[torch.arange(len(rows), device=model.device), at].float()
    return out


# ---- Probes --------------------------------------------------------------------------------------

def letter_probes(features, letters, *, batch, weight_decay, l1=0.0, seed, epochs=50):
    """26 probes, one against the rest -> Probe, weight [26, D]. features [N, D], letters [N].

    Cross-entropy weighted by negatives / positives + l1 · mean_letters ‖w‖₁, by Adam; the learning rate falls from 1e-2
    to 1e-5, epoch by epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = F.one_hot(letters, 26).float()
    positives = labels.sum(0)
    pos_weight = (len(labels) - positives) / positives.clamp(min=1)

    bound = features.shape[1] ** -0.5
    weight = torch.empty(26, features.shape[1]).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(26).uniform_(-bound, bound, generator=generator)
    weight, bias = (p.to(features.device).requires_grad_() for p in (weight, bias))
    optimizer = torch.optim.Adam([weight, bias], lr=1e-2, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, (1e-5 / 1e-2) ** (1 / epochs))

    for _ in range(epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for chosen in order.split(batch):
            logits = features[chosen] @ weight.T + bias
            loss = F.binary_cross_entropy_with_logits(logits, labels[chosen], pos_weight=pos_weight)
            loss = loss + l1 * weight.abs().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return Probe(weight.detach(), bias.detach())


def f1(predicted, true):
    """predicted, true [.., N] bool -> [..]: 2 TP / (2 TP + FP + FN), 0 where there is nothing."""
    both = (predicted & true).sum(-1)
    either = predicted.sum(-1) + true.sum(-1)
    return 2 * both / either.clamp(min=1)


# ---- One model -----------------------------------------------------------------------------------

def one_model(model, sae, layer, asked, seed):
    """{letter: its counts} of the model as it is."""
    x = read_at_word(model, layer, asked.prompts, asked.offset)
    letters = torch.tensor([letter(word) for word in [*asked.train, *asked.test]], device=x.device)
    cut = len(asked.train)

    def read_again(indices):
        return read_at_word(model, layer, [asked.again[i] for i in indices], asked.offset)

    return absorption(sae, (x[:cut], letters[:cut]), (x[cut:], letters[cut:]), read_again, seed)


def absorption(sae, train, test, read_again, seed):
    """{letter: {"words", "true_positives", "candidates", "survivors", "absorbed", "latents", F1s}} of one set of words.

    train, test: x [N, D] and letters [N]. read_again(indices of test words) -> their x in other prompts.
    """
    (x, letters), (x_test, letters_test) = train, test
    probe = letter_probes(x, letters, batch=64, weight_decay=1e-4, seed=seed)
    z, z_test = encode(sae, x), encode(sae, x_test)
    # SAEBench's batch, but a small vocabulary in parts: 50 steps, one an epoch, would choose latents almost at random.
    batch = min(4096, max(64, len(z) // 25))
    favourites = letter_probes(z, letters, batch=batch, weight_decay=1e-6, l1=0.01, seed=seed).weight

    kept = [i for i in range(26) if (letters == i).any() and (letters_test == i).any()]
    found = sparse_probes(z, letters, z_test, letters_test, favourites, kept)
    right = x_test @ probe.weight.T + probe.bias > 0                            # [N, 26]
    counts = {}
    for i, (latents, fires, scores) in zip(kept, found):
        own = letters_test == i
        seen = own & right[:, i]
        candidates = (seen & ~fires).nonzero().squeeze(1)
        new = read_again(candidates.tolist()) if len(candidates) else x_test[:0]
        silent, absorbed = absorbs(sae, new, probe.weight[i], latents)
        counts[string.ascii_lowercase[i]] = {
            "words": int(own.sum()), "true_positives": int(seen.sum()), "candidates": len(candidates),
            "survivors": int(silent.sum()), "absorbed": int(absorbed.sum()), "latents": latents.tolist(),
            "probe_f1": f1(right[:, i], own).item(), "one_f1": scores[0], "sparse_f1": max(scores[:len(latents)])}
    return counts


@torch.no_grad()
def encode(sae, x):
    return sae.encode(x).float()


def sparse_probes(z, letters, z_test, letters_test, favourites, kept):
    """For each letter of `kept`: (its latents, test words they say it of [N] bool, F1 with 1, 2, .. latents).

    Latents are taken in the order of their weights in the L1 probe, one more as long as F1 gains more than 0.03.
    """
    true = torch.stack([letters == i for i in kept])
    true_test = torch.stack([letters_test == i for i in kept])
    order = favourites[kept].topk(min(MOST_LATENTS, z.shape[1])).indices        # [letters, 10], the strongest first

    fires, scores = [], []
    for k in range(1, order.shape[1] + 1):
        columns = order[:, :k]
        probe = logistic(z.T[columns].mT, true, balanced=True)
        logits = (z_test.T[columns].mT.double() @ probe.weight[..., None]).squeeze(-1) + probe.bias[:, None]
        fires.append(logits > 0)
        scores.append(f1(logits > 0, true_test))
    scores = torch.stack(scores, 1).tolist()

    found = []
    for i, of_letter in enumerate(scores):
        k = split_count(of_letter)
        found.append((order[i, :k], fires[k - 1][i], of_letter))
    return found


def split_count(scores):
    """How many latents stand for a letter, by the F1 of 1, 2, ..: each next one has to gain more than 0.03."""
    best = scores[0]
    for k, score in enumerate(scores[1:], 1):
        if score <= best + F1_GAIN:
            return k
        best = score
    return len(scores)


def absorbs(sae, x, direction, latents):
    """x [N, D] of words with a letter -> its latents are silent [N], another one has absorbed it [N]."""
    u = F.normalize(direction, dim=0)
    rows = sae.W_dec.float()
    along = rows @ u                                    # [M]: where rows have length 1, SAEBench's cosine
    z = encode(sae, x)
    silent = z[:, latents].sum(1) < SILENT

    projection, top = (z * along).max(1)
    cosine = along[top] / rows[top].norm(dim=1).clamp(min=1e-12)
    total = x @ u
    carried = (cosine >= LEAST_COSINE) & (total >= 0) & (projection >= LEAST_SHARE * total)
    return silent, silent & carried


def scores(counts):
    """{letter: counts} -> the score of one seed and what explains it."""
    rated = [row for row in counts.values() if row["true_positives"]]
    rates = [row["absorbed"] / row["true_positives"] for row in rated]
    surviving = [row["absorbed"] / row["true_positives"] for row in rated if row["survivors"]]
    out = {"absorption": sum(rates) / max(len(rates), 1), "saebench": sum(surviving) / max(len(surviving), 1)}

    for name in ("probe_f1", "one_f1", "sparse_f1"):
        out[name] = sum(row[name] for row in counts.values()) / len(counts)
    for name in ("true_positives", "candidates", "survivors", "absorbed"):
        out[name] = float(sum(row[name] for row in counts.values()))
    out["known"] = float(sum(row["probe_f1"] > KNOWN for row in counts.values()))
    out["latents"] = sum(len(row["latents"]) for row in counts.values()) / len(counts)
    return out


def show(numbers):
    print("feature absorption: of the words whose letter the probe sees, those another latent absorbed; less is better")
    saebench.show_rows(numbers, LABELS, PAPER, TOLERANCE)

    known = numbers["rows"]["known"]
    if min(known["base"], known["lora"]) < 13:
        print(f"The probe knows {known['base']:.1f} letters in the base model, {known['lora']:.1f} in the adapted one. "
              "Where the residual\nstream does not hold the letter, nothing can absorb it: these rates say little.")


def draw(numbers, figure):
    """The rate of each letter, mean over seeds, in both models."""
    figure.set_size_inches(8, 3.4)
    axes = figure.subplots()
    for model, shift, label in (("base", -0.2, "base"), ("lora", 0.2, "LoRA")):
        rates = []
        for name in string.ascii_lowercase:
            rows = [counts[name] for counts in numbers["letters"][model] if name in counts]
            seen = sum(row["true_positives"] for row in rows)
            rates.append(sum(row["absorbed"] for row in rows) / seen if seen else 0)
        axes.bar([place + shift for place in range(26)], rates, 0.4, label=label)
    axes.set_xticks(range(26), list(string.ascii_uppercase))
    axes.set(xlabel="first letter", ylabel="absorbed, of words the probe gets right", title="Feature absorption")
    axes.legend()
