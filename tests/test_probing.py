"""Probes against scikit-learn, means over the right positions, what adapting can change."""
import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from helpers import adapted
from lorasae.errors import InputError
from lorasae.evals import probing, saebench, scr_tpp
from lorasae.evals.probes import Task, accuracy, hold_out, logistic, train_probes
from lorasae.evals.saebench import Means, one_against_rest, read_means
from lorasae.evals.labelled import Cut
from lorasae.io.saes import load_sae
from lorasae.lora import add_lora, base


# ---- Logistic regression -------------------------------------------------------------------------

def golden():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    y = x @ [1, -2, .5] + .3 * rng.normal(size=40) > .2
    return torch.tensor(x), torch.tensor(y)


@pytest.mark.parametrize("balanced, weight, bias", [
    (False, (1.07604678, -2.06506263, .56055453), -.89510907),
    (True, (1.09307195, -2.12279762, .54885571), -.40920537),
])
def test_logistic_regression_reaches_the_known_minimum(balanced, weight, bias):
    x, y = golden()
    found = logistic(x[None], y[None], balanced=balanced)
    assert found.weight[0].tolist() == pytest.approx(weight, abs=2e-7)
    assert found.bias.item() == pytest.approx(bias, abs=2e-7)


@pytest.mark.parametrize("features, balanced, C", [
    (1, False, 1), (10, True, 1), (30, False, .1), (30, True, 100)])
def test_logistic_regression_is_scikit_learns(features, balanced, C):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="the oracle")
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(120, features, generator=generator, dtype=torch.float64) * 3
    y = x[:, 0] + torch.randn(120, generator=generator) > 1
    oracle = linear_model.LogisticRegression(
        C=C, class_weight="balanced" if balanced else None, tol=1e-10, max_iter=10_000)
    oracle.fit(x.numpy(), y.numpy())
    found = logistic(x[None], y[None], C=C, balanced=balanced)
    assert found.weight[0].tolist() == pytest.approx(oracle.coef_[0].tolist(), rel=1e-5, abs=1e-5)
    assert found.bias.item() == pytest.approx(oracle.intercept_[0], rel=1e-5, abs=1e-5)


def test_several_regressions_at_once_are_those_alone_even_where_the_classes_separate():
    x, y = golden()
    x = torch.stack([x, 50 * x])
    y = torch.stack([y, x[1, :, 0] > 0])
    both = logistic(x, y)
    for i in range(2):
        alone = logistic(x[i][None], y[i][None])
        torch.testing.assert_close(both.weight[i], alone.weight[0])
        torch.testing.assert_close(both.bias[i], alone.bias[0])
    assert both.weight.isfinite().all()


# ---- Probes by gradient --------------------------------------------------------------------------

def test_the_epoch_is_the_best_on_held_out_texts():
    x, y = golden()
    rows = torch.arange(40)[None]
    task, opposite = Task(rows, y[None].long()), Task(rows, 1 - y[None].long())
    settings = dict(lr=0.1, batch=8, epochs=20, seed=0)
    good = accuracy(train_probes(x, task, task, **settings), x, task)
    # any learning is worse for these
    first = accuracy(train_probes(x, task, opposite, **settings), x, task)
    assert good.item() > 0.9 > first.item()


def test_held_out_texts_are_not_trained_on():
    task = Task(torch.arange(40).view(2, 20), torch.ones(2, 20))
    part, held = hold_out(task, seed=0)
    assert held.rows.shape == (2, 2)
    for i in range(2):
        assert sorted(part.rows[i].tolist() + held.rows[i].tolist()) == task.rows[i].tolist()


def test_a_class_meets_as_many_texts_of_the_others_evenly_drawn():
    task = one_against_rest([30, 30, 30, 30], seed=3)
    assert task.rows.shape == (4, 60)
    for label in range(4):
        positive, negative = task.rows[label, :30], task.rows[label, 30:]
        assert positive.tolist() == list(range(30 * label, 30 * label + 30))
        assert (negative // 30 != label).all() and len(negative.unique()) == 30
        assert all((negative // 30 == other).sum() == 10 for other in range(4) if other != label)
    assert torch.equal(task.rows, one_against_rest([30, 30, 30, 30], seed=3).rows)
    assert not torch.equal(task.rows, one_against_rest([30, 30, 30, 30], seed=4).rows)


# ---- Means ---------------------------------------------------------------------------------------

@pytest.fixture
def sae(sae_folder):
    return load_sae(str(sae_folder), layer=1)


@pytest.fixture
def text_of_run(whole_model, raw_config):
    tokenizer = Tokenizer.from_file(str(whole_model / "tokenizer.json"))
    bos, eos = raw_config["bos_token_id"], raw_config["eos_token_id"]
    return SimpleNamespace(tokenizer=tokenizer, bos=bos, eos=eos)


STRINGS = ["def area(width):", "x = 1", "class Shape:\n    name = 'square'\n" * 20,
           "return width * height <eos> x1"]


def test_padding_bos_and_eos_never_count(model, sae, text_of_run):
    texts = saebench.tokenise(text_of_run, model, STRINGS)
    found = read_means(model, sae, 1, texts, batch=3)
    assert texts.tokens.shape[1] == saebench.LENGTH
    tokenizer, bos, eos = text_of_run.tokenizer, text_of_run.bos, text_of_run.eos
    for i, text in enumerate(STRINGS):
        ids = [bos, *tokenizer.encode(text, add_special_tokens=False).ids][:saebench.LENGTH]
        x = model.run(model.embed(torch.tensor([ids])), 0, 2)[0]
        kept = [t for t, token in enumerate(ids) if token not in (bos, eos)]
        assert found.counted[i] == len(kept) < len(ids)
        means = x[kept].mean(0), sae.encode(x[kept]).mean(0)
        for mean, expected in zip((found.residual[i], found.latents[i]), means):
            torch.testing.assert_close(mean, expected, atol=1e-4, rtol=1e-4)


# ---- Base and adapted ----------------------------------------------------------------------------

@pytest.mark.parametrize("blocks, same", [([2, 3], True), ([1], False)])
def test_adapters_change_what_the_sae_reads_unless_they_are_after_it(
        model, sae, text_of_run, blocks, same):
    texts = saebench.tokenise(text_of_run, model, STRINGS)
    adapted(model, blocks, std=0.3)
    with base(model):
        before = read_means(model, sae, 1, texts)
    after = read_means(model, sae, 1, texts)
    assert torch.equal(before.latents, after.latents) == same
    assert torch.equal(before.residual, after.residual) == same


@pytest.fixture
def labelled(tmp_path):
    """Two classes crossed with two attributes, each with words of its own."""
    path, lines = tmp_path / "texts.jsonl", []
    for i in range(600):
        label, attribute = "ab"[i % 2], "xy"[i // 2 % 2]
        word = {"a": "width", "b": "class"}[label] + {"x": " return", "y": " name ="}[attribute]
        text = f"{word} {i * 7919 % 1000} {word}"
        lines.append(json.dumps({"text": text, "label": label, "attribute": attribute}))
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def setting(model, sae, text_of_run, tmp_path):
    config = SimpleNamespace(model="tiny-gemma-2", sae=("sae-folder",), layer=(1,))
    return SimpleNamespace(model=model, saes={1: sae}, text=text_of_run, config=config,
                           folder=tmp_path)


def test_adapters_after_the_sae_are_refused_in_one_line(setting, labelled):
    adapted(setting.model, [2, 3])
    with pytest.raises(InputError, match="after it.*--adapt all") as error:
        probing.evaluate(setting, SimpleNamespace(labelled=labelled, seeds=1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suite", ["probing", "scr", "tpp"])
def test_a_fresh_adapter_is_paired_to_a_difference_of_zero(
        suite, setting, labelled, capsys, monkeypatch):
    monkeypatch.setattr(scr_tpp, "LEAST_STEPS", 50)     # quick, and good enough for this
    module = importlib.import_module(f"lorasae.evals.{suite}")
    add_lora(setting.model, [0, 1, 2, 3], 3, dropout=0.0)       # B is zero
    numbers = module.evaluate(setting, SimpleNamespace(labelled=labelled, seeds=2))
    assert numbers == json.loads(json.dumps(numbers, allow_nan=False))
    assert all(row["difference"] == 0 == row["ci90"] for row in numbers["rows"].values())

    module.show(numbers)
    assert "SAEBench's reruns differ" in capsys.readouterr().out
    figure = pytest.importorskip("matplotlib.figure", reason="draws the picture").Figure()
    module.draw(numbers, figure)
    assert figure.axes


def test_one_planted_latent_is_all_that_probing_needs():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(60)
    latents = torch.rand(180, 12, generator=generator)
    latents[torch.arange(180), 4 + labels] += 3
    means = Means(torch.randn(180, 8, generator=generator), latents, torch.ones(180))
    cut = {str(i): [""] * 60 for i in range(3)}
    found = probing.measure(None, means, means, Cut(cut, cut), seed=42)
    assert found["sae_top_1"] == 1 and found["sae_all"] > 0.95
    assert found["residual_top_1"] < 0.7

    task = one_against_rest([60] * 3, 42)
    assert probing.best_features(latents, task, 1).squeeze(1).tolist() == [4, 5, 6]
