"""Feature absorption: does the latent for "starts with S" fire on "snake"? (§5.1, Tables 3 and 6)

    python eval.py RUN_DIR --suite absorption                 2,000 words of the model's vocabulary
    python eval.py RUN_DIR --suite absorption --words 8000    more words, for a GPU

Chanin et al. 2024. The residual stream x is read at the last token of a word, in a prompt that asks
for its first letter. A linear probe finds a direction u for each letter. Logistic regressions on 1,
2, ... latents find those that represent the letter: one is added as long as that raises F1 by more
than 0.03. If the probe detects the letter but these are silent, another latent i may represent it:

    z_i W_dec,i · u >= 0.4 x · u >= 0   and   W_dec,i · u / ‖W_dec,i‖ >= 0.025

where i has the largest z_i W_dec,i · u. If both hold, i has absorbed the letter. A letter's
rate is absorbed words / words that the probe gets right; lower is better. The score is the mean
rate over the letters with a silent word.

Shapes: N words, D d_model, M latents, 26 letters.
"""
import random
import re
from functools import partial
from string import ascii_uppercase
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lorasae.errors import InputError
from lorasae.evals import saebench
from lorasae.evals.common import as_model, progress
from lorasae.evals.probes import Task, logistic, scikit_learn, train_probes
from lorasae.evals.texts import activations

QUESTION = " has the first letter:"
EXAMPLES = 10                           # example words in a prompt, each with its answer
LEAST_WORDS = 200
MOST_LATENTS = 10                       # that may represent one letter
F1_GAIN, SILENT, LEAST_COSINE, LEAST_SHARE = 0.03, 1e-8, 0.025, 0.4
LETTERS = len(ascii_uppercase)


def add_options(add):
    add("--words", type=int, default=2000, metavar="N",
        help="number of words to draw from the vocabulary for each seed (default: %(default)s; "
             "SAEBench: all)")


def evaluate(setting, words, seeds):
    """Table 6's absorption row for the first SAE of a run, and the counts for each letter."""
    scikit_learn()                                      # fails before any work if it is missing
    layer, sae, seeds = saebench.reading(setting, "absorption", seeds)
    vocabulary = letter_words(setting.text.tokenizer)
    if min(words, len(vocabulary)) < LEAST_WORDS:
        raise InputError(f"--words {words}, from the tokenizer's {len(vocabulary)} tokens of ASCII "
                         f"letters: absorption needs at least {LEAST_WORDS} words")

    letters = {who: [] for who in saebench.MODELS}
    for seed in progress(seeds, "absorption"):
        asked = ask(vocabulary, setting.text, words, seed)
        for who in saebench.MODELS:
            with as_model(setting.model, who):
                x = read_at_word(setting.model, sae, layer, asked)
            letters[who].append(absorption(sae, x, asked, seed))

    values = {who: saebench.columns(list(map(scores, found))) for who, found in letters.items()}
    drawn = f"{min(words, len(vocabulary))} words drawn for each seed"
    return saebench.summary(layer, values, len(seeds), sets=[drawn], letters=letters)


# ---- Words and prompts -------------------------------------------------------------------------

def letter_words(tokenizer):
    """{word: token id} for all tokens of ASCII letters, with or without a leading space."""
    found = {}
    for piece, token in tokenizer.get_vocab().items():
        word = re.sub("^[Ġ▁]", " ", piece)              # how BPE and SentencePiece write a space
        if re.fullmatch(" ?[A-Za-z]+", word):
            found[word] = token
    return found


def initial(word):
    return word.strip()[0].upper()


class Asked(NamedTuple):
    """The words drawn for one seed, four fifths of them for training, and their prompts."""
    train: list
    test: list
    prompts: list           # token ids for train, test, and test again with other examples
    offset: int             # number of tokens after the word in a prompt


def ask(vocabulary, text, count, seed):
    """Draws `count` words and writes their prompts. text: the run's text, for its tokenizer.

    SAEBench reads the sixth token from the end. How many tokens follow the word depends on the
    tokenizer, so words are kept only if the token read there is the whole word.
    """
    def encode(texts):
        return [each.ids for each in text.tokenizer.encode_batch(texts, add_special_tokens=False)]

    # The words that stay one token. A prompt always ends in a line of this form.
    rng = random.Random(seed)
    drawn = rng.sample(sorted(vocabulary), min(count, len(vocabulary)))
    question, *lines = encode([QUESTION, *(f"\n{word}{QUESTION}" for word in drawn)])
    whole = [word for word, ids in zip(drawn, lines)
             if ids[-len(question) - 1:] == [vocabulary[word], *question]]
    if len(whole) < len(drawn) // 2:
        raise InputError(f"only {len(whole)} of {len(drawn)} words stay one token in a prompt, so "
                         "this tokenizer does not suit absorption")

    # Their prompts; a test word has two, with different examples.
    cut = len(whole) * 4 // 5
    train, test = whole[:cut], whole[cut:]
    prompts = [prompt(word, examples, rng)
               for words, examples in ((train, train), (test, test), (test, whole))
               for word in words]
    rows = [[text.bos, *ids] for ids in encode(prompts)]
    return Asked(train, test, rows, len(question))


def prompt(word, examples, rng):
    """Ten other words with their first letters, then the question about this word."""
    lines = []
    while len(lines) < EXAMPLES:
        example = rng.choice(examples)
        if word not in example:
            lines.append(f"{example}{QUESTION} {initial(example)}")
    return "\n".join([*lines, f"{word}{QUESTION}"])


def read_at_word(model, sae, layer, asked):
    """x [N, D] fp32 at the last token of the word, for all prompts."""
    out = torch.empty(len(asked.prompts), model.head.shape[1], device=model.device)
    for chosen, _, x in activations(model, sae, layer, asked.prompts):
        places = [len(asked.prompts[i]) - asked.offset - 1 for i in chosen]
        out[chosen] = x[range(len(chosen)), places].float()
    return out


# ---- One model ---------------------------------------------------------------------------------

def absorption(sae, x, asked, seed):
    """{letter: {"right", "silent", "absorbed", "probe_f1", "latents"}}, from x [N, D] at the words.

    The first three count test words; each is a subset of the one before.
    """
    x, x_test, x_again = x.split([len(asked.train), len(asked.test), len(asked.test)])
    z, z_test, z_again = [sae.encode(part).float() for part in (x, x_test, x_again)]
    own, own_test = [one_hot(words).to(x.device) for words in (asked.train, asked.test)]

    # The direction of each letter, and the test words that the probe says begin with it.
    probe = letter_probes(x, own, batch=64, weight_decay=1e-4, seed=seed)
    seen = (x_test @ probe.weight.T + probe.bias).T > 0                         # [26, N]

    # Latents are tried in the order of their weights in a sparse probe. SAEBench's batch is 4,096;
    # with few words that is one step per epoch, which orders them almost at random.
    batch = min(4096, max(64, len(z) // 25))
    sparse = letter_probes(z, own, batch=batch, weight_decay=1e-6, l1=0.01, seed=seed)

    # For each letter, the words where the probe is right and the letter's latents are silent.
    counts = {}
    for i, letter in enumerate(ascii_uppercase):
        if not (own[i].any() and own_test[i].any()):
            continue
        order = sparse.weight[i].argsort(descending=True)[:MOST_LATENTS]
        latents, fires = letter_latents(z, own[i], z_test, own_test[i], order)
        right = own_test[i] & seen[i]
        silent, absorbed = absorbs(sae, x_again, z_again, probe.weight[i], latents)
        counts[letter] = {
            "right": int(right.sum()),
            "silent": int((right & ~fires & silent).sum()),
            "absorbed": int((right & ~fires & absorbed).sum()),
            "probe_f1": f1(seen[i], own_test[i]),
            "latents": latents.tolist(),
        }
    return counts


def one_hot(words):
    """Words [N] -> bool [26, N]: which of them begin with each letter."""
    return torch.tensor([[initial(word) == letter for word in words] for letter in ascii_uppercase])


def letter_probes(features, labels, *, batch, weight_decay, seed, l1=0.0):
    """SAEBench's probes, each for one letter against the rest. features [N, D], labels [26, N].

    Adam; the learning rate falls from 1e-2 to 1e-5 in 50 epochs. SAEBench's loss is the mean over
    letters, ours the sum, so weight decay and eps are 26 times SAEBench's.
    """
    adam = partial(torch.optim.Adam, weight_decay=LETTERS * weight_decay, eps=LETTERS * 1e-8)
    task = Task(torch.arange(len(features), device=features.device)[None], labels)
    positives = labels.sum(1, keepdim=True)
    pos_weight = (len(features) - positives) / positives.clamp(min=1)
    return train_probes(features, task, lr=1e-2, optimizer=adam, batch=batch, epochs=50, seed=seed,
                        l1=l1, pos_weight=pos_weight, decay=1e-3 ** (1 / 50))


def letter_latents(z, own, z_test, own_test, order):
    """(a letter's latents, the test words they predict it for). order: candidates, best first."""
    best = -1.0
    for k in range(1, len(order) + 1):
        fires = logistic(z[:, order[:k]], own, z_test[:, order[:k]], "balanced").to(z.device)
        score = f1(fires, own_test)
        if score <= best + F1_GAIN:
            break
        best, found = score, (order[:k], fires)
    return found


def f1(found, true):
    """found, true [N] bool -> 2 TP / (2 TP + FP + FN); 0 if all are False."""
    both, either = (found & true).sum(), found.sum() + true.sum()
    return (2 * both / either.clamp(min=1)).item()


def absorbs(sae, x, z, direction, latents):
    """x [N, D], z [N, M] -> where a letter's latents are silent [N], another absorbed it [N]."""
    W_dec = sae.W_dec.float()
    projection, top = (z * (W_dec @ direction)).max(1)
    cosine = F.cosine_similarity(W_dec[top], direction[None])
    total = x @ direction

    silent = z[:, latents].sum(1) < SILENT
    carried = (cosine >= LEAST_COSINE) & (total >= 0) & (projection >= LEAST_SHARE * total)
    return silent, silent & carried


def scores(counts):
    """{letter: counts} -> {metric: its mean over letters}."""
    rates = [row["absorbed"] / row["right"] for row in counts.values() if row["silent"]]
    known = [row["probe_f1"] for row in counts.values()]
    return {"absorption": sum(rates) / max(len(rates), 1), "probe_f1": sum(known) / len(known)}


def tables(numbers):
    notes = ["If the probe's F1 is low, the residual stream does not encode the letters, so no "
             "latent can absorb them."]
    caption = ("Feature absorption: of the words whose first letter the probe detects, the share "
               "whose letter another latent has absorbed; lower is better")
    return [saebench.table(numbers, "absorption", caption, notes)]
