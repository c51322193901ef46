"""Probes, means over the right positions, base against adapted model, tables and notes."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import refuses
from lorasae import add_lora, load_model, load_sae, load_tokenizer
from lorasae.evals import absorption, concepts, probing, saebench, scr, texts, tpp
from lorasae.evals.probes import (Task, accuracy, hold_out, logistic, mean_difference,
                                  one_against_rest, train_probes)
from lorasae.evals.texts import Cut, Means, read_means
from lorasae.io.presets import TINY


def golden():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    y = x @ [1, -2, .5] + .3 * rng.normal(size=40) > .2
    return torch.tensor(x), torch.tensor(y)


@pytest.mark.parametrize("class_weight, weight, bias", [
    (None, (1.07604678, -2.06506263, .56055453), -.89510907),
    ("balanced", (1.09307195, -2.12279762, .54885571), -.40920537),
])
def test_logistic_regression_decides_by_the_known_minimum(class_weight, weight, bias):
    pytest.importorskip("sklearn", reason="fits them")
    x, y = golden()
    tests = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = tests @ torch.tensor(weight, dtype=torch.float64) + bias
    clear = logits.abs() > 1e-3
    assert torch.equal(logistic(x, y, tests, class_weight)[clear], logits[clear] > 0)
    assert torch.equal(logistic(50 * x, x[:, 0] > 0, 50 * x), x[:, 0] > 0)      # separable


SGD = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.1), "batch": 8, "seed": 0}


def test_the_epoch_is_the_best_on_held_out_texts():
    x, y = golden()
    rows = torch.arange(40)[None]
    task, opposite = Task(rows, y[None]), Task(rows, ~y[None])
    good = accuracy(train_probes(x, task, task, epochs=20, **SGD), x.float(), task)
    # Any learning is worse for these
    first = accuracy(train_probes(x, task, opposite, epochs=20, **SGD), x.float(), task)
    assert good.item() > 0.9 > first.item()
    # Without held-out texts it is the last one
    ten, twenty = (train_probes(x, task, epochs=count, **SGD).weight.norm() for count in (10, 20))
    assert ten < twenty


def test_a_probe_out_of_patience_stays_as_it_is():
    x, y = golden()
    rows = torch.arange(40).expand(2, 40)
    task, held = Task(rows, torch.stack([y, y])), Task(rows, torch.stack([~y, y]))
    short = train_probes(x, task, held, epochs=6, patience=2, **SGD)
    long = train_probes(x, task, held, epochs=40, patience=2, **SGD)
    assert torch.equal(short.weight[0], long.weight[0])


def test_tasks_that_share_their_texts_are_trained_as_if_each_had_its_own():
    x, y = golden()
    labels, rows = torch.stack([y, x[:, 0] > 0]), torch.arange(40)[None]
    weights = torch.tensor([[1.0], [2.0]])
    shared, own = (train_probes(x, Task(r, labels), epochs=5, pos_weight=weights, **SGD)
                   for r in (rows, rows.expand(2, 40)))
    torch.testing.assert_close(shared, own)


def test_held_out_texts_are_not_trained_on():
    task = Task(torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.bool))
    part, held = hold_out(task, seed=0)
    assert held.rows.shape == (2, 2)
    for i in range(2):
        assert sorted(part.rows[i].tolist() + held.rows[i].tolist()) == task.rows[i].tolist()


def test_a_class_meets_as_many_texts_of_the_others_evenly_drawn():
    classes = {**{label: range(40) for label in "abc"}, "d": range(30)}
    task = one_against_rest(classes, seed=3)
    assert task.rows.shape == (4, 60)
    for label in range(4):
        positive, negative = task.rows[label, :30], task.rows[label, 30:]
        assert positive.tolist() == list(range(40 * label, 40 * label + 30))
        assert task.labels[label].tolist() == [True] * 30 + [False] * 30
        assert (negative // 40 != label).all() and len(negative.unique()) == 30
        assert all((negative // 40 == i).sum() == 10 for i in range(4) if i != label)
    assert torch.equal(task.rows, one_against_rest(classes, seed=3).rows)
    assert not torch.equal(task.rows, one_against_rest(classes, seed=4).rows)


@pytest.fixture
def setting(tmp_path):
    model = load_model("tiny-gemma-2", dtype="float32").requires_grad_(False)
    sae = load_sae(str(TINY / "gemma-2-sae" / "topk"), layer=2)
    text = SimpleNamespace(tokenizer=load_tokenizer("tiny-gemma-2"), bos=model.config.bos_token_id)
    config = SimpleNamespace(model="tiny-gemma-2", sae=("topk",), layer=(2,))
    return SimpleNamespace(model=model, saes={2: sae}, text=text, config=config, folder=tmp_path)


def test_padding_bos_and_eos_never_count(setting, monkeypatch):
    monkeypatch.setattr(texts, "BATCH", 3)
    model, sae, text = setting.model, setting.saes[2], setting.text
    eos = model.config.eos_token_id
    with_eos = f"a {text.tokenizer.id_to_token(eos)} b"
    strings = ["def area(width):", "x = 1", "class Shape:\n    name = 1\n" * 20, with_eos]
    rows = texts.tokenise(text, {"a": strings[:1], "b": strings[1:]})
    found = read_means(model, sae, 2, rows)
    assert max(map(len, rows)) == texts.LENGTH and eos in rows[3]
    for i, string in enumerate(strings):
        ids = text.tokenizer.encode(string, add_special_tokens=False).ids
        assert rows[i] == [text.bos, *ids][:texts.LENGTH]
        x = model.run(model.embed(torch.tensor([rows[i]])), 0, 3)[0]
        kept = [t for t, token in enumerate(rows[i]) if token not in (text.bos, eos)]
        means = x[kept].mean(0), sae.encode(x[kept]).mean(0)
        for mean, expected in zip((found.residual[i], found.latents[i]), means):
            torch.testing.assert_close(mean, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("suite, blocks, options, said", [
    (tpp, [3, 4, 5], ("stdlib", 1), "after it.*--adapt all"),
    (absorption, [3, 4, 5], (200, 1), "after it.*--adapt all"),
    (absorption, range(6), (10, 1), "--words 10"),
])
def test_what_cannot_be_compared_is_refused_in_one_line(setting, suite, blocks, options, said):
    add_lora(setting.model, blocks, 2)
    if suite is absorption:
        pytest.importorskip("sklearn", reason="fits the probes")
    refuses(said, suite.evaluate, setting, *options)


def test_a_missing_scikit_learn_is_named_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for evaluate in (probing.evaluate, absorption.evaluate):
        refuses("pip install scikit-learn", evaluate, None, "stdlib", 1)


def crossed(seed):
    """A Cut of two classes crossed with two attributes, each with words of its own."""
    cut = Cut({}, {})
    for label, noun in (("a", "width"), ("b", "class")):
        for attribute, word in (("x", " return"), ("y", " name =")):
            found = [f"{noun}{word} {i * 7919 % 1000} {noun}{word}" for i in range(80)]
            cut.train[label, attribute], cut.test[label, attribute] = found[:60], found[60:]
    return cut


@pytest.mark.parametrize("suite, options", [
    (probing, ("stdlib", 2)), (scr, ("stdlib", 2)), (tpp, ("stdlib", 2)), (absorption, (200, 2))])
def test_a_fresh_adapter_is_paired_to_a_difference_of_zero(suite, options, setting, monkeypatch):
    if suite in (probing, absorption):
        pytest.importorskip("sklearn", reason="fits the probes")
    texts_of = SimpleNamespace(suite_sets=lambda suite: {"crossed": crossed})
    monkeypatch.setitem(saebench.LABELLED, "stdlib", texts_of)
    monkeypatch.setattr(concepts, "LEAST_STEPS", 50)    # quick, and good enough for this
    add_lora(setting.model, range(6), 3, dropout=0.0)   # B is zero
    numbers = suite.evaluate(setting, *options)
    assert numbers == json.loads(json.dumps(numbers, allow_nan=False))
    assert (numbers["layer"], numbers["seeds"], len(numbers["sets"])) == (2, 2, 1)
    labels, paper, _ = saebench.table_6(suite.__name__.rpartition(".")[2])
    assert set(numbers["rows"]) == set(labels) >= set(paper)
    assert all(row["difference"] == 0 for row in numbers["rows"].values())
    assert all(row["ci90"] is None for row in numbers["rows"].values())         # nothing varies

    table, = suite.tables(numbers)
    assert len(table.rows) == len(labels)
    assert any("over seeds of evaluation (2)" in note for note in table.notes)


def test_one_planted_latent_is_all_that_probing_needs():
    pytest.importorskip("sklearn", reason="fits the probes")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(60)
    latents = torch.rand(180, 12, generator=generator)
    latents[torch.arange(180), 4 + labels] += 3
    means = Means(torch.randn(180, 8, generator=generator), latents)
    cut = {str(i): [""] * 60 for i in range(3)}
    found = probing.measure(None, means, means, Cut(cut, cut), seed=42)
    assert set(found) == set(saebench.table_6("probing")[0])
    assert found["sae_top_1"] == 1 and found["sae_all"] > 0.95

    task = one_against_rest(cut, 42)
    assert mean_difference(latents, task).argmax(1).tolist() == [4, 5, 6]
