"""SAEBench's own data sets, cut as SAEBench cuts them, through the optional `datasets` package.

    --labelled saebench                     all that a suite has: eight for probing, two for TPP, eight pairs for SCR
    --labelled ag_news,bias_in_bios_1       some of them

At seed 42 the texts are those of SAEBench (sae_bench_utils/dataset_utils.py). Other seeds draw others, except for SCR,
which takes the first texts of its data sets, and europarl and github_code, which are the first of a stream.
"""
import random
from functools import partial

import numpy as np

from lorasae.errors import InputError
from lorasae.evals.labelled import SCR_TEST, SCR_TRAIN, TEST, TRAIN, Cut, DataSet

BIOS, AMAZON = "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5"
BIOS_COLUMNS = "hard_text", "profession", "gender"
AMAZON_COLUMNS = "text", "category", "rating"

BIOS_SETS = {
    "bias_in_bios_1": (0, 1, 2, 6, 9),
    "bias_in_bios_2": (11, 13, 14, 18, 19),
    "bias_in_bios_3": (20, 21, 22, 25, 26),
}
AMAZON_CATEGORIES = (1, 2, 3, 5, 6)

BIOS_PAIRS = {
    "professor/nurse": (21, 13),
    "architect/journalist": (1, 11),
    "surgeon/psychologist": (25, 22),
    "attorney/teacher": (2, 26),
}
AMAZON_PAIRS = {
    "books/cds": (24, 26),
    "software/electronics": (30, 6),
    "pets/office": (18, 11),
    "industrial/toys": (3, 1),
}

LANGUAGES = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
EXTENSIONS = {
    "C": (".c", ".h"),
    "Python": (".py",),
    "HTML": (".html",),
    "Java": (".java",),
    "PHP": (".php", ".php3", ".php4", ".php5", ".phps", ".phpt"),
}
HEADER, CODE_LEAST = 150, 150 + 3 * 128                 # characters: a licence's, and the least of a file


# ---- Loading -------------------------------------------------------------------------------------

FAILURES = (OSError, ValueError, RuntimeError)          # what `datasets` raises offline, or for a damaged set


def load(repository, *names, **options):
    """datasets.load_dataset, with one line for each thing that can be missing."""
    try:
        from datasets import load_dataset               # here: optional, and slow to import
    except ImportError:
        problem = "SAEBench's data sets need a package: pip install datasets  (--labelled stdlib needs none)"
        raise InputError(problem) from None

    what = options.get("data_files", repository)
    try:
        return load_dataset(repository, *names, **options)
    except FAILURES as error:
        raise unreachable(what, error) from error


def load_rows(repository, *names, **options):
    """Yields the rows of a stream; what fails midway fails in one line too."""
    stream = load(repository, *names, split="train", streaming=True, **options)
    what = options.get("data_files", repository)
    try:
        yield from stream
    except FAILURES as error:
        raise unreachable(what, error) from error


def unreachable(what, error):
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(f"cannot load the data set {what} ({reason}): check the network, leave it out by naming others "
                      "(--labelled ag_news,europarl), or use --labelled stdlib")


def too_few(what, found, count):
    return InputError(f"{what} has {found:,} texts, but SAEBench takes {count:,}: is the data set complete?")


def sampled(rows, count, seed, what):
    """`count` of the row numbers, as pandas draws them: DataFrame.sample(count, random_state=seed)."""
    if len(rows) < count:
        raise too_few(what, len(rows), count)
    return rows[np.random.RandomState(seed).choice(len(rows), count, replace=False)]


# ---- Cutting -------------------------------------------------------------------------------------

def balanced_classes(repository, columns, classes, seed):
    """Of each class as many texts with either attribute (gender, or rating): 1,000 each to train, 250 each to test."""
    data = load(repository)
    sides = []
    for split, count in (("train", TRAIN // 2), ("test", TEST // 2)):
        texts, labels, attributes = read_columns(data[split], columns)

        side = {}
        for wanted in classes:
            chosen_texts = side[str(wanted)] = []
            for attribute in np.unique(attributes):
                rows = np.flatnonzero((labels == wanted) & (attributes == attribute))
                what = f"{repository}, {columns[1]} {wanted}, {columns[2]} {attribute}, {split}"
                for row in sampled(rows, count, seed, what):
                    chosen_texts.append(texts[int(row)])
        sides.append(side)
    return Cut(*sides)


def plain_classes(repository, columns, classes, seed):
    """2,000 texts of each class to train and 500 to test, whatever else they are."""
    data = load(repository)
    sides = []
    for split, count in (("train", TRAIN), ("test", TEST)):
        texts, labels = read_columns(data[split], columns)

        side = {}
        for wanted in classes:
            rows = np.flatnonzero(labels == wanted)
            what = f"{repository}, {columns[1]} {wanted}, {split}"
            side[str(wanted)] = [texts[int(row)] for row in sampled(rows, count, seed, what)]
        sides.append(side)
    return Cut(*sides)


def saebench_pair(repository, columns, pair, attributes, seed):
    """The quadrants in the data set's own order, up to 2,000 texts each to train and 250 to test, whatever the seed."""
    data = load(repository)
    sides = []
    for split, most, least in (("train", 2 * SCR_TRAIN, SCR_TRAIN), ("test", SCR_TEST, SCR_TEST)):
        texts, labels, values = read_columns(data[split], columns)

        side = {}
        for label in pair:
            for attribute in attributes:
                rows = np.flatnonzero((labels == label) & (values == attribute))[:most]
                if len(rows) < least:
                    raise too_few(f"{repository}, {label} and {attribute}, {split}", len(rows), least)
                side[str(label), str(attribute)] = [texts[int(row)] for row in rows]
        sides.append(side)
    return Cut(*sides)


def read_columns(split, columns):
    """The texts as they are stored, and the other columns as arrays."""
    text, *others = columns
    return [split[text], *(np.array(split[column]) for column in others)]


def europarl(seed):
    """The first 2,501 sentences of each language, shuffled and cut in two."""
    found = {}
    for language, pair in LANGUAGES.items():
        texts = found[language] = []
        for row in load_rows("Helsinki-NLP/europarl", pair):
            texts.append(row["translation"][language])
            if len(texts) > TRAIN + TEST:
                break
    return cut_shuffled(found, seed)


def github_code(seed):
    """Long files, less their first 150 characters, read until each language has 2,501; shuffled and cut.

    SAEBench reads them through the data set's own script, which `datasets` no longer runs. The same rows in the same
    order are in its Parquet files, and the script's language is that of the file's extension.
    """
    files = "hf://datasets/codeparrot/github-code/data/*.parquet"
    found = {language: [] for language in EXTENSIONS}
    for row in load_rows("parquet", data_files=files):
        language = language_of(row["path"])
        if language and len(row["content"]) > CODE_LEAST:
            found[language].append(row["content"][HEADER:])
            if min(len(texts) for texts in found.values()) > TRAIN + TEST:
                break
    return cut_shuffled(found, seed)


def language_of(path):
    for language, endings in EXTENSIONS.items():
        if path.endswith(endings):
            return language


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


# ---- The sets of each suite ----------------------------------------------------------------------

def suite_sets(suite):
    """{name: cut} of a suite: "probing", "tpp" or "scr"."""
    if suite == "scr":
        sets = {}
        for name, pair in BIOS_PAIRS.items():
            sets[name] = partial(saebench_pair, BIOS, BIOS_COLUMNS, pair, (0, 1))
        for name, pair in AMAZON_PAIRS.items():
            sets[name] = partial(saebench_pair, AMAZON, AMAZON_COLUMNS, pair, (1.0, 5.0))
        return sets

    sets = {name: partial(balanced_classes, BIOS, BIOS_COLUMNS, classes) for name, classes in BIOS_SETS.items()}
    sets["amazon_categories"] = partial(balanced_classes, AMAZON, AMAZON_COLUMNS, AMAZON_CATEGORIES)
    if suite == "tpp":
        return {name: sets[name] for name in ("bias_in_bios_1", "amazon_categories")}

    sets["amazon_sentiment"] = partial(plain_classes, AMAZON, ("text", "rating"), (1.0, 5.0))
    sets["github_code"] = github_code
    sets["ag_news"] = partial(plain_classes, "fancyzhx/ag_news", ("text", "label"), (0, 1, 2, 3))
    sets["europarl"] = europarl
    return sets


def chosen(source, suite):
    """The data sets of a suite that `source` names, comma-separated; "saebench" is all of them."""
    sets = suite_sets(suite)
    names = list(sets) if source == "saebench" else source.split(",")
    for name in names:
        if name not in sets:
            raise InputError(f"--labelled {name}: expected stdlib, saebench, a .jsonl file, or, for --suite {suite}, "
                             f"some of {','.join(sets)}")
    return [DataSet(name, sets[name]) for name in names]
