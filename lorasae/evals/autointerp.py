"""Automated interpretability (paper §5.1, Tables 3 and 6; SAEBench): can what a latent fires on be put into words?

    python eval.py RUN_DIR --suite autointerp                                              a lexical judge, no language model
    python eval.py RUN_DIR --suite autointerp --judge https://api.openai.com/v1 --chat-model gpt-4o-mini
    python eval.py RUN_DIR --suite autointerp --judge http://localhost:8000/v1 --chat-model NAME --judge-latents 100

For each latent a judge sees 15 windows of text in which it fires and explains it. Then it sees 14 others in random order
and, by its explanation alone, says in which the latent fires:

    score = (windows judged rightly) / 14,        always answering "None" scores 10/14

4 of the 14 are active: 2 of the strongest and 2 drawn in proportion to activation². The other 10 are random windows, which
SAEBench calls inactive without looking: the table says how many of them do fire, and what that leaves to be reached.
Balanced accuracy, the mean of the shares of active and of inactive windows judged rightly, is 1/2 for any constant answer.

The SAE reads base and adapted model; nothing is spliced in. Both are asked about the same latents and share the random
windows and the draws. Every seed draws the windows anew; a latent's score is its mean over them, and the 90 % interval is over
latents, of LoRA - base paired by latent.

Deviations from SAEBench: the text is the run's held-out text (there 2M tokens of the Pile); latents are sampled among those
alive in both models; wording of the prompts; an empty answer is unusable (there it counts as "None").
"""
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lorasae.errors import InputError
from lorasae.evals import firing
from lorasae.evals.chat import Kept, chat
from lorasae.evals.common import evaluating, interval, percent, plus_minus, progress
from lorasae.runs.folder import print_table

ALIVE = 15                                              # a latent that fires on no more tokens than this is not asked about
AROUND = 10                                             # a window is a token and as many on either side
TOP, TOP_SHOWN = 12, 10                                 # the strongest windows; how many of them explain, the others score
DRAWN, DRAWN_SHOWN = 7, 5                               # windows drawn by activation², likewise
RANDOM = 10                                             # random windows, all of which score
SCORED = (TOP - TOP_SHOWN) + (DRAWN - DRAWN_SHOWN) + RANDOM
FLOOR = RANDOM / SCORED                                 # the score of always answering "None"
THRESHOLD = 0.01                                        # a token fires above this share of the strongest activation
LEXICAL = "lexical judge, no language model"
WORDS = 10                                              # tokens in one of its explanations, at most
WORKERS = 8                                             # latents an endpoint is asked about at a time


class Window(NamedTuple):
    """2 · AROUND + 1 = 21 tokens of one row."""
    tokens: tuple                                       # ids
    activations: tuple
    fires: tuple                                        # of bool, for each token: above THRESHOLD
    active: bool                                        # SAEBench's label: a random window is not


class Verdict(NamedTuple):
    """What a judge makes of a latent."""
    explanation: str
    picked: list | None                                 # numbers from 1 of the windows where it says the latent fires


# ---- Windows ---------------------------------------------------------------------------------------------------------

def windows(found, rows, rng):
    """(15 windows to explain, the strongest first; 14 to score, in random order) of one latent; None where it is too rare.

    found: its Firing over rows [N, T]. All that is random comes from rng, a numpy Generator.
    """
    count, length = rows.shape
    low, high = AROUND, length - AROUND                 # where the middle of a window may be
    random = rng.integers(count, size=RANDOM) * length + rng.integers(low, high, size=RANDOM)
    top_order, drawn_order, scored_order = (rng.permutation(n) for n in (TOP, DRAWN, SCORED))

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
    right = [(number in picked) == window.active for number, window in enumerate(scored, 1)]
    active = [r for r, window in zip(right, scored) if window.active]
    inactive = [r for r, window in zip(right, scored) if not window.active]
    balanced = (sum(active) / len(active) + sum(inactive) / len(inactive)) / 2
    return sum(right) / len(right), balanced


# ---- The lexical judge -----------------------------------------------------------------------------------------------

def lexical(shown, scored, tokenizer):
    """Explains a latent by the tokens that fire it, and expects it to fire wherever one of them is. No language model.

    Those are the tokens which fire in at least half of their places in the windows to explain, at most ten of them: those
    with the largest sums of activations. It cannot see a word's surroundings: a latent that needs them is beyond it.
    """
    places, fires, total = defaultdict(int), defaultdict(int), defaultdict(float)
    for window in shown:
        for token, activation, active in zip(window.tokens, window.activations, window.fires):
            places[token] += 1
            if active:
                fires[token] += 1
                total[token] += activation

    reliable = [token for token in total if 2 * fires[token] >= places[token]]
    chosen = sorted(reliable, key=total.get, reverse=True)[:WORDS]

    words = [repr(tokenizer.decode([token], skip_special_tokens=False)) for token in chosen]
    picked = [number for number, window in enumerate(scored, 1) if set(window.tokens) & set(chosen)]
    return Verdict(", ".join(words), picked)


# ---- A language model as the judge -----------------------------------------------------------------------------------

EXPLAIN = """You describe what makes a neuron of a language model fire: a certain word, part of a word, or idea. You are given
short documents in which it fires, the strongest first. The tokens it fires on are enclosed in << and >>.

Answer with one sentence that covers most of the enclosed tokens; do not make it narrower than they are. Capital letters and
punctuation count where they matter. At most 20 words. No long lists of words, no formatting, no full stop at the end. Four
good answers to other neurons:

This neuron activates on the word "but" at the start of a sentence
This neuron activates on numbers that are years
This neuron activates on the ending "ing" of verbs
This neuron activates on expressions of doubt or hesitation"""

PREDICT = """You are told what makes a neuron of a language model fire, and given {count} pieces of text in random order. Name
the pieces in which it fires at least once. Answer only with their numbers, separated by commas, or with "None" if there are
none, and write nothing else. An answer may look like this: {example}"""


def written(window, tokenizer, marked):
    """A window as text on one line; marked: what fires between << and >>."""
    text = ""
    for piece, fires in zip(firing.pieces(tokenizer, list(window.tokens)), window.fires):
        text += f"<<{piece}>>" if marked and fires else piece
    return text.replace(">><<", "").replace("\n", "↵")


def numbered(shown, tokenizer, marked):
    return "\n".join(f"{number}. {written(window, tokenizer, marked)}" for number, window in enumerate(shown, 1))


def language_model(shown, scored, tokenizer, ask, rng):
    """Has `ask` explain a latent by the windows `shown` and, in a conversation of its own, predict the `scored` ones."""
    documents = numbered(shown, tokenizer, marked=True)
    answer = ask([{"role": "system", "content": EXPLAIN},
                  {"role": "user", "content": f"The documents in which the neuron fires:\n\n{documents}"}], 30)
    explanation = read_explanation(answer)

    example = ", ".join(map(str, sorted(rng.choice(len(scored), 4, replace=False) + 1)))
    task = PREDICT.format(count=len(scored), example=example)
    documents = numbered(scored, tokenizer, marked=False)
    answer = ask([{"role": "system", "content": task},
                  {"role": "user", "content": f"This neuron fires on {explanation}.\n\nThe texts:\n\n{documents}"}], 33)
    return Verdict(explanation, read_numbers(answer))


def read_explanation(answer):
    """What an answer says the neuron activates on."""
    return answer.split("activates on")[-1].strip().removesuffix(".").strip()


def read_numbers(answer):
    """The numbers of an answer such as "1, 3 and 5."; [] for "None", and None where it is neither: it cannot be used."""
    if not answer.strip():
        return None
    parts = re.split("and|,", answer.strip().removesuffix(".").replace("None", ""))
    parts = [part.strip() for part in parts if part.strip()]
    if not all(part.isdecimal() for part in parts):
        return None
    return [int(part) for part in parts]


# ---- The evaluation --------------------------------------------------------------------------------------------------

def add_options(add):
    add("--judge", metavar="URL", help="OpenAI-compatible endpoint (…/v1) whose --chat-model explains and predicts; its "
        "answers are kept in RUN_DIR/autointerp (default: a lexical judge, no language model)")
    add("--judge-latents", type=int, default=1000, metavar="N", help="latents to judge, sampled from those alive (default: "
        "SAEBench's %(default)s; --latents names them instead)")
    add("--judge-seeds", type=int, default=3, metavar="N", help="how often windows are drawn anew (default: %(default)s; "
        "SAEBench: once)")


def evaluate(setting, options):
    """Judges the latents of the first SAE in the base and in the adapted model."""
    firing.refuse_nothing_new(setting, "autointerp")
    if options.judge_latents < 2 or options.judge_seeds < 1:
        raise InputError(f"--judge-latents {options.judge_latents} and --judge-seeds {options.judge_seeds}: expected at "
                         "least 2 and 1")
    model, (layer, sae) = setting.model, next(iter(setting.saes.items()))
    rows = firing.rows_of(setting.corpus)
    if rows.shape[1] <= 2 * AROUND:
        raise InputError(f"the run's context gives rows of {rows.shape[1]} tokens, but a window takes {2 * AROUND + 1}: "
                         "evaluate a run with a longer --context")

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
    if len(usable) < 2:
        raise InputError(f"of {len(latents)} latents, {results.count('rare')} fire too rarely for {TOP + DRAWN} windows and "
                         f"{results.count('unusable')} got answers that name no windows: nothing is left to score")
    return {"layer": layer, "judge": judge_name(options), "seeds": options.judge_seeds,
            "tokens": rows[:, 1:].numel(), "alive": {name: int(alive[name].sum()) for name in alive},
            "chosen": len(latents), "rare": results.count("rare"), "unusable": results.count("unusable"),
            "floor": {"score": FLOOR, "balanced": 0.5},
            **summary(usable), "rows": usable}


def choose_latents(options, sae, layer, alive, rows):
    """The latents to judge: those named, or a sample of those alive in both models. alive: {model: bool [M]}"""
    if options.latents:
        firing.check_latents(options.latents, sae, layer)
        return list(dict.fromkeys(options.latents))
    both = (alive["base"] & alive["lora"]).nonzero().squeeze(1).numpy()
    if len(both) < 2:
        raise InputError(f"only {len(both)} latents fire on more than {ALIVE} of {rows.numel():,} held-out tokens: evaluate a "
                         "run with more --eval-tokens")
    count = min(options.judge_latents, len(both))
    return sorted(np.random.default_rng(42).choice(both, count, replace=False).tolist())


def judge_name(options):
    return f"{options.chat_model} at {options.judge}" if options.judge else LEXICAL


def judge_of(setting, options, latent):
    """judge(shown, scored, rng) -> Verdict. What an endpoint answers about a latent is kept in the run's folder."""
    tokenizer = setting.corpus.tokenizer
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
    """A row of the results for one latent; "rare" where it has not enough windows, "unusable" where an answer cannot be read.

    found: {model: its Firing}. As in SAEBench such a latent is left out; here of both models, which stay paired.
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
    """Means over latents with 90 % intervals, each latent first averaged over the seeds, and LoRA - base paired by latent."""
    out = {}
    for measure in ("score", "balanced"):
        values = {name: torch.tensor([row[measure][name] for row in rows], dtype=torch.float64)      # [latents, seeds]
                  for name in ("base", "lora")}
        pairs = {**values, "delta": values["lora"] - values["base"]}
        out[measure] = {}
        for name, value in pairs.items():
            mean, half = interval(value.mean(1))
            out[measure][name] = {"mean": mean, "ci90": half, "by_seed": value.mean(0).tolist()}
    out["random_fires"] = {name: sum(row["random_fires"][name] for row in rows) / len(rows) for name in ("base", "lora")}
    return out


def show(numbers):
    def cells(measure, form):
        out = []
        for name in ("base", "lora", "delta"):
            found = numbers[measure][name]
            out += [f"{found['mean']:{'+' if name == 'delta' else ''}{form}}", plus_minus(found["ci90"], form)]
        return out

    floor = numbers["floor"]
    print_table([["autointerp score", *cells("score", ".4f"), f"{floor['score']:.4f}"],
                 ["balanced accuracy", *cells("balanced", ".4f"), f"{floor['balanced']:.4f}"]],
                [f"layer {numbers['layer']}", "base", "90 % CI", "base + LoRA", "90 % CI", "Δ", "90 % CI", 'always "None"'])

    by_seed = numbers["score"]["delta"]["by_seed"]
    print(f"\njudge: {numbers['judge']}; {len(numbers['rows']):,} latents, {numbers['seeds']} seeds; intervals over latents, Δ "
          "paired by latent")
    print(f"Δ of the score by seed: {', '.join(f'{delta:+.4f}' for delta in by_seed)}; the paper's one seed 0.830 - 0.832 = "
          "-0.002 (gpt-4o-mini), SAEBench's own reruns differ by up to 0.04")
    fires = numbers["random_fires"]
    best = [1 - RANDOM / SCORED * fires[name] for name in ("base", "lora")]
    print(f"{percent(fires['base'])} (base) and {percent(fires['lora'])} (LoRA) of the random windows, which count as inactive, "
          f"do fire: who knew where latents fire would score {best[0]:.4f} and {best[1]:.4f}")
    if numbers["rare"] or numbers["unusable"]:
        print(f"left out: {numbers['rare']} of {numbers['chosen']:,} latents fire too rarely, {numbers['unusable']} got an "
              "answer that names no windows")


def draw(numbers, figure):
    """The scores of the latents in both models, with the floor."""
    figure.set_size_inches(6, 3.6)
    axes = figure.subplots()
    for name, label in (("base", "base model"), ("lora", "LoRA model")):
        scores = [sum(row["score"][name]) / numbers["seeds"] for row in numbers["rows"]]
        mean = numbers["score"][name]["mean"]
        edges = [(i - 0.5) / SCORED for i in range(SCORED + 2)]
        axes.hist(scores, edges, alpha=0.5, label=f"{label}: mean {mean:.3f}")
    axes.axvline(numbers["floor"]["score"], color="black", linestyle=":", label='always answering "None"')
    axes.set(xlabel=f"share of {SCORED} windows judged rightly", ylabel="latents", title=f"Autointerp ({numbers['judge']})")
    axes.legend()
