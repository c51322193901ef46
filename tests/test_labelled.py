"""Labelled texts: no clues to the class, disjoint training and test texts, SAEBench's splits."""
import random
import re
import sys
from types import SimpleNamespace

import pytest

from helpers import refuses
from lorasae.evals import labelled_saebench, labelled_stdlib
from lorasae.evals.labelled_stdlib import PACKAGES, PAIRS, cut_passages, passages, split_source
from lorasae.io.text import held_out, standard_library

NAMES = re.compile("|".join(PACKAGES), re.IGNORECASE)


def all_texts(cut):
    return [text for side in cut for texts in side.values() for text in texts]


def test_every_class_and_quadrant_has_enough_texts():
    by_package, = labelled_stdlib.suite_sets("tpp").values()
    cut = by_package(42)
    assert cut == by_package(42) != by_package(43) and list(cut.train) == list(PACKAGES)
    assert {len(texts) for texts in cut.train.values()} == {240}
    assert min(map(len, cut.test.values())) >= 60

    for cut in labelled_stdlib.suite_sets("scr").values():
        train, test = cut(42)
        assert [kind for _, kind in train] == ["code", "documentation"] * 2
        assert min(map(len, train.values())) >= 60 and min(map(len, test.values())) >= 30
        first, *_, last = train.values()                # the texts of the biased probe
        assert min(len(first), len(last)) >= 100


def test_no_text_names_its_package_or_imports():
    for cut in labelled_stdlib.suite_sets("probing").values():
        for text in all_texts(cut(1)):
            assert not NAMES.search(text)
            for line in text.split("\n"):
                assert not (line.startswith(("import ", "from ")) and " import" in line)
    for pair, cut in zip(PAIRS, labelled_stdlib.suite_sets("scr").values()):
        for text in all_texts(cut(1)):
            assert not any(package in text.lower() for package in pair)


def test_the_texts_of_a_file_are_all_for_training_or_all_for_testing():
    found = passages("email", PACKAGES)
    for side in found.values():
        assert side.test and not set(side.train) & set(side.test)

    held = [file for file in standard_library()
            if file.name.startswith("email/") and held_out(file.name)]
    assert held                                         # no run has trained on these
    for file in held:
        with file.open() as stream:
            lines, _ = split_source(stream.read().decode())
        for text in cut_passages([line for line in lines if line and not NAMES.search(line)]):
            assert text in found["code"].test


def test_a_file_is_split_into_code_and_documentation():
    source = ('#!/usr/bin/env python\n# licence\n"""The module."""\nimport os\n'
              'from a import (b,\n    c)\ndef area(w, h):\n    """Width\n    times height.\n'
              '    """\n    # a product\n    return w * h  # done\n')
    code, documentation = split_source(source)
    assert code == ["def area(w, h):", "    return w * h  # done", ""]
    assert [line for line in documentation if line] == ["Width", "times height.", "a product"]


class Split(dict):
    """Columns, like a split of the `datasets` package."""

    def to_pandas(self):
        pandas = pytest.importorskip("pandas", reason="pandas comes with `datasets`")
        return pandas.DataFrame(self)


def bios(train, test):
    """`train` and `test` texts for each of 28 professions and both genders, shuffled."""
    splits = {}
    for seed, (name, each) in enumerate((("train", train), ("test", test))):
        pairs = [(profession, gender) for profession in range(28) for gender in (0, 1)] * each
        random.Random(seed).shuffle(pairs)
        splits[name] = Split(hard_text=[f"{seed} {i}" for i in range(len(pairs))],
                             profession=[p for p, _ in pairs], gender=[g for _, g in pairs])
    return splits


@pytest.fixture
def answers(monkeypatch):
    """{(repository, names ..): what load_dataset of a fake `datasets` package returns}."""
    found = {}

    def load_dataset(*names, **options):
        if isinstance(found[names], Exception):
            raise found[names]
        return found[names]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return found


def saebench_cut(suite, name):
    return labelled_saebench.suite_sets(suite)[name](42)


def test_professions_are_balanced_by_gender_and_sampled_as_pandas_does(answers):
    answers["LabHC/bias_in_bios",] = data = bios(1100, 260)
    cut = saebench_cut("probing", "bias_in_bios_2")
    assert list(cut.train) == ["11", "13", "14", "18", "19"]
    for side, split, count in zip(cut, ("train", "test"), (1000, 250)):
        frame = data[split].to_pandas()
        for label in (11, 19):
            expected = []
            for gender in (0, 1):
                group = frame[(frame.profession == label) & (frame.gender == gender)]
                expected += group["hard_text"].sample(n=count, random_state=42).tolist()
            assert side[str(label)] == expected


def test_scr_uses_the_first_rows_of_each_quadrant_in_order(answers):
    answers["LabHC/bias_in_bios",] = data = bios(1500, 300)
    cut = saebench_cut("scr", "professor/nurse")
    assert list(cut.train) == [("21", "0"), ("21", "1"), ("13", "0"), ("13", "1")]
    columns = data["test"].values()
    first = [text for text, *pair in zip(*columns) if pair == [13, 1]][:250]
    assert cut.test["13", "1"] == first
    assert len(cut.train["21", "0"]) == 1500            # fewer than 2,000, so all of them


def test_languages_and_code_come_from_the_start_of_a_stream_and_are_shuffled_in_turn(answers):
    languages = labelled_saebench.FACTS["languages"]
    for language, pair in languages.items():
        rows = [{"translation": {language: f"{language}{i}"}} for i in range(3000)]
        answers["Helsinki-NLP/europarl", pair] = rows
    cut = saebench_cut("probing", "europarl")
    rng = random.Random(42)
    for language in languages:
        texts = [f"{language}{i}" for i in range(2501)]
        rng.shuffle(texts)
        assert (cut.train[language], cut.test[language]) == (texts[:2000], texts[2000:2500])

    endings = ["c", "py", "html", "java", "php", "rs"]
    answers["parquet",] = [{"path": f"f{i}.{endings[i % 6]}",
                            "content": f"{i:0150d}{i}" + "x" * (i % 500 + 40)}
                           for i in range(50_000)]
    cut = saebench_cut("probing", "github_code")
    assert list(cut.train) == ["C", "Python", "HTML", "Java", "PHP"]
    for position, language in enumerate(cut.train):
        for text in cut.train[language][:50]:
            assert len(text) > 384 and int(text.rstrip("x")) % 6 == position


def test_missing_texts_or_packages_are_reported_in_one_line(answers, monkeypatch):
    answers["LabHC/bias_in_bios",] = ConnectionError("Couldn't reach the Hub\nand more")
    expected = "cannot load the data set LabHC/bias_in_bios .*--labelled stdlib"
    refuses(expected, saebench_cut, "tpp", "bias_in_bios_1")

    answers["LabHC/bias_in_bios",] = bios(20, 20)
    message = "LabHC/bias_in_bios .Cannot take a larger sample"
    refuses(message, saebench_cut, "tpp", "bias_in_bios_1")

    monkeypatch.setitem(sys.modules, "datasets", None)
    refuses("pip install datasets", saebench_cut, "tpp", "bias_in_bios_1")
