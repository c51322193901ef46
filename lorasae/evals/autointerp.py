"""Automated interpretability (paper §5.1, Tables 3 and 6; SAEBench): latents put into words.

    python eval.py RUN_DIR --suite autointerp           a lexical judge, no language model
    python eval.py RUN_DIR --suite autointerp --judge https://api.openai.com/v1
    python eval.py RUN_DIR --suite autointerp --judge http://localhost:8000/v1 --chat-model NAME

A judge sees 15 windows of text in which a latent fires, and explains it. Then it sees 14 others in
random order and says, by its explanation only, in which of them the latent fires:

    score = (windows judged rightly) / 14,        always answering "None" scores 10/14

4 of the 14 are active: 2 of the strongest and 2 drawn in proportion to activation². The other 10
are random windows, which SAEBench calls inactive without looking. The latent does fire in some of
them; if these are a share f (the table's last row), a judge that knew where it fires would score
1 - f 10/14. Balanced accuracy is the mean of two shares: of the active and of the inactive windows
that are judged rightly. It is 1/2 for any constant answer.

The SAE reads the base and the adapted model; nothing is spliced in. Both models are asked about the
same latents, with the same random windows and orders. Each seed draws new windows, and a latent's
score is its mean over seeds. 90 % intervals are over latents; LoRA - base is paired by latent.

Deviations from SAEBench: the text is the run's held-out text (there 2M tokens of the Pile); latents
are sampled from those alive in both models; the wording of the prompts; an empty answer is unusable
(there it counts as "None").
"""
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch

from lorasae.errors import InputError
from lorasae.evals import firing
from lorasae.evals.chat import Kept, chat
from lorasae.evals.common import as_model, evaluating, interval, progress
from lorasae.evals.judges import LEXICAL, language_model, lexical
from lorasae.evals.report import Table, with_interval
from lorasae.io.console import note

ALIVE = 15                              # latents that fire on no more tokens are not judged
AROUND = 10                             # a window is a token and this many on either side
TOP, TOP_SHOWN = 12, 10                 # the strongest windows; how many of them explain
DRAWN, DRAWN_SHOWN = 7, 5               # windows drawn by activation²; how many of them explain
RANDOM = 10                             # random windows, all of them scored
SCORED = (TOP - TOP_SHOWN) + (DRAWN - DRAWN_SHOWN) + RANDOM
THRESHOLD = 0.01                        # a latent fires above this share of its largest activation
WORKERS = 8                             # latents about which an endpoint is asked at a time
PAPERS_JUDGE = "gpt-4o-mini"
MODELS = {"base": "base", "lora": "base + LoRA"}
MEASURES = {"score": "score", "balanced": "balanced accuracy",
            "random_fires": "random windows that fire"}
FLOOR = {"score": RANDOM / SCORED, "balanced": 0.5}     # of always answering "None"


class Window(NamedTuple):
    """2 · AROUND + 1 = 21 tokens of one row."""
    tokens: list                        # ids
    activations: list                   # one per token; 0 up to THRESHOLD
    active: bool                        # SAEBench's label: False for a random window


class Draws(NamedTuple):
    """Random places and orders, made before looking at a latent: both models share them."""
    random: np.ndarray                  # [RANDOM] the middles of random windows
    top: np.ndarray                     # [TOP] the order of the strongest
    drawn: np.ndarray                   # [DRAWN] the order of those drawn by activation²
    scored: np.ndarray                  # [SCORED] the order of the windows to score


# ---- Windows -----------------------------------------------------------------------------------

def make_draws(rng, count, length):
    """The Draws for `count` rows of `length` tokens."""
    row = rng.integers(count, size=RANDOM)
    column = rng.integers(AROUND, length - AROUND, size=RANDOM)
    return Draws(row * length + column, *map(rng.permutation, (TOP, DRAWN, SCORED)))


def strongest(places, values, length):
    """The TOP places with the largest values, the largest first; fewer if there are fewer.

    Two places in one row (of `length` tokens) are more than AROUND tokens from each other.
    """
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

    None if it fires too rarely. activation: the latent's, at every token, [N T]; rows [N, T]; rng:
    a numpy Generator, the only source of randomness.
    """
    count, length = rows.shape
    draws = make_draws(rng, count, length)

    # Where it fires, without the places whose window would leave their row.
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

    def window(place, active):
        span = slice(place - AROUND, place + AROUND + 1)
        fires = activation[span] > THRESHOLD * at_top.max()
        activations = activation[span] * fires
        return Window(rows.view(-1)[span].tolist(), activations.tolist(), active)

    # Most of them explain the latent; the others are scored, with the random ones.
    strong = [window(top[i], True) for i in draws.top]
    weak = [window(drawn[i], True) for i in draws.drawn]
    shown = strong[:TOP_SHOWN] + weak[:DRAWN_SHOWN]
    shown.sort(key=lambda example: max(example.activations), reverse=True)
    random = [window(place, False) for place in draws.random]
    scored = strong[TOP_SHOWN:] + weak[DRAWN_SHOWN:] + random
    return shown, [scored[i] for i in draws.scored]


def measures(picked, scored):
    """{measure: value} of one answer; picked: numbers of the scored windows, from 1."""
    right = {True: [], False: []}       # of the active windows, and of the others
    for number, window in enumerate(scored, 1):
        right[window.active].append((number in picked) == window.active)
    return {
        "score": fmean(right[True] + right[False]),
        "balanced": (fmean(right[True]) + fmean(right[False])) / 2,
        "random_fires": fmean(any(window.activations) for window in scored if not window.active),
    }


# ---- The evaluation ----------------------------------------------------------------------------

def add_options(add):
    add("--judge", metavar="URL", help="OpenAI-compatible endpoint (…/v1) whose --chat-model "
        "explains and predicts; its answers are kept in RUN_DIR/autointerp (default: a lexical "
        "judge, no language model)")
    add("--chat-model", default=PAPERS_JUDGE,
        help="model to ask at that endpoint (default: the paper's, %(default)s)")
    add("--judge-latents", type=int, default=1000, metavar="N",
        help="latents to judge, sampled from those alive (default: SAEBench's %(default)s; "
        "--latents names them instead)")
    add("--judge-seeds", type=int, default=3, metavar="N",
        help="how many times to draw windows (default: %(default)s; SAEBench: once)")


def evaluate(setting, judge, judge_latents, judge_seeds, latents, chat_model):
    """Judges latents of the first SAE in the base and in the adapted model.

    judge: the URL of an endpoint; None: the lexical judge. latents: those to judge; None: a sample
    of judge_latents.
    """
    firing.refuse_nothing_new(setting, "autointerp")
    if judge_latents < 1 or judge_seeds < 1:
        raise InputError(f"--judge-latents {judge_latents} and --judge-seeds {judge_seeds}: "
                         "expected at least 1 of each")
    model, (layer, sae) = setting.model, next(iter(setting.saes.items()))
    rows = firing.rows_of(setting.text)
    if rows.shape[1] <= 2 * AROUND:
        raise InputError(f"the run's context gives rows of {rows.shape[1]} tokens, but a window "
                         f"takes {2 * AROUND + 1}: evaluate a run with a longer --context")

    # The latents, and where each of them fires in either model.
    def in_both(measure, label, *more):
        found = {}
        for name in MODELS:
            with as_model(model, name):
                found[name] = measure(model, sae, layer, rows, f"{label}, {name}", *more)
        return found

    with evaluating(model):
        fired = in_both(firing.times_fired, "firing rates")
        alive = torch.minimum(fired["base"], fired["lora"]) > ALIVE
        latents = choose(latents, judge_latents, alive)
        found = in_both(firing.firings, "activations", latents)

    # What an endpoint says about a latent is kept in a file of the run's folder.
    tokenizer = setting.text.tokenizer
    judge_name = f"{chat_model} at {judge}" if judge else LEXICAL

    def judged(i):
        activation = {name: found[name][i].to_dense() for name in MODELS}
        ask = partial(chat, judge, chat_model)
        path = setting.folder / "autointerp" / f"latent_{latents[i]}.json"
        kept = Kept(path, ask, judge_name) if judge else None
        return judge_latent(latents[i], activation, rows, tokenizer, kept, judge_seeds)

    if judge:
        questions = len(latents) * judge_seeds * len(MODELS) * 2
        note(f"autointerp: {questions:,} questions to {judge_name}, less those answered before")
    with ThreadPoolExecutor(WORKERS if judge else 1) as pool:
        answers = pool.map(judged, range(len(latents)))     # an error cancels those not yet begun
        results = [next(answers) for _ in progress(latents, "judging")]

    usable = [row for row in results if isinstance(row, dict)]
    rare, unusable = results.count("rare"), results.count("unusable")
    if not usable:
        raise InputError(f"of {len(latents)} latents, {rare} fire too rarely for {TOP + DRAWN} "
                         f"windows and {unusable} got answers that name no windows: nothing is "
                         "left to score")
    return {
        "layer": layer,
        "judge": judge_name,
        "seeds": judge_seeds,
        "alive": int(alive.sum()),
        "chosen": len(latents),
        "rare": rare,
        "unusable": unusable,
        **{measure: summary(usable, measure) for measure in MEASURES},
        "rows": usable,
    }


def choose(latents, count, alive):
    """The latents to judge: those named, or a sample of those alive in both models, bool [M]."""
    for latent in latents or ():
        if not 0 <= latent < len(alive):
            raise InputError(f"--latents {latent}: the SAE has latents 0 to {len(alive) - 1}")
    if latents:
        return list(dict.fromkeys(latents))
    alive = alive.nonzero().squeeze(1).numpy()
    if not len(alive):
        raise InputError(f"no latent fires on more than {ALIVE} held-out tokens in both models: "
                         "evaluate a run with more --eval-tokens")
    count = min(count, len(alive))
    return sorted(np.random.default_rng(42).choice(alive, count, replace=False).tolist())


def judge_latent(latent, activation, rows, tokenizer, ask, seeds):
    """One latent's row of the results, or why it is left out: "rare" or "unusable".

    Rare: it fires too rarely for its windows. Unusable: an answer names no windows. SAEBench leaves
    such latents out too; here they are left out of both models, which keeps the pairs.

    activation: {model: [N T]}; ask: the chat model, or None for the lexical judge.
    """
    row = {"latent": latent, "explanation": {}, **{measure: {} for measure in MEASURES}}
    for name in MODELS:
        found = []
        for seed in range(seeds):
            rng = np.random.default_rng([42, seed, latent])             # the same for both models
            both = windows(activation[name], rows, rng)
            if both is None:
                return "rare"
            judge = partial(language_model, ask=ask, rng=rng) if ask else lexical
            verdict = judge(tokenizer, *both)
            if verdict.picked is None:
                return "unusable"
            row["explanation"].setdefault(name, verdict.explanation)    # the first seed's
            found.append(measures(verdict.picked, both[1]))
        for measure in MEASURES:
            row[measure][name] = [values[measure] for values in found]
    return row


def summary(rows, measure):
    """{model: (mean over latents, half of its 90 % interval)}, by latents' means over seeds.

    "delta" is LoRA - base, paired by latent.
    """
    by_latent = [[fmean(row[measure][name]) for name in MODELS] for row in rows]
    base, lora = torch.tensor(by_latent, dtype=torch.float64).T
    return {"base": interval(base), "lora": interval(lora), "delta": interval(lora - base)}


# ---- What it shows -----------------------------------------------------------------------------

def tables(numbers):
    """Both models by each measure."""
    rows = []
    for measure, label in MEASURES.items():
        found = numbers[measure]
        cells = [with_interval(*found[name]) for name in MODELS]
        delta = with_interval(*found["delta"], "+.4f")
        rows.append([label, *cells, delta, FLOOR.get(measure, "")])

    notes = [
        f"± 90 % over latents ({len(numbers['rows']):,}), LoRA - base paired by latent; seeds of "
        f"the windows: {numbers['seeds']}",
        f"Judge: {numbers['judge']}. The paper's, {PAPERS_JUDGE}, gave 0.832 (base) and 0.830 "
        "(LoRA) with one seed; SAEBench allows its reruns to differ by 0.04",
        "Random windows count as inactive even if the latent fires there",
    ]
    if not numbers["judge"].startswith(f"{PAPERS_JUDGE} at "):
        notes.insert(2, "This is another judge than the paper's, so its scores are no yardstick")
    if numbers["rare"] or numbers["unusable"]:
        notes.append(f"Left out of {numbers['chosen']:,} latents: {numbers['rare']} that fire too "
                     f"rarely, {numbers['unusable']} with an answer that names no windows")
    headings = ["", *MODELS.values(), "LoRA - base", 'always "None"']
    return [Table(f"Autointerp, SAE at layer {numbers['layer']}", headings, rows, tuple(notes))]


def draw(numbers, figure):
    """The scores of the latents in both models."""
    figure.set_size_inches(6, 3.6)
    axes = figure.subplots()
    edges = [(i - 0.5) / SCORED for i in range(SCORED + 2)]
    for name, label in MODELS.items():
        scores = [fmean(row["score"][name]) for row in numbers["rows"]]
        axes.hist(scores, edges, alpha=0.5, label=label)
    axes.axvline(FLOOR["score"], color="black", linestyle=":", label='always answering "None"')
    axes.set(xlabel=f"share of {SCORED} windows judged rightly", ylabel="latents")
    axes.legend(loc="upper left")
