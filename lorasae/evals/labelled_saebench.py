"""SAEBench's own data sets, cut as SAEBench cuts them, through the optional `datasets` package.

    --labelled saebench                     all: eight for probing, two for TPP, eight pairs for SCR
    --labelled ag_news,bias_in_bios_1       some of them

At seed 42 the texts are SAEBench's (sae_bench_utils/dataset_utils.py). Other seeds draw others,
except for SCR, which takes the first texts of its data sets, and europarl and github_code, which
are the first of a stream.
"""
import random
from contextlib import contextmanager
from functools import partial
from itertools import islice, product

from lorasae.errors import InputError
from lorasae.evals.texts import Cut
from lorasae.io.files import first_line

TRAIN, TEST = 2000, 500                 # texts per class: 4,000 and 1,000 of each binary task
SCR_TRAIN, SCR_TEST = 1000, 250         # texts per quadrant
BIOS = "LabHC/bias_in_bios", "hard_text", "profession", "gender"        # and columns
AMAZON = "canrager/amazon_reviews_mcauley_1and5", "text", "category", "rating"

CLASSES = {                             # balanced by the last column
    "bias_in_bios_1": (*BIOS, (0, 1, 2, 6, 9)),
    "bias_in_bios_2": (*BIOS, (11, 13, 14, 18, 19)),
    "bias_in_bios_3": (*BIOS, (20, 21, 22, 25, 26)),
    "amazon_categories": (*AMAZON, (1, 2, 3, 5, 6)),
    "amazon_sentiment": (AMAZON[0], "text", "rating", None, (1.0, 5.0)),
    "ag_news": ("fancyzhx/ag_news", "text", "label", None, (0, 1, 2, 3)),
}
TPP = ("bias_in_bios_1", "amazon_categories")
PAIRS = {
    "professor/nurse": (*BIOS, (21, 13), (0, 1)),
    "architect/journalist": (*BIOS, (1, 11), (0, 1)),
    "surgeon/psychologist": (*BIOS, (25, 22), (0, 1)),
    "attorney/teacher": (*BIOS, (2, 26), (0, 1)),
    "books/cds": (*AMAZON, (24, 26), (1.0, 5.0)),
    "software/electronics": (*AMAZON, (30, 6), (1.0, 5.0)),
    "pets/office": (*AMAZON, (18, 11), (1.0, 5.0)),
    "industrial/toys": (*AMAZON, (3, 1), (1.0, 5.0)),
}
LANGUAGES = {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
EXTENSIONS = {
    "C": (".c", ".h"),
    "Python": (".py",),
    "HTML": (".html",),
    "Java": (".java",),
    "PHP": (".php", ".php3", ".php4", ".php5", ".phps", ".phpt"),
}
HEADER, LEAST_CODE = 150, 150 + 3 * 128         # characters: of a licence, and the least of a file


def suite_sets(suite):
    """{name: cut} for "probing", "tpp" or "scr"; cut(seed) -> Cut."""
    if suite == "scr":
        return {name: partial(first_quadrants, *pair) for name, pair in PAIRS.items()}
    sets = {name: partial(sampled_classes, *classes) for name, classes in CLASSES.items()}
    if suite == "tpp":
        return {name: sets[name] for name in TPP}
    return {**sets, "europarl": europarl, "github_code": github_code}


# ---- Loading -----------------------------------------------------------------------------------

def load(repository, *names, **options):
    """datasets.load_dataset, with one line for each thing that can be missing."""
    try:
        from datasets import load_dataset               # imported here: optional, and slow
    except ImportError:
        raise InputError("SAEBench's data sets need a package: pip install datasets  "
                         "(--labelled stdlib needs none)") from None
    with readable(repository):
        return load_dataset(repository, *names, **options)


def stream(repository, *names, **options):
    """Yields the rows of a data set as they arrive."""
    rows = load(repository, *names, split="train", streaming=True, **options)
    with readable(repository):
        yield from rows


@contextmanager
def readable(repository):
    """Turns what `datasets` raises offline, or for a damaged set, into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load the data set {repository} ({first_line(error)}): check the "
                         "network, name other sets (--labelled ag_news,europarl), or use "
                         "--labelled stdlib") from error


def enough(rows, count, what):
    """InputError if there are fewer rows than SAEBench takes."""
    if len(rows) < count:
        raise InputError(f"{what} has {len(rows):,} texts, but SAEBench takes {count:,}: is the "
                         "data set complete?")


# ---- Cutting -----------------------------------------------------------------------------------

def sampled_classes(repository, text, label, attribute, classes, seed):
    """2,000 texts of each class to train and 500 to test, as many of both attributes."""
    data = load(repository)
    cut = Cut({}, {})
    for side, split, count in zip(cut, ("train", "test"), (TRAIN, TEST)):
        rows = data[split].to_pandas()
        each = count // 2 if attribute else count
        for wanted in classes:
            texts = side[str(wanted)] = []
            for _, group in rows[rows[label] == wanted].groupby(attribute or label):
                drawn = group.sample(min(each, len(group)), random_state=seed)
                texts += drawn[text].tolist()
            enough(texts, count, f"{repository}, {split}, {label} {wanted}")
    return cut


def first_quadrants(repository, text, label, attribute, pair, values, seed):
    """The first texts of each quadrant, up to 2,000 to train and 250 to test, whatever the seed."""
    data = load(repository)
    cut = Cut({}, {})
    for side, split, least in zip(cut, ("train", "test"), (SCR_TRAIN, SCR_TEST)):
        most = 2 * least if split == "train" else least         # the biased probe trains on more
        rows = data[split].to_pandas()
        for wanted, value in product(pair, values):
            chosen = rows[(rows[label] == wanted) & (rows[attribute] == value)][:most]
            enough(chosen, least, f"{repository}, {split}, {label} {wanted}, {attribute} {value}")
            side[str(wanted), str(value)] = chosen[text].tolist()
    return cut


def europarl(seed):
    """The first 2,501 sentences of each language, shuffled and cut in two."""
    found = {}
    for language, pair in LANGUAGES.items():
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
    found = {language: [] for language in EXTENSIONS}
    for row in stream("parquet", data_files=files):
        for language, endings in EXTENSIONS.items():
            if row["path"].endswith(endings) and len(row["content"]) > LEAST_CODE:
                found[language].append(row["content"][HEADER:])
        if min(map(len, found.values())) > TRAIN + TEST:
            break
    return shuffle(found, seed)


def shuffle(found, seed):
    """Shuffles each class by one generator: 2,000 texts to train, the next 500 to test."""
    rng = random.Random(seed)
    cut = Cut({}, {})
    for label, texts in found.items():
        enough(texts, TRAIN + TEST, f"class {label}")
        rng.shuffle(texts)
        cut.train[label] = texts[:TRAIN]
        cut.test[label] = texts[TRAIN:TRAIN + TEST]
    return cut
