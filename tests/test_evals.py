"""The evaluations of fidelity, tokens and distances, and what eval.py says of folders it cannot evaluate."""
import json
import math
import shutil
import sys

import pytest
import torch

from conftest import GEMMA, LLAMA, TEXT, write_model, write_tokenizer
from helpers import adapted, command, misuse, random_sae, read, refusal
from lorasae.evals import distances, fidelity, tokens as token_suite
from lorasae.evals.common import evaluating, interval, ratio, t_quantile
from lorasae.io.saes import save_sae
from lorasae.lora import add_lora, base

ALL = tuple(fidelity.SETTINGS)


def sae_of(kind, model, layer=1, **how):
    return random_sae(kind, model, k=6, threshold=0.3, seed=layer, **how)


def adapt(model, blocks):
    """Adapters on `blocks`, moved away from the identity, with a dropout that evaluations must switch off."""
    return adapted(model, blocks, dropout=0.5)


class Identity:
    """The SAE that loses nothing."""
    def __call__(self, x):
        return x

    encode = __call__


@pytest.fixture
def sequences(model):
    """[6, 32] with BOS in front, and EOS in the middle of some."""
    tokens = torch.randint(3, 97, (6, 32), generator=torch.Generator().manual_seed(3))
    tokens[:, 0] = model.config.bos_token_id
    tokens[::2, 11] = model.config.eos_token_id
    return tokens


# ---- Intervals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("df, t", [(1, 6.313752), (2, 2.919986), (3, 2.353363), (99, 1.6603912), (399, 1.6486815),
                                   (499, 1.6479129)])
def test_t_quantiles_are_the_tables(df, t):
    assert t_quantile(df) == pytest.approx(t, abs=1e-6)


def test_t_quantiles_are_scipys():
    stats = pytest.importorskip("scipy.stats", reason="the oracle is scipy")
    for df in (*range(1, 40), 976, 5000):
        assert t_quantile(df) == pytest.approx(stats.t.ppf(0.95, df), rel=1e-9)


def test_an_interval_is_students_and_one_value_has_none():
    mean, half = interval(torch.tensor([1., 2, 4, 8], dtype=torch.float64))
    assert (mean - half, mean + half) == pytest.approx((0.1073512, 7.3926488), abs=1e-6)
    assert interval(torch.tensor([3.])) == (3, None)


def test_a_ratio_of_paired_values_knows_that_they_move_together():
    b = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    assert ratio(0.3 * b, b) == pytest.approx((0.3, 0), abs=1e-12)              # always the same part: no doubt about it
    noise = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert ratio(noise, torch.full((50,), 2.0, dtype=torch.float64)) == pytest.approx(interval(noise / 2))
    assert ratio(noise, b * 0) == (None, None)


def test_evaluation_switches_dropout_off_and_training_back_on(model):
    model.train()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model.training
        raise RuntimeError
    assert model.training


# ---- Fidelity --------------------------------------------------------------------------------------------------------

def naive(model, saes, tokens, setting):
    """CE and KL of every prediction [B, T - 1] from whole forward passes and all of their logits."""
    zero = {layer: torch.zeros_like for layer in saes}
    with base(model):
        log_p = model(tokens).double().log_softmax(-1)[:, :-1]
        logits = model(tokens, {"sae": saes, "zero": zero}.get(setting, {}))
    if setting in ("adapted", "lora"):
        logits = model(tokens, saes if setting == "adapted" else {})
    log_q = logits.double().log_softmax(-1)[:, :-1]
    return -log_q.gather(-1, tokens[:, 1:, None])[..., 0], (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("on_special", [False, True])
@pytest.mark.parametrize("kind, sae_layers, blocks", [
    ("jumprelu", [1], [2, 3]), ("topk", [1], [0, 1, 2, 3]), ("topk", [0, 2], [1, 3]), ("jumprelu", [3], [0])])
def test_every_setting_is_its_whole_forward_pass(model, sequences, kind, sae_layers, blocks, on_special):
    saes = {layer: sae_of(kind, model, layer, on_special=on_special) for layer in sae_layers}
    adapt(model, blocks)
    found = fidelity.measure(model, saes, sequences.split(4), ALL)
    for setting in ALL:
        ce, kl = naive(model, saes, sequences, setting)
        torch.testing.assert_close(found[setting]["ce"], ce.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[setting]["kl"], kl.mean(1), rtol=1e-5, atol=1e-5)
        assert (found[setting]["kl"] > 0.01).all() if setting != "base" else (found[setting]["kl"] == 0).all()


def test_l0_and_explained_variance_are_over_all_text_positions_whatever_the_batches(model, sequences):
    sae = sae_of("topk", model)
    adapt(model, [0, 3])
    found = fidelity.measure(model, {1: sae}, sequences.split(1), ("sae", "adapted"))
    text = ~model.special(sequences)
    for setting in ("sae", "adapted"):
        with torch.no_grad(), base(model) if setting == "sae" else evaluating(model):
            x = model.run(model.embed(sequences), 0, 2)[text].double()
        lost, varied = (x - sae(x.float())).square().sum(), (x - x.mean(0)).square().sum()
        assert found[setting]["ev"][1] == pytest.approx(1 - (lost / varied).item(), rel=1e-5)
        assert found[setting]["l0"][1] == pytest.approx((sae.encode(x.float()) > 0).sum(-1).double().mean().item())
        assert found[setting]["l0"][1] <= sae.k
    assert found["sae"]["ev"][1] != found["adapted"]["ev"][1]


def test_adapters_after_a_jumprelu_leave_its_l0_and_its_reconstruction_as_they_were(model, sequences):
    adapt(model, [2, 3])
    found = fidelity.measure(model, {1: sae_of("jumprelu", model)}, [sequences])
    assert found["sae"]["l0"] == found["adapted"]["l0"] and found["sae"]["ev"] == found["adapted"]["ev"]
    assert not torch.equal(found["sae"]["ce"], found["adapted"]["ce"])


def test_fresh_adapters_change_nothing(model, sequences):
    add_lora(model, [0, 1, 2, 3], 3)
    found = fidelity.measure(model, {1: sae_of("topk", model)}, [sequences], ALL)
    for loss in ("ce", "kl"):
        assert torch.equal(found["adapted"][loss], found["sae"][loss])
        assert torch.equal(found["lora"][loss], found["base"][loss])
    numbers = fidelity.summary(found)
    assert numbers["kl_gap_closed"] == 0 != numbers["excess_sae"] and numbers["gap_closed"] in (0, None)
    assert numbers["excess_adapted"] == numbers["excess_sae"]


def test_a_lossless_sae_costs_nothing_and_leaves_no_gap(model, sequences):
    add_lora(model, [2, 3], 3)
    found = fidelity.measure(model, {1: Identity()}, [sequences], ALL)
    numbers = fidelity.summary(found)
    assert numbers["ce_sae"] == numbers["ce_base"] and numbers["kl_sae"] == 0
    assert numbers["gap_closed"] is None and numbers["kl_gap_closed"] is None
    assert numbers["loss_recovered_sae"] == 1 and numbers["explained_variance_sae"] == {1: 1}
    apart = distances.measure(model, {1: Identity()}, [sequences])
    for positions in ("all", "without_0"):
        assert apart[positions]["l2"]["sae"] == [0, 0, 0]
        assert apart[positions]["cosine"]["sae"] == pytest.approx([1, 1, 1], abs=1e-6)


def test_saes_of_both_kinds_are_measured_together(model, sequences):
    saes = {0: sae_of("jumprelu", model, 0), 2: sae_of("topk", model, 2)}
    adapt(model, [1, 3])
    found = fidelity.measure(model, saes, sequences.split(4), ALL)
    for setting in ALL:
        ce, kl = naive(model, saes, sequences, setting)
        torch.testing.assert_close(found[setting]["ce"], ce.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[setting]["kl"], kl.mean(1), rtol=1e-5, atol=1e-5)
    assert found["sae"]["l0"].keys() == found["adapted"]["ev"].keys() == {0, 2}


def test_what_the_sae_says_of_kept_positions_is_never_heard(model, sequences):
    sae, special = sae_of("topk", model), model.special(sequences)

    class Garbling:
        encode = staticmethod(sae.encode)

        def __call__(self, x):
            return torch.where(special[..., None], 1e3, sae(x))

    adapt(model, [2, 3])
    for keeps in (True, False):
        sae.on_special = Garbling.on_special = not keeps
        a, b = (fidelity.losses_by_setting(model, {1: s}, sequences, ("sae", "adapted")) for s in (sae, Garbling()))
        for setting in a:
            assert torch.equal(a[setting].ce, b[setting].ce) == torch.equal(a[setting].kl, b[setting].kl) == keeps


def test_the_summary_is_arithmetic_on_the_sequences():
    ce = {"base": [1.0, 2.0, 3.0], "sae": [1.5, 2.4, 3.6], "adapted": [1.2, 2.3, 3.3], "zero": [5.0, 6.0, 7.0]}
    results = {name: {"ce": torch.tensor(values, dtype=torch.float64), "kl": torch.full((3,), 0.1), "l0": {1: 8.0},
                      "ev": {1: 0.5}} for name, values in ce.items()}
    results["sae"]["kl"] = torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64)
    numbers = fidelity.summary(results)
    assert numbers["ce_sae"] == 2.5 and numbers["excess_sae"] == pytest.approx(0.5)
    assert numbers["gap_closed"] == pytest.approx((0.3 + 0.1 + 0.3) / 1.5)
    assert numbers["kl_gap_closed"] == pytest.approx((0.4 - 0.1) / 0.4)
    assert numbers["loss_recovered_adapted"] == pytest.approx((18 - 6.8) / 12)
    assert numbers["ci90"]["excess_sae"] == pytest.approx(2.919986 * 0.1 / math.sqrt(3), abs=1e-6)
    assert numbers["ci90"]["ce_sae"] > 1                # sequences differ much more than what the SAE costs on them
    json.dumps(numbers, allow_nan=False)


@pytest.mark.parametrize("costs, said", [([-0.1, -0.2, -0.3], "lowers the cross-entropy"), ([0.3, -0.2, -0.05], "beyond its interval"),
                                         ([0.1, 0.2, 0.3], "gap closed 50.0%")])
def test_of_a_gap_that_is_not_there_no_part_is_closed(costs, said, capsys):
    base_ce = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    excess = torch.tensor(costs, dtype=torch.float64)
    kl = {"base": 0.0, "sae": 0.4, "adapted": 0.1}
    results = {name: {"ce": base_ce + part * excess, "kl": torch.full((3,), kl[name], dtype=torch.float64), "l0": {1: 8.0}, "ev": {1: 0.5}}
               for name, part in (("base", 0), ("sae", 1), ("adapted", 0.5))}
    numbers = fidelity.summary(results)
    assert (numbers["gap_closed"] is None) == ("gap closed" not in said)
    assert numbers["kl_gap_closed"] == pytest.approx(0.75) and (numbers["ci90"]["gap_closed"] is None) == (numbers["gap_closed"] is None)
    fidelity.show(numbers)
    line = capsys.readouterr().out.splitlines()[-1]
    assert said in line and "KL gap closed 75.0%" in line


# ---- Tokens ----------------------------------------------------------------------------------------------------------

def test_shares_of_tokens_and_of_improvement_on_planted_changes():
    change = torch.tensor([[0.5, -0.05, 0.0, 2.0], [0.005, -0.5, 0.02, 20.0]])
    numbers = token_suite.statistics(change)
    assert numbers["tokens"] == 8 and numbers["share_worse"] == 0.25 and numbers["share_better"] == 5 / 8
    assert numbers["improvement"] == pytest.approx(21.975 / 8)
    assert numbers["ci90"]["share_worse"] == 0          # a quarter of the tokens in both sequences; the third is unchanged
    assert numbers["gained"] - numbers["lost"] == pytest.approx(numbers["improvement"])
    for part, total in (("gained", 22.525), ("lost", 0.55)):
        assert sum(row[part] for row in numbers["by_size"]) == pytest.approx(numbers[part]) == pytest.approx(total / 8)
    hundredths, tenths = numbers["by_size"][3:5]
    assert (hundredths["share_better"], hundredths["share_worse"]) == (1 / 8, 1 / 8)
    assert (tenths["share_better"], tenths["share_worse"], tenths["lost"]) == pytest.approx((1 / 8, 1 / 8, 0.5 / 8))
    assert sum(numbers["histogram"]["better"]) == 4     # 20 nats lie beyond the paper's last bin, not beyond the table
    assert numbers["by_size"][-1]["share_better"] == 2 / 8


def test_the_mean_change_of_all_tokens_is_the_improvement_of_fidelity(model, sequences):
    saes = {1: sae_of("topk", model)}
    adapt(model, [2, 3])
    numbers = token_suite.statistics(token_suite.changes(model, saes, sequences.split(2)))
    whole = fidelity.summary(fidelity.measure(model, saes, [sequences]))
    assert numbers["improvement"] == pytest.approx(whole["ce_sae"] - whole["ce_adapted"], abs=1e-6)
    assert numbers["tokens"] == 6 * 31 and 0 < numbers["share_worse"] < 1


# ---- Distances -------------------------------------------------------------------------------------------------------

def test_distances_are_those_of_whole_forward_passes(model, sequences):
    saes = {1: sae_of("topk", model)}
    adapt(model, [0, 2])
    numbers = distances.measure(model, saes, sequences.split(4))
    assert numbers["layers"] == [1, 2, 3] and numbers["sequences"] == 6
    for i, layer in enumerate(numbers["layers"]):
        with torch.no_grad(), base(model):
            a, sae = (model.run(model.embed(sequences), 0, layer + 1, s).double() for s in ({}, saes))
        with torch.no_grad():
            adapted = model.run(model.embed(sequences), 0, layer + 1, saes).double()
        for name, start in (("all", 0), ("without_0", 1)):
            l2 = [(a - b)[:, start:].norm(dim=-1).mean(1) for b in (sae, adapted)]
            cosine = [torch.cosine_similarity(a, b, -1)[:, start:].mean(1) for b in (sae, adapted)]
            for measure, (before, after) in (("l2", l2), ("cosine", cosine)):
                found, (change, half) = numbers[name][measure], interval(after - before)
                assert found["sae"][i] == pytest.approx(before.mean().item(), rel=1e-5)
                assert found["adapted"][i] == pytest.approx(after.mean().item(), rel=1e-5)
                assert (found["change"][i], found["ci90"][i]) == pytest.approx((change, half), rel=1e-3, abs=1e-6)


def test_adapters_after_the_sae_change_no_distance_at_the_sae_itself(model, sequences):
    adapt(model, [2, 3])
    numbers = distances.measure(model, {1: sae_of("topk", model, on_special=False)}, [sequences[1::2]])     # without EOS
    for measure in ("l2", "cosine"):
        assert numbers["all"][measure]["change"][0] == 0 != numbers["all"][measure]["change"][1]
    assert numbers["all"]["l2"]["sae"][0] == pytest.approx(numbers["without_0"]["l2"]["sae"][0] * 31 / 32, rel=1e-5)


# ---- Whole runs ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["gemma2", "llama"])
def place(request, tmp_path_factory):
    """A folder with a tiny model, text, an SAE of layer 1 and a short run: JumpReLU and `after`, or TopK and `all`."""
    folder, raw = tmp_path_factory.mktemp(request.param), {"gemma2": GEMMA, "llama": LLAMA}[request.param]
    write_model(folder / "model", raw)
    (folder / "text").mkdir()
    for i in range(60):
        (folder / "text" / f"{i}.txt").write_text("".join(f"x{i * j} = {j}\n{TEXT}" for j in range(12)))
    write_tokenizer(folder / "model", raw, TEXT + "x0123456789 = ")
    sae = random_sae("jumprelu" if request.param == "gemma2" else "topk", raw["hidden_size"], k=6, threshold=0.3)
    save_sae(sae, folder / "sae", model_name="test", layer=1, context=32)
    words = ["--model", folder / "model", "--layer", 1, "--data", folder / "text", "--context", 32, "--tokens", 640,
             "--eval-tokens", 2048, "--batch-size", 2, "--lr", 1e-2, "--dtype", "float32", "--device", "cpu"]
    command("train", *words, "--sae", folder / "sae", "--rank", 2, "--out", folder / "run")
    command("train", *words, "--method", "topk", "--width", 64, "--k", 4, "--out", folder / "sae-run")
    return folder


def test_every_suite_leaves_a_file_a_table_and_a_picture(place, capsys):
    pytest.importorskip("matplotlib", reason="draws the pictures")
    run = place / "run"
    command("eval", run, "--suite", "fidelity,tokens,distances")
    shown = capsys.readouterr().out
    for name in ("fidelity", "tokens", "distances"):
        assert f"---- {name} ----" in shown and (run / f"eval-{name}.json").exists()
        assert (run / f"eval-{name}.png").read_bytes().startswith(b"\x89PNG")
    (run / "eval-tokens.png").unlink()
    command("eval", run, "--suite", "tokens", "--draw")                                # from the file alone
    assert (run / "eval-tokens.png").exists() and "----" not in capsys.readouterr().out


def test_without_matplotlib_one_line_says_what_draws_the_picture(place, capsys, monkeypatch):
    (place / "run" / "eval-tokens.png").unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command("eval", place / "run", "--suite", "tokens")
    assert "pip install matplotlib && python eval.py" in capsys.readouterr().out.splitlines()[-1]
    assert not (place / "run" / "eval-tokens.png").exists()


def test_a_run_that_trained_an_sae_is_evaluated_without_adapters(place, capsys):
    command("eval", place / "sae-run")
    numbers = read(place / "sae-run" / "eval-fidelity.json")
    results = read(place / "sae-run" / "results.json")
    assert numbers["ce_sae"] == pytest.approx(results["ce_sae"], rel=1e-5)
    assert "ce_adapted" not in numbers and "gap_closed" not in numbers and "loss_recovered_sae" in numbers
    assert "no adapter" in refusal("eval", place / "sae-run", "--suite", "tokens")


def test_folders_that_cannot_be_evaluated_are_answered_in_one_line(place, tmp_path, capsys):
    assert "no folder" in refusal("eval", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refusal("eval", tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("[1]")
    assert "not a JSON object" in refusal("eval", tmp_path / "empty")
    assert "unknown" in misuse(capsys, "eval", place / "run", "--suite", "fidelity,magic")
    half = shutil.copytree(place / "run", tmp_path / "half")
    (half / "adapter" / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal("eval", half)
    shutil.rmtree(half / "adapter")
    assert "no adapter yet" in refusal("eval", half) and f"--resume {half}" in refusal("eval", half)
    shutil.rmtree(shutil.copytree(place / "sae-run", tmp_path / "young") / "sae")
    assert "no sae yet" in refusal("eval", tmp_path / "young")
    (place / "run" / "rank-4.bak").mkdir(exist_ok=True)
    command("eval", place / "run", "--suite", "tokens")                                # is no run of a rank
    assert "eval-tokens.json" in refusal("eval", tmp_path / "young", "--suite", "tokens", "--draw")


def test_the_adapter_of_another_model_is_refused_even_where_it_would_fit(place, tmp_path):
    foreign = shutil.copytree(place / "run", tmp_path / "foreign")
    path = foreign / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "other/model"}))
    assert "an adapter of other/model" in refusal("eval", foreign)
