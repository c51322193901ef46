"""Texts with a label each, for the evaluations that train probes; here the user's own, from a file of JSON lines.

    --labelled FILE.jsonl     {"text": "...", "label": "...", "attribute": "..."} a line; only SCR needs the attribute

The embedded ones are labelled_stdlib.py, SAEBench's are labelled_saebench.py. A data set is a name and a function that
cuts it: cut(seed) -> Cut. The seed decides which texts are drawn, where there are more than are needed.
"""
import json
import random
from hashlib import sha256
from pathlib import Path
from typing import Callable, NamedTuple

from lorasae.errors import InputError

TRAIN, TEST = 2000, 500                                 # texts a class: SAEBench's 4,000 and 1,000 a binary task
SCR_TRAIN, SCR_TEST = 1000, 250                         # texts a quadrant
LEAST = 16                                          # texts of a class: fewer train and test nothing


class Cut(NamedTuple):
    """Texts by class, equally many of each; for SCR by (class, attribute), where the biased probe needs more of some.

    No text is on both sides, nor, as far as that is known, two pieces of one file.
    """
    train: dict
    test: dict


class DataSet(NamedTuple):
    name: str
    cut: Callable                                       # seed -> Cut


def draw(rng, texts, count, what):
    """At most `count` of the texts, in an order drawn from rng; InputError where there are too few."""
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < LEAST:
        raise InputError(f"only {len(distinct)} different texts of {what}, but at least {LEAST} are needed: give "
                         "--labelled more, or other, data")
    return rng.sample(distinct, min(count, len(distinct)))


def equal(classes):
    """{class: texts} -> as many texts of every class as the smallest has."""
    least = min(len(texts) for texts in classes.values())
    return {label: texts[:least] for label, texts in classes.items()}


# ---- The user's file -----------------------------------------------------------------------------

def file_classes(path, seed):
    """The labels of a file as classes."""
    by_label = {}
    for row in read_rows(path):
        by_label.setdefault(row["label"], []).append(row["text"])
    if len(by_label) < 2:
        only = next(iter(by_label))
        raise InputError(f"{path} has the one label {only!r}, but a probe needs two or more to tell apart")

    rng = random.Random(seed)
    train, test = {}, {}
    for label in sorted(by_label):
        parts = split_texts(by_label[label])
        train[label] = draw(rng, parts.train, TRAIN, f"label {label!r} for training in {path}")
        test[label] = draw(rng, parts.test, TEST, f"label {label!r} for testing in {path}")
    return Cut(equal(train), equal(test))


def file_pair(path, seed):
    """The two labels and two attributes of a file, for SCR."""
    quadrants = {}
    for row in read_rows(path):
        if "attribute" not in row:
            raise InputError(f"{path}: a line has no attribute, which --suite scr needs beside the label")
        quadrants.setdefault((row["label"], row["attribute"]), []).append(row["text"])

    labels = sorted({label for label, _ in quadrants})
    attributes = sorted({attribute for _, attribute in quadrants})
    if len(labels) != 2 or len(attributes) != 2 or len(quadrants) != 4:
        raise InputError(f"{path}: SCR needs two labels, two attributes and texts of all four combinations; found "
                         f"labels {', '.join(labels)} and attributes {', '.join(attributes)}")

    rng = random.Random(seed)
    train, test = {}, {}
    for quadrant in sorted(quadrants):
        parts = split_texts(quadrants[quadrant])
        what = f"label {quadrant[0]!r}, attribute {quadrant[1]!r}"
        train[quadrant] = draw(rng, parts.train, 2 * SCR_TRAIN, f"{what} for training in {path}")
        test[quadrant] = draw(rng, parts.test, SCR_TEST, f"{what} for testing in {path}")
    return Cut(train, test)


def split_texts(texts):
    """[texts] -> Cut of them: a fifth, by their hash, is for testing, the same with every seed."""
    parts = Cut([], [])
    for text in texts:
        is_test = int(sha256(text.encode()).hexdigest(), 16) % 5 == 0
        side = parts.test if is_test else parts.train
        side.append(text)
    return parts


def read_rows(path):
    """The rows of a JSON-lines file, labels and attributes as strings. InputError names the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason})") from None

    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number:,}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or "label" not in row:
            raise InputError(f'{where}: expected {{"text": "...", "label": "..."}}, and for SCR an "attribute"')
        # JSON can spell half of a surrogate pair, which is no character: it becomes U+FFFD
        row["text"] = row["text"].encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        rows.append({key: str(row[key]) for key in ("text", "label", "attribute") if key in row})
    if not rows:
        raise InputError(f"{path} is empty: expected a JSON object with text and label on each line")
    return rows
