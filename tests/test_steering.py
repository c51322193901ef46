"""Steering: likelihoods, the change by steering, how α is chosen, where the texts come from."""
import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from helpers import adapted, random_sae, refuses, toy_text
from lorasae.evals import steering
from lorasae.evals.common import interval
from lorasae.evals.report import as_text, with_interval
from lorasae.lora import adapters
from lorasae.runs.config import Config
from lorasae.runs.setting import Setting


def unit(D, seed=0):
    return F.normalize(torch.randn(D, generator=torch.Generator().manual_seed(seed)), dim=0)


def texts_of(count, length, model, seed=0):
    tokens = torch.randint(3, 97, (count, length), generator=torch.Generator().manual_seed(seed))
    return F.pad(tokens, (1, 0), value=model.config.bos_token_id)


@pytest.mark.parametrize("alpha", [0, 2.5])
def test_likelihoods_of_many_texts_match_those_of_each_alone(model, alpha, monkeypatch):
    texts, v, layer = texts_of(5, 20, model), unit(model.config.hidden_size), 1
    monkeypatch.setattr(steering, "BATCH", 2)
    found = steering.log_likelihoods(model, texts, layer, v, (alpha, 0))
    for i, text in enumerate(texts):
        every = {layer: lambda x: x + alpha * torch.outer(x[0] @ v, v)[None]}
        log_p = model(text[None], every)[0].double().log_softmax(-1)
        expected = log_p[:-1].gather(-1, text[1:, None]).mean()     # of each next token
        assert found[0, i].item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.equal(found[0], found[1]) == (alpha == 0)


def test_the_best_alpha_raises_positives_but_not_negatives():
    flat = torch.tensor([0.0, 1.0])                                         # unsteered: range 1
    raised = lambda *by: torch.stack([flat + amount for amount in by])
    alphas = (0, 1, 2, 3)
    for positives, negatives, best in (
            ((0, 1, 3, 4), (0, 0, 0, 2), 2),                # 3 gains 1 and costs 2
            ((0, 1, 3, 4), (0, -1, -5, -9), 3),             # lowering negatives costs nothing
            ((0, -1, -2, -3), (0, -1, -2, -3), 0)):         # nothing helps
        assert steering.tune(raised(*positives), raised(*negatives), alphas) == best


def test_alpha_is_tuned_on_one_half_and_table_4_pairs_the_models_on_the_other(model, monkeypatch):
    tried = []

    def tune(*likelihoods):
        tried.append(likelihoods)
        return (2, 0.5)[len(tried) - 1]                     # for the base model, then the adapted

    monkeypatch.setattr(steering, "tune", tune)
    adapted(model, [2, 3], std=0.1)
    v = unit(model.config.hidden_size, 3)
    sets = {side: texts_of(12, 10, model, seed) for seed, side in enumerate(steering.SIDES)}
    row = steering.compare(model, 1, v, sets)
    assert (row["alpha_base"], row["alpha_lora"]) == (2, 0.5)
    for i, (side, texts) in enumerate(sets.items()):
        d = {}
        for name, seen in zip(("base", "lora"), tried):
            for module in adapters(model).values():
                module.enabled = name == "lora"
            tuning = steering.log_likelihoods(model, texts[::2], 1, v, steering.ALPHAS)
            assert torch.equal(seen[i], tuning)
            alphas = (0, row[f"alpha_{name}"])
            unsteered, steered = steering.log_likelihoods(model, texts[1::2], 1, v, alphas)
            d[name] = 100 * (steered - unsteered) / (unsteered.max() - unsteered.min())
            assert row[side]["d"][name] == d[name].tolist()
        assert (row[side]["delta"], row[side]["ci90"]) == interval(d["lora"] - d["base"])
        assert row[side]["delta"] != 0


def test_windows_are_distinct_stretches_of_one_document(monkeypatch):
    monkeypatch.setattr(steering, "WINDOW", 10)
    chunks = torch.stack([torch.arange(100), torch.arange(100), torch.arange(50, 150)]) + 3
    chunks[:, 0] = 2
    chunks[:, 30] = 1                                       # a document ends in the third window
    text = SimpleNamespace(held_out=chunks, documents=torch.tensor([4, 4, 9]), bos=2, eos=1)
    found, documents = steering.windows(text)
    assert found.shape == (13, 11) and (found[:, 0] == 2).all() and not (found[:, 1:] < 3).any()
    assert found[0].tolist() == [2, *range(4, 14)] and len(found.unique(dim=0)) == 13
    assert documents.tolist() == [4] * 8 + [9] * 5          # the third chunk repeats the first
    assert found[8].tolist() == [2, *range(94, 104)]


@pytest.fixture
def planted(model):
    """A JumpReLU at layer 1, texts, and the highest activation of each latent in each text."""
    sae = random_sae("jumprelu", model, 40, std=1, seed=2)
    texts = texts_of(300, 12, model)
    x = model.run(model.embed(texts), 0, 2)
    pre = torch.stack([F.linear(row[1:], sae.W_enc) for row in x])      # [300, 12, 40], without BOS
    sorted_ = pre.flatten(0, 1).sort(0).values              # latent i should fire 3 (i + 1) times
    sae.threshold.data = sorted_[-3 * torch.arange(1, 41), torch.arange(40)].clamp(min=0.1)
    peak = torch.where(pre > sae.threshold, pre, 0).amax(1)
    return sae, texts, peak


def test_examples_are_where_a_latent_fires_most_and_where_it_does_not_fire(model, planted):
    sae, texts, peak = planted
    found = steering.peaks(model, sae, 1, texts)
    torch.testing.assert_close(found, peak, atol=1e-4, rtol=1e-4)
    for latent in (9, 30):
        chosen = steering.examples_of(peak[:, latent], 12)
        order = peak[:, latent].argsort(descending=True)[:12]
        assert sorted(chosen["positive"].tolist()) == sorted(order.tolist())
        assert (peak[chosen["positive"], latent] > 0).all() and len(chosen["negative"]) == 12
        assert (peak[chosen["negative"], latent] == 0).all()


def test_chosen_latents_fire_strongly_in_enough_texts_but_not_in_too_many(planted):
    _, _, peak = planted
    fired = (peak > 0).sum(0)
    assert (fired < 16).any() and (fired > 30).any()    # there is something to leave out
    eligible = [i for i in range(40) if 16 <= fired[i] <= 30]
    strength = {i: peak[:, i].sum().item() / fired[i].item() for i in eligible}
    best = sorted(eligible, key=strength.get, reverse=True)
    assert steering.choose_latents(peak, 3, least=16) == best[:3]
    assert steering.choose_latents(peak, 40, least=16) == best
    refuses("--latents", steering.choose_latents, peak, 3, least=299)


@pytest.fixture
def setting(model, raw_config, tmp_path, planted):
    words = [f"x{i}" for i in range(1000)]
    text = toy_text(tmp_path, raw_config, words, "x0123456789", eval_tokens=14_000)
    return Setting(adapted(model, [2, 3], std=0.1), {1: planted[0]}, text, Config(), tmp_path)


@pytest.mark.parametrize("raw_config", ["gemma2", "llama"], indirect=True)
@pytest.mark.parametrize("how, message", [
    ({"latents": [40]}, "0 to 39"), ({"latents": [-1]}, "0 to 39"),
    ({"examples": 7}, "--examples 7.*8 or more")])
def test_impossible_latents_or_examples_are_one_clear_line(setting, how, message):
    refuses(message, steering.evaluate, setting, **how)


@pytest.mark.parametrize("raw_config", ["gemma2", "llama"], indirect=True)
def test_the_picture_and_the_table_show_every_latent(setting, tmp_path, capsys):
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib draws the pictures")
    texts, _ = steering.windows(setting.text)
    peak = steering.peaks(setting.model, setting.saes[1], 1, texts)
    latents = steering.choose_latents(peak, 2, least=16)
    numbers = steering.evaluate(setting, latents, examples=16)
    numbers = json.loads(json.dumps(numbers, allow_nan=False))
    print(as_text(steering.tables(numbers)))
    shown = capsys.readouterr().out
    assert all(f"\nlatent {latent} " in shown for latent in latents)
    for row in numbers["rows"]:
        found = row["positive"]
        delta = with_interval(found["delta"], found["ci90"], "+.2f")
        assert f" {delta} " in re.sub(" +", " ", shown)
        assert len(found["d"]["lora"]) == 8 and 1 <= found["documents"] <= 8
        v = F.normalize(setting.saes[1].W_dec[row["latent"]], dim=0)
        chosen = steering.examples_of(peak[:, row["latent"]], 16)
        sides = {side: texts[some] for side, some in chosen.items()}
        expected = steering.compare(setting.model, 1, v, sides)
        assert all(row[side]["d"] == expected[side]["d"] for side in sides)
    figure = figures.Figure()
    steering.draw(numbers, figure)
    assert len(figure.axes) == 4
