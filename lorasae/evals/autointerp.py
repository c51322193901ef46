"""Automated interpretability (paper §5.1, Tables 3 and 6; SAEBench): can what a latent fires on be put into words?

    python eval.py RUN_DIR --suite autointerp                       a lexical judge, no language model
    python eval.py RUN_DIR --suite autointerp --judge https://api.openai.com/v1 --chat-model gpt-4o-mini
    python eval.py RUN_DIR --suite autointerp --judge http://localhost:8000/v1 --chat-model NAME --judge-latents 100

For each latent a judge sees 15 windows of text in which it fires and explains it. Then it sees 14 others in random
order and, by its explanation alone, says in which the latent fires:

    score = (windows judged rightly) / 14,        always answering "None" scores 10/14

4 of the 14 are active: 2 of the strongest and 2 drawn in proportion to activation². The other 10 are random windows,
which SAEBench calls inactive without looking: the table says how many of them do fire, and what that leaves to be
reached. Balanced accuracy, the mean of the shares of active and of inactive windows judged rightly, is 1/2 for any
constant answer.

The SAE reads base and adapted model; nothing is spliced in. Both are asked about the same latents and share the random
windows and the draws. Every seed draws the windows anew; a latent's score is its mean over them, and the 90 % interval
is over latents, of LoRA - base paired by latent.

Deviations from SAEBench: the text is the run's held-out text (there 2M tokens of the Pile); latents are sampled among
those alive in both models; the wording of the prompts; an empty answer is unusable (there it counts as "None").
"""
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lorasae.errors import InputError
from lorasae.evals import firing
from lorasae.evals.chat import Kept, chat
from lorasae.evals.common import evaluating, interval, percent, plus_minus, print_table, progress
from lorasae.evals.judges import LEXICAL, language_model, lexical

ALIVE = 15                                 # latents that fire on no more tokens are not asked about
AROUND = 10                                         # a window is a token and as many on either side
TOP, TOP_SHOWN = 12, 10                          # the strongest windows; those of them that explain
DRAWN, DRAWN_SHOWN = 7, 5                         # windows drawn by activation²; those that explain
RANDOM = 10                                             # random windows, all of which score
SCORED = (TOP - TOP_SHOWN) + (DRAWN - DRAWN_SHOWN) + RANDOM
FLOOR = RANDOM / SCORED                                 # the score of always answering "None"
THRESHOLD = 0.01                          # a token fires above this share of the largest activation
WORKERS = 8                                           # latents an endpoint is asked about at a time


class Window(NamedTuple):
    """2 · AROUND + 1 = 21 tokens of one row."""
    tokens: tuple                                       # ids
    activations: tuple
    fires: tuple                                        # of bool, for each token: above THRESHOLD
    active: bool                                        # SAEBench's label: a random window is not


# ---- Windows -------------------------------------------------------------------------------------

def windows(found, rows, rng):
    """One latent's (15 windows to explain, the strongest first; 14 to score, in random order); None if it is too rare.

    found: its Firing over rows [N, T]. All that is random comes from rng, a numpy Generator.
    """
    count, length = rows.shape
    low, high = AROUND, length - AROUND                 # where the middle of a window may be
    random = rng.integers(count, size=RANDOM) * length + rng.integers(low, high, size=RANDOM)
    top_order = rng.permutation(TOP)
    drawn_order = rng.permutation(DRAWN)
    scored_order = rng.permutation(SCORED)

    # The strongest, no two of them within ten tokens.
    top = firing.strongest(found, length, TOP, apart=AROUND, margin=AROUND)
    if len(top) < TOP:
        return None
    activation = torch.zeros(count * length)
    activation[found.places] = found.values
    at_top = activation[torch.tensor(top)]

    # Weaker ones, in proportion to activation².
    column = found.places % length
    weaker = (found.values < at_top.min()) & (column >= low) & (column < high)
    if weaker.sum() < DRAWN:
        return None
    weight = found.values[weaker].double().numpy() ** 2
    drawn = rng.choice(found.places[weaker].numpy(), DRAWN, replace=False, p=weight / weight.sum())

    def window(place, active):
        span = slice(int(place) - AROUND, int(place) + AROUND + 1)
        here = activation[span]
        fires = here > THRESHOLD * at_top.max()
        return Window(tuple(rows.view(-1)[span].tolist()), tuple(here.tolist()), tuple(fires.tolist()), active)

    strong = [window(top[i], True) for i in top_order]
    weak = [window(drawn[i], True) for i in drawn_order]
    shown = strong[:TOP_SHOWN] + weak[:DRAWN_SHOWN]
    shown.sort(key=lambda example: max(example.activations), reverse=True)

    scored = strong[TOP_SHOWN:] + weak[DRAWN_SHOWN:] + [window(place, False) for place in random]
    return shown, [scored[i] for i in scored_order]


def score(picked, scored):
    """(share of the windows judged rightly, balanced accuracy) of an answer; picked counts the windows from 1."""
    right = {True: [], False: []}                       # for active windows and for the others
    for number, window in enumerate(scored, 1):
        right[window.active].append((number in picked) == window.active)

    share = (sum(right[True]) + sum(right[False])) / len(scored)
    balanced = (sum(right[True]) / len(right[True]) + sum(right[False]) / len(right[False])) / 2
    return share, balanced


# ---- The evaluation ------------------------------------------------------------------------------

def add_options(add):
    add("--judge", metavar="URL", help="OpenAI-compatible endpoint (…/v1) whose --chat-model explains and predicts; "
        "its answers are kept in RUN_DIR/autointerp (default: a lexical judge, no language model)")
    add("--judge-latents", type=int, default=1000, metavar="N", help="latents to judge, sampled from those alive "
        "(default: SAEBench's %(default)s; --latents names them instead)")
    add("--judge-seeds", type=int, default=3, metavar="N", help="how often windows are drawn anew (default: "
        "%(default)s; SAEBench: once)")


def evaluate(setting, options):
    """Judges the latents of the first SAE in the base and in the adapted model."""
    firing.refuse_nothing_new(setting, "autointerp")
    if options.judge_latents < 1 or options.judge_seeds < 1:
        raise InputError(f"--judge-latents {options.judge_latents} and --judge-seeds {options.judge_seeds}: expected "
                         "at least 1 of each")
    model, (layer, sae) = setting.model, next(iter(setting.saes.items()))
    rows = firing.rows_of(setting.text)
    if rows.shape[1] <= 2 * AROUND:
        raise InputError(f"the run's context gives rows of {rows.shape[1]} tokens, but a window takes {2 * AROUND + 1}"
                         ": evaluate a run with a longer --context")

    # The latents, and where each fires in either model.
    found, alive = {}, {}
    with evaluating(model):
        for name in ("base", "lora"):
            with firing.as_model(model, name):
                alive[name] = firing.rates(model, sae, layer, rows, f"firing rates, {name}").fired > ALIVE
        latents = choose_latents(options, sae, layer, alive, rows)
        for name in ("base", "lora"):
            with firing.as_model(model, name):
                found[name] = firing.firings(model, sae, layer, rows, latents, f"activations, {name}")

    # Every latent, asked about in both models with all seeds.
    def judged(latent):
        pair = {name: found[name][latent] for name in found}
        return judge_latent(latent, pair, rows, judge_of(setting, options, latent), options.judge_seeds)

    results = judge_all(judged, latents, WORKERS if options.judge else 1, options)
    usable = [row for row in results if isinstance(row, dict)]
    rare, unusable = results.count("rare"), results.count("unusable")
    if not usable:
        raise InputError(f"of {len(latents)} latents, {rare} fire too rarely for {TOP + DRAWN} windows and {unusable} "
                         "got answers that name no windows: nothing is left to score")
    return {"layer": layer, "judge": judge_name(options), "seeds": options.judge_seeds,
            "tokens": rows[:, 1:].numel(), "alive": {name: int(alive[name].sum()) for name in alive},
            "chosen": len(latents), "rare": rare, "unusable": unusable,
            "floor": {"score": FLOOR, "balanced": 0.5},
            **summary(usable), "rows": usable}


def choose_latents(options, sae, layer, alive, rows):
    """The latents to judge: those named, or a sample of those alive in both models. alive: {model: bool [M]}"""
    if options.latents:
        firing.check_latents(options.latents, sae, layer)
        return list(dict.fromkeys(options.latents))
    both = (alive["base"] & alive["lora"]).nonzero().squeeze(1).numpy()
    if not len(both):
        raise InputError(f"no latent fires on more than {ALIVE} of {rows.numel():,} held-out tokens in both models: "
                         "evaluate a run with more --eval-tokens")
    count = min(options.judge_latents, len(both))
    return sorted(np.random.default_rng(42).choice(both, count, replace=False).tolist())


def judge_name(options):
    return f"{options.chat_model} at {options.judge}" if options.judge else LEXICAL


def judge_of(setting, options, latent):
    """judge(shown, scored, rng) -> Verdict. What an endpoint answers about a latent is kept in the run's folder."""
    tokenizer = setting.text.tokenizer
    if not options.judge:
        return lambda shown, scored, rng: lexical(shown, scored, tokenizer)
    ask = partial(chat, options.judge, options.chat_model, temperature=None)
    kept = Kept(Path(setting.folder) / "autointerp" / f"latent_{latent}.json", ask, judge_name(options))
    return lambda shown, scored, rng: language_model(shown, scored, tokenizer, kept, rng)


def judge_all(judged, latents, workers, options):
    """[judged(latent) of each latent], several at a time; where one fails, no new ones are begun."""
    if options.judge:
        questions = len(latents) * options.judge_seeds * 4
        print(f"autointerp: {questions:,} questions to {judge_name(options)}, less those answered before", flush=True)
    with ThreadPoolExecutor(workers) as pool:
        try:
            running = [pool.submit(judged, latent) for latent in latents]
            return [future.result() for future in progress(running, "judging")]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def judge_latent(latent, found, rows, judge, seeds):
    """A row of the results for one latent, or why it is left out: "rare" (too few windows), "unusable" (an answer).

    found: {model: its Firing}. SAEBench leaves such a latent out too; here of both models, which stay paired.
    """
    row = {"latent": latent, "explanation": {}, "score": {}, "balanced": {}, "random_fires": {}}
    for name in found:
        scores, balanced, fires = [], [], []
        for seed in range(seeds):
            rng = np.random.default_rng([42, seed, latent])             # the same for both models
            both = windows(found[name], rows, rng)
            if both is None:
                return "rare"
            shown, scored = both
            verdict = judge(shown, scored, rng)
            if verdict.picked is None:
                return "unusable"

            right, even = score(verdict.picked, scored)
            scores.append(right)
            balanced.append(even)
            fires.append(sum(any(window.fires) for window in scored if not window.active) / RANDOM)
            if seed == 0:
                row["explanation"][name] = verdict.explanation
        row["score"][name], row["balanced"][name] = scores, balanced
        row["random_fires"][name] = sum(fires) / seeds
    return row


def summary(rows):
    """Means over latents, each first averaged over the seeds, with 90 % intervals; LoRA - base paired by latent."""
    out = {}
    for measure in ("score", "balanced"):
        values = {}                                     # [latents, seeds] each
        for name in ("base", "lora"):
            values[name] = torch.tensor([row[measure][name] for row in rows], dtype=torch.float64)
        values["delta"] = values["lora"] - values["base"]

        out[measure] = {}
        for name, value in values.items():
            mean, half = interval(value.mean(1))
            out[measure][name] = {"mean": mean, "ci90": half, "by_seed": value.mean(0).tolist()}

    out["random_fires"] = {}
    for name in ("base", "lora"):
        out["random_fires"][name] = sum(row["random_fires"][name] for row in rows) / len(rows)
    return out


def show(numbers):
    table = []
    for measure, label in (("score", "autointerp score"), ("balanced", "balanced accuracy")):
        cells = [label]
        for name, form in (("base", ".4f"), ("lora", ".4f"), ("delta", "+.4f")):
            found = numbers[measure][name]
            cells += [f"{found['mean']:{form}}", plus_minus(found["ci90"])]
        table.append([*cells, numbers["floor"][measure]])
    print_table(table, [f"layer {numbers['layer']}", "base", "90 % CI", "base + LoRA", "90 % CI", "Δ", "90 % CI",
                        'always "None"'])

    print(f"\njudge: {numbers['judge']}; {len(numbers['rows']):,} latents, {numbers['seeds']} seeds; intervals over "
          "latents, Δ paired by latent")
    by_seed = ", ".join(f"{delta:+.4f}" for delta in numbers["score"]["delta"]["by_seed"])
    print(f"Δ of the score by seed: {by_seed}; the paper's one seed 0.830 - 0.832 = -0.002 (gpt-4o-mini), while "
          "SAEBench allows its own reruns to differ by 0.04")

    fires = numbers["random_fires"]
    best = [1 - RANDOM / SCORED * fires[name] for name in ("base", "lora")]
    print(f"{percent(fires['base'])} (base) and {percent(fires['lora'])} (LoRA) of the random windows, which count as "
          f"inactive, do fire: who knew where latents fire would score {best[0]:.4f} and {best[1]:.4f}")
    if numbers["rare"] or numbers["unusable"]:
        print(f"left out of {numbers['chosen']:,} latents: {numbers['rare']} that fire too rarely, "
              f"{numbers['unusable']} with an answer that names no windows")


def draw(numbers, figure):
    """The scores of the latents in both models, with the floor."""
    figure.set_size_inches(6, 3.6)
    axes = figure.subplots()
    edges = [(i - 0.5) / SCORED for i in range(SCORED + 2)]
    for name, label in (("base", "base model"), ("lora", "LoRA model")):
        scores = [sum(row["score"][name]) / numbers["seeds"] for row in numbers["rows"]]
        axes.hist(scores, edges, alpha=0.5, label=f"{label}: mean {numbers['score'][name]['mean']:.3f}")
    axes.axvline(numbers["floor"]["score"], color="black", linestyle=":", label='always answering "None"')
    axes.set(xlabel=f"share of {SCORED} windows judged rightly", ylabel="latents")
    axes.set_title(f"Autointerp ({numbers['judge']})", fontsize=10)
    axes.legend(loc="upper left")
