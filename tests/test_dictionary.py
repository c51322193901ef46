"""Training SAEs: every gradient against its formula, what each step keeps true, checkpoints, resuming, and mistakes."""
import pytest
import torch

from conftest import random_weights
from helpers import command, metrics, read, refusal
from lorasae import dictionary
from lorasae.adapt import naive_loss
from lorasae.dictionary import aux_loss, fit_biases, fvu, geometric_median, jump, l0_penalty, new_sae, schedule, target_l0
from lorasae.errors import InputError
from lorasae.io.models import parse_config
from lorasae.io.saes import load_sae
from lorasae.model import Transformer
from lorasae.objectives import naive_kl
from lorasae.runs.config import Config
from lorasae.runs.folder import Run
from lorasae.runs.sae_training import measure, train
from lorasae.runs.setting import Setting
from lorasae.sae import TopK

LAYER, B, T, M, K = 1, 2, 16, 128, 4


class Text:
    """A corpus of random tokens with a BOS in front; `watch(number)` is called before the number-th batch is given, from 0."""

    def __init__(self, bos, watch=lambda number: None):
        self.bos, self.watch = bos, watch

    def batch(self, number):
        tokens = torch.randint(3, 97, (B, T), generator=torch.Generator().manual_seed(number))
        tokens[:, 0] = self.bos
        return tokens

    def batches(self, batch_size, position=None):
        return Batches(self, position or 0)


class Batches:
    def __init__(self, text, start):
        self.text, self.start, self.number = text, start, start

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        return self

    def __next__(self):
        self.text.watch(self.number)
        self.number += 1
        return self.text.batch(self.number - 1), self.number


@pytest.fixture
def text(model):
    return Text(model.config.bos_token_id)


def fresh(method, model, seed=0):
    torch.manual_seed(seed)
    return new_sae(method, model.config.hidden_size, M, K)


def configuration(method, steps=20, **how):
    values = dict(model="test", method=method, layer=(LAYER,), width=M, k=K, l0=float(K), batch_size=B, context=T, tokens=steps * B * T,
                  lr=3e-3, checkpoint_every=7)
    return Config(**{**values, **how})


def fit(model, sae, method, text, folder, resume=False, **how):
    """Trains the SAE in a run of its own, or goes on with the run that is there."""
    run = Run.resume(folder) if resume else Run.create(folder, configuration(method, **how))
    try:
        run.begin()
        train(Setting(model, {}, text, run.config), run, sae)
    finally:
        run.close()


# ---- Losses ----------------------------------------------------------------------------------------------------------

def test_the_jump_has_the_straight_through_gradients_of_its_formula():
    torch.manual_seed(0)
    pre, theta = torch.rand(50, 7, dtype=torch.float64) - 0.2, torch.rand(7, dtype=torch.float64) * 0.5
    d_z, d_gates, eps = torch.randn(50, 7, dtype=torch.float64), torch.randn(50, 7, dtype=torch.float64), 0.3
    pre.requires_grad_(), theta.requires_grad_()
    z, gates = jump(pre, theta, eps)
    found = torch.autograd.grad((z * d_z + gates * d_gates).sum(), (pre, theta))

    expected_pre, expected_theta = torch.zeros(50, 7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for n in range(50):
        for i in range(7):
            p, t = pre[n, i].item(), theta[i].item()
            inside = -0.5 < (p - t) / eps < 0.5
            assert z[n, i].item() == (p if p > t else 0) and gates[n, i].item() == (p > t)
            expected_pre[n, i] = d_z[n, i] if p > t else 0
            expected_theta[i] += -(t / eps) * inside * d_z[n, i] - (1 / eps) * inside * d_gates[n, i]
    torch.testing.assert_close(found[0], expected_pre)
    torch.testing.assert_close(found[1], expected_theta)
    assert (expected_theta != 0).all()


def test_fvu_is_one_for_the_mean_and_zero_for_a_perfect_reconstruction():
    x = torch.randn(30, 5) + 3
    assert fvu(x, x) == 0 and fvu(x.mean(0).expand(30, 5), x).item() == pytest.approx(1)
    assert fvu(0.9 * x, x).item() == pytest.approx(((0.1 * x) ** 2).sum().item() / (x.var(0, correction=0).sum().item() * 30), rel=1e-4)


def test_aux_loss_sends_its_gradient_to_the_dead_latents_part_alone():
    x, x_hat, e_hat = (torch.randn(9, 4, requires_grad=True) for _ in range(3))
    aux_loss(e_hat, x_hat, x).backward()
    assert x.grad is None and x_hat.grad is None and (e_hat.grad != 0).all()
    with torch.no_grad():
        assert aux_loss(torch.zeros(9, 4), x_hat, x).item() == pytest.approx(1) and aux_loss(x - x_hat, x_hat, x) == 0
        assert aux_loss(torch.zeros(9, 4), x, x) == 0


def test_the_geometric_median_balances_directions_and_ignores_an_outlier():
    torch.manual_seed(0)
    x = torch.randn(200, 6, dtype=torch.float64)
    x[0] = 1e4
    median = geometric_median(x, steps=1000, tolerance=1e-12)
    towards = torch.nn.functional.normalize(x - median, dim=1).sum(0)       # the gradient of the total distance
    assert towards.norm() < 1e-6 and median.norm() < 0.5 < x.mean(0).norm()


# ---- A step ----------------------------------------------------------------------------------------------------------

def first_step(model, sae, method, text, folder, monkeypatch, **how):
    """{parameter: gradient} of the first step, before anything is updated."""
    found = {}
    monkeypatch.setattr(dictionary, "update", lambda sae, _: found.update({n: p.grad.clone() for n, p in sae.named_parameters()}))
    fit(model, sae, method, text, folder, steps=1, clip=1e9, **how)
    return found


def same_gradients(found, expected):
    for name, gradient in found.items():
        assert gradient.norm() > 0 or expected[name].norm() == 0
        assert (gradient - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-6, name


def gradients(sae, loss):
    return dict(zip(dict(sae.named_parameters()), torch.autograd.grad(loss, list(sae.parameters()))))


def test_the_end_to_end_gradient_is_that_of_two_whole_forward_passes(model, text, tmp_path, monkeypatch):
    sae = fresh("e2e", model)
    found = first_step(model, sae, "e2e", text, tmp_path, monkeypatch)
    tokens, depth = text.batch(0), len(model.layers)

    def spliced(x):                                     # a TopK SAE in plain dense autograd
        pre = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
        kth = pre.topk(K).values[..., -1:]
        return (pre * (pre >= kth)) @ sae.W_dec + sae.b_dec

    target = model.norm(model.run(model.embed(tokens), 0, depth))
    hidden = model.norm(model.run(spliced(model.run(model.embed(tokens), 0, LAYER + 1)), LAYER + 1, depth))
    same_gradients(found, gradients(sae, naive_kl(target, hidden, model.head, model.softcap) / B))


def test_the_end_to_end_loss_is_the_methods_own_loss(model, text):
    """Eq. 7 with nothing to adapt: what trains is the SAE, fresh from its fit."""
    sae, config, tokens = fresh("e2e", model), configuration("e2e"), text.batch(0)
    fit_biases(sae, dictionary.observe(model, sae, LAYER, tokens, end_to_end=False).x.flatten(0, 1))
    seen = dictionary.observe(model, sae, LAYER, tokens, end_to_end=True)
    loss, _, count, values = dictionary.loss_of(model, sae, LAYER, seen, 0, torch.zeros(M), config, 1.0)
    naive = naive_loss(model, {LAYER: sae}, tokens)
    assert loss.item() == pytest.approx(naive.item() / B, rel=1e-4) and count == B * T
    assert values["kl"].item() == pytest.approx(naive.item() / (B * T), rel=1e-4)


def test_what_is_learned_from_leaves_out_bos_and_eos_where_the_sae_does(model, text):
    tokens = text.batch(0)
    tokens[0, 5] = model.config.eos_token_id
    for method, learned in (("topk", B * T), ("e2e", B * T), ("jumprelu", B * T - 3)):
        seen = dictionary.observe(model, fresh(method, model), LAYER, tokens, method == "e2e")
        assert seen.learned.sum() == learned and (seen.target is None) == (method != "e2e")


def test_the_topk_gradient_is_that_of_the_dense_fvu(model, text, tmp_path, monkeypatch):
    sae = fresh("topk", model)
    found = first_step(model, sae, "topk", text, tmp_path, monkeypatch)
    x = model.run(model.embed(text.batch(0)), 0, LAYER + 1).flatten(0, 1)
    same_gradients(found, gradients(sae, fvu(sae.decode(sae.encode(x)), x)))


def test_the_jumprelu_gradient_is_that_of_fvu_and_l0_penalty_on_ordinary_positions(model, text, tmp_path, monkeypatch):
    sae = fresh("jumprelu", model)
    found = first_step(model, sae, "jumprelu", text, tmp_path, monkeypatch)
    x = model.run(model.embed(text.batch(0)), 0, LAYER + 1)[:, 1:].flatten(0, 1)     # BOS is left out
    unit = (x - geometric_median(x)).square().sum(1).mean().sqrt()
    z, gates = jump(x @ sae.W_enc.T + sae.b_enc, sae.threshold, dictionary.BANDWIDTH * unit)
    loss = fvu(z @ sae.W_dec + sae.b_dec, x) + dictionary.L0_WEIGHT * l0_penalty(gates.sum(1).mean(), K)
    same_gradients(found, gradients(sae, loss))


@pytest.mark.parametrize("method", ["topk", "jumprelu", "e2e"])
def test_decoder_rows_have_norm_one_after_every_step(model, text, tmp_path, method):
    sae, norms = fresh(method, model), []
    text.watch = lambda number: norms.append(sae.W_dec.detach().norm(dim=1))    # once more for the batch that fits the biases
    before = sae.W_dec.detach().clone()
    fit(model, sae, method, text, tmp_path)
    torch.testing.assert_close(torch.stack(norms), torch.ones(21, M), rtol=1e-5, atol=1e-5)
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5 and not torch.equal(before, sae.W_dec)


def test_the_part_of_a_gradient_along_its_decoder_row_is_removed(model):
    sae, taken = fresh("topk", model), []
    across = torch.randn_like(sae.W_dec)
    across -= (across * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    for p in sae.parameters():
        p.grad = torch.zeros_like(p)
    sae.W_dec.grad = across + 5 * sae.W_dec.detach()
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: taken.append(sae.W_dec.grad.clone()))
    dictionary.update(sae, optimizer)
    torch.testing.assert_close(taken[0], across.detach(), rtol=1e-4, atol=1e-5)


def test_reconstruction_never_runs_the_blocks_after_the_sae(model, text, tmp_path):
    for block in model.layers[LAYER + 1:]:
        block.forward = None
    model.model["norm"].forward = None
    fit(model, fresh("topk", model), "topk", text, tmp_path)


def test_the_rate_rises_for_a_tenth_of_a_short_run_and_ends_at_zero():
    rates = [schedule(step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)]) and rates[100] == 0
    assert all(a > b for a, b in zip(rates[9:], rates[10:])) and rates[99] == pytest.approx(1 / 91)
    assert schedule(999, 10 ** 6) == 1 and schedule(499, 10 ** 6) == 0.5


def test_the_l0_that_is_asked_for_falls_to_its_target_over_a_fifth_of_the_run():
    config = configuration("jumprelu", steps=100)
    wanted = [target_l0(config, step) for step in range(100)]
    assert wanted[0] == pytest.approx(K * 4 ** 0.95) and wanted[19:] == [K] * 81
    assert all(a > b for a, b in zip(wanted[:20], wanted[1:20]))


# ---- Dead latents ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("auxk", [False, True])
def test_auxk_and_nothing_else_trains_dead_latents_encoder_and_decoder(model, text, tmp_path, auxk):
    sae = fresh("topk", model)
    dead = torch.arange(M) < 40
    with torch.no_grad():
        sae.W_enc[dead] *= 1e-3                         # positive now and then, but never among the k largest
    before = {name: p[dead].detach().clone() for name, p in sae.named_parameters() if name in ("W_enc", "b_enc", "W_dec")}
    fit(model, sae, "topk", text, tmp_path, steps=300, lr=1e-2, auxk=auxk, dead_after=100)
    for name, rows in before.items():
        moved = (getattr(sae, name)[dead].detach() - rows).abs().max()
        assert moved > 1e-2 if auxk else moved < 1e-6, name
    x = model.run(model.embed(text.batch(0)), 0, LAYER + 1)
    fired = (sae.encode(x)[..., dead] > 0).flatten(0, 1).any(0).float().mean()
    assert fired > 0.3 if auxk else fired == 0
    last = metrics(tmp_path)[-1]
    assert auxk or last["dead"] >= 40 / M - 1e-6


def test_the_evaluation_counts_the_latents_that_no_token_fires(model, tokens):
    sae = fresh("topk", model)
    fit_biases(sae, model.run(model.embed(tokens), 0, LAYER + 1).flatten(0, 1))
    with torch.no_grad():
        sae.b_enc[:32] = -1e6
    numbers = measure(model, sae, LAYER, tokens.split(1))
    x = model.run(model.embed(tokens), 0, LAYER + 1)
    fired = (sae.encode(x) > 0).flatten(0, 1)
    assert numbers["dead_latents"] == pytest.approx(1 - fired.any(0).float().mean().item()) and numbers["dead_latents"] >= 0.25
    assert numbers["l0"] == pytest.approx(fired.float().sum(1).mean().item())
    assert numbers["fvu"] == pytest.approx(fvu(sae(x).flatten(0, 1), x.flatten(0, 1)).item(), rel=1e-3)
    assert numbers["ce_sae"] != numbers["ce_base"] and numbers["kl_sae"] > 0


# ---- Checkpoints -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, auxk", [("topk", True), ("jumprelu", True), ("e2e", False)])
def test_an_interrupted_run_resumes_to_the_very_same_sae(model, text, tmp_path, method, auxk):
    class Killed(Exception):
        pass

    def kill(number):
        if number == 14:
            raise Killed

    how = {"ahead": 3 * B, "auxk": auxk, "dead_after": 50}
    whole = fresh(method, model)
    fit(model, whole, method, text, tmp_path / "whole", **how)
    with pytest.raises(Killed):
        fit(model, fresh(method, model), method, Text(text.bos, kill), tmp_path / "killed", **how)
    resumed = fresh(method, model, seed=1)              # what it starts from does not matter
    fit(model, resumed, method, text, tmp_path / "killed", resume=True)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole") and metrics(tmp_path / "whole")[-1]["step"] == 20


@pytest.mark.parametrize("steps", [20, 37])
def test_each_tenth_is_kept_under_its_true_percentage(model, text, tmp_path, steps):
    sae, snapshots = fresh("topk", model), {}
    text.watch = lambda number: snapshots.update({number: sae.W_enc.detach().clone()})
    fit(model, sae, "topk", text, tmp_path, steps=steps)
    kept = sorted(path.name for path in tmp_path.glob("sae*"))
    assert kept == [f"sae-{percent}pct" for percent in range(10, 100, 10)]
    seconds = 0
    for percent in range(10, 100, 10):
        folder = tmp_path / f"sae-{percent}pct"
        about = read(folder / "training.json")
        assert about["percent"] == percent and about["tokens"] == about["step"] * B * T
        assert about["step"] - 1 < steps * percent / 100 <= about["step"]
        assert about["seconds"] > seconds
        seconds = about["seconds"]
        assert torch.equal(load_sae(folder).W_enc, snapshots[about["step"]])


# ---- The command -----------------------------------------------------------------------------------------------------

@pytest.fixture
def words(whole_model, text_folder, tmp_path):
    def words(method, *more):
        return ["--method", method, "--model", whole_model, "--layer", 1, "--data", text_folder, "--context", 32, "--tokens", 2560,
                "--eval-tokens", 256, "--batch-size", 2, "--width", 96, "--dtype", "float32", "--device", "cpu", *more]
    return words


def test_a_run_reports_and_keeps_an_sae_that_a_model_is_then_adapted_around(words, whole_model, tmp_path, capsys):
    run = tmp_path / "run"
    command("train", *words("topk", "--k", 4, "--lr", 3e-3), "--out", run)
    printed = capsys.readouterr().out
    results, config = read(run / "results.json"), read(run / "config.json")
    for text in ("with SAE", "FVU", "dead latents", "tokens/s"):
        assert text in printed
    assert {"ce_base", "ce_sae", "kl_sae", "fvu", "l0", "dead_latents", "seconds", "train_tokens"} <= results.keys()
    assert 0 < results["fvu"] < 1 and 0 < results["l0"] <= 4 and config["width"] == 96 and config["steps"] == 40
    assert read(run / "sae" / "training.json")["percent"] == 100 and (run / "sae-90pct").is_dir()
    sae = load_sae(run, layer=1)
    assert isinstance(sae, TopK) and sae.k == 4 and len(sae.W_enc) == 96 and sae.on_special
    around = [word for word in words("lora", "--rank", 2, "--sae", run) if word not in ("--width", 96)]
    command("train", *around, "--out", tmp_path / "adapted")
    assert read(tmp_path / "adapted" / "results.json")["ce_sae"] == pytest.approx(results["ce_sae"], rel=1e-5)


def test_the_paper_s_rate_and_width_are_the_defaults(words, whole_model, raw_config, tmp_path):
    command("train", *[word for word in words("topk", "--k", 4, "--out", tmp_path / "run") if word not in ("--width", 96)])
    config, width = read(tmp_path / "run" / "config.json"), 8 * raw_config["hidden_size"]
    assert config["width"] == width and config["lr"] == pytest.approx(2e-4 / (width / 2 ** 14) ** 0.5)


@pytest.mark.parametrize("method, change, message", [
    ("topk", ["--k", 97], "1 <= k <= 96"),
    ("topk", ["--k", 0], "--k is 0, but it must be a positive whole number"),
    ("e2e", ["--k", -3], "--k is -3, but it must be a positive whole number"),
    ("topk", ["--layer", 4], "0 to 3"),
    ("topk", ["--layer", -1], "at least 0"),
    ("topk", ["--layer", 1, 2], "one layer"),
    ("jumprelu", ["--l0", 0], "--l0 is 0.0, but it must be a positive number"),
    ("jumprelu", ["--l0", 96], "--l0 96 cannot be reached"),
    ("jumprelu", ["--l0", "nan"], "--l0 is nan"),
    ("topk", ["--width", "many"], "number of latents"),
    ("topk", ["--width", "²k"], "number of latents"),
    ("topk", ["--width", 0], "number of latents"),
    ("topk", ["--sae", "somewhere"], "from scratch"),
    ("topk", ["--lr", -1], "lr"),
    ("topk", ["--l0", 8], "no effect"),
    ("jumprelu", ["--k", 8], "no effect"),
    ("e2e", ["--rank", 8], "no effect"),
])
def test_mistakes_are_answered_with_one_line_and_nothing_is_written(words, tmp_path, method, change, message):
    before = set(tmp_path.rglob("*"))
    assert message in refusal("train", *words(method, *change), "--out", tmp_path / "run")
    assert set(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_another_width_is_refused(model, text, tmp_path):
    fit(model, fresh("topk", model), "topk", text, tmp_path)
    with pytest.raises(InputError, match="another run"):
        fit(model, new_sae("topk", model.config.hidden_size, 64, K), "topk", text, tmp_path, resume=True)


# ---- Several processes -----------------------------------------------------------------------------------------------

def together(model, method, folder):
    """The SAE and the last line of the metrics of a short run with everything in it."""
    sae = fresh(method, model)
    fit(model, sae, method, Text(model.config.bos_token_id), folder, steps=10, auxk=True, dead_after=50)
    return dict(sae.named_parameters())


def process(number, folder, raw):
    """One of two processes that train an SAE together."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    model = Transformer(parse_config(raw, "the test"))
    model.load_state_dict(random_weights(raw, scale=0.15))
    model.requires_grad_(False)
    torch.save({method: together(model, method, folder / method) for method in ("jumprelu", "e2e")}, folder / f"{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("raw_config", ["llama"], indirect=True)
def test_two_processes_take_the_steps_of_one(model, raw_config, tmp_path):
    torch.multiprocessing.spawn(process, (tmp_path, raw_config), nprocs=2)
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in (0, 1))
    for method, loss in (("jumprelu", "fvu"), ("e2e", "kl")):
        before, alone = dict(fresh(method, model).named_parameters()), together(model, method, tmp_path / f"{method}-alone")
        for name, parameter in alone.items():
            assert torch.equal(first[method][name], second[method][name]), name
            moved = (parameter - before[name]).norm()
            assert moved > 0 and (first[method][name] - parameter).norm() < 1e-2 * moved, name
        lines = [metrics(tmp_path / name)[-1] for name in (method, f"{method}-alone")]
        for key in ("l0", "dead", loss):
            assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-3), key
