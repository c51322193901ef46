"""SAEBench's own data sets, cut as SAEBench cuts them, through the optional `datasets` package.

    --labelled saebench                     all that a suite has: eight for probing, two for TPP, eight pairs for SCR
    --labelled ag_news,bias_in_bios_1       some of them

At seed 42 the texts are those of SAEBench (sae_bench_utils/dataset_utils.py). Other seeds draw others, except for SCR, which
takes the first texts of its data sets, and europarl and github_code, which are the first of a stream.
"""
import random
from functools import partial

import numpy as np

from lorasae.errors import InputError
from lorasae.io.labelled import SCR_TEST, SCR_TRAIN, TEST, TRAIN, Cut, DataSet

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
HEADER, CODE_LEAST = 150, 150 + 3 * 128                 # characters: a licence's, and the least of a file


# ---- Loading --------------------------------------------------------------------------------------------------------

def load(repository, *names, **options):
    """datasets.load_dataset, with one line for each thing that can be missing."""
    try:
        from datasets import load_dataset               # here: optional, and slow to import
    except ImportError:
        raise InputError("SAEBench's data sets need a package: pip install datasets  (--labelled stdlib needs none)") from None
    try:
        return load_dataset(repository, *names, **options)
    except FAILURES as error:
        raise unreachable(repository, error) from error


def load_rows(repository, *names, **options):
    """Yields the rows of a stream; what fails midway fails in one line too."""
    stream = load(repository, *names, split="train", streaming=True, **options)
    try:
        yield from stream
    except FAILURES as error:
        raise unreachable(repository, error) from error


FAILURES = (OSError, ValueError, RuntimeError)          # what `datasets` raises offline, or for a missing or damaged set


def unreachable(repository, error):
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(f"cannot load the data set {repository} ({reason}): check the network, leave it out by naming others "
                      "(--labelled ag_news,europarl), or use --labelled stdlib")


def sampled(rows, count, seed, what):
    """`count` of the row numbers, as pandas draws them: DataFrame.sample(count, random_state=seed)."""
    if len(rows) < count:
        raise too_few(what, len(rows), count)
    return rows[np.random.RandomState(seed).choice(len(rows), count, replace=False)]


def too_few(what, found, count):
    return InputError(f"{what} has {found:,} texts, but SAEBench takes {count:,}: is the data set complete?")


# ---- Cutting --------------------------------------------------------------------------------------------------------

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
        texts = found[language] = []
        for row in load_rows("Helsinki-NLP/europarl", pair):
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
    found = {language: [] for language in EXTENSIONS}
    for row in load_rows("parquet", data_files=files):
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
            raise too_few(f"class {label}", len(texts), TRAIN + TEST)
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
                if len(rows) < SCR_TEST:
                    raise too_few(f"{repository}, {label} and {attribute}, {split}", len(rows), SCR_TEST)
                side[str(label), str(attribute)] = [texts[int(row)] for row in rows]
        sides.append(side)
    return Cut(*sides)


# ---- The sets of each suite -----------------------------------------------------------------------------------------

BIOS_CLASSES = {name: partial(balanced_classes, BIOS, BIOS_COLUMNS, classes) for name, classes in BIOS_SETS.items()}
AMAZON_CLASSES = partial(balanced_classes, AMAZON, AMAZON_COLUMNS, AMAZON_CATEGORIES)
SUITES = {
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


def chosen(source, suite):
    """The data sets of a suite ("probing", "tpp", "scr") that `source` names, comma-separated; "saebench" is all."""
    sets = SUITES[suite]
    names = list(sets) if source == "saebench" else source.split(",")
    for name in names:
        if name not in sets:
            raise InputError(f"--labelled {name}: expected stdlib, saebench, a .jsonl file, or for --suite {suite} some of "
                             f"{','.join(sets)}")
    return [DataSet(name, sets[name]) for name in names]
