"""Labelled texts: nothing gives a class away, training and test never meet, SAEBench's cuts, errors in one line."""
import json
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lorasae.errors import InputError
from lorasae.evals.saebench import class_sets, pair_sets
from lorasae.evals import labelled_saebench, labelled_stdlib
from lorasae.evals.labelled import file_classes, file_pair, split_texts
from lorasae.evals.labelled_stdlib import PACKAGES, PAIRS, cut_passages, passages, split_source
from lorasae.io.text import held_out, standard_library

NAMES = re.compile("|".join(PACKAGES), re.IGNORECASE)


# ---- The standard library ------------------------------------------------------------------------

def all_texts(cut):
    return [text for side in cut for texts in side.values() for text in texts]


def test_packages_have_enough_texts_and_equally_many():
    data = class_sets("stdlib", "tpp")[0]
    cut = data.cut(42)
    assert cut == data.cut(42) != data.cut(43)
    assert list(cut.train) == list(PACKAGES)
    assert {len(texts) for texts in cut.train.values()} == {240}
    assert min(len(texts) for texts in cut.test.values()) >= 60


def test_every_quadrant_has_texts_for_the_clean_and_the_biased_probe():
    for data in pair_sets("stdlib"):
        cut = data.cut(42)
        quadrants = list(cut.train)
        assert len(quadrants) == 4 and [kind for _, kind in quadrants[:2]] == ["code", "documentation"]
        assert min(len(texts) for texts in cut.train.values()) >= 60
        assert min(len(cut.train[quadrants[0]]), len(cut.train[quadrants[3]])) >= 100       # the biased probe's
        assert min(len(texts) for texts in cut.test.values()) >= 30


def test_no_text_names_its_package_or_imports():
    cuts = [data.cut(1) for data in class_sets("stdlib", "probing")]
    for text in sum((all_texts(cut) for cut in cuts), []):
        assert not any(package in text.lower() for package in PACKAGES)
        assert not any(line.startswith(("import ", "from ")) and " import" in line for line in text.split("\n"))
    for pair, data in zip(PAIRS, pair_sets("stdlib")):
        for text in all_texts(data.cut(1)):
            assert not any(package in text.lower() for package in pair)


def test_texts_of_one_file_are_all_for_training_or_all_for_testing():
    found = passages("email", PACKAGES)
    for side in found:
        assert side.test and not set(side.train) & set(side.test)

    held = [file for file in standard_library() if file.name.startswith("email/") and held_out(file.name)]
    assert held                                                        # no run has trained on these
    for file in held:
        with file.open() as stream:
            lines, _ = split_source(stream.read().decode())
        for text in cut_passages([line for line in lines if line and not NAMES.search(line)]):
            assert text in found.code.test


def test_a_file_is_split_into_code_and_documentation():
    source = '#!/usr/bin/env python\n# licence\n"""The module."""\nimport os\nfrom a import (b,\n    c)\n' \
             'def area(w, h):\n    """Width\n    times height.\n    """\n    # a product\n    return w * h  # done\n'
    code, documentation = split_source(source)
    assert code == ["def area(w, h):", "    return w * h  # done", ""]
    assert [line for line in documentation if line] == ["Width", "times height.", "a product"]


# ---- The user's file -----------------------------------------------------------------------------

def write(tmp_path, rows):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def rows(count=1000, labels="ab", attributes="xy"):
    return [{"text": f"text {i}", "label": labels[i % len(labels)], "attribute": attributes[i // 2 % len(attributes)]}
            for i in range(count)]


def test_a_users_file_gives_classes_and_quadrants(tmp_path):
    path = write(tmp_path, rows())
    classes = class_sets(path, "probing")[0].cut(0)
    assert list(classes.train) == ["a", "b"] and len(classes.train["a"]) == len(classes.train["b"]) > 100
    quadrants = pair_sets(path)[0].cut(0)
    assert list(quadrants.test) == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    for cut in (classes, quadrants):
        train, test = (set(sum(side.values(), [])) for side in cut)
        assert train and test and not train & test


def test_the_test_texts_of_a_users_file_are_the_same_with_every_seed(tmp_path):
    path = write(tmp_path, rows())
    first, second = (file_classes(path, seed).test for seed in (0, 1))
    parts = split_texts([f"text {i}" for i in range(1000)])
    assert set(sum(first.values(), [])) <= set(parts.test)
    for label in first:
        assert len(set(first[label]) & set(second[label])) >= 0.8 * len(first[label])   # but for making classes equal


@pytest.mark.parametrize("reader, lines, expected", [
    (file_classes, ['{"text": "a", "label": 1}', "{oops"], "line 2: not JSON"),
    (file_classes, ['{"text": "a"}'], "line 1: expected"),
    (file_classes, ["[1]"], "line 1: expected"),
    (file_classes, [], "is empty"),
    (file_classes, rows(labels="a"), "the one label 'a'"),
    (file_classes, rows(20), "at least 16 are needed"),
    (file_pair, rows(attributes="xyz"), "two labels, two attributes.*attributes x, y, z"),
    (file_pair, [{"text": "a", "label": "b"}], "no attribute"),
])
def test_a_bad_file_is_refused_in_one_line(reader, lines, expected, tmp_path):
    with pytest.raises(InputError, match=expected) as error:
        reader(write(tmp_path, lines), 0)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_an_unknown_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        class_sets(str(tmp_path / "no.jsonl"), "probing")[0].cut(0)
    with pytest.raises(InputError, match="expected stdlib, saebench.*bias_in_bios_1,amazon_categories"):
        class_sets("imdb", "tpp")


# ---- SAEBench's data sets ------------------------------------------------------------------------

def bios_split(per_quadrant, seed):
    """Rows of all professions and both genders, shuffled, as columns: what load_dataset returns, column by column."""
    rng = random.Random(seed)
    pairs = [(profession, gender) for profession in range(28) for gender in (0, 1) for _ in range(per_quadrant)]
    rng.shuffle(pairs)
    return {"hard_text": [f"{seed} {i}" for i in range(len(pairs))], "profession": [p for p, _ in pairs],
            "gender": [g for _, g in pairs]}


@pytest.fixture
def fakes(monkeypatch):
    """A `datasets` package whose load_dataset answers from a dictionary, {(repository, names ..): what it returns}."""
    answers, calls = {}, []

    def load_dataset(*names, **options):
        calls.append((names, options))
        if isinstance(answers[names], Exception):
            raise answers[names]
        return answers[names]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return SimpleNamespace(answers=answers, calls=calls)


def test_professions_are_sampled_as_pandas_samples_them_balanced_by_gender(fakes):
    pandas = pytest.importorskip("pandas", reason="the oracle")
    fakes.answers["LabHC/bias_in_bios",] = data = {"train": bios_split(1100, 0), "test": bios_split(260, 1)}
    cut = labelled_saebench.suite_sets("probing")["bias_in_bios_2"](42)
    assert list(cut.train) == ["11", "13", "14", "18", "19"]
    for side, split, count in zip(cut, ("train", "test"), (1000, 250)):
        frame = pandas.DataFrame(data[split])
        for label in (11, 19):
            of_label = frame[frame.profession == label]
            expected = []
            for _, group in of_label.groupby("gender"):
                expected += group["hard_text"].sample(n=count, random_state=42).tolist()
            assert side[str(label)] == expected


def test_sentiment_and_news_are_sampled_by_class_alone(fakes):
    rng = np.random.default_rng(0)
    split = {"text": [f"t{i}" for i in range(12_000)], "label": rng.integers(0, 4, 12_000).tolist(),
             "category": [1] * 12_000, "rating": rng.choice([1.0, 5.0], 12_000).tolist()}
    for name in ("fancyzhx/ag_news", labelled_saebench.AMAZON):
        fakes.answers[name,] = {"train": split, "test": split}
    news = labelled_saebench.suite_sets("probing")["ag_news"](42)
    assert [(label, len(texts)) for label, texts in news.train.items()] == [(c, 2000) for c in "0123"]
    of_class = [text for text, label in zip(split["text"], split["label"]) if label == 2]
    picked = np.random.RandomState(42).choice(len(of_class), 500, replace=False)
    assert news.test["2"] == [of_class[i] for i in picked]
    sentiment = labelled_saebench.suite_sets("probing")["amazon_sentiment"](42)
    assert [len(texts) for texts in sentiment.test.values()] == [500, 500] and list(sentiment.test) == ["1.0", "5.0"]


def test_scr_takes_the_first_rows_of_each_quadrant_in_their_order(fakes):
    fakes.answers["LabHC/bias_in_bios",] = data = {"train": bios_split(1500, 0), "test": bios_split(300, 1)}
    cut = labelled_saebench.suite_sets("scr")["professor/nurse"](42)
    assert list(cut.train) == [("21", "0"), ("21", "1"), ("13", "0"), ("13", "1")]
    columns = data["test"]
    first = [text for text, p, g in zip(*columns.values()) if (p, g) == (13, 1)][:250]
    assert cut.test["13", "1"] == first
    assert len(cut.train["21", "0"]) == 1500                       # fewer than 2,000: all there are


def test_languages_and_code_are_the_first_of_a_stream_shuffled_one_after_the_other(fakes):
    for language, pair in labelled_saebench.LANGUAGES.items():
        rows = [{"translation": {language: f"{language}{i}"}} for i in range(3000)]
        fakes.answers["Helsinki-NLP/europarl", pair] = rows
    cut = labelled_saebench.europarl(42)
    rng = random.Random(42)
    for language in labelled_saebench.LANGUAGES:
        texts = [f"{language}{i}" for i in range(2501)]
        rng.shuffle(texts)
        assert (cut.train[language], cut.test[language]) == (texts[:2000], texts[2000:2500])

    endings = ["c", "py", "html", "java", "php", "rs"]
    fakes.answers["parquet",] = [{"path": f"f{i}.{endings[i % 6]}", "content": f"{i:0150d}{i}" + "x" * (i % 500 + 40)}
                                 for i in range(50_000)]
    cut = labelled_saebench.github_code(42)
    assert list(cut.train) == ["C", "Python", "HTML", "Java", "PHP"]
    for position, language in enumerate(cut.train):
        for text in cut.train[language][:50]:
            assert len(text) > 384 and int(text.rstrip("x")) % 6 == position


def test_what_is_missing_is_said_in_one_line(fakes, monkeypatch):
    fakes.answers["LabHC/bias_in_bios",] = ConnectionError("Couldn't reach the Hub\nand more")
    with pytest.raises(InputError, match="cannot load the data set LabHC/bias_in_bios .*--labelled stdlib") as error:
        labelled_saebench.suite_sets("tpp")["bias_in_bios_1"](42)
    assert "\n" not in str(error.value)

    fakes.answers["LabHC/bias_in_bios",] = {"train": bios_split(20, 0), "test": bios_split(20, 1)}
    with pytest.raises(InputError, match="has 20 texts, but SAEBench takes 1,000"):
        labelled_saebench.suite_sets("tpp")["bias_in_bios_1"](42)

    def broken():
        yield {"translation": {"en": "a"}}
        raise ConnectionError("cut off")

    fakes.answers["Helsinki-NLP/europarl", "en-fr"] = broken()
    with pytest.raises(InputError, match="cut off"):
        labelled_saebench.europarl(42)

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        labelled_saebench.suite_sets("tpp")["bias_in_bios_1"](42)


def test_every_suite_has_the_papers_data_sets():
    assert [len(labelled_saebench.suite_sets(suite)) for suite in ("probing", "tpp", "scr")] == [8, 2, 8]
    assert [data.name for data in class_sets("saebench", "tpp")] == ["bias_in_bios_1", "amazon_categories"]
    assert [data.name for data in class_sets("europarl,ag_news", "probing")] == ["europarl", "ag_news"]
    assert labelled_stdlib.class_sets("tpp")[0].name == "packages"
