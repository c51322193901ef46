"""Finetuning an SAE: the objectives and every gradient, what stays as it was, and the run."""
import pytest
import torch
from torch.nn.functional import normalize

from helpers import command, read, words
from lorasae import dictionary
from lorasae.beyond import finetune
from lorasae.adapt import first_differing, frozen_forward
from lorasae.errors import InputError
from lorasae.beyond.finetune import combined, loss_of, naive_loss, reference_of
from lorasae.beyond.finetuning import Finetuning
from lorasae.io.saes import load_sae, save_sae
from lorasae.runs.config import Config
from lorasae.sae import JumpReLU, TopK, splice, used_positions

LAYER = 1


def random_sae(kind, d_model, latents=160, k=8):
    """A trainable SAE whose decoder rows have all sorts of norms."""
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
    """(the SAE as it was, the frozen part, the first block that differs)"""
    seen = dictionary.observe(model, sae, LAYER, tokens, end_to_end=False)
    first = first_differing(model, {LAYER: sae})
    part = frozen_forward(model, {}, tokens, first)
    return reference_of(sae, seen.x[used_positions(sae, seen.x, seen.special)]), part, first


def alone(sae, reference):
    """The SAE is trained without adapters."""
    return finetune.Trained(LAYER, sae, reference, [])


def close(found, expected, rtol=2e-4):
    assert found.keys() == expected.keys()
    for name in expected:
        error = (found[name] - expected[name]).norm()
        assert error <= rtol * expected[name].norm() + 1e-7, (name, error, expected[name].norm())


def gradients(loss, sae):
    named = {name: p for name, p in sae.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


# ---- The objective -------------------------------------------------------------------------------

def test_the_balanced_loss_is_the_mse_in_value_and_gives_both_gradients_the_size_of_the_mses():
    a = torch.tensor(3.0, requires_grad=True)
    kl, mse = 10 * a ** 2, a + 1
    loss = combined("balanced", kl, mse)
    assert loss.item() == pytest.approx(4.0)
    assert torch.autograd.grad(loss, a)[0].item() == pytest.approx((1 + 60 * 4 / 90) / 2)

    with pytest.raises(InputError, match="nothing to balance") as refused:
        combined("balanced", 0 * kl, mse)
    assert "\n" not in str(refused.value) and combined("kl", 0 * kl, mse) == 0
    assert combined("balanced", torch.nan * kl, mse).isnan()            # the run says: diverged


@pytest.mark.parametrize("site", ["resid", "mlp"])
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("objective", ["kl", "mse", "balanced"])
def test_value_and_every_gradient_are_those_of_the_naive_formula(
        model, tokens, kind, objective, site):
    sae = random_sae(kind, model.config.hidden_size)
    sae.site = site
    if kind == "jumprelu":
        sae.threshold.requires_grad_(False)
    reference, part, first = prepared(model, sae, tokens)
    config = Config(objective=objective)
    loss, values = loss_of(model, alone(sae, reference), part, first, config)
    assert ("kl" in values) == (objective != "mse")
    expected = naive_loss(model, {LAYER: sae}, tokens, objective)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert values["l0"].item() == pytest.approx(l0_of(model, sae, tokens), rel=1e-5)
    close(gradients(loss, sae), gradients(expected, sae))


def l0_of(model, sae, tokens):
    """Active latents at a position that the SAE is trained on."""
    x = model.read(tokens, sae, LAYER)
    used = ~model.special(tokens) | sae.on_special
    return (sae.encode(x[used]) > 0).sum(-1).float().mean().item()


def surrogate(sae, bandwidth, notes):
    """x -> x̂ of a JumpReLU in plain autograd: lines with the straight-through slopes for jumps."""
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
def test_thresholds_follow_the_straight_through_gradient_and_the_penalty_of_l0(
        model, tokens, objective):
    sae = random_sae("jumprelu", model.config.hidden_size)
    reference, part, first = prepared(model, sae, tokens)
    original = random_sae("jumprelu", model.config.hidden_size)
    original.threshold.data += 1.5
    reference = reference._replace(original=original, bandwidth=10 * reference.bandwidth)
    trained = alone(sae, reference)
    loss, _ = loss_of(model, trained, part, first, Config(objective=objective))

    notes = []
    stand_in = surrogate(sae, reference.bandwidth, notes)
    expected = naive_loss(model, {LAYER: stand_in}, tokens, objective)
    l0 = notes[0][~model.special(tokens)].mean()
    wanted = l0_of(model, original, tokens)
    assert wanted < 0.9 * l0.item()
    expected = expected + finetune.L0_WEIGHT * (l0 / wanted - 1) ** 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    close(gradients(loss, sae), gradients(expected, sae))
    of_kl, _ = loss_of(model, trained, part, first, Config(objective="kl"))
    assert gradients(of_kl, sae)["threshold"].abs().sum() > 0


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_in_training_an_sae_does_to_the_model_what_it_does_in_place(model, tokens, kind):
    sae = random_sae(kind, model.config.hidden_size)
    special = model.special(tokens)
    x = model.run(model.embed(tokens), 0, LAYER + 1)
    stand_in = dictionary.InTraining(sae, special, 0.1)
    found = splice(x, stand_in)
    torch.testing.assert_close(found, splice(x, sae, special), rtol=1e-5, atol=1e-6)
    if not sae.on_special:
        assert torch.equal(found[special], x[special])


# ---- What stays ----------------------------------------------------------------------------------

def fit(model, sae, tokens, steps=8, **how):
    """Some steps on the same text -> [values], the kind of step."""
    config = Config(method="finetune", tokens=steps * 48, batch_size=2, context=24, lr=1e-2,
                    lr_decay=True, **how)
    kind = Finetuning(model, LAYER, sae, {}, config, tokens)
    part = kind.frozen(tokens)
    return [kind.step(part, step) for step in range(config.steps)], kind


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
    """Against one number for all text, the penalty would press on how L0 varies over texts."""
    texts = torch.randint(3, 97, (24, 8), generator=torch.Generator().manual_seed(1))
    sae = random_sae("jumprelu", model.config.hidden_size)
    x = model.run(model.embed(texts), 0, LAYER + 1)
    original = reference_of(sae, x.flatten(0, 1)).original
    active = (sae.encode(x) > 0).sum((1, 2))
    assert active.max() > 1.1 * active.min()
    assert [finetune.active_latents(original, each).item() for each in x] == active.tolist()
    with torch.no_grad():
        sae.threshold += 1
    assert finetune.active_latents(original, x[0]) == active[0] > (sae.encode(x[0]) > 0).sum()
    assert original.W_dec is sae.W_dec                  # which is not held twice


def test_rates_fall_and_those_of_a_jumprelus_vectors_have_the_scale_of_its_activations(
        model, tokens):
    _, kind = fit(model, random_sae("jumprelu", model.config.hidden_size), tokens, steps=4)
    matrices, vectors = kind.optimizer.param_groups
    assert matrices["lr"] == pytest.approx(1e-2 / 4)                    # of the last step
    assert vectors["lr"] == pytest.approx(kind.trained.reference.unit * 1e-2 / 4)
    assert matrices["weight_decay"] == vectors["weight_decay"] == 0.0


# ---- The run -------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_a_run_leaves_an_sae_that_eval_opens_and_that_a_model_is_adapted_to(
        site, tmp_path, capsys, kind):
    run, folder = tmp_path / "run", tmp_path / "before"
    before = random_sae(kind, 48)
    save_sae(before, folder, model_name="test", layer=LAYER, context=32)
    arguments = words(site, "finetune", "--sae", folder, "--tokens", 640, "--lr", 3e-3)
    command("train", *arguments, "--out", run)
    said = capsys.readouterr().out
    assert "loss            balanced" in said
    assert ("L0 held where it was" in said) == (kind == "jumprelu")

    results = read(run / "results.json")
    assert results["before"].keys() == {"fvu", "l0", "dead_latents"} < results.keys()
    assert results["kl_sae"] < results["kl_before"] and results["kl_gap_closed"] > 0
    assert (run / "sae/training.json").exists()
    after = load_sae(run)
    assert after.on_special == before.on_special and type(after) is type(before)
    torch.testing.assert_close(after.W_dec.norm(dim=1), before.W_dec.norm(dim=1))
    assert not torch.equal(after.W_dec, before.W_dec)

    command("eval", run)
    assert read(run / "eval-fidelity.json")["kl_sae"] == pytest.approx(results["kl_sae"], rel=1e-6)
    around = words(site, "lora", "--sae", run, "--tokens", 128, "--out", tmp_path / "around")
    command("train", *around)
    again = read(tmp_path / "around/results.json")
    assert again["kl_sae"] == pytest.approx(results["kl_sae"], rel=1e-4)
