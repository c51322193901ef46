"""Probes, means over the right positions, base against adapted model; SCR and TPP; tables."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import adapted, refuses
from lorasae import load_model, load_sae, load_tokenizer
from lorasae.evals import absorption, concepts, probing, saebench, scr, texts, tpp
from lorasae.evals.concepts import THRESHOLDS, ablate, over_thresholds, strongest
from lorasae.evals.probes import (Task, accuracy, hold_out, logistic, mean_difference,
                                  one_against_rest, train_probes)
from lorasae.evals.texts import LENGTH, Cut, Means, read_means
from lorasae.io.presets import TINY
from lorasae.sae import JumpReLU, TopK


def golden():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    y = x @ [1, -2, .5] + .3 * rng.normal(size=40) > .2
    return torch.tensor(x), torch.tensor(y)


@pytest.mark.parametrize("class_weight, weight, bias", [
    (None, (1.07604678, -2.06506263, .56055453), -.89510907),
    ("balanced", (1.09307195, -2.12279762, .54885571), -.40920537),
])
def test_logistic_regression_decides_as_the_known_minimum_does(class_weight, weight, bias):
    pytest.importorskip("sklearn", reason="scikit-learn fits them")
    x, y = golden()
    tests = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = tests @ torch.tensor(weight, dtype=torch.float64) + bias
    clear = logits.abs() > 1e-3
    assert torch.equal(logistic(x, y, tests, class_weight)[clear], logits[clear] > 0)
    assert torch.equal(logistic(50 * x, x[:, 0] > 0, 50 * x), x[:, 0] > 0)      # separable


SGD = {"lr": 0.1, "batch": 8, "seed": 0}


def test_the_best_epoch_on_held_out_texts_is_kept():
    x, y = golden()
    rows = torch.arange(40)[None]
    task, opposite = Task(rows, y[None]), Task(rows, ~y[None])
    good = accuracy(train_probes(x, task, task, epochs=20, **SGD), x.float(), task)
    # With opposite labels held out, every epoch makes it worse
    first = accuracy(train_probes(x, task, opposite, epochs=20, **SGD), x.float(), task)
    assert good.item() > 0.9 > first.item()
    # Without held-out texts, the last epoch is kept
    ten, twenty = (train_probes(x, task, epochs=count, **SGD).weight.norm() for count in (10, 20))
    assert ten < twenty


def test_a_probe_out_of_patience_stops_changing():
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


def test_each_class_is_set_against_as_many_texts_drawn_evenly_from_the_others():
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
        seen = found.residual[i], found.latents[i]
        torch.testing.assert_close(seen, means, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("suite, blocks, options, said", [
    (tpp, [3, 4, 5], ("stdlib", 1), "after it.*--adapt all"),
    (absorption, [3, 4, 5], (200, 1), "after it.*--adapt all"),
    (absorption, range(6), (10, 1), "--words 10"),
])
def test_impossible_comparisons_are_refused_in_one_line(setting, suite, blocks, options, said):
    adapted(setting.model, blocks)
    if suite is absorption:
        pytest.importorskip("sklearn", reason="scikit-learn fits the probes")
    refuses(said, suite.evaluate, setting, *options)


def test_a_missing_scikit_learn_is_named_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for evaluate in (probing.evaluate, absorption.evaluate):
        refuses("pip install scikit-learn", evaluate, None, "stdlib", 1)


def crossed(seed):
    """A Cut of two classes crossed with two attributes, each with its own words."""
    cut = Cut({}, {})
    for label, noun in (("a", "width"), ("b", "class")):
        for attribute, word in (("x", " return"), ("y", " name =")):
            found = [f"{noun}{word} {i * 7919 % 1000} {noun}{word}" for i in range(80)]
            cut.train[label, attribute], cut.test[label, attribute] = found[:60], found[60:]
    return cut


@pytest.mark.parametrize("suite, options", [
    (probing, ("stdlib", 2)), (scr, ("stdlib", 2)), (tpp, ("stdlib", 2)), (absorption, (200, 2))])
@pytest.mark.parametrize("std", [0, 0.3], ids=["fresh", "trained"])
def test_scores_differ_if_the_adapters_are_not_fresh(suite, options, setting, monkeypatch, std):
    if suite in (probing, absorption):
        pytest.importorskip("sklearn", reason="scikit-learn fits the probes")
    texts_of = SimpleNamespace(suite_sets=lambda suite: {"crossed": crossed})
    monkeypatch.setitem(saebench.LABELLED, "stdlib", texts_of)
    monkeypatch.setattr(concepts, "LEAST_STEPS", 50)    # quick, and enough here
    adapted(setting.model, range(6), std=std)
    numbers = suite.evaluate(setting, *options)
    assert numbers == json.loads(json.dumps(numbers, allow_nan=False))
    assert (numbers["layer"], numbers["seeds"], len(numbers["sets"])) == (2, 2, 1)
    labels, paper, _ = saebench.table_6(suite.__name__.rpartition(".")[2])
    assert set(numbers["rows"]) == set(labels) >= set(paper)
    differ = [row["difference"] != 0 for row in numbers["rows"].values()]
    assert any(differ) if std else not any(differ)
    assert std or all(row["ci90"] is None for row in numbers["rows"].values())  # nothing varies

    table, = suite.tables(numbers)
    assert len(table.rows) == len(labels)
    assert any("over seeds of evaluation (2)" in note for note in table.notes)


def test_one_planted_latent_is_all_that_probing_needs():
    pytest.importorskip("sklearn", reason="scikit-learn fits the probes")
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


# ---- SCR and TPP ---------------------------------------------------------------------------------

ATTRIBUTE, CLASS = scr.ATTRIBUTE, scr.CLASS


def dictionary(rows, kind=JumpReLU):
    """An SAE whose latents are these directions [M, D], each read and written along its own row."""
    sae = kind(rows.shape[1], len(rows), 2)
    sae.W_enc.data, sae.W_dec.data = rows.clone(), rows.clone()
    return sae.requires_grad_(False)


def as_means(sae, x):
    """The means of texts of one token each."""
    return Means(x, sae.encode(x))


def test_scr_and_tpp_match_saebenchs_toy_values():
    assert scr.cured(clean=0.95, biased=0.80, ablated=0.88) == pytest.approx(0.53333, abs=1e-5)
    # A biased probe that is not worse leaves nothing to cure
    assert scr.cured(clean=0.9, biased=0.9, ablated=0.7) == 0

    clean = torch.tensor([0.9, 0.8, 0.95])
    ablated = torch.tensor([[0.6, 0.79, 0.95], [0.9, 0.7, 0.93], [0.88, 0.8, 0.65]])
    assert tpp.perturbation(clean, ablated) == pytest.approx(0.225, abs=1e-6)


def test_each_model_reports_its_own_concept_but_differences_use_the_base_models():
    def scores(biased, top):
        return {"clean": 0.9, "biased": biased, **{f"top_{n}": top for n in THRESHOLDS}}

    base = {ATTRIBUTE: scores(0.7, 0.1), CLASS: scores(0.6, 0.2)}       # reports the class
    lora = {ATTRIBUTE: scores(0.5, 0.7), CLASS: scores(0.6, 0.3)}       # reports the attribute
    values = {}
    for who, reported in scr.report({"base": base, "lora": lora}).items():
        metrics = saebench.columns([reported])
        values[who] = {**metrics, **over_thresholds(metrics)}
    numbers = saebench.summary(12, values, 1)
    for metric in ("top_2", "max", "average"):
        row = numbers["rows"][metric]
        assert (row["base"], row["lora"]) == pytest.approx((0.2, 0.7))
        assert row["difference"] == pytest.approx(0.3 - 0.2)
    assert set(numbers["rows"]) == set(saebench.table_6("scr")[0])


def naive_ablate(sae, x, counted, latents):
    """Token by token, as SAEBench writes it: x [N, T, D], counted [N, T] bool -> [N, D]."""
    z = sae.encode(x)
    error = x - sae.decode(z)
    z[..., latents] = 0
    ablated = sae.decode(z) + error
    return (ablated * counted[..., None]).sum(1) / counted.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", [TopK, JumpReLU])
def test_ablating_means_equals_ablating_tokens_and_padding_would_distort_short_texts(kind):
    generator = torch.Generator().manual_seed(1)
    sae = dictionary(F.normalize(torch.randn(24, 16, generator=generator), dim=1), kind)
    sae.b_enc.data, sae.b_dec.data = 0.3 * torch.ones(24), 0.1 * torch.arange(16)
    x = torch.randn(5, LENGTH, 16, generator=generator)
    counted = torch.arange(LENGTH) < torch.tensor([3, 12, 7, 1, 9])[:, None]
    weights = counted[..., None] / counted.sum(1)[:, None, None]
    means = Means((x * weights).sum(1), (sae.encode(x) * weights).sum(1))
    at_zero = sae.encode(torch.zeros(16)).nonzero().flatten()[:2]
    chosen = torch.cat([at_zero, torch.tensor([3, 11])]).unique()

    found = ablate(sae, means, chosen)
    torch.testing.assert_close(found, naive_ablate(sae, x, counted, chosen), atol=1e-5, rtol=1e-5)
    assert torch.equal(ablate(sae, means, chosen[:0]), means.residual)

    # SAEBench's input is zero where masked, and it sums over all positions
    z = sae.encode(x * counted[..., None])
    written = (z[..., chosen] @ sae.W_dec[chosen]).sum(1)
    published = means.residual - written / counted.sum(1, keepdim=True)
    assert (published - found).norm(dim=1).argmax() == counted.sum(1).argmin()


def test_only_latents_with_an_effect_are_ablated():
    effects = torch.tensor([0.0, 0.3, 0.0, 0.1, 0.2])
    assert strongest(effects, 2).tolist() == [1, 4]
    assert sorted(strongest(effects, 50).tolist()) == [1, 3, 4]


CLASSES, EACH, D = 10, 90, 32


def class_texts(seed):
    """x [CLASSES · EACH, D]: class i lies along axis i; one axis is constant, others are noise."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(CLASSES * EACH, D, generator=generator)
    x[torch.arange(len(x)), torch.arange(CLASSES).repeat_interleave(EACH)] += 4
    x[:, -1] += 4
    return x, {str(i): ["text"] * EACH for i in range(CLASSES)}


def tpp_of(sae):
    (train, cut), (test, _) = class_texts(0), class_texts(1)
    return tpp.measure(sae, as_means(sae, train), as_means(sae, test), Cut(cut, cut), seed=42)


def test_tpp_is_nearly_its_maximum_if_a_latent_is_a_class_and_zero_for_a_shuffled_dictionary():
    sae = dictionary(torch.eye(D))
    found = tpp_of(sae)
    assert found["clean"] > 0.98
    assert found["top_2"] > 0.4                         # at most clean - 0.5
    sae.W_dec.data = sae.W_dec.data.roll(CLASSES, 0)    # fires on a class, writes into the noise
    assert abs(tpp_of(sae)["top_2"]) < 0.03


def quadrant_texts(seed, n):
    """Class along axis 0, attribute twice as strong along axis 1; n texts per quadrant."""
    generator = torch.Generator().manual_seed(seed)
    parts, cut = [], {}
    for label, sign in (("professor", 1), ("nurse", -1)):
        for attribute, other in (("male", 1), ("female", -1)):
            x = 0.5 * torch.randn(n, D, generator=generator)
            x[:, 0] += 1.5 * sign
            x[:, 1] += 3 * other
            parts.append(x)
            cut[label, attribute] = ["text"] * n
    return torch.cat(parts), cut


def scr_of(sae):
    (train, train_cut), (test, test_cut) = quadrant_texts(0, 400), quadrant_texts(1, 100)
    cut = Cut(train_cut, test_cut)
    return scr.measure(sae, as_means(sae, train), as_means(sae, test), cut, seed=42)


def test_scr_is_nearly_one_if_latents_are_the_concepts_and_zero_for_a_shuffled_dictionary():
    axes = torch.eye(D)[:2]
    sae = dictionary(torch.cat([axes, -axes]))
    found = scr_of(sae)
    assert scr.worse_known(found) == CLASS
    assert found[CLASS]["biased"] < found[CLASS]["clean"] - 0.2
    assert found[CLASS]["top_2"] > 0.9
    sae.W_dec.data = torch.eye(D)[2:6]                  # fires on a concept, writes into the noise
    assert abs(scr_of(sae)[CLASS]["top_2"]) < 0.05


def test_the_three_probes_see_the_texts_that_saebench_gives_them():
    cut = {("p", "m"): range(6), ("p", "f"): range(4), ("n", "m"): range(3), ("n", "f"): range(9)}
    train = scr.training_tasks(cut)
    pm, pf, nm, nf = [0, 1, 2], [6, 7, 8], [10, 11, 12], [13, 14, 15]
    biased = [0, 1, 2, 3, 4, 5, 13, 14, 15, 16, 17, 18]
    assert train.rows.tolist() == [pm + nm + pf + nf, pm + pf + nm + nf, biased]
    assert train.labels.tolist() == [[True] * 6 + [False] * 6] * 3
    test = scr.test_tasks(cut)
    assert test.rows.tolist() == train.rows[:2].tolist()
