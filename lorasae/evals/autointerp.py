"""Automated interpretability (paper §5.1, Tables 3 and 6; SAEBench): latents explained by a judge.

    python eval.py RUN_DIR --suite autointerp --judge https://api.openai.com/v1
    python eval.py RUN_DIR --suite autointerp --judge http://localhost:8000/v1 --chat-model NAME

A judge sees 15 windows of text in which a latent fires, and explains the latent. Then it sees 14
others in random order and predicts, from its explanation only, in which of them the latent fires:

    score = (windows judged correctly) / 14;        always answering "None" scores 10/14

4 of the 14 are active: 2 of the strongest and 2 drawn in proportion to activation². The other 10
are random windows, which SAEBench labels inactive without checking.

The SAE reads the activations of the base and the adapted model in rows of 128 tokens, BOS first;
nothing is spliced in. Both get the same latents, random windows and orders. Each seed draws new
windows; a score is the mean over seeds. Intervals are 90 %, over latents, paired for LoRA - base.

Deviations from SAEBench: the text is the run's held-out text (SAEBench: 2M tokens of the Pile),
with BOS inserted (SAEBench overwrites every 128th token); latents are sampled from those alive in
both models; prompts are worded differently; an empty answer is unusable (SAEBench: "None").

Shapes: N rows, T tokens per row, M latents.
"""
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch

from lorasae.errors import InputError
from lorasae.evals import saebench
from lorasae.evals.chat import Kept, chat
from lorasae.evals.common import as_model, check_latents, progress
from lorasae.evals.judge import judge as ask_judge
from lorasae.evals.saebench import MODELS
from lorasae.evals.texts import LENGTH, latents_of
from lorasae.io.console import note

ALIVE = 15                              # latents that fire on no more tokens than this are left out
AROUND = 10                             # a window is a token and this many on either side
TOP, TOP_SHOWN = 12, 10                 # the strongest windows; how many are shown to explain
DRAWN, DRAWN_SHOWN = 7, 5               # windows drawn by activation²; how many are shown
RANDOM = 10                             # random windows, all of them scored
SCORED = (TOP - TOP_SHOWN) + (DRAWN - DRAWN_SHOWN) + RANDOM
THRESHOLD = 0.01                        # a latent fires above this share of its largest activation
WORKERS = 8                             # latents judged at the same time
PAPERS_JUDGE = "gpt-4o-mini"


class Window(NamedTuple):
    """2 · AROUND + 1 = 21 tokens of one row."""
    tokens: list                        # ids
    activations: list                   # one per token; 0 if below THRESHOLD
    active: bool                        # SAEBench's label: False for a random window


# ---- Where latents fire ------------------------------------------------------------------------

def rows_of(text):
    """Held-out chunks [n, context] -> rows [N, T], T <= 128: BOS and T - 1 tokens of a chunk."""
    chunks = text.held_out[:, 1:]
    length = min(LENGTH - 1, chunks.shape[1])
    rows = chunks.unfold(1, length, length).flatten(0, 1)
    return torch.cat([torch.full((len(rows), 1), text.bos), rows], 1)


def times_fired(model, sae, layer, rows):
    """The number of tokens on which each latent fires, [M] int64."""
    return sum((z > 0).sum((0, 1)).cpu() for z in latents_of(model, sae, layer, rows))


def firings(model, sae, layer, rows, latents):
    """The activations of some latents at every token, [len(latents), N T], sparse."""
    parts = [z[..., latents].flatten(0, 1).T.float().cpu().to_sparse()
             for z in latents_of(model, sae, layer, rows)]
    return torch.cat(parts, 1).coalesce()


# ---- Windows -----------------------------------------------------------------------------------

def strongest(places, values, length):
    """Up to TOP places, largest values first; those in one row are over AROUND tokens apart."""
    chosen = []
    for place in places[values.argsort(descending=True, stable=True)].tolist():
        same_row = [other for other in chosen if other // length == place // length]
        if all(abs(place - other) > AROUND for other in same_row):
            chosen.append(place)
        if len(chosen) == TOP:
            break
    return chosen


def windows(activation, rows, rng):
    """One latent's windows: (15 to explain, the strongest first; 14 to score, in random order).

    None if it fires too rarely. activation [N T]; rows [N, T]; rng: the only source of randomness.
    """
    count, length = rows.shape

    # Random places and orders, before looking at the latent: both models share them.
    row = rng.integers(count, size=RANDOM)
    random = row * length + rng.integers(AROUND, length - AROUND, size=RANDOM)
    order_of_top, order_of_scored = rng.permutation(TOP), rng.permutation(SCORED)

    # Where the latent fires, except too near the ends of a row for a whole window.
    places = activation.nonzero().squeeze(1)
    column = places % length
    places = places[(column >= AROUND) & (column < length - AROUND)]
    values = activation[places]

    # The strongest windows, and weaker ones in proportion to activation².
    top = strongest(places, values, length)
    if len(top) < TOP:
        return None
    at_top = activation[top]
    weaker = values < at_top.min()
    if weaker.sum() < DRAWN:
        return None
    weight = values[weaker].double().numpy() ** 2
    drawn = rng.choice(places[weaker].numpy(), DRAWN, replace=False, p=weight / weight.sum())

    def window(place, active=True):
        span = slice(place - AROUND, place + AROUND + 1)
        kept = activation[span] * (activation[span] > THRESHOLD * at_top.max())
        return Window(rows.view(-1)[span].tolist(), kept.tolist(), active)

    # Most are shown to explain the latent; the rest are scored, with the random ones.
    strong = [window(top[i]) for i in order_of_top]
    weak = [window(place) for place in drawn]
    shown = strong[:TOP_SHOWN] + weak[:DRAWN_SHOWN]
    shown.sort(key=lambda example: max(example.activations), reverse=True)
    scored = strong[TOP_SHOWN:] + weak[DRAWN_SHOWN:]
    scored += [window(place, active=False) for place in random]
    return shown, [scored[i] for i in order_of_scored]


def score(picked, scored):
    """The share of windows judged correctly; picked: numbers of those judged active, from 1."""
    return fmean((number in picked) == window.active for number, window in enumerate(scored, 1))


# ---- The evaluation ----------------------------------------------------------------------------

def add_options(add):
    add("--judge", metavar="URL", help="OpenAI-compatible endpoint (…/v1) whose --chat-model "
        "explains and predicts; its answers are kept in RUN_DIR/autointerp")
    add("--chat-model", default=PAPERS_JUDGE,
        help="model to ask at that endpoint (default: the paper's, %(default)s)")
    add("--judge-latents", type=int, default=1000, metavar="N",
        help="number of latents to judge, sampled from those alive (default: SAEBench's "
        "%(default)s); --latents names them instead")


def evaluate(setting, judge, chat_model, judge_latents, latents, seeds):
    """Judges the first SAE's latents in both models. latents None: a sample of judge_latents."""
    if judge is None:
        raise InputError("--suite autointerp needs a language model as its judge: --judge "
                         "https://api.openai.com/v1, or another OpenAI-compatible endpoint")
    layer, sae, seeds = saebench.reading(setting, "autointerp", seeds)
    rows = rows_of(setting.text)
    if rows.shape[1] <= 2 * AROUND:
        raise InputError(f"the run's context gives rows of {rows.shape[1]} tokens, but a window "
                         f"needs {2 * AROUND + 1}: evaluate a run with a longer --context")

    # The latents, and where each fires in each model.
    def in_both(measure, *more):
        found = {}
        for who in MODELS:
            with as_model(setting.model, who):
                found[who] = measure(setting.model, sae, layer, rows, *more)
        return found

    alive = torch.minimum(*in_both(times_fired).values()) > ALIVE
    latents = choose(latents, judge_latents, alive)
    found = in_both(firings, latents)

    # The endpoint's answers about a latent are kept in a file in the run's folder.
    name = f"{chat_model} at {judge}"
    questions = len(latents) * len(seeds) * len(MODELS) * 2
    note(f"autointerp: {questions:,} questions to {name}, minus those already answered")

    def judged(i):
        activation = {who: found[who][i].to_dense() for who in MODELS}
        path = setting.folder / "autointerp" / f"latent_{latents[i]}.json"
        kept = Kept(path, partial(chat, judge, chat_model), name)
        return judge_latent(latents[i], activation, rows, setting.text.tokenizer, kept, seeds)

    with ThreadPoolExecutor(WORKERS) as pool:
        answers = pool.map(judged, range(len(latents)))     # an error cancels those not yet started
        results = [next(answers) for _ in progress(latents, "judging")]

    usable = [row for row in results if isinstance(row, dict)]
    rare, unusable = results.count("rare"), results.count("unusable")
    left_out = (f"Of {len(latents):,} latents, {rare} fire too rarely for {TOP + DRAWN} windows "
                f"and {unusable} got answers that name no windows")
    if not usable:
        raise InputError(f"{left_out}: nothing is left to score")
    values = {who: saebench.columns([{"score": fmean(row["score"][who])} for row in usable])
              for who in MODELS}
    return saebench.summary(layer, values, len(seeds), f"latents ({len(usable):,})", sets=[name],
                            left_out=left_out, latents=usable)


def choose(latents, count, alive):
    """The latents to judge: those named, or a sample of those alive in both models, alive [M]."""
    if latents:
        check_latents(latents, len(alive))
        return list(dict.fromkeys(latents))
    alive = alive.nonzero().squeeze(1).numpy()
    if count < 1 or not len(alive):
        raise InputError(f"--judge-latents {count}, from {len(alive)} latents that fire on more "
                         f"than {ALIVE} held-out tokens in both models: ask for 1 or more, or "
                         "evaluate a run with more --eval-tokens")
    count = min(count, len(alive))
    return sorted(np.random.default_rng(42).choice(alive, count, replace=False).tolist())


def judge_latent(latent, activation, rows, tokenizer, ask, seeds):
    """A latent's row, or why it is left out: "rare" or "unusable". activation: {model: [N T]}

    Rare: it fires too rarely for its windows. Unusable: an answer is neither numbers nor "None".
    SAEBench leaves such latents out too; here both models leave them out, which keeps the pairs.
    """
    row = {"latent": latent, "explanation": {}, "score": {who: [] for who in MODELS}}
    for who in MODELS:
        for seed in seeds:
            rng = np.random.default_rng([seed, latent])                 # the same for both models
            both = windows(activation[who], rows, rng)
            if both is None:
                return "rare"
            explanation, picked = ask_judge(tokenizer, *both, ask, rng)
            if picked is None:
                return "unusable"
            row["explanation"].setdefault(who, explanation)             # the first seed's
            row["score"][who].append(score(picked, both[1]))
    return row


def tables(numbers):
    notes = [
        f'{numbers["left_out"]}. Always answering "None" scores {RANDOM / SCORED:.3f}.',
        f"The paper's judge is {PAPERS_JUDGE}: scores from other judges are not comparable.",
    ]
    caption = "Autointerp: the share of windows for which a judge correctly says if a latent fires"
    return [saebench.table(numbers, "autointerp", caption, notes)]
