"""SAEBench's own data sets, cut as SAEBench cuts them, through the optional `datasets` package.

    --labelled saebench         eight for probing, two for TPP, eight pairs for SCR

At seed 42 the texts are SAEBench's (sae_bench_utils/dataset_utils.py). Other seeds draw others,
except for SCR, which takes the first texts of its data sets, and europarl and github_code, which
are the first of a stream.
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
HEADER, LEAST_CODE = 150, 150 + 3 * 128         # characters: of a licence, and the least of a file


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
    """datasets.load_dataset"""
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
    """One line for all that can go wrong: no package, no network, a damaged set."""
    try:
        yield
    except Exception as error:                          # those of `datasets` have no common type
        raise InputError(f"cannot load the data set {repository} ({first_line(error)}): pip "
                         "install datasets if it is missing, check the network, or use --labelled "
                         "stdlib") from error


# ---- Cutting -----------------------------------------------------------------------------------

def sampled_classes(repository, text, label, attribute, classes, seed):
    """2,000 texts of each class to train and 500 to test, half with each attribute."""
    data = load(repository)
    cut = Cut({}, {})
    for side, split, count in zip(cut, ("train", "test"), (TRAIN, TEST)):
        rows = data[split].to_pandas()
        each = count // 2 if attribute else count
        for wanted in classes:
            texts = side[str(wanted)] = []
            for _, group in rows[rows[label] == wanted].groupby(attribute or label):
                with readable(repository):              # it may have too few
                    drawn = group.sample(each, random_state=seed)
                texts += drawn[text].tolist()
    return cut


def first_quadrants(repository, text, label, attribute, pair, values, seed):
    """The first texts of each quadrant, up to 2,000 to train and 250 to test, whatever the seed."""
    data = load(repository)
    cut = Cut({}, {})
    for side, split, most in zip(cut, ("train", "test"), (SCR_TRAIN, SCR_TEST)):
        rows = data[split].to_pandas()
        for wanted, value in product(pair, values):
            chosen = rows[(rows[label] == wanted) & (rows[attribute] == value)]
            side[str(wanted), str(value)] = chosen[text][:most].tolist()
    return cut


def europarl(seed):
    """The first 2,501 sentences of each language, shuffled and cut in two."""
    found = {}
    for language, pair in FACTS["languages"].items():
        rows = islice(stream("Helsinki-NLP/europarl", pair), TRAIN + TEST + 1)
        found[language] = [row["translation"][language] for row in rows]
    return shuffle(found, seed)


def github_code(seed):
    """Long files without their first 150 characters, until each language has 2,501; then as above.

    SAEBench reads them through the data set's own script, which `datasets` no longer runs. The same
    rows in the same order are in its Parquet files; the script takes the language from the file's
    extension.
    """
    files = "hf://datasets/codeparrot/github-code/data/*.parquet"
    endings = FACTS["extensions"]
    found = {language: [] for language in endings}
    for row in stream("parquet", data_files=files):
        for language, texts in found.items():
            is_in_it = row["path"].endswith(tuple(endings[language]))
            if is_in_it and len(row["content"]) > LEAST_CODE:
                texts.append(row["content"][HEADER:])
        if min(map(len, found.values())) > TRAIN + TEST:
            break
    return shuffle(found, seed)


def shuffle(found, seed):
    """Shuffles each class by one generator: 2,000 texts to train, the next 500 to test."""
    rng = random.Random(seed)
    cut = Cut({}, {})
    for label, texts in found.items():
        rng.shuffle(texts)
        cut.train[label] = texts[:TRAIN]
        cut.test[label] = texts[TRAIN:TRAIN + TEST]
    return cut
