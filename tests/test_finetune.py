"""Finetuning an SAE, alone or with adapters: objectives, gradients, invariants, and the runs."""
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import helpers
from helpers import command, metrics, moved, read, refuses, same_tensors, some_tokens, words
from lorasae import adapt, add_lora, dictionary, load_sae, save_sae
from lorasae.adapt import adamw, first_differing, frozen_forward
from lorasae.beyond import finetune
from lorasae.beyond.finetune import combined, loss_of, naive_loss, reference_of
from lorasae.beyond.finetuning import Finetuning, make_trainable
from lorasae.beyond.muon import Muon, muon
from lorasae.lora import attach_lora, detach_lora, lora_parameters
from lorasae.runs.config import Config
from lorasae.runs.training import compiled_blocks
from lorasae.sae import used_positions

LAYER = 1


def random_sae(kind, model):
    """A trainable SAE whose decoder rows have all sorts of norms."""
    sae = helpers.random_sae(kind, model, latents=160, std=1, seed=3).requires_grad_(True)
    norms, rows = 0.3 + torch.rand(160, 1), normalize(sae.W_dec.data, dim=1)
    sae.W_enc.data, sae.W_dec.data = rows / norms, 0.5 * rows * norms
    for bias in (sae.b_enc, sae.b_dec):
        torch.nn.init.normal_(bias, std=0.1)
    if kind == "jumprelu":
        torch.nn.init.uniform_(sae.threshold, 0.5, 1.5)
    return sae


@pytest.fixture
def tokens(model):
    return some_tokens(model, 2, 24)


def prepared(model, sae, tokens):
    """(what is trained: the SAE without adapters; the frozen part; the first block that differs)"""
    seen = dictionary.observe(model, sae, LAYER, tokens, end_to_end=False)
    first = first_differing(model, {LAYER: sae})
    part = frozen_forward(model, {}, tokens, first)
    reference = reference_of(sae, seen.x[used_positions(sae, seen.x, seen.special)])
    return finetune.Trained(LAYER, sae, reference, []), part, first


def gradients(loss, sae):
    return torch.autograd.grad(loss, [p for p in sae.parameters() if p.requires_grad])


def test_the_balanced_loss_has_the_value_of_the_mse_and_scales_the_kl_to_that_value():
    a = torch.tensor(3.0, requires_grad=True)
    kl, mse = 10 * a ** 2, a + 1
    loss = combined("balanced", kl, mse)
    assert loss.item() == pytest.approx(4.0)
    assert torch.autograd.grad(loss, a)[0].item() == pytest.approx((1 + 60 * 4 / 90) / 2)

    refuses("nothing to balance", combined, "balanced", 0 * kl, mse)
    assert combined("kl", 0 * kl, mse) == 0
    assert combined("balanced", torch.nan * kl, mse).isnan()            # the run reports divergence


@pytest.mark.parametrize("site", ["resid", "mlp"])
@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("objective", ["kl", "mse", "balanced"])
def test_value_and_gradients_match_the_naive_loss(model, tokens, kind, objective, site):
    sae = random_sae(kind, model)
    sae.site = site
    if kind == "jumprelu":
        sae.threshold.requires_grad_(False)
    trained, part, first = prepared(model, sae, tokens)
    loss, values = loss_of(model, trained, part, first, Config(objective=objective))
    assert ("kl" in values) == (objective != "mse")
    expected = naive_loss(model, {LAYER: sae}, tokens, objective)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert values["l0"].item() == pytest.approx(l0_of(model, sae, tokens), rel=1e-5)
    expected = gradients(expected, sae)
    same_tensors(gradients(loss, sae), expected, 2e-4)

    if objective == "kl":                               # a block contains the SAE of its MLP
        with compiled_blocks(model, backend="aot_eager"):
            again, _ = loss_of(model, trained, part, first, Config(objective=objective))
            same_tensors(gradients(again, sae), expected, 2e-4)


def l0_of(model, sae, tokens):
    """Mean number of active latents at the positions that the SAE is trained on."""
    x = model.read(tokens, sae, LAYER)
    used = ~model.special(tokens) | sae.on_special
    return (sae.encode(x[used]) > 0).sum(-1).float().mean().item()


def surrogate(sae, bandwidth, notes):
    """x -> x̂ of a JumpReLU in plain autograd, with straight-through slopes in place of jumps."""
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
def test_thresholds_follow_their_slopes_and_the_l0_penalty(model, tokens, objective):
    sae = random_sae("jumprelu", model)
    trained, part, first = prepared(model, sae, tokens)
    original = random_sae("jumprelu", model)
    original.threshold.data += 1.5
    reference = trained.reference._replace(
        original=original, bandwidth=10 * trained.reference.bandwidth)
    trained = trained._replace(reference=reference)
    loss, _ = loss_of(model, trained, part, first, Config(objective=objective))

    notes = []
    stand_in = surrogate(sae, reference.bandwidth, notes)
    expected = naive_loss(model, {LAYER: stand_in}, tokens, objective)
    l0 = notes[0][~model.special(tokens)].mean()
    wanted = l0_of(model, original, tokens)
    assert wanted < 0.9 * l0.item()
    expected = expected + finetune.L0_WEIGHT * (l0 / wanted - 1) ** 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    same_tensors(gradients(loss, sae), gradients(expected, sae), 2e-4)


def fit(model, sae, tokens, steps=8, **how):
    """Takes some steps on the same text -> ([values], the Finetuning)"""
    config = Config(method="finetune", tokens=steps * 48, batch_size=2, context=24, lr=1e-2,
                    lr_decay=True, **how)
    kind = Finetuning(model, LAYER, sae, {}, config, tokens)
    part = kind.frozen(tokens)
    return [kind.step(part, step) for step in range(config.steps)], kind


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_decoder_rows_keep_their_original_norms_and_the_loss_falls(model, tokens, kind):
    sae = random_sae(kind, model)
    sae.W_dec.data[5] = 0
    before = sae.W_dec.detach().clone()
    values, _ = fit(model, sae, tokens)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), before.norm(dim=1))
    assert (sae.W_dec - before).norm() > 0.01 * before.norm()
    assert values[-1]["kl"] < values[0]["kl"] and values[-1]["fvu"] < values[0]["fvu"]


def test_frozen_thresholds_stay_bitwise_the_same_and_trained_ones_keep_l0(model, tokens):
    sae = random_sae("jumprelu", model)
    sae.threshold.requires_grad_(False)
    before = sae.threshold.clone()
    fit(model, sae, tokens, objective="kl")
    assert torch.equal(sae.threshold, before)

    sae = random_sae("jumprelu", model)
    values, _ = fit(model, sae, tokens, steps=60, objective="kl")
    assert not torch.equal(sae.threshold, before)
    assert values[-1]["l0"].item() == pytest.approx(values[0]["l0"].item(), rel=0.05)


def test_the_target_l0_is_that_of_the_original_sae_on_the_steps_text(model):
    """With one target for all text, the penalty would work against L0's variation between texts."""
    texts = torch.randint(3, 97, (24, 8), generator=torch.Generator().manual_seed(1))
    sae = random_sae("jumprelu", model)
    x = model.run(model.embed(texts), 0, LAYER + 1)
    original = reference_of(sae, x.flatten(0, 1)).original
    active = (sae.encode(x) > 0).sum((1, 2))
    assert active.max() > 1.1 * active.min()
    assert [finetune.active_latents(original, each).item() for each in x] == active.tolist()
    with torch.no_grad():
        sae.threshold += 1
    assert finetune.active_latents(original, x[0]) == active[0] > (sae.encode(x[0]) > 0).sum()
    assert original.W_dec is sae.W_dec                  # shared, not copied


def test_a_run_saves_an_sae_of_the_same_form_with_a_lower_kl(site, tmp_path):
    run, folder = tmp_path / "run", tmp_path / "before"
    before = random_sae("jumprelu", 48)
    save_sae(before, folder, model_name="test", layer=LAYER, context=32)
    arguments = words(site, "finetune", "--sae", folder, "--tokens", 640, "--lr", 3e-3)
    command("train", *arguments, "--out", run)
    results = read(run / "results.json")
    assert results["before"].keys() == {"fvu", "l0", "dead_latents"} < results.keys()
    assert results["kl_sae"] < results["kl_before"] and results["kl_gap_closed"] > 0
    assert (run / "sae/training.json").exists()
    after = load_sae(run)
    assert after.on_special == before.on_special and type(after) is type(before)
    torch.testing.assert_close(after.W_dec.norm(dim=1), before.W_dec.norm(dim=1))
    assert not torch.equal(after.W_dec, before.W_dec)


def kind_of(model, sae_kind, sample, dropout=0.0, optimizer=adamw, **how):
    """A Finetuning with adapters that are not the identity, placed as in the paper."""
    sae = random_sae(sae_kind, model)
    torch.manual_seed(0)
    blocks = range(4) if sae_kind == "topk" else range(LAYER + 1, 4)
    adapters = moved(detach_lora(add_lora(model, blocks, rank=3, dropout=dropout)))
    attach_lora(model, adapters)
    config = Config(train_sae=True, batch_size=2, context=24, lr=1e-2, **{"sae_lr": 1e-3, **how})
    make_trainable(sae, config)
    return Finetuning(model.train(), LAYER, sae, adapters, config, sample, optimizer)


@pytest.mark.parametrize("sae_kind", ["topk", "jumprelu"])
def test_every_gradient_of_adapters_and_sae_matches_equation_7(model, tokens, sae_kind):
    # Eq. 7 has no gradient for thresholds, so they are frozen.
    how = {"thresholds": "frozen"} if sae_kind == "jumprelu" else {}
    kind = kind_of(model, sae_kind, tokens, **how)
    sae = kind.trained.sae
    assert kind.first == (0 if sae_kind == "topk" else LAYER + 1)
    part = kind.frozen(tokens)
    loss, values = finetune.loss_of(model, kind.trained, part, kind.first, kind.config)
    expected = adapt.naive_loss(model, {LAYER: sae}, tokens) / tokens.numel()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) == values["kl"].item()
    naive = finetune.naive_loss(model, {LAYER: sae}, tokens, "kl")
    assert naive.item() == pytest.approx(expected.item(), rel=1e-5)

    trained = lora_parameters(model) + [p for p in sae.parameters() if p.requires_grad]
    found, naive = (torch.autograd.grad(value, trained) for value in (loss, expected))
    same_tensors(found, naive)
    of_adapters = torch.nn.utils.get_total_norm(naive[:len(lora_parameters(model))])
    over_sequence = of_adapters.item() * tokens.shape[1]
    norm = kind.step(part, 0)["grad_norm_lora"]
    assert norm.item() == pytest.approx(over_sequence, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("sae_kind", ["topk", "jumprelu"])
def test_adapters_and_sae_have_their_own_rates_and_both_fall(model, tokens, sae_kind, name):
    """A JumpReLU's vectors have the scale of activations, and their rate is multiplied by it."""
    kind = kind_of(model, sae_kind, tokens, optimizer={"adamw": adamw, "muon": muon}[name],
                   lr_decay=True, tokens=4 * 48)
    part = kind.frozen(tokens)
    values = [kind.step(part, step) for step in range(4)]
    groups = kind.optimizer.param_groups
    of_adapters = getattr(kind.optimizer.parts[0], "parts", [])
    assert [type(part) for part in of_adapters] == [Muon] * (name == "muon")
    unit = kind.trained.reference.unit if sae_kind == "jumprelu" else 1
    assert [group["lr"] for group in groups] == pytest.approx([2.5e-3, 2.5e-4, unit * 2.5e-4])
    assert [group["weight_decay"] for group in groups] == [0.01, 0, 0]
    assert values[-1]["kl"] < values[0]["kl"]


def test_a_run_saves_adapters_and_sae_and_merge_tells_them_apart(site, finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished("both"), tmp_path / "run"))
    assert not torch.equal(load_sae(run).W_enc, load_sae(site / "gemma2/sae").W_enc)
    assert metrics(run)[0].keys() == {
        "step", "tokens", "kl", "fvu", "l0", "grad_norm", "grad_norm_lora"}
    command("train", "--merge", run)
    assert f"the SAE trained with them is {run}/sae/" in capsys.readouterr().out
    assert (run / "merged/model.safetensors").exists()

    told = [(each / "adapter/adapter_config.json").read_bytes() for each in (run, finished("lora"))]
    assert told[0] == told[1]
