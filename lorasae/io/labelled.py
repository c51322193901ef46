"""Texts with a label each, for the evaluations that train probes: SAEBench's own, the standard library's, or the user's.

    --labelled stdlib               packages as classes, code or documentation as second attribute: no network
    --labelled saebench             SAEBench's data sets, by the optional `datasets` package (NAMES chooses some of them)
    --labelled FILE.jsonl           {"text": "...", "label": "...", "attribute": "..."} a line; SCR alone needs the attribute

A data set is a name and a function that cuts it: cut(seed) -> Cut. The seed decides which texts are drawn, where the source
has more than are needed; training and test texts never share a file (standard library), a split (SAEBench) or a text.
"""
import ast
import json
import random
import re
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorasae.errors import InputError
from lorasae.io.streams import held_out, standard_library

TRAIN, TEST = 2000, 500                                 # texts a class: SAEBench's 4,000 and 1,000 a binary task
SCR_TRAIN, SCR_TEST = 1000, 250                         # texts a quadrant
LEAST = 16                                              # training texts of a class without which a probe learns nothing


class Cut(NamedTuple):
    """Texts by class, as many in each; for SCR by (class, attribute), more where the biased probe needs them."""
    train: dict
    test: dict


class DataSet(NamedTuple):
    name: str
    cut: object                                         # seed -> Cut


def class_sets(source, suite):
    """The data sets of classes that `source` has for a suite, "probing" or "tpp"."""
    if source == "stdlib":
        return stdlib_class_sets(suite)
    if source.endswith((".jsonl", ".json")):
        return [DataSet(Path(source).name, partial(file_classes, source))]
    return chosen(source, SAEBENCH[suite], suite)


def pair_sets(source):
    """The data sets of two classes and two attributes that `source` has for SCR."""
    if source == "stdlib":
        return [DataSet("/".join(pair), partial(stdlib_pair, pair)) for pair in STDLIB_PAIRS]
    if source.endswith((".jsonl", ".json")):
        return [DataSet(Path(source).name, partial(file_pair, source))]
    return chosen(source, SAEBENCH["scr"], "scr")


def chosen(source, sets, suite):
    """Those of SAEBench's sets that `source` names, comma-separated; "saebench" is all of them."""
    if source == "saebench":
        return [DataSet(name, cut) for name, cut in sets.items()]
    names = source.split(",")
    for name in names:
        if name not in sets:
            raise InputError(f"--labelled {name}: expected stdlib, saebench, a .jsonl file, or for --suite {suite} some of "
                             f"{','.join(sets)}")
    return [DataSet(name, sets[name]) for name in names]


# ---- The standard library -------------------------------------------------------------------------------------------

PACKAGES = ("asyncio", "email", "multiprocessing", "unittest", "xml")       # large, and on every Python
STDLIB_PAIRS = (("asyncio", "email"), ("multiprocessing", "unittest"), ("logging", "importlib"), ("xml", "asyncio"))
STDLIB_TRAIN, STDLIB_TEST = 240, 80                     # texts a class: what two CPU cores read in seconds
STDLIB_QUADRANT, STDLIB_QUADRANT_TEST = 60, 40          # texts a quadrant
PASSAGE = 240                                           # characters: 60 to 80 tokens
MARKS = re.compile(r'''^(#+|[rR]?"{3}|[rR]?'{3})|("{3}|'{3})$''')       # what makes a line a comment or a docstring


def stdlib_class_sets(suite):
    packages = DataSet("packages", partial(stdlib_packages, PACKAGES))
    if suite == "tpp":
        return [packages]
    return [packages, DataSet("code or documentation", partial(stdlib_kinds, PACKAGES))]


def stdlib_packages(packages, seed):
    """Which package is a passage of code from?"""
    rng = random.Random(seed)
    train, test = {}, {}
    for package in packages:
        code, _ = passages(package, packages)
        train[package] = draw(rng, code.train, STDLIB_TRAIN, package)
        test[package] = draw(rng, code.test, STDLIB_TEST, package)
    return Cut(equal(train), equal(test))


def stdlib_kinds(packages, seed):
    """Is a passage code or documentation? From all the packages alike."""
    rng = random.Random(seed)
    train, test = {}, {}
    for position, kind in enumerate(("code", "documentation")):
        parts = [passages(package, packages)[position] for package in packages]
        train[kind] = draw(rng, [text for part in parts for text in part.train], STDLIB_TRAIN, kind)
        test[kind] = draw(rng, [text for part in parts for text in part.test], STDLIB_TEST, kind)
    return Cut(equal(train), equal(test))


def stdlib_pair(pair, seed):
    """Two packages crossed with code and documentation: the spurious correlation of SCR."""
    rng = random.Random(seed)
    train, test = {}, {}
    for package in pair:
        for kind, texts in zip(("code", "documentation"), passages(package, pair)):
            where = f"{package}, {kind}"
            train[package, kind] = draw(rng, texts.train, 2 * STDLIB_QUADRANT, where)
            test[package, kind] = draw(rng, texts.test, STDLIB_QUADRANT_TEST, where)
    return Cut(train, test)


@cache
def library():
    return standard_library()


@cache
def passages(package, packages):
    """(code, documentation) of a package, a Cut of [texts] each.

    About a quarter of its text is for testing, in files of their own: first those that no run trains on (held_out), then
    others by their hash. Lines that import, or that name any of `packages`, are left out: they would give the class away.
    """
    names = re.compile("|".join(map(re.escape, packages)), re.IGNORECASE)
    files = [file for file in library() if file.name.startswith(f"{package}/")]
    files.sort(key=lambda file: (not held_out(file.name), sha256(file.name.encode()).hexdigest()))

    code, documentation = Cut([], []), Cut([], [])
    for_testing = sum(file.size for file in files) / 4
    for file in files:
        with file.open() as stream:
            source = stream.read().decode()
        side = 1 if for_testing > 0 else 0
        for_testing -= file.size
        for texts, lines in zip((code, documentation), split_source(source)):
            kept = [line for line in lines if not names.search(line)]
            texts[side].extend(cut_passages(kept))
    return code, documentation


def split_source(source):
    """A Python file -> its lines of code and its lines of documentation (docstrings and comments, without their marks).

    What stands above the first statement, the module's docstring and imports belong to neither.
    """
    tree = ast.parse(source)
    lines = source.split("\n")
    owner = {}                                          # line number -> "documentation", or None: left out

    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            owner.update(dict.fromkeys(range(node.lineno, node.end_lineno + 1)))
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node) is not None:
            docstring = node.body[0]
            kind = None if isinstance(node, ast.Module) else "documentation"
            owner.update(dict.fromkeys(range(docstring.lineno, docstring.end_lineno + 1), kind))

    first = tree.body[0].end_lineno if tree.body else len(lines)
    code, documentation = [], []
    for number, line in enumerate(lines[first:], first + 1):
        if owner.get(number, "code") is None:
            continue
        if number in owner or line.lstrip().startswith("#"):
            documentation.append(MARKS.sub("", line.strip()).strip())
        else:
            code.append(line.rstrip())
    return code, documentation


def cut_passages(lines):
    """Lines -> passages of at least PASSAGE characters, each from the start of a line to the end of one."""
    texts, pending = [], ""
    for line in lines:
        if line:
            pending += line + "\n"
        if len(pending) >= PASSAGE:
            texts.append(pending[:2 * PASSAGE])         # a very long line is cut
            pending = ""
    return texts


def draw(rng, texts, count, what):
    """At most `count` of the texts, in an order drawn from rng; InputError where there are too few to learn from."""
    texts = list(dict.fromkeys(texts))
    if len(texts) < LEAST:
        raise InputError(f"only {len(texts)} texts of {what}, but at least {LEAST} are needed: --labelled takes other data")
    return rng.sample(texts, min(count, len(texts)))


def equal(classes):
    """As many texts of every class as the smallest has."""
    least = min(len(texts) for texts in classes.values())
    return {label: texts[:least] for label, texts in classes.items()}


# ---- The user's file ------------------------------------------------------------------------------------------------

def file_classes(path, seed):
    """The labels of a file as classes."""
    by_label = {}
    for row in read_rows(path):
        by_label.setdefault(row["label"], []).append(row["text"])
    if len(by_label) < 2:
        raise InputError(f"{path} has {len(by_label)} label, but probes need two or more")

    rng = random.Random(seed)
    train, test = {}, {}
    for label in sorted(by_label):
        parts = split_texts(by_label[label])
        train[label] = draw(rng, parts.train, TRAIN, f"label {label!r} for training in {path}")
        test[label] = draw(rng, parts.test, TEST, f"label {label!r} for testing in {path}")
    return Cut(equal(train), equal(test))


def file_pair(path, seed):
    """The two labels and two attributes of a file."""
    quadrants = {}
    for row in read_rows(path):
        if "attribute" not in row:
            raise InputError(f"{path}: a line has no attribute, which --suite scr needs beside the label")
        quadrants.setdefault((row["label"], row["attribute"]), []).append(row["text"])

    labels = sorted({label for label, _ in quadrants})
    attributes = sorted({attribute for _, attribute in quadrants})
    if len(labels) != 2 or len(attributes) != 2 or len(quadrants) != 4:
        raise InputError(f"{path}: SCR needs two labels, two attributes and texts of all four combinations; found labels "
                         f"{', '.join(labels)} and attributes {', '.join(attributes)}")

    rng = random.Random(seed)
    train, test = {}, {}
    for quadrant in sorted(quadrants):
        parts = split_texts(quadrants[quadrant])
        what = f"label {quadrant[0]!r}, attribute {quadrant[1]!r}"
        train[quadrant] = draw(rng, parts.train, 2 * SCR_TRAIN, f"{what} for training in {path}")
        test[quadrant] = draw(rng, parts.test, SCR_TEST, f"{what} for testing in {path}")
    return Cut(train, test)


def split_texts(texts):
    """A fifth of the texts, by their hash, is for testing: with every seed the same, and no text on both sides."""
    train, test = [], []
    for text in texts:
        is_test = int(sha256(text.encode()).hexdigest(), 16) % 5 == 0
        (test if is_test else train).append(text)
    return Cut(train, test)


def read_rows(path):
    """The rows of a JSON-lines file, text and label being strings or numbers. InputError names the line."""
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
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number:,}: not JSON ({error.msg}, column {error.colno})") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or "label" not in row:
            raise InputError(f'{path}, line {number:,}: expected {{"text": "...", "label": "..."}}, for SCR with an '
                             '"attribute" too')
        rows.append({key: str(row[key]) for key in ("text", "label", "attribute") if key in row})
    if not rows:
        raise InputError(f"{path} has no lines")
    return rows


# ---- SAEBench's data sets -------------------------------------------------------------------------------------------

BIOS, AMAZON = "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5"
BIOS_COLUMNS, AMAZON_COLUMNS = ("hard_text", "profession", "gender"), ("text", "category", "rating")
BIOS_SETS = {"bias_in_bios_1": (0, 1, 2, 6, 9), "bias_in_bios_2": (11, 13, 14, 18, 19),
             "bias_in_bios_3": (20, 21, 22, 25, 26)}
BIOS_PAIRS = {"professor/nurse": (21, 13), "architect/journalist": (1, 11), "surgeon/psychologist": (25, 22),
              "attorney/teacher": (2, 26)}
AMAZON_CATEGORIES = (1, 2, 3, 5, 6)
AMAZON_PAIRS = {"books/cds": (24, 26), "software/electronics": (30, 6), "pets/office": (18, 11),
                "industrial/toys": (3, 1)}
LANGUAGES = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
EXTENSIONS = {"C": (".c", ".h"), "Python": (".py",), "HTML": (".html",), "Java": (".java",),
              "PHP": (".php", ".php3", ".php4", ".php5", ".phps", ".phpt")}
HEADER, CODE_LEAST = 150, 150 + 3 * 128                 # characters: a licence header's, and the least a file must have


def load(repository, *names, **options):
    """datasets.load_dataset, with one line for each thing that can be missing."""
    try:
        from datasets import load_dataset               # here: optional, and slow to import
    except ImportError:
        raise InputError("SAEBench's data sets need a package: pip install datasets  (--labelled stdlib needs none)") from None
    try:
        return load_dataset(repository, *names, **options)
    except (OSError, ValueError, RuntimeError) as error:        # what it raises offline, for a missing set, for a bad file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot load the data set {repository} ({reason}): check the network, leave it out by naming "
                         "others (--labelled ag_news,europarl), or use --labelled stdlib") from error


def sampled(rows, count, seed, what):
    """`count` of the row numbers as pandas draws them: DataFrame.sample(count, random_state=seed)."""
    if len(rows) < count:
        raise InputError(f"{what} has {len(rows):,} texts, but SAEBench takes {count:,}: is the data set complete?")
    return rows[np.random.RandomState(seed).choice(len(rows), count, replace=False)]


def balanced_classes(repository, columns, classes, seed):
    """As many texts of each class with either attribute (gender, or rating): 1,000 and 1,000 to train, 250 and 250 to test."""
    text, label, attribute = columns
    data = load(repository)
    sides = []
    for split, count in (("train", TRAIN // 2), ("test", TEST // 2)):
        texts, labels, attributes = (data[split][column] for column in columns)
        labels, attributes = np.array(labels), np.array(attributes)
        side = {}
        for wanted in classes:
            side[str(wanted)] = []
            for value in np.unique(attributes):
                rows = np.flatnonzero((labels == wanted) & (attributes == value))
                picked = sampled(rows, count, seed, f"{repository}, {label} {wanted}, {attribute} {value}, {split}")
                side[str(wanted)] += [texts[int(row)] for row in picked]
        sides.append(side)
    return Cut(*sides)


def plain_classes(repository, text, label, classes, seed):
    """2,000 texts of each class to train and 500 to test, whatever else they are."""
    data = load(repository)
    sides = []
    for split, count in (("train", TRAIN), ("test", TEST)):
        texts, labels = data[split][text], np.array(data[split][label])
        side = {}
        for wanted in classes:
            rows = np.flatnonzero(labels == wanted)
            picked = sampled(rows, count, seed, f"{repository}, {label} {wanted}, {split}")
            side[str(wanted)] = [texts[int(row)] for row in picked]
        sides.append(side)
    return Cut(*sides)


def europarl(seed):
    """The first 2,501 sentences of each language, shuffled, cut in two. The seed decides the cut alone."""
    found = {}
    for language, pair in LANGUAGES.items():
        stream = load("Helsinki-NLP/europarl", pair, split="train", streaming=True)
        texts = found[language] = []
        for row in stream:
            texts.append(row["translation"][language])
            if len(texts) > TRAIN + TEST:
                break
    return cut_shuffled(found, seed)


def github_code(seed):
    """The first 2,501 long files of each language, less their first 150 characters, shuffled, cut in two.

    SAEBench reads them through the data set's own script, which `datasets` no longer runs; the same rows in the same order
    are in its Parquet files, the language being that of the file's extension.
    """
    files = "hf://datasets/codeparrot/github-code/data/*.parquet"
    stream = load("parquet", data_files=files, split="train", streaming=True)
    found = {language: [] for language in EXTENSIONS}
    for row in stream:
        language = next((name for name, ends in EXTENSIONS.items() if row["path"].endswith(ends)), None)
        if language and len(row["content"]) > CODE_LEAST:
            found[language].append(row["content"][HEADER:])
            if all(len(texts) > TRAIN + TEST for texts in found.values()):
                break
    return cut_shuffled(found, seed)


def cut_shuffled(found, seed):
    """Each class shuffled, one after the other from the same generator; 2,000 texts to train, the next 500 to test."""
    rng = random.Random(seed)
    train, test = {}, {}
    for label, texts in found.items():
        if len(texts) < TRAIN + TEST:
            raise InputError(f"class {label} has {len(texts):,} texts, but SAEBench takes {TRAIN + TEST:,}: is the data set "
                             "complete?")
        rng.shuffle(texts)
        train[label] = texts[:TRAIN]
        test[label] = texts[TRAIN:TRAIN + TEST]
    return Cut(train, test)


def saebench_pair(repository, columns, pair, attributes, seed):
    """The quadrants in the data set's own order, up to 2,000 texts each to train and 250 to test. No seed changes them."""
    data = load(repository)
    sides = []
    for split, count in (("train", 2 * SCR_TRAIN), ("test", SCR_TEST)):
        texts, labels, values = (data[split][column] for column in columns)
        labels, values = np.array(labels), np.array(values)
        side = {}
        for label in pair:
            for attribute in attributes:
                rows = np.flatnonzero((labels == label) & (values == attribute))[:count]
                side[str(label), str(attribute)] = [texts[int(row)] for row in rows]
        sides.append(side)
    return Cut(*sides)


BIOS_CLASSES = {name: partial(balanced_classes, BIOS, BIOS_COLUMNS, classes) for name, classes in BIOS_SETS.items()}
AMAZON_CLASSES = partial(balanced_classes, AMAZON, AMAZON_COLUMNS, AMAZON_CATEGORIES)
SAEBENCH = {
    "probing": {**BIOS_CLASSES,
                "amazon_categories": AMAZON_CLASSES,
                "amazon_sentiment": partial(plain_classes, AMAZON, "text", "rating", (1.0, 5.0)),
                "github_code": github_code,
                "ag_news": partial(plain_classes, "fancyzhx/ag_news", "text", "label", (0, 1, 2, 3)),
                "europarl": europarl},
    "tpp": {"bias_in_bios_1": BIOS_CLASSES["bias_in_bios_1"], "amazon_categories": AMAZON_CLASSES},
    "scr": {**{name: partial(saebench_pair, BIOS, BIOS_COLUMNS, pair, (0, 1)) for name, pair in BIOS_PAIRS.items()},
            **{name: partial(saebench_pair, AMAZON, AMAZON_COLUMNS, pair, (1.0, 5.0)) for name, pair in AMAZON_PAIRS.items()}},
}
