"""The judge of autointerp.py: a chat model that explains a latent, and predicts where it fires.

It explains a latent from the windows `shown`, in which it fires. From this explanation only, it
predicts in which of `scored` it fires, given their text. A window is an autointerp.Window.
"""
import re
from itertools import groupby

EXPLAIN = """\
You describe what makes a neuron of a language model fire: a certain word, part of a word, or idea.
You are given short documents in which it fires, the strongest first. The tokens on which it fires
are enclosed in << and >>.

Answer with one sentence that covers most of the enclosed tokens; do not make it narrower than they
are. Capital letters and punctuation count where they matter. At most 20 words. No long lists of
words, no formatting, no full stop at the end. Four good answers to other neurons:

This neuron activates on the word "but" at the start of a sentence
This neuron activates on numbers that are years
This neuron activates on the ending "ing" of verbs
This neuron activates on expressions of doubt or hesitation"""

PREDICT = """\
You are told what makes a neuron of a language model fire, and given {count} pieces of text in
random order. Name the pieces in which it fires at least once. Answer only with their numbers,
separated by commas, or with "None" if there are none, and write nothing else. An answer may look
like this: {example}"""


def judge(tokenizer, shown, scored, ask, rng):
    """Has a chat model explain and then, in a new conversation, predict.

    ask(messages, max_tokens) -> its answer. rng draws the example answer in the prompt. Returns its
    explanation and what read_numbers makes of its prediction.
    """
    documents = numbered(tokenizer, shown, marked=True)
    user = f"The documents in which the neuron fires:\n\n{documents}"
    explanation = read_explanation(ask(conversation(EXPLAIN, user), 30))

    example = sorted(rng.choice(len(scored), 4, replace=False) + 1)
    system = PREDICT.format(count=len(scored), example=", ".join(map(str, example)))
    documents = numbered(tokenizer, scored, marked=False)
    user = f"This neuron fires on {explanation}.\n\nThe texts:\n\n{documents}"
    return explanation, read_numbers(ask(conversation(system, user), 33))


def conversation(system, user):
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def numbered(tokenizer, windows, marked):
    lines = [written(tokenizer, window, marked) for window in windows]
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


def written(tokenizer, window, marked):
    """A window as one line of text. marked: with << and >> around the tokens on which it fires."""
    text = ""
    pairs = zip(window.tokens, window.activations)
    for fires, run in groupby(pairs, lambda pair: marked and pair[1] > 0):
        piece = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        text += f"<<{piece}>>" if fires else piece
    return text.replace("\n", "↵")


def read_explanation(answer):
    """The part of an answer after "activates on", without its full stop."""
    return answer.split("activates on")[-1].strip().removesuffix(".").strip()


def read_numbers(answer):
    """The numbers in an answer such as "1, 3 and 5.", [] for "None", or None if it is neither."""
    if not answer.strip():
        return None
    parts = re.split("and|,", answer.strip().removesuffix(".").replace("None", ""))
    parts = [part.strip() for part in parts if part.strip()]
    return [int(part) for part in parts] if all(map(str.isdecimal, parts)) else None
