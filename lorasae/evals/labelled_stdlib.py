"""Labelled texts without a network: passages of Python's standard library, by package and kind.

    --labelled stdlib       packages as classes; for SCR, pairs of packages, code or documentation

About a quarter of a package's text is for testing, and no file is on both sides; files held out
by runs on stdlib come first. Whatever gives a package away is left out: imports, a file's first
statement (usually its docstring) and all above it, and lines that name one of the packages.
"""
import ast
import random
import re
from functools import cache, partial
from hashlib import sha256

from lorasae.evals.texts import Cut
from lorasae.io.text import held_out, standard_library, text_of

PACKAGES = ("asyncio", "email", "multiprocessing", "unittest", "xml")   # large; in every Python
PAIRS = (("asyncio", "email"), ("multiprocessing", "unittest"),
         ("logging", "importlib"), ("xml", "asyncio"))
TRAIN, TEST = 240, 80                   # texts per class: two CPU cores read these in seconds
SCR_TRAIN, SCR_TEST = 120, 40           # texts per quadrant
PASSAGE = 240                           # characters: 60 to 80 tokens
MARKS = re.compile(r'''^(#+|[rR]?"{3}|[rR]?'{3})|("{3}|'{3})$''')       # of comments and docstrings


def suite_sets(suite):
    """{name: cut} for "probing", "tpp" or "scr"; cut(seed) -> Cut."""
    if suite == "scr":
        return {"/".join(pair): partial(by_both, pair) for pair in PAIRS}
    return {"packages": by_package}


def by_package(seed):
    """Which package is this code from?"""
    found = {package: passages(package, PACKAGES)["code"] for package in PACKAGES}
    return draw(found, TRAIN, TEST, seed)


def by_both(pair, seed):
    """Two packages crossed with code and documentation: SCR's class and attribute."""
    found = {(package, kind): texts for package in pair
             for kind, texts in passages(package, pair).items()}
    return draw(found, SCR_TRAIN, SCR_TEST, seed)


def draw(found, train, test, seed):
    """{class: Cut of [texts]} -> Cut of {class: [texts]}, at most `train` and `test` per class."""
    rng = random.Random(seed)
    drawn = Cut({}, {})
    for label, sides in found.items():
        for side, texts, count in zip(drawn, sides, (train, test)):
            distinct = list(dict.fromkeys(texts))
            side[label] = rng.sample(distinct, min(count, len(distinct)))
    return drawn


# ---- Passages of a package ---------------------------------------------------------------------

@cache
def passages(package, packages):
    """{kind: Cut of [texts]} for a package, without the lines that name any of `packages`."""
    names = re.compile("|".join(packages), re.IGNORECASE)
    files = [file for file in standard_library() if file.name.startswith(f"{package}/")]
    files.sort(key=lambda file: (not held_out(file.name), sha256(file.name.encode()).hexdigest()))

    found = {"code": Cut([], []), "documentation": Cut([], [])}
    for_testing = sum(file.size for file in files) / 4
    for file in files:
        for cut, lines in zip(found.values(), split_source(text_of(file))):
            kept = [line for line in lines if line and not names.search(line)]
            side = cut.test if for_testing > 0 else cut.train
            side.extend(cut_passages(kept))
        for_testing -= file.size
    return found


def split_source(source):
    """A Python file -> (lines of code, lines of docstrings and comments without their marks)."""
    tree = ast.parse(source)
    docstrings, left_out = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            left_out |= lines_of(node)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node) is not None:
                docstrings |= lines_of(node.body[0])

    start = tree.body[0].end_lineno if tree.body else 0     # usually the file's docstring
    code, documentation = [], []
    for number, line in enumerate(source.split("\n"), 1):
        if number <= start or number in left_out:
            continue
        if number in docstrings or line.lstrip().startswith("#"):
            documentation.append(MARKS.sub("", line.strip()).strip())
        else:
            code.append(line.rstrip())
    return code, documentation


def lines_of(node):
    return set(range(node.lineno, node.end_lineno + 1))


def cut_passages(lines):
    """Lines -> passages of whole lines, PASSAGE characters or a little more."""
    texts, pending = [], ""
    for line in lines:
        pending += line + "\n"
        if len(pending) >= PASSAGE:
            texts.append(pending[:2 * PASSAGE])
            pending = ""
    return texts
