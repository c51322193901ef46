"""Training SAEs: every gradient against its formula, the invariants of a step, and the runs."""
from types import SimpleNamespace

import pytest
import torch

from helpers import command, read, same_tensors, some_tokens, words
from lorasae import dictionary
from lorasae.adapt import naive_loss
from lorasae.dictionary import aux_loss, fvu, new_sae, observe, schedule, target_l0
from lorasae.evals import fidelity
from lorasae.io.saes import load_sae
from lorasae.runs.adapting import blocks_to_adapt
from lorasae.runs.config import Config
from lorasae.runs.sae_training import resolved
from lorasae.sae import (
    KINDS, SAE, START_L0, Jump, TopK, geometric_median, splice, used_positions)

LAYER, B, T, M, K = 1, 2, 16, 128, 4


def ordinary(model, tokens):
    """Activations at all positions except BOS and EOS."""
    special = torch.tensor([model.config.bos_token_id, model.config.eos_token_id])
    return model.run(model.embed(tokens), 0, LAYER + 1)[~torch.isin(tokens, special)]


def fresh(method, model, seed=0):
    torch.manual_seed(seed)
    return new_sae(method, model.config.hidden_size, M, K)


def configuration(method, steps=20, **how):
    values = dict(method=method, l0=float(K), batch_size=B, steps=steps, lr=3e-3, clip=1.0,
                  auxk=False, dead_after=10 ** 9, compile=False, max_norm=0.0)
    return SimpleNamespace(**{**values, **how})


def fit(model, sae, method, after=lambda step: None, **how):
    """Trains an SAE -> what each step logs."""
    config = configuration(method, **how)
    first = observe(model, sae, LAYER, some_tokens(model, B, T, 0), end_to_end=False)
    training = dictionary.begin(sae, first, config)
    values = []
    for step in range(config.steps):
        after(step)
        seen = observe(model, sae, LAYER, some_tokens(model, B, T, step), method == "e2e")
        values.append(dictionary.take_step(model, sae, LAYER, seen, step, training, config))
    return values


# ---- Losses --------------------------------------------------------------------------------------

def test_the_jump_has_the_straight_through_gradients_of_its_formula():
    torch.manual_seed(0)
    double = dict(dtype=torch.float64)
    pre, theta = torch.rand(50, 7, **double) - 0.2, torch.rand(7, **double) * 0.5
    d_z, d_gates, eps = torch.randn(50, 7, **double), torch.randn(50, 7, **double), 0.3
    pre.requires_grad_(), theta.requires_grad_()
    z, gates = Jump.apply(pre, theta, eps)
    found = torch.autograd.grad((z * d_z + gates * d_gates).sum(), (pre, theta))

    above, inside = pre > theta, ((pre - theta) / eps).abs() < 0.5
    assert torch.equal(z, torch.where(above, pre, 0.0)) and torch.equal(gates, above.double())
    expected_theta = (-(theta * d_z + d_gates) / eps * inside).sum(0).detach()
    torch.testing.assert_close(found, (torch.where(above, d_z, 0.0), expected_theta))
    assert (expected_theta != 0).all()


def test_fvu_is_one_for_the_mean_and_zero_for_a_perfect_reconstruction():
    x = torch.randn(30, 5) + 3
    assert fvu(x, x) == 0 and fvu(x.mean(0).expand(30, 5), x).item() == pytest.approx(1)
    expected = (0.1 * x).square().sum() / (x.var(0, correction=0).sum() * 30)
    assert fvu(0.9 * x, x).item() == pytest.approx(expected.item(), rel=1e-4)


def test_aux_loss_has_a_gradient_only_for_what_the_dead_latents_write():
    x, x_hat, e_hat = (torch.randn(9, 4, requires_grad=True) for _ in range(3))
    aux_loss(e_hat, x_hat, x).backward()
    assert x.grad is None and x_hat.grad is None and (e_hat.grad != 0).all()
    with torch.no_grad():
        nothing = torch.zeros(9, 4)
        assert aux_loss(nothing, x_hat, x).item() == pytest.approx(1)
        assert aux_loss(x - x_hat, x_hat, x) == 0 == aux_loss(nothing, x, x)


def test_the_geometric_median_balances_directions_and_ignores_an_outlier():
    torch.manual_seed(0)
    x = torch.randn(200, 6, dtype=torch.float64)
    x[0] = 1e4
    median = geometric_median(x, steps=1000, tolerance=1e-12)
    towards = torch.nn.functional.normalize(x - median, dim=1).sum(0)   # slope of total distance
    assert towards.norm() < 1e-6 and median.norm() < 0.5 < x.mean(0).norm()


# ---- A step --------------------------------------------------------------------------------------

def first_step(model, sae, method, monkeypatch):
    """The gradients of the first step, and what it logs, before anything is updated."""
    monkeypatch.setattr(dictionary, "update", lambda sae, optimizer: None)
    values, = fit(model, sae, method, steps=1, clip=1e-3)
    clipped_by = values["grad_norm"] / 1e-3
    return [parameter.grad * clipped_by for parameter in sae.parameters()], values


def gradients_of(loss, sae):
    return torch.autograd.grad(loss, list(sae.parameters()))


def test_the_end_to_end_loss_and_gradient_match_equation_7_with_nothing_adapted(
        model, monkeypatch):
    sae, tokens = fresh("e2e", model), some_tokens(model, B, T, 0)
    found, values = first_step(model, sae, "e2e", monkeypatch)
    naive = naive_loss(model, {LAYER: sae}, tokens)
    same_tensors(found, gradients_of(naive / B, sae))
    assert values["kl"].item() == pytest.approx(naive.item() / (B * T), rel=1e-4)


def test_the_topk_gradient_matches_the_dense_fvu_and_no_later_block_runs(model, monkeypatch):
    for block in (*model.layers[LAYER + 1:], model.model["norm"]):
        block.forward = None
    sae = fresh("topk", model)
    found, values = first_step(model, sae, "topk", monkeypatch)
    x = model.run(model.embed(some_tokens(model, B, T, 0)), 0, LAYER + 1).flatten(0, 1)
    loss = fvu(sae.decode(sae.encode(x)), x)
    same_tensors(found, gradients_of(loss, sae))
    assert values["fvu"].item() == pytest.approx(loss.item(), rel=1e-5)


def test_the_jumprelu_gradient_matches_fvu_and_l0_penalty_on_ordinary_positions(
        model, monkeypatch):
    sae = fresh("jumprelu", model)
    wanted = configuration("jumprelu", steps=1)
    found, values = first_step(model, sae, "jumprelu", monkeypatch)
    x = ordinary(model, some_tokens(model, B, T, 0))
    unit = (x - geometric_median(x)).square().sum(1).mean().sqrt()
    pre = x @ sae.W_enc.T + sae.b_enc
    z, gates = Jump.apply(pre, sae.threshold, dictionary.BANDWIDTH * unit)
    l0 = gates.sum(1).mean()
    per_latent = max(1, round(len(x) * START_L0 * K / M))
    assert (gates.sum(0) == per_latent).all()           # as the first thresholds are chosen
    penalty = (l0 / target_l0(wanted, 0) - 1) ** 2
    loss = fvu(z @ sae.W_dec + sae.b_dec, x) + dictionary.L0_WEIGHT * penalty
    same_tensors(found, gradients_of(loss, sae))
    assert values["l0"].item() == pytest.approx(l0.item(), rel=1e-5)


@pytest.mark.parametrize("method", ["topk", "jumprelu", "e2e"])
def test_attention_sinks_are_left_out_of_training_splicing_and_metrics(model, method):
    """One position of a batch has a hundred times the norm of the others, and is not BOS."""
    tokens = some_tokens(model, B, T, 0)
    loud = tokens[0, 5].item()
    model.model["embed_tokens"].weight.data[loud] *= 300
    sinks = tokens == loud
    sae = fresh(method, model)
    seen = observe(model, sae, LAYER, tokens, method == "e2e")
    ordinary = seen.x[~seen.special].norm(dim=-1)
    dictionary.begin(sae, seen, configuration(method, max_norm=10.0))
    assert sae.max_norm == pytest.approx(10 * ordinary.median().item())
    assert ordinary.max() > sae.max_norm

    used = used_positions(sae, seen.x, seen.special)
    assert not used[sinks].any() and used.sum() >= B * T - sinks.sum() - 4
    stand_in = dictionary.InTraining(sae, seen.special, 0.1)
    spliced = splice(seen.x, stand_in)
    assert torch.equal(spliced[~used], seen.x[~used]) and len(stand_in.x) == used.sum()
    in_place = splice(seen.x, sae, seen.special)
    assert torch.equal(in_place[~used], seen.x[~used])
    torch.testing.assert_close(spliced, in_place, rtol=1e-4, atol=1e-4)

    found = fidelity.measure(model, {LAYER: sae}, [tokens], ("sae",))["sae"]
    counted = used & ~seen.special
    assert found["left_out"][LAYER] == pytest.approx(1 - counted.float().mean().item())
    x, x_hat = seen.x[counted].double(), sae(seen.x[counted]).double()
    explained = 1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert found["ev"][LAYER] == pytest.approx(explained.item(), abs=1e-4)


@pytest.mark.parametrize("method", ["topk", "jumprelu", "e2e"])
def test_decoder_rows_have_norm_one_after_every_step_and_no_gradient_along_themselves(
        model, method):
    sae, norms = fresh(method, model), []
    before = sae.W_dec.detach().clone()
    fit(model, sae, method, after=lambda step: norms.append(sae.W_dec.detach().norm(dim=1)))
    norms.append(sae.W_dec.detach().norm(dim=1))
    torch.testing.assert_close(torch.stack(norms), torch.ones(21, M), rtol=1e-5, atol=1e-5)
    assert not torch.equal(before, sae.W_dec)

    across = torch.randn_like(sae.W_dec)
    across -= (across * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    sae.W_dec.grad, taken = (across + 5 * sae.W_dec).detach(), []
    optimizer = torch.optim.SGD([sae.W_dec], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: taken.append(sae.W_dec.grad.clone()))
    dictionary.update(sae, optimizer)
    torch.testing.assert_close(taken[0], across.detach(), rtol=1e-4, atol=1e-5)


def test_the_learning_rate_and_the_target_l0_follow_their_schedules():
    """Warm-up over a tenth of a short run, then decay to 0; L0 falls over a fifth of the run."""
    rates = [schedule(step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)]) and rates[100] == 0
    assert all(a > b for a, b in zip(rates[9:], rates[10:])) and rates[99] == pytest.approx(1 / 91)
    assert schedule(999, 10 ** 6) == 1 and schedule(499, 10 ** 6) == 0.5

    config = configuration("jumprelu", steps=100)
    wanted = [target_l0(config, step) for step in range(100)]
    assert wanted[0] == pytest.approx(K * 4 ** 0.95) and wanted[19:] == [K] * 81
    assert all(a > b for a, b in zip(wanted[:20], wanted[1:20]))


@pytest.mark.parametrize("auxk", [False, True])
def test_only_auxk_trains_the_encoder_and_decoder_of_dead_latents(model, auxk):
    sae = fresh("topk", model)
    dead = torch.arange(M) < 40
    with torch.no_grad():
        sae.W_enc[dead] *= 1e-3                         # sometimes positive, never in the top k
    names = ("W_enc", "b_enc", "W_dec")
    before = {name: getattr(sae, name)[dead].detach().clone() for name in names}
    values = fit(model, sae, "topk", steps=300, lr=1e-2, auxk=auxk, dead_after=100)
    for name, rows in before.items():
        moved = (getattr(sae, name)[dead].detach() - rows).abs().max()
        assert moved > 1e-2 if auxk else moved < 1e-6, name
    x = model.run(model.embed(some_tokens(model, B, T, 0)), 0, LAYER + 1)
    fired = (sae.encode(x)[..., dead] > 0).flatten(0, 1).any(0).float().mean()
    assert fired > 0.2 if auxk else fired == 0
    assert auxk or values[-1]["dead"] >= 40 / M - 1e-6


def test_a_new_kind_of_sae_takes_one_class_and_one_line(model, monkeypatch):
    """Even if it leaves BOS and EOS alone and trains end to end, on Eq. 7 of the spliced model."""
    class ReLU(SAE):
        """z = ReLU(W_enc x + b_enc)"""
        architecture, on_special = "standard", False

        def encode(self, x):
            return (x @ self.W_enc.T + self.b_enc).relu()

        def training_step(self, x, bandwidth):
            z = self.encode(x)
            fired = (z > 0).float().sum(0)
            return self.decode(z), fired, fired.sum()

    monkeypatch.setitem(KINDS, "topk", ReLU)
    sae, tokens = fresh("e2e", model), some_tokens(model, B, T, 0)
    found, _ = first_step(model, sae, "e2e", monkeypatch)
    loss = naive_loss(model, {LAYER: sae}, tokens) / B
    same_tensors(found, gradients_of(loss, sae))
    tensors, facts = sae.saved()
    assert facts == {"architecture": "standard", "apply_b_dec_to_input": False}
    assert tensors.keys() == {"W_enc", "W_dec", "b_enc", "b_dec"}
    assert blocks_to_adapt((), {LAYER: sae}, 4) == [2, 3]


# ---- The command ---------------------------------------------------------------------------------

def test_each_tenth_is_kept_under_its_true_percentage(site, tmp_path, monkeypatch, steps=37):
    snapshots, exact = [None], dictionary.update

    def spy(sae, optimizer):
        exact(sae, optimizer)
        snapshots.append(sae.W_enc.detach().clone())

    monkeypatch.setattr(dictionary, "update", spy)
    arguments = words(site, "topk", "--tokens", 64 * steps, model="llama")
    command("train", *arguments, "--out", tmp_path / "run")
    seconds = 0
    for percent in range(10, 100, 10):
        folder = tmp_path / f"run/sae-{percent}pct"
        about = read(folder / "training.json")
        assert about["percent"] == percent and about["tokens"] == about["step"] * 64
        assert about["step"] - 1 < steps * percent / 100 <= about["step"]
        assert about["seconds"] > seconds
        seconds = about["seconds"]
        assert torch.equal(load_sae(folder).W_enc, snapshots[about["step"]])


def test_a_run_saves_an_sae_that_a_model_can_then_be_adapted_to(site, tmp_path):
    run = tmp_path / "run"
    command("train", *words(site, "topk", "--k", 4, "--lr", 3e-3), "--out", run)
    results = read(run / "results.json")
    assert results.keys() >= {"ce_base", "ce_sae", "kl_sae", "fvu", "l0", "dead_latents", "seconds",
                              "train_tokens"}
    assert 0 < results["fvu"] < 1 and 0 < results["l0"] <= 4
    assert read(run / "sae/training.json")["percent"] == 100
    sae = load_sae(run, layer=1)
    assert isinstance(sae, TopK) and sae.k == 4 and len(sae.W_enc) == 96
    assert not sae.on_special and sae.max_norm == read(run / "sae/cfg.json")["metadata"]["max_norm"]

    command("train", *words(site, "lora", "--sae", run), "--out", tmp_path / "adapted")
    again = read(tmp_path / "adapted/results.json")
    assert again["ce_sae"] == pytest.approx(results["ce_sae"], rel=1e-5)


def test_the_default_width_and_learning_rate_follow_from_the_model(model):
    config, width = Config(method="topk", lr=None, layer=(1,)), 8 * model.config.hidden_size
    found = resolved(config, model.config)
    assert found.width == width and found.lr == pytest.approx(2e-4 / (width / 2 ** 14) ** 0.5)
