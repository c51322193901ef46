"""Steering: likelihoods, the change by steering, how α is chosen, where the examples come from."""
import importlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import adapted, random_sae, read, toy_text
from lorasae.errors import InputError
from lorasae.evals import steering
from lorasae.evals.common import interval
from lorasae.evals.steering import Examples
from lorasae.lora import adapters, add_lora, base
from lorasae.runs.config import Config
from lorasae.runs.setting import Setting


def unit(D, seed=0):
    return F.normalize(torch.randn(D, generator=torch.Generator().manual_seed(seed)), dim=0)


def texts_of(lengths, model, seed=0):
    generator, bos = torch.Generator().manual_seed(seed), model.config.bos_token_id
    return [[bos, *torch.randint(3, 97, (n,), generator=generator).tolist()] for n in lengths]


def adapt(model):
    return adapted(model, [2, 3], std=0.1)


# ---- Likelihoods ---------------------------------------------------------------------------------

def test_a_likelihood_scores_each_token_by_the_row_before_it():
    log_probs = torch.tensor(np.random.default_rng(0).normal(size=(6, 5))).log_softmax(-1)
    tokens = torch.tensor([0, 3, 1, 1, 4, 2])
    found = steering.naive_log_likelihood(log_probs, tokens).item()
    assert found == pytest.approx(-1.4169129, abs=1e-7)     # a row too late it is -1.9523935


@pytest.mark.parametrize("alpha", [0, 2.5])
def test_batched_likelihoods_are_those_of_each_text_alone(model, alpha):
    texts, v, layer = texts_of([7, 20, 1, 12, 20], model), unit(model.config.hidden_size), 1
    found = steering.log_likelihoods(model, texts, layer, v, (alpha, 0), batch=3)
    for i, text in enumerate(texts):
        tokens = torch.tensor([text])
        every = {layer: lambda x: x + alpha * torch.outer(x[0] @ v, v)[None]}
        logits = model(tokens, every)
        expected = steering.naive_log_likelihood(logits[0].double().log_softmax(-1), tokens[0])
        assert found[0, i].item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.equal(found[0], found[1]) == (alpha == 0)


def test_steering_multiplies_what_lies_along_the_latent_and_has_its_units():
    x, v = torch.randn(2, 3, 8), unit(8)
    steered = steering.steer(x, v, 2.0)
    torch.testing.assert_close(steered @ v, 3 * (x @ v))
    torch.testing.assert_close(steered - x, (x @ v)[..., None] * 2 * v)
    assert torch.equal(steering.steer(x, v, 0), x)

    # A change is in units where the unsteered texts span 100
    unsteered = torch.tensor([-5.0, -3.0, -1.0])
    assert steering.change(unsteered, unsteered).tolist() == [0, 0, 0]
    assert steering.change(torch.tensor([-3.0, -3.0, 0.0]), unsteered).tolist() == [50, 0, 25]


def test_alpha_raises_positives_and_not_negatives():
    flat = torch.tensor([0.0, 1.0])                                         # unsteered: a span of 1
    raised = lambda *by: torch.stack([flat + amount for amount in by])
    alphas = (0, 1, 2, 3)
    for positives, negatives, best in (
            ((0, 1, 3, 4), (0, 0, 0, 2), 2),                # 3 gains 1 and costs 2
            ((0, 1, 3, 4), (0, -1, -5, -9), 3),             # lowering negatives costs nothing
            ((0, -1, -2, -3), (0, -1, -2, -3), 0)):         # nothing helps
        assert steering.tune(raised(*positives), raised(*negatives), alphas) == best


# ---- The comparison ------------------------------------------------------------------------------

def examples(model):
    return Examples(*(texts_of([10] * 6, model, seed) for seed in range(4)))


def test_fresh_adapters_steer_exactly_as_the_base_model(model):
    add_lora(model, [2, 3], 3)
    row = steering.compare(model, 1, unit(model.config.hidden_size), examples(model))
    assert row["alpha_base"] == row["alpha_lora"]
    for side in ("positive", "negative"):
        assert row[side]["base"] == row[side]["lora"]
        assert row[side]["delta"] == row[side]["ci90"] == 0


def test_table_4_pairs_the_models_text_by_text_each_at_its_own_alpha(model):
    v, sets = unit(model.config.hidden_size, 3), examples(adapt(model))
    row = steering.compare(model, 1, v, sets)
    for side, texts in (("positive", sets.positive), ("negative", sets.negative)):
        d = {}
        for name in ("base", "lora"):
            for module in adapters(model).values():
                module.enabled = name == "lora"
            alphas = (0, row[f"alpha_{name}"])
            unsteered, steered = steering.log_likelihoods(model, texts, 1, v, alphas)
            d[name] = 100 * (steered - unsteered) / (unsteered.max() - unsteered.min())
            assert row[side][name]["d"] == d[name].tolist()
            assert row[side][name]["nats"] == pytest.approx((steered - unsteered).mean().item())
        assert (row[side]["delta"], row[side]["ci90"]) == interval(d["lora"] - d["base"])


def test_alpha_is_chosen_on_the_tuning_half_alone(model):
    v, sets = unit(model.config.hidden_size, 3), examples(adapt(model))
    row = steering.compare(model, 1, v, sets)
    exchanged = sets._replace(positive=sets.negative, negative=sets.positive)
    other = steering.compare(model, 1, v, exchanged)
    assert (row["alpha_base"], row["alpha_lora"]) == (other["alpha_base"], other["alpha_lora"])
    with base(model):
        likelihoods = [steering.log_likelihoods(model, texts, 1, v, steering.ALPHAS)
                       for texts in sets[:2]]
    assert row["alpha_base"] == steering.tune(*likelihoods)


# ---- Latents and examples ------------------------------------------------------------------------

def test_windows_are_distinct_stretches_of_one_document():
    chunks = torch.arange(100).repeat(2, 1) + 3
    chunks[:, 0] = 2
    chunks[:, 30] = 1                                       # an end of document in the third window
    found = steering.windows(chunks, bos=2, eos=1, length=10)
    assert found.shape == (8, 11) and (found[:, 0] == 2).all() and not (found[:, 1:] < 3).any()
    assert found[0].tolist() == [2, *range(4, 14)] and len(found.unique(dim=0)) == 8


@pytest.fixture
def planted(model):
    """A JumpReLU at layer 1, texts, and the highest activation of each latent in each text."""
    sae = random_sae("jumprelu", model, 40, std=1, seed=2)
    texts = torch.tensor(texts_of([12] * 300, model))
    with torch.no_grad():
        x = model.run(model.embed(texts), 0, 2)
        pre = torch.stack([F.linear(row[1:], sae.W_enc) for row in x])  # [300, 12, 40], without BOS
        sorted_ = pre.flatten(0, 1).sort(0).values          # latent i is to fire 3 (i + 1) times
        sae.threshold.data = sorted_[-3 * torch.arange(1, 41), torch.arange(40)].clamp(min=0.1)
        peak = torch.where(pre > sae.threshold, pre, 0).amax(1)
    return sae, texts, peak


def test_examples_are_where_a_latent_fires_most_and_where_it_does_not_fire(model, planted):
    sae, texts, peak = planted
    found = steering.text_examples(model, sae, 1, [9, 30], texts, 12)
    for latent in (9, 30):
        order = peak[:, latent].argsort(descending=True)[:12]
        positive, negative = found[latent]
        assert sorted(positive) == sorted(texts[order].tolist()) and (peak[order, latent] > 0).all()
        rows = [texts.tolist().index(text) for text in negative]
        assert len(rows) == 12 and (peak[rows, latent] == 0).all()


def test_the_latents_chosen_fire_hard_in_enough_texts_but_in_few(model, planted):
    sae, texts, peak = planted
    fired = (peak > 0).sum(0)
    assert (fired < 16).any() and (fired > 30).any()               # there is something to leave out
    eligible = [i for i in range(40) if 16 <= fired[i] <= 30]
    strength = {i: peak[:, i].sum().item() / fired[i].item() for i in eligible}
    chosen = steering.choose_latents(model, sae, 1, texts, 3, least=16)
    assert chosen == sorted(eligible, key=strength.get)[:-4:-1]
    with pytest.raises(InputError, match="--latents"):
        steering.choose_latents(model, sae, 1, texts, 3, least=299)


def test_texts_are_read_from_json_and_from_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"examples": ["one", "two"]}))
    (tmp_path / "b.json").write_text(json.dumps(["one", "two"]))
    (tmp_path / "c.txt").write_text("one\ntwo\n")
    for name in ("a.json", "b.json", "c.txt"):
        assert steering.read_texts(tmp_path / name) == ["one", "two"]
    (tmp_path / "d.json").write_text("{}")
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe\xff")
    for name, message in (("d.json", "JSON list"), ("e.txt", "utf-8"), ("f.txt", "No such file"),
                          ("g.json", "g.json")):
        with pytest.raises(InputError, match=message):
            steering.read_texts(tmp_path / name)


# ---- The whole evaluation ------------------------------------------------------------------------

def test_generated_texts_lose_their_numbering_and_their_doubles():
    answers = iter(['1. A line.\n2) "Another"\n\n- A line.\n', "* third\n4th of July\n"])
    prompts = []

    def ask(messages, max_tokens):
        prompts.append(messages[0]["content"])
        return next(answers)

    found = steering.generate(ask, ["seed one", "seed two"], 4)
    assert found == ["A line.", "Another", "third", "4th of July"]
    assert len(prompts) == 2 and "seed one\nseed two" in prompts[0]


@pytest.fixture
def setting(model, raw_config, tmp_path, planted):
    words = [f"x{i}" for i in range(1000)]
    text = toy_text(tmp_path, raw_config, words, "x0123456789", eval_tokens=14_000)
    return Setting(adapt(model), {1: planted[0]}, text, Config(), tmp_path)


def test_positives_from_a_folder_and_negatives_from_files_are_what_is_steered(setting, tmp_path):
    lines = [f"x{i} = {i * i}" for i in range(20)]
    (tmp_path / "latent_5.json").write_text(json.dumps({"examples": lines}))
    for name in ("tune", "law", "recipes"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {i}" for i in range(10)))
    files = [tmp_path / f"{name}.txt" for name in ("tune", "law", "recipes")]
    numbers = steering.measure(setting, tmp_path, [5], positives=tmp_path, negatives=files)
    row, = numbers["rows"]
    assert numbers["layer"] == 1 and row["latent"] == 5 and row["examples"] == lines[:3]
    assert len(row["positive"]["base"]["d"]) == 10 and len(row["negative"]["lora"]["d"]) == 20
    json.dumps(numbers, allow_nan=False)


def test_an_endpoints_texts_are_kept_for_the_next_time(setting, tmp_path):
    written = [f"x{i} = {i}" for i in range(10)]
    ask = lambda messages, max_tokens: "\n".join(f"{text}" for text in written)
    first = steering.measure(setting, tmp_path, [5], count=10, ask=ask)
    assert read(tmp_path / "steering" / "latent_5.json") == {"examples": written}
    again = steering.measure(setting, tmp_path, [5], count=10, positives=tmp_path / "steering")
    assert again == first


@pytest.mark.parametrize("how, message", [
    ({"latents": [40]}, "0 to 39"), ({"latents": [-1]}, "0 to 39"),
    ({"positives": "file.txt"}, "needs --latents"), ({"negatives": ["one.txt"]}, "two files"),
    ({"latents": [5], "count": 4}, "fewer than 8"),
    ({"latents": [5], "positives": "nowhere.txt"}, "nowhere.txt")])
def test_what_cannot_be_steered_is_one_clear_line(setting, tmp_path, how, message):
    with pytest.raises(InputError, match=message):
        steering.measure(setting, tmp_path, **how)


def test_the_picture_and_the_table_show_every_latent(setting, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="draws the pictures")
    from lorasae.evals.figures import save_figure
    latents = steering.choose_latents(setting.model, setting.saes[1], 1, steering.windows(
        setting.text.held_out, setting.text.bos, setting.text.eos), 2, least=16)
    numbers = steering.measure(setting, tmp_path, latents, count=16)
    steering.show(numbers)
    shown = capsys.readouterr().out
    assert all(f"latent {latent} " in shown for latent in latents) and "positive d base" in shown
    save_figure(steering.draw, numbers, tmp_path / "eval-steering.png")
    assert (tmp_path / "eval-steering.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_asks_for_what_its_options_say(setting, monkeypatch):
    """An address goes to the endpoint, a path to the files; the rest as it is."""
    arguments, seen = importlib.import_module("eval").arguments, {}
    monkeypatch.setattr(steering, "measure", lambda *given, **how: seen.update(how, given=given))
    words = ["run", "--positives", "http://host/v1", "--chat-model", "m"]
    steering.evaluate(setting, arguments(words))
    assert seen["given"] == (setting, setting.folder, None, 100)
    assert set(seen) == {"given", "negatives", "ask"}
    assert seen["ask"].args == ("http://host/v1", "m")
    seen.clear()
    words = "run --positives folder --negatives a b --latents 5 7 --examples 9"
    steering.evaluate(setting, arguments(words.split()))
    assert seen == {"given": (setting, setting.folder, [5, 7], 9), "positives": "folder",
                    "negatives": ["a", "b"]}
    assert arguments(["run"]).chat_model == "gpt-4o-mini"
