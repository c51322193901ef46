"""SAEBench's own data sets, split as in SAEBench; they need the optional `datasets` package.

    --labelled saebench         eight for probing, two for TPP, eight pairs for SCR

At seed 42 the texts are SAEBench's (sae_bench_utils/dataset_utils.py). Other seeds draw others, but
SCR always uses the first texts of its data sets; europarl and github_code, the first of a stream.
"""
import random
from contextlib import contextmanager
from functools import partial
from itertools import islice, product
from pathlib import Path

from lorasae.errors import InputError
from lorasae.evals.texts import Cut
from lorasae.io.files import first_line, read_json

TRAIN, TEST = 2000, 500                 # texts per class: 4,000 and 1,000 of each binary task
SCR_TRAIN, SCR_TEST = 2000, 250         # texts per quadrant, at most
FACTS = read_json(Path(__file__).with_name("saebench.json"))    # which columns, which classes
TPP = ("bias_in_bios_1", "amazon_categories")
HEADER, LEAST_CODE = 150, 150 + 3 * 128         # characters to cut off; the least in a file


def suite_sets(suite):
    """{name: cut} for "probing", "tpp" or "scr"; cut(seed) -> Cut."""
    if suite == "scr":
        return {name: partial(first_quadrants, *pair) for name, pair in FACTS["pairs"].items()}
    sets = {name: partial(sampled_classes, *classes) for name, classes in FACTS["classes"].items()}
    if suite == "tpp":
        return {name: sets[name] for name in TPP}
    return {**sets, "europarl": europarl, "github_code": github_code}


# ---- Loading -----------------------------------------------------------------------------------

def load(repository, *names, **options):
    """datasets.load_dataset, with its errors as InputError."""
    with readable(repository):
        from datasets import load_dataset               # imported here: optional, and slow
        return load_dataset(repository, *names, **options)


def stream(repository, *names, **options):
    """Yields the rows of a data set as they arrive."""
    rows = load(repository, *names, split="train", streaming=True, **options)
    with readable(repository):
        yield from rows


@contextmanager
def readable(repository):
    """Turns any error (no package, no network, a damaged data set) into an InputError."""
    try:
        yield
    except Exception as error:                          # `datasets` raises many types
        raise InputError(f"cannot load the data set {repository} ({first_line(error)}): pip "
                         "install datasets if the package is missing, check the network, or use "
                         "--labelled stdlib") from error


# ---- Cutting -----------------------------------------------------------------------------------

def sampled_classes(repository, text, label, attribute, classes, seed):
    """For each class, 2,000 training and 500 test texts, half with each attribute."""
    data = load(repository)
    cut = Cut({}, {})
    for side, split, count in zip(cut, ("train", "test"), (TRAIN, TEST)):
        rows = data[split].to_pandas()
        each = count // 2 if attribute else count
        for wanted in classes:
            texts = side[str(wanted)] = []
            for _, group in rows[rows[label] == wanted].groupby(attribute or label):
                with readable(repository):              # the group may be too small
                    drawn = group.sample(each, random_state=seed)
                texts += drawn[text].tolist()
    return cut


def first_quadrants(repository, text, label, attribute, pair, values, seed):
    """The first texts of each quadrant for any seed: up to 2,000 for training, 250 for testing."""
    data = load(repository)
    cut = Cut({}, {})
    for side, split, most in zip(cut, ("train", "test"), (SCR_TRAIN, SCR_TEST)):
        rows = data[split].to_pandas()
        for wanted, value in product(pair, values):
            chosen = rows[(rows[label] == wanted) & (rows[attribute] == value)]
            side[str(wanted), str(value)] = chosen[text][:most].tolist()
    return cut


def europarl(seed):
    """The first 2,501 sentences of each language, shuffled and split in two."""
    found = {}
    for language, pair in FACTS["languages"].items():
        rows = islice(stream("Helsinki-NLP/europarl", pair), TRAIN + TEST + 1)
        found[language] = [row["translation"][language] for row in rows]
    return shuffle(found, seed)


def github_code(seed):
    """2,501 or more long files per language, without their first 150 characters; then as above.

    SAEBench reads them with the data set's own script, which `datasets` no longer runs. Its Parquet
    files have the same rows in the same order; the script tells the language by the extension.
    """
    files = "hf://datasets/codeparrot/github-code/data/*.parquet"
    endings = FACTS["extensions"]
    found = {language: [] for language in endings}
    for row in stream("parquet", data_files=files):
        for language, texts in found.items():
            if row["path"].endswith(tuple(endings[language])) and len(row["content"]) > LEAST_CODE:
                texts.append(row["content"][HEADER:])
        if min(map(len, found.values())) > TRAIN + TEST:
            break
    return shuffle(found, seed)


def shuffle(found, seed):
    """Shuffles all classes with one generator: 2,000 texts to train on, the next 500 to test on."""
    rng = random.Random(seed)
    cut = Cut({}, {})
    for label, texts in found.items():
        rng.shuffle(texts)
        cut.train[label] = texts[:TRAIN]
        cut.test[label] = texts[TRAIN:TRAIN + TEST]
    return cut
