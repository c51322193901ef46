"""The judges of autointerp.py: what a latent fires on, in words, and where those words say that it fires.

Each explains a latent by the windows `shown` and their activations, and predicts by that explanation alone in which of
the windows `scored`, of which it uses the text and nothing else, the latent fires. A window is autointerp.Window.
"""
import re
from collections import defaultdict
from typing import NamedTuple

from lorasae.evals.firing import pieces

LEXICAL = "lexical judge, no language model"
WORDS = 10                                              # tokens in one of its explanations, at most


class Verdict(NamedTuple):
    """What a judge makes of a latent."""
    explanation: str
    picked: list | None               # numbers from 1 of the windows where it says the latent fires


# ---- The lexical judge ---------------------------------------------------------------------------

def lexical(shown, scored, tokenizer):
    """Explains a latent by the tokens that fire it, and expects it to fire wherever one of them is. No language model.

    Those are the tokens which fire in at least half of their places in the windows to explain, at most ten of them:
    those with the largest sums of activations. It cannot see a word's surroundings: a latent that needs them is beyond
    it.
    """
    # How often each token occurs and fires, and how hard.
    places, fires, total = defaultdict(int), defaultdict(int), defaultdict(float)
    for window in shown:
        for token, activation, active in zip(window.tokens, window.activations, window.fires):
            places[token] += 1
            if active:
                fires[token] += 1
                total[token] += activation

    reliable = [token for token in total if 2 * fires[token] >= places[token]]
    chosen = sorted(reliable, key=total.get, reverse=True)[:WORDS]
    explanation = ", ".join(repr(tokenizer.decode([token], skip_special_tokens=False)) for token in chosen)

    picked = []
    for number, window in enumerate(scored, 1):
        if not set(chosen).isdisjoint(window.tokens):
            picked.append(number)
    return Verdict(explanation, picked)


# ---- A language model as the judge ---------------------------------------------------------------

EXPLAIN = """You describe what makes a neuron of a language model fire: a certain word, part of a word, or idea. You are
given short documents in which it fires, the strongest first. The tokens it fires on are enclosed in << and >>.

Answer with one sentence that covers most of the enclosed tokens; do not make it narrower than they are. Capital letters
and punctuation count where they matter. At most 20 words. No long lists of words, no formatting, no full stop at the
end. Four good answers to other neurons:

This neuron activates on the word "but" at the start of a sentence
This neuron activates on numbers that are years
This neuron activates on the ending "ing" of verbs
This neuron activates on expressions of doubt or hesitation"""

PREDICT = """You are told what makes a neuron of a language model fire, and given {count} pieces of text in random
order. Name the pieces in which it fires at least once. Answer only with their numbers, separated by commas, or with
"None" if there are none, and write nothing else. An answer may look like this: {example}"""


def written(window, tokenizer, marked):
    """A window as text on one line; marked: what fires between << and >>."""
    text = ""
    for piece, fires in zip(pieces(tokenizer, list(window.tokens)), window.fires):
        text += f"<<{piece}>>" if marked and fires and piece else piece
    return text.replace(">><<", "").replace("\n", "↵")


def numbered(shown, tokenizer, marked):
    return "\n".join(f"{number}. {written(window, tokenizer, marked)}" for number, window in enumerate(shown, 1))


def conversation(system, user):
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def language_model(shown, scored, tokenizer, ask, rng):
    """Has `ask` explain a latent by the windows `shown` and, in a conversation of its own, predict those `scored`."""
    documents = numbered(shown, tokenizer, marked=True)
    answer = ask(conversation(EXPLAIN, f"The documents in which the neuron fires:\n\n{documents}"), 30)
    explanation = read_explanation(answer)

    example = ", ".join(map(str, sorted(rng.choice(len(scored), 4, replace=False) + 1)))
    task = PREDICT.format(count=len(scored), example=example)
    documents = numbered(scored, tokenizer, marked=False)
    answer = ask(conversation(task, f"This neuron fires on {explanation}.\n\nThe texts:\n\n{documents}"), 33)
    return Verdict(explanation, read_numbers(answer))


def read_explanation(answer):
    """What an answer says the neuron activates on."""
    return answer.split("activates on")[-1].strip().removesuffix(".").strip()


def read_numbers(answer):
    """The numbers of an answer such as "1, 3 and 5."; [] for "None", and None where it is neither: of no use."""
    if not answer.strip():
        return None
    parts = re.split("and|,", answer.strip().removesuffix(".").replace("None", ""))
    parts = [part.strip() for part in parts if part.strip()]
    if not all(part.isdecimal() for part in parts):
        return None
    return [int(part) for part in parts]
