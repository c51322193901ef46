"""Labelled texts without a network: passages of the Python standard library, by package and by kind.

    --labelled stdlib           packages as classes; for SCR pairs of them, each in code and in documentation

About a quarter of a package's text is for testing, in files of their own: first those that no run trains on (held_out),
then others. What gives a package away at sight is left out: imports, what stands above a file's first statement or in
its docstring, and every line that names one of the packages.
"""
import ast
import random
import re
from functools import cache, partial
from hashlib import sha256
from typing import NamedTuple

from lorasae.evals.labelled import Cut, DataSet, draw, equal
from lorasae.io.text import held_out, standard_library

PACKAGES = ("asyncio", "email", "multiprocessing", "unittest", "xml")       # large, and part of every Python
PAIRS = (("asyncio", "email"), ("multiprocessing", "unittest"), ("logging", "importlib"), ("xml", "asyncio"))
TRAIN, TEST = 240, 80                            # texts a class: what two CPU cores read in seconds
SCR_TRAIN, SCR_TEST = 60, 40                            # texts a quadrant
PASSAGE = 240                                           # characters: 60 to 80 tokens
MARKS = re.compile(r'''^(#+|[rR]?"{3}|[rR]?'{3})|("{3}|'{3})$''')       # of comments and docstrings


def class_sets(suite):
    """The data sets for "probing" or "tpp", to which two classes would be too few: one's loss is the other's."""
    packages = DataSet("packages", partial(by_package, PACKAGES))
    kinds = DataSet("code or documentation", partial(by_kind, PACKAGES))
    return [packages] if suite == "tpp" else [packages, kinds]


def pair_sets():
    """The data sets for SCR."""
    return [DataSet("/".join(pair), partial(by_both, pair)) for pair in PAIRS]


def by_package(packages, seed):
    """Which package is this code from?"""
    rng = random.Random(seed)
    train, test = {}, {}
    for package in packages:
        code = passages(package, packages).code
        train[package] = draw(rng, code.train, TRAIN, package)
        test[package] = draw(rng, code.test, TEST, package)
    return Cut(equal(train), equal(test))


def by_kind(packages, seed):
    """Is this code or documentation? From all the packages alike."""
    rng = random.Random(seed)
    train, test = {}, {}
    for kind in Passages._fields:
        parts = [getattr(passages(package, packages), kind) for package in packages]
        train[kind] = draw(rng, sum((part.train for part in parts), []), TRAIN, kind)
        test[kind] = draw(rng, sum((part.test for part in parts), []), TEST, kind)
    return Cut(equal(train), equal(test))


def by_both(pair, seed):
    """Two packages crossed with code and documentation: SCR's class and attribute."""
    rng = random.Random(seed)
    train, test = {}, {}
    for package in pair:
        for kind, texts in passages(package, pair)._asdict().items():
            quadrant = package, kind
            train[quadrant] = draw(rng, texts.train, 2 * SCR_TRAIN, f"{kind} of {package}")
            test[quadrant] = draw(rng, texts.test, SCR_TEST, f"{kind} of {package}")
    return Cut(train, test)


# ---- Passages of a package -----------------------------------------------------------------------

class Passages(NamedTuple):
    """Of one package, each a Cut of [texts]."""
    code: Cut
    documentation: Cut


@cache
def library():
    return standard_library()


@cache
def passages(package, packages):
    """The Passages of a package, without the lines that name one of `packages`."""
    names = re.compile("|".join(packages), re.IGNORECASE)
    files = [file for file in library() if file.name.startswith(f"{package}/")]
    files.sort(key=lambda file: (not held_out(file.name), sha256(file.name.encode()).hexdigest()))

    found = Passages(Cut([], []), Cut([], []))
    for_testing = sum(file.size for file in files) / 4
    for file in files:
        with file.open() as stream:
            source = stream.read().decode()
        side = "test" if for_testing > 0 else "train"
        for_testing -= file.size

        for texts, lines in zip(found, split_source(source)):
            kept = [line for line in lines if line and not names.search(line)]
            getattr(texts, side).extend(cut_passages(kept))
    return found


def split_source(source):
    """A Python file -> its lines of code, and those of documentation: docstrings and comments, without their marks."""
    tree = ast.parse(source)
    docstrings, left_out = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            left_out |= lines_of(node)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node) is not None:
                docstrings |= lines_of(node.body[0])

    start = tree.body[0].end_lineno if tree.body else 0            # its docstring, where it has one
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
    """Lines -> passages of PASSAGE characters or a little more, each of whole lines but for very long ones."""
    texts, pending = [], ""
    for line in lines:
        pending += line + "\n"
        if len(pending) >= PASSAGE:
            texts.append(pending[:2 * PASSAGE])
            pending = ""
    return texts
