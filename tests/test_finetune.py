"""Finetuning an SAE that is there: the objectives and every gradient, what stays as it was, and the run around it."""
import json

import pytest
import torch
from torch.nn.functional import normalize

import eval as evaluation
import train as training
from helpers import counted, interrupted_after
from lorasae import dictionary
from lorasae.beyond import finetune
from lorasae.adapt import teach
from lorasae.errors import InputError
from lorasae.beyond.finetune import combined, hold, learn, naive_loss
from lorasae.io.saes import load_sae, save_sae
from lorasae.runs.config import Config, read_config
from lorasae.sae import JumpReLU, TopK, splice

LAYER = 1


def random_sae(kind, d_model, latents=160, k=8):
    """A trainable SAE whose decoder rows have all sorts of norms; a JumpReLU leaves BOS and EOS alone."""
    generator = torch.Generator().manual_seed(3)
    sae = TopK(d_model, latents, k) if kind == "topk" else JumpReLU(d_model, latents)
    rows = normalize(torch.randn(latents, d_model, generator=generator), dim=1)
    norms = 0.3 + torch.rand(latents, 1, generator=generator)
    sae.W_enc.data = rows / norms
    sae.W_dec.data = 0.5 * rows * norms
    sae.b_enc.data = 0.1 * torch.randn(latents, generator=generator)
    sae.b_dec.data = 0.1 * torch.randn(d_model, generator=generator)
    if kind == "jumprelu":
        sae.threshold.data = 0.5 + torch.rand(latents, generator=generator)
    return sae


@pytest.fixture
def tokens(model):
    tokens = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = model.config.bos_token_id
    tokens[1, 7] = model.config.eos_token_id
    return tokens


def prepared(model, sae, tokens):
    """(what stays as it was, the lesson, the first block that differs)"""
    seen = dictionary.observe(model, sae, LAYER, tokens, end_to_end=False)
    first = finetune.first_trained(model, LAYER)
    return hold(sae, seen.x[seen.learned]), teach(model, {}, tokens, first), first


def alone(sae, held):
    """The SAE is trained without adapters."""
    return finetune.Learners(LAYER, sae, held, [])


def close(found, expected, rtol=2e-4):
    assert found.keys() == expected.keys()
    for name in expected:
        error = (found[name] - expected[name]).norm()
        assert error <= rtol * expected[name].norm() + 1e-7, (name, error, expected[name].norm())


def gradients(loss, sae):
    named = {name: p for name, p in sae.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


# ---- The objective -----------------------------------------------------------------------------------------------------

def test_the_balanced_loss_is_the_mse_in_value_and_gives_both_gradients_the_size_of_the_mses():
    a = torch.tensor(3.0, requires_grad=True)
    kl, mse = 10 * a ** 2, a + 1
    loss = combined("balanced", kl, mse)
    assert loss.item() == pytest.approx(4.0)
    assert torch.autograd.grad(loss, a)[0].item() == pytest.approx((1 + 60 * 4 / 90) / 2)


def test_a_kl_of_zero_leaves_nothing_to_balance():
    with pytest.raises(InputError, match="nothing to balance") as refused:
        combined("balanced", torch.zeros(()), torch.ones(()))
    assert "\n" not in str(refused.value)
    assert combined("kl", torch.zeros(()), torch.ones(())).item() == 0
    assert combined("balanced", torch.tensor(torch.nan), torch.ones(())).isnan()       # diverged: the run says that


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("objective", ["kl", "mse", "balanced"])
def test_value_and_every_gradient_are_those_of_the_naive_formula(model, tokens, kind, objective):
    sae = random_sae(kind, model.config.hidden_size)
    held, lesson, first = prepared(model, sae, tokens)
    if kind == "jumprelu":
        sae.threshold.requires_grad_(False)
    loss, values = learn(model, alone(sae, held), lesson, first, Config(objective=objective))
    expected = naive_loss(model, {LAYER: sae}, tokens, objective)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert values["l0"].item() == pytest.approx(l0_of(model, sae, tokens), rel=1e-5)
    close(gradients(loss, sae), gradients(expected, sae))


def l0_of(model, sae, tokens):
    """Active latents at a position that the SAE learns from."""
    x = model.run(model.embed(tokens), 0, LAYER + 1)
    learned = ~model.special(tokens) | sae.on_special
    return (sae.encode(x[learned]) > 0).sum(-1).float().mean().item()


def surrogate(sae, bandwidth, notes):
    """x -> x̂ of a JumpReLU in plain autograd, its jumps replaced by lines whose slopes are the straight-through ones."""
    def reconstruct(x):
        pre = x @ sae.W_enc.T + sae.b_enc
        theta, gate = sae.threshold, (pre > sae.threshold).float()
        near = ((pre - theta).abs() < bandwidth / 2).float()
        moved = theta - theta.detach()
        z = pre * gate - (theta / bandwidth * near).detach() * moved
        notes.append((gate - near / bandwidth * moved).sum(-1))
        return z @ sae.W_dec + sae.b_dec
    reconstruct.on_special = sae.on_special
    return reconstruct


@pytest.mark.parametrize("objective", ["kl", "balanced"])
def test_thresholds_follow_the_straight_through_gradient_and_the_penalty_of_l0(model, tokens, objective):
    sae = random_sae("jumprelu", model.config.hidden_size)
    held, lesson, first = prepared(model, sae, tokens)
    as_it_came = random_sae("jumprelu", model.config.hidden_size)
    as_it_came.threshold.data += 1.5
    encoder = as_it_came.W_enc, as_it_came.b_enc, as_it_came.threshold
    held = held._replace(encoder=encoder, bandwidth=10 * held.bandwidth)
    loss, _ = learn(model, alone(sae, held), lesson, first, Config(objective=objective))

    notes = []
    stand_in = surrogate(sae, held.bandwidth, notes)
    expected = naive_loss(model, {LAYER: stand_in}, tokens, objective)
    l0 = notes[0][~model.special(tokens)].mean()
    wanted = l0_of(model, as_it_came, tokens)
    assert wanted < 0.9 * l0.item()
    expected = expected + finetune.L0_WEIGHT * (l0 / wanted - 1) ** 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    close(gradients(loss, sae), gradients(expected, sae))
    assert gradients(loss_of(model, sae, held, lesson, first), sae)["threshold"].abs().sum() > 0


def loss_of(model, sae, held, lesson, first):
    return learn(model, alone(sae, held), lesson, first, Config(objective="kl"))[0]


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_in_training_an_sae_does_to_the_model_what_it_does_in_place(model, tokens, kind):
    sae = random_sae(kind, model.config.hidden_size)
    held, _, _ = prepared(model, sae, tokens)
    special = model.special(tokens)
    x = model.run(model.embed(tokens), 0, LAYER + 1)
    stand_in = finetune.InTraining(sae, held, ~special | sae.on_special)
    torch.testing.assert_close(stand_in(x), splice(x, sae, special), rtol=1e-5, atol=1e-6)
    if not sae.on_special:
        assert torch.equal(stand_in(x)[special], x[special])


# ---- What stays --------------------------------------------------------------------------------------------------------

def fit(model, sae, tokens, steps=8, **how):
    held, lesson, _ = prepared(model, sae, tokens)
    config = Config(method="finetune", tokens=steps * 48, batch_size=2, context=24, lr=1e-2, lr_decay=True, **how)
    optimizer = finetune.optimizers(alone(sae, held), config, config.lr)
    steps = finetune.train(model, alone(sae, held), [lesson] * steps, optimizer, config)
    return [values for _, values in steps], optimizer


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_decoder_rows_keep_the_norms_they_came_with_and_the_loss_falls(model, tokens, kind):
    sae = random_sae(kind, model.config.hidden_size)
    sae.W_dec.data[5] = 0
    before = sae.W_dec.detach().clone()
    values, _ = fit(model, sae, tokens)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), before.norm(dim=1))
    assert (sae.W_dec - before).norm() > 0.01 * before.norm()
    assert values[-1]["kl"] < values[0]["kl"] and values[-1]["fvu"] < values[0]["fvu"]


def test_frozen_thresholds_stay_to_the_bit_and_trained_ones_hold_l0(model, tokens):
    sae = random_sae("jumprelu", model.config.hidden_size)
    sae.threshold.requires_grad_(False)
    before = sae.threshold.clone()
    fit(model, sae, tokens, objective="kl")
    assert torch.equal(sae.threshold, before)

    sae = random_sae("jumprelu", model.config.hidden_size)
    values, _ = fit(model, sae, tokens, steps=60, objective="kl")
    assert not torch.equal(sae.threshold, before)
    assert values[-1]["l0"].item() == pytest.approx(values[0]["l0"].item(), rel=0.05)


def test_the_l0_that_is_wanted_is_that_of_the_step_s_own_text(model):
    """Against one number for all text, the penalty would also press on how L0 varies from text to text."""
    texts = torch.randint(3, 97, (24, 8), generator=torch.Generator().manual_seed(1))
    sae = random_sae("jumprelu", model.config.hidden_size)
    x = model.run(model.embed(texts), 0, LAYER + 1)
    held = hold(sae, x.flatten(0, 1))
    active = (sae.encode(x) > 0).sum((1, 2))
    assert active.max() > 1.1 * active.min()
    assert [finetune.active_as_it_came(held, each).item() for each in x] == active.tolist()
    with torch.no_grad():
        sae.threshold += 1
    assert finetune.active_as_it_came(held, x[0]) == active[0] > (sae.encode(x[0]) > 0).sum()


def test_rates_fall_linearly_and_those_of_a_jumprelus_vectors_have_the_scale_of_its_activations(model, tokens):
    sae = random_sae("jumprelu", model.config.hidden_size)
    held, _, _ = prepared(model, sae, tokens)
    _, optimizer = fit(model, sae, tokens, steps=4)
    matrices, vectors = optimizer.param_groups
    assert matrices["lr"] == pytest.approx(1e-2 / 4)                    # of the last step
    assert vectors["lr"] == pytest.approx(held.unit * 1e-2 / 4)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


# ---- The run -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def arguments(whole_model, text_folder):
    return ["--method", "finetune", "--model", whole_model, "--layer", LAYER, "--data", text_folder, "--context", 32, "--tokens",
            640, "--eval-tokens", 256, "--batch-size", 2, "--lr", 3e-3, "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def sae_of(raw_config, tmp_path):
    """The folder of a random SAE of one kind, for the fixture `model`."""
    def write(kind):
        sae = random_sae(kind, raw_config["hidden_size"])
        save_sae(sae, tmp_path / f"{kind}-before", model_name="test", layer=LAYER, context=32)
        return tmp_path / f"{kind}-before"
    return write


def command(script, *words):
    script.main([str(word) for word in words])


def refusal(*words):
    with pytest.raises(SystemExit) as stopped:
        command(training, *words)
    line = stopped.value.code
    assert isinstance(line, str) and line.startswith("error: ") and "\n" not in line
    return line


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_a_run_leaves_an_sae_that_eval_opens_and_that_a_model_is_adapted_to(arguments, sae_of, tmp_path, capsys, kind):
    run = tmp_path / "run"
    command(training, *arguments, "--sae", sae_of(kind), "--out", run)
    said = capsys.readouterr().out
    assert "on balanced" in said and ("L0 held at what it was" in said) == (kind == "jumprelu")

    results, before = read(run / "results.json"), load_sae(sae_of(kind))
    for name in ("ce_base", "ce_sae", "kl_sae", "fvu", "l0", "dead_latents"):
        assert name in results and name in results["before"]
    assert results["kl_sae"] < results["before"]["kl_sae"] and results["closed"]["kl_gap_closed"] > 0
    assert (run / "sae/training.json").exists()
    after = load_sae(run)
    assert after.on_special == before.on_special and type(after) is type(before)
    torch.testing.assert_close(after.W_dec.norm(dim=1), before.W_dec.norm(dim=1))
    assert not torch.equal(after.W_dec, before.W_dec)

    command(evaluation, run)
    assert read(run / "eval-fidelity.json")["kl_sae"] == pytest.approx(results["kl_sae"], rel=1e-6)
    command(training, "--model", read(run / "config.json")["model"], "--sae", run, "--tokens", 128, "--batch-size", 2,
            "--rank", 2, "--device", "cpu", "--out", tmp_path / "around")
    assert read(tmp_path / "around/results.json")["kl_sae"] == pytest.approx(results["kl_sae"], rel=1e-4)


@pytest.mark.parametrize("raw_config", ["llama"], indirect=True)
def test_an_interrupted_finetune_resumes_to_the_bit(arguments, sae_of, tmp_path):
    arguments += ["--sae", sae_of("jumprelu"), "--checkpoint-every", 4]
    command(training, *arguments, "--out", tmp_path / "whole")
    with interrupted_after(6, finetune, "take_step"), pytest.raises(SystemExit):
        command(training, *arguments, "--out", tmp_path / "cut")
    with counted(finetune, "take_step") as steps:
        command(training, "--resume", tmp_path / "cut")
    assert len(steps) == read_config(tmp_path / "cut").steps - 4        # from the checkpoint, not from the beginning
    found, expected = (load_sae(tmp_path / name).state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_what_cannot_be_finetuned_is_refused_in_one_line(arguments, sae_of, tmp_path):
    topk = sae_of("topk")
    save_sae(random_sae("topk", 32), tmp_path / "narrow", model_name="other", layer=LAYER, context=32)
    assert "trained on block 1, not 2: pass --layer 1" in refusal(*arguments, "--layer", 2, "--sae", topk)
    assert "activations of width 32, but the model's have 48" in refusal(*arguments, "--sae", tmp_path / "narrow")
    assert "has none" in refusal(*arguments, "--sae", topk, "--thresholds", "frozen")
    assert "--rank has no effect" in refusal(*arguments, "--sae", topk, "--rank", 4)
    assert "--micro-batch 1" in refusal(*arguments, "--sae", topk, "--micro-batch", 1)
    assert "one --lr" in refusal(*arguments, "--sae", topk, "--lr", 1e-3, 1e-2)
    assert "the SAE of one layer" in refusal(*arguments, "--layer", 1, 2, "--sae", topk)
    assert "--sae-dtype bfloat16" in refusal(*arguments, "--sae", topk, "--sae-dtype", "bfloat16")
