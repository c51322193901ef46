"""Fidelity, tokens and distances, and what eval.py says of folders it cannot evaluate."""
import json
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import GEMMA, LLAMA, TEXT, write_model, write_tokenizer
from helpers import adapted, command, misuse, random_sae, read, refusal
from lorasae.evals import distances, fidelity, tokens as token_suite
from lorasae.evals.common import error_bar, evaluating, interval, ratio, t_quantile
from lorasae.io.files import write_json
from lorasae.io.saes import save_sae
from lorasae.lora import add_lora, base

ALL = tuple(name for name in fidelity.SETTINGS if name != "before")     # of one model


def sae_of(kind, model, layer=1, **how):
    return random_sae(kind, model, k=6, threshold=0.3, seed=layer, **how)


def adapt(model, blocks):
    """Adapters away from the identity, with a dropout that evaluations must switch off."""
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


# ---- Intervals -----------------------------------------------------------------------------------

def test_t_quantiles_are_the_tables_and_scipys():
    for df, t in (1, 6.313752), (2, 2.919986), (3, 2.353363), (99, 1.6603912):
        assert t_quantile(df) == pytest.approx(t, abs=1e-6)
    stats = pytest.importorskip("scipy.stats", reason="the oracle is scipy")
    for df in (*range(1, 40), 1.2, 4.37, 12.8, 976, 5000):
        assert t_quantile(df) == pytest.approx(stats.t.ppf(0.95, df), rel=1e-9)


def test_an_interval_is_students_and_one_value_has_none():
    values = torch.tensor([1., 2, 4, 8], dtype=torch.float64)
    mean, half = interval(values)
    assert (mean - half, mean + half) == pytest.approx((0.1073512, 7.3926488), abs=1e-6)
    assert interval(torch.tensor([3.])) == (3, None)
    assert interval(values.repeat(2), torch.arange(8)) == pytest.approx(interval(values.repeat(2)))


def test_a_ratio_of_paired_values_knows_that_they_move_together():
    b = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    noise = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    two = torch.full((50,), 2.0, dtype=torch.float64)
    for documents in (None, torch.arange(50) // 4):
        assert ratio(0.3 * b, b, documents) == pytest.approx((0.3, 0), abs=1e-12)
        expected = interval(noise / 2, documents)
        assert ratio(noise, two, documents) == pytest.approx(expected)
        assert ratio(noise, b * 0, documents) == (None, None)


def test_the_interval_over_documents_is_the_sandwich_written_with_matrices():
    """CR2 and its degrees of freedom from their definitions, with [n, n] matrices."""
    sizes = torch.tensor([7, 5, 4, 4, 3, 3, 2, 2, 1, 1, 1])
    n, G = int(sizes.sum()), len(sizes)
    documents = torch.arange(G).repeat_interleave(sizes)
    generator = torch.Generator().manual_seed(0)
    effects = torch.randn(G, dtype=torch.float64, generator=generator)[documents]
    x = effects + torch.randn(n, dtype=torch.float64, generator=generator)

    e = x - x.mean()
    same = (documents[:, None] == documents).double()
    others = same - torch.eye(n)
    rho = (e @ others @ e) / others.sum() / e.square().mean()
    omega = torch.eye(n) + rho * others                 # the working covariance
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    columns, variance = [], 0.0
    for g in range(G):
        mine = documents == g
        block = centre[mine][:, mine]                   # [n_g, n_g]; its -1/2 power is CR2's
        values, vectors = torch.linalg.eigh(block)
        weights = (vectors * values.rsqrt()) @ vectors.T @ torch.ones(int(sizes[g])).double() / n
        columns.append(centre[:, mine] @ weights)
        variance += (weights @ e[mine]) ** 2
    B = torch.stack(columns) @ omega @ torch.stack(columns).T
    df = B.trace() ** 2 / B.square().sum()

    order = torch.randperm(n, generator=generator)      # the order of sequences says nothing
    mean, half = interval(x[order], documents[order])
    assert mean == pytest.approx(x.mean().item()) and 0 < rho < 1
    assert half == pytest.approx(t_quantile(df.item()) * math.sqrt(variance), rel=1e-9)


# Chunks of 256 tokens per document in 50,000 held-out tokens of the standard library, all of its
# held-out files mixed
SIZES = torch.tensor([34, 20, 18, 13, 10, 9, 9, 9, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 3, 2, 2, 2, 2]
                     + [1] * 5)


@pytest.mark.parametrize("correlation, skewed", [(0, False), (0.5, False), (0.3, True)])
def test_intervals_over_documents_cover_what_they_say(correlation, skewed):
    """900 texts of a known mean, paired difference and ratio: 90 % intervals hold 87 to 93 %."""
    documents = torch.arange(len(SIZES)).repeat_interleave(SIZES)
    n, generator = len(documents), torch.Generator().manual_seed(1)

    def draw(*shape):
        """Mean 0, variance 1; an exponential's skewness is 2."""
        if skewed:
            return torch.empty(shape, dtype=torch.float64).exponential_(generator=generator) - 1
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def values():
        chunk = torch.randn(n, dtype=torch.float64, generator=generator)
        of_document = draw(len(SIZES))[documents]
        return correlation ** 0.5 * of_document + (1 - correlation) ** 0.5 * chunk

    covered, naive, trials = {"mean": 0, "difference": 0, "ratio": 0}, 0, 900
    for _ in range(trials):
        gap, change = 1 + 0.2 * values(), 0.3 * values()
        found = {
            "mean": (interval(gap, documents), 1),
            "difference": (interval(gap - change, documents), 1),
            "ratio": (ratio(0.4 * gap + change, gap, documents), 0.4),
        }
        for name, ((value, half), truth) in found.items():
            covered[name] += abs(value - truth) <= half
        value, half = interval(gap)
        naive += abs(value - 1) <= half
    for count in covered.values():
        assert 0.87 <= count / trials <= 0.93
    assert correlation == 0 or naive / trials < 0.7     # as if sequences were independent


def test_too_few_documents_have_no_interval_whatever_the_number_of_sequences():
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    few, dominated = torch.arange(400) % 7, (torch.arange(400) - 300).clamp(min=0)
    for documents in (few, dominated, torch.zeros(400, dtype=int)):
        assert interval(values, documents) == (values.mean().item(), None)
        assert ratio(values, values + 3, documents)[1] is None
    assert interval(values, torch.arange(400) % 8)[1] > 0
    assert math.isnan(error_bar(None)) and error_bar(0.5, 100) == 50


def test_evaluation_switches_dropout_off_and_training_back_on(model):
    model.train()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model.training
        raise RuntimeError
    assert model.training


# ---- Fidelity ------------------------------------------------------------------------------------

def zeroed(sae, special):
    """Zeros where the SAE replaces something: everywhere, or everywhere but at BOS and EOS."""
    keeps = special & (not sae.on_special)
    return lambda x: torch.where(keeps[..., None], x, 0.0)


def naive(model, saes, tokens, setting):
    """CE and KL of every prediction [B, T - 1] from whole forward passes."""
    zero = {layer: zeroed(sae, model.special(tokens)) for layer, sae in saes.items()}
    with base(model):
        log_p = model(tokens).double().log_softmax(-1)[:, :-1]
        logits = model(tokens, {"sae": saes, "zero": zero}.get(setting, {}))
    if setting in ("adapted", "lora"):
        logits = model(tokens, saes if setting == "adapted" else {})
    log_q = logits.double().log_softmax(-1)[:, :-1]
    return -log_q.gather(-1, tokens[:, 1:, None])[..., 0], (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("on_special", [False, True])
@pytest.mark.parametrize("kinds, blocks", [
    ({1: "jumprelu"}, [2, 3]), ({1: "topk"}, [0, 1, 2, 3]), ({0: "jumprelu", 2: "topk"}, [1, 3]),
    ({3: "jumprelu"}, [0])])
def test_every_setting_is_its_whole_forward_pass(model, sequences, kinds, blocks, on_special):
    saes = {layer: sae_of(kind, model, layer, on_special=on_special)
            for layer, kind in kinds.items()}
    adapt(model, blocks)
    found = fidelity.measure(model, saes, sequences.split(4), ALL)
    assert found["sae"]["l0"].keys() == found["adapted"]["ev"].keys() == kinds.keys()
    for setting in ALL:
        ce, kl = naive(model, saes, sequences, setting)
        torch.testing.assert_close(found[setting]["ce"], ce.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[setting]["kl"], kl.mean(1), rtol=1e-5, atol=1e-5)
        assert (found[setting]["kl"] == 0).all() if setting == "base" else (
            found[setting]["kl"] > 0.01).all()


def test_l0_and_explained_variance_are_over_all_text_positions(model, sequences):
    sae = sae_of("topk", model)
    adapt(model, [0, 3])
    found = fidelity.measure(model, {1: sae}, sequences.split(1), ("sae", "adapted"))
    text = ~model.special(sequences)
    for setting in ("sae", "adapted"):
        with torch.no_grad(), base(model) if setting == "sae" else evaluating(model):
            x = model.run(model.embed(sequences), 0, 2)[text].double()
        lost, varied = (x - sae(x.float())).square().sum(), (x - x.mean(0)).square().sum()
        assert found[setting]["ev"][1] == pytest.approx(1 - (lost / varied).item(), rel=1e-5)
        active = (sae.encode(x.float()) > 0).sum(-1).double().mean().item()
        assert found[setting]["l0"][1] == pytest.approx(active) and active <= sae.k
    assert found["sae"]["ev"][1] != found["adapted"]["ev"][1]       # these begin before the SAE


def test_fresh_adapters_change_nothing(model, sequences):
    add_lora(model, [0, 1, 2, 3], 3)
    found = fidelity.measure(model, {1: sae_of("topk", model)}, [sequences], ALL)
    for loss in ("ce", "kl"):
        assert torch.equal(found["adapted"][loss], found["sae"][loss])
        assert torch.equal(found["lora"][loss], found["base"][loss])
    numbers = fidelity.summary(found)
    assert numbers["kl_gap_closed"] == 0 != numbers["excess_sae"]
    assert numbers["gap_closed"] in (0, None)
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


def results_of(**settings):
    """What fidelity.measure returns, for {setting: ([CE], [KL])} of each sequence."""
    found = {}
    for name, losses in settings.items():
        ce, kl = (torch.tensor(values, dtype=torch.float64) for values in losses)
        found[name] = {"ce": ce, "kl": kl, "l0": {1: 8.0}, "ev": {1: 0.5}}
    return found


def test_the_summary_is_arithmetic_on_the_sequences():
    numbers = fidelity.summary(results_of(
        base=([1, 2, 3], [0] * 3), sae=([1.5, 2.4, 3.6], [0.2, 0.4, 0.6]),
        adapted=([1.2, 2.3, 3.3], [0.1] * 3), zero=([5, 6, 7], [0.1] * 3)))
    assert numbers["ce_sae"] == 2.5 and numbers["excess_sae"] == pytest.approx(0.5)
    assert numbers["gap_closed"] == pytest.approx((0.3 + 0.1 + 0.3) / 1.5)
    assert numbers["kl_gap_closed"] == pytest.approx((0.4 - 0.1) / 0.4)
    assert numbers["loss_recovered_adapted"] == pytest.approx((18 - 6.8) / 12)
    assert numbers["ci90"]["excess_sae"] == pytest.approx(2.919986 * 0.1 / 3 ** 0.5, abs=1e-6)
    assert numbers["ci90"]["ce_sae"] > 1                # sequences differ more than the SAE costs
    json.dumps(numbers, allow_nan=False)


@pytest.mark.parametrize("costs, said", [
    ([-0.1, -0.2, -0.3], "does not raise"), ([0.3, -0.2, -0.05], "no more cross-entropy"),
    ([0.1, 0.2, 0.3], "gap closed 50.0%")])
def test_of_a_gap_that_is_not_there_no_part_is_closed(costs, said, capsys):
    after = [1 + costs[0] / 2, 2 + costs[1] / 2, 3 + costs[2] / 2]
    before = [1 + costs[0], 2 + costs[1], 3 + costs[2]]
    numbers = fidelity.summary(results_of(
        base=([1, 2, 3], [0] * 3), sae=(before, [0.4] * 3), adapted=(after, [0.1] * 3)))
    assert (numbers["gap_closed"] is None) == ("gap closed" not in said)
    assert numbers["kl_gap_closed"] == pytest.approx(0.75)
    assert (numbers["ci90"]["gap_closed"] is None) == (numbers["gap_closed"] is None)
    fidelity.show(numbers)
    line = capsys.readouterr().out.splitlines()[-1]
    assert said in line and "KL gap closed 75.0%" in line and "too few" not in line


BEFORE = results_of(base=([1, 2, 3], [0] * 3), sae=([2, 3, 4], [1] * 3))


@pytest.mark.parametrize("after, closed, kl_closed, won_back", [
    (dict(sae=([1.8, 2.8, 3.8], [0.9] * 3), adapted=([1.6, 2.6, 3.6], [0.6] * 3)), 0.4, 0.4, 0.25),
    (dict(sae=([1.7, 2.7, 3.7], [0.8] * 3)), 0.3, 0.2, None)])     # adapters too; the SAE alone
def test_the_gap_is_that_of_the_sae_as_it_came(after, closed, kl_closed, won_back, capsys):
    results = results_of(base=([1, 2, 3], [0] * 3), **after)
    numbers = fidelity.summary(results, before=BEFORE)
    assert numbers["gap_closed"] == pytest.approx(closed)
    assert numbers["kl_gap_closed"] == pytest.approx(kl_closed)
    assert numbers.get("won_back_by_adapters") == (won_back and pytest.approx(won_back))
    assert numbers["ce_before"] == 3 and numbers["excess_before"] == 1
    assert numbers["l0_before"] == {1: 8.0}
    fidelity.show(numbers)
    shown = capsys.readouterr().out
    assert "with SAE as it came" in shown and f"gap closed {closed:.1%}" in shown
    assert ("adapters win back 25.0%" in shown) == (won_back is not None)


def test_an_sae_that_trained_is_compared_with_the_run_s_file_of_before(model, sequences, tmp_path):
    """eval.py's numbers are those that training ended with."""
    came, trained = sae_of("topk", model, 1), sae_of("topk", model, 2)
    batches, documents = sequences.split(4), torch.tensor([0, 0, 1, 1, 1, 2])
    adapt(model, [2, 3])
    before = fidelity.measure(model, {1: came}, batches, ("base", "sae"))
    write_json(tmp_path / "before.json", fidelity.as_json(before))
    again = fidelity.read_results(tmp_path / "before.json")
    assert torch.equal(again["sae"]["ce"], before["sae"]["ce"])
    assert again["sae"]["l0"] == before["sae"]["l0"]

    text = SimpleNamespace(held_out=sequences, documents=documents)
    for method, names in (("lora", ("base", "sae", "adapted")), ("finetune", ("base", "sae"))):
        config = SimpleNamespace(method=method, train_sae=method == "lora", eval_batch=4)
        setting = SimpleNamespace(model=model, saes={1: trained}, text=text, config=config,
                                  folder=tmp_path)
        now = fidelity.measure(model, {1: trained}, batches, names)
        ended_with = fidelity.summary(now, documents, before)
        found = fidelity.evaluate(setting, None)
        for name in ("gap_closed", "kl_gap_closed", "ce_before", "excess_before"):
            assert found[name] == ended_with[name]
        assert ("won_back_by_adapters" in found) == (method == "lora")


def test_tables_and_pictures_say_where_documents_are_too_few(model, sequences, capsys):
    figures = pytest.importorskip("matplotlib.figure", reason="draws the pictures")
    saes, batches, documents = {1: sae_of("topk", model)}, [sequences], [5, 5, 9, 9, 9, 9]
    adapt(model, [2, 3])
    numbers = fidelity.summary(fidelity.measure(model, saes, batches, ALL), documents)
    assert numbers["documents"] == 2 and set(numbers["ci90"].values()) == {None}
    change = token_suite.changes(model, saes, batches)
    suites = [
        (fidelity, numbers),
        (token_suite, token_suite.statistics(change, documents)),
        (distances, distances.measure(model, saes, batches, documents)),
    ]
    for suite, numbers in suites:
        suite.show(numbers)
        shown = capsys.readouterr().out
        assert "too few documents for an interval: 2" in shown and "±" not in shown
        figure = figures.Figure()
        suite.draw(numbers, figure)
        title = figure.get_suptitle()
        assert "90 %" not in title and (suite is not fidelity or "too few documents" in title)


# ---- Tokens --------------------------------------------------------------------------------------

def test_shares_of_tokens_and_of_improvement_on_planted_changes():
    change = torch.tensor([[0.5, -0.05, 0.0, 2.0], [0.005, -0.5, 0.02, 20.0]])
    numbers = token_suite.statistics(change)
    assert (numbers["tokens"], numbers["share_worse"], numbers["share_better"]) == (8, 1 / 4, 5 / 8)
    assert numbers["improvement"] == pytest.approx(21.975 / 8)
    assert numbers["ci90"]["share_worse"] == 0          # a quarter of the tokens of both sequences
    assert numbers["gained"] - numbers["lost"] == pytest.approx(numbers["improvement"])
    for part, total in (("gained", 22.525), ("lost", 0.55)):
        assert numbers[part] == pytest.approx(total / 8)
        assert sum(row[part] for row in numbers["by_size"]) == pytest.approx(total / 8)
    for row in numbers["by_size"][3:5]:                 # hundredths and tenths of a nat
        assert (row["share_better"], row["share_worse"]) == (1 / 8, 1 / 8)
    assert numbers["by_size"][4]["lost"] == pytest.approx(0.5 / 8)
    assert sum(numbers["histogram"]["better"]) == 4     # 20 nats lie beyond the paper's last bin,
    assert numbers["by_size"][-1]["share_better"] == 2 / 8      # not beyond the table


def test_the_mean_change_of_all_tokens_is_the_improvement_of_fidelity(model, sequences):
    saes = {1: sae_of("topk", model)}
    adapt(model, [2, 3])
    numbers = token_suite.statistics(token_suite.changes(model, saes, sequences.split(2)))
    whole = fidelity.summary(fidelity.measure(model, saes, [sequences]))
    assert numbers["improvement"] == pytest.approx(whole["ce_sae"] - whole["ce_adapted"], abs=1e-6)
    assert numbers["tokens"] == 6 * 31 and 0 < numbers["share_worse"] < 1


# ---- Distances -----------------------------------------------------------------------------------

def test_distances_are_those_of_whole_forward_passes(model, sequences):
    saes = {1: sae_of("topk", model)}
    adapt(model, [0, 2])
    numbers = distances.measure(model, saes, sequences.split(4))
    assert numbers["layers"] == [1, 2, 3] and numbers["sequences"] == 6
    for i, layer in enumerate(numbers["layers"]):
        with torch.no_grad(), base(model):
            a, sae = (model.run(model.embed(sequences), 0, layer + 1, each).double()
                      for each in ({}, saes))
        with torch.no_grad():
            adapted = model.run(model.embed(sequences), 0, layer + 1, saes).double()
        for name, start in (("all", 0), ("without_0", 1)):
            l2 = [(a - b)[:, start:].norm(dim=-1).mean(1) for b in (sae, adapted)]
            cosine = [torch.cosine_similarity(a, b, -1)[:, start:].mean(1) for b in (sae, adapted)]
            for measure, (before, after) in (("l2", l2), ("cosine", cosine)):
                found = numbers[name][measure]
                assert found["sae"][i] == pytest.approx(before.mean().item(), rel=1e-5)
                assert found["adapted"][i] == pytest.approx(after.mean().item(), rel=1e-5)
                change = found["change"][i], found["ci90"][i]
                assert change == pytest.approx(interval(after - before), rel=1e-3, abs=1e-6)


# ---- Whole runs ----------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["gemma2", "llama"])
def place(request, text_folder, tmp_path_factory):
    """A folder with a tiny model, an SAE of layer 1, and short runs: of adapters and of an SAE."""
    folder, gemma = tmp_path_factory.mktemp(request.param), request.param == "gemma2"
    raw = GEMMA if gemma else LLAMA
    write_model(folder / "model", raw)
    write_tokenizer(folder / "model", raw, TEXT + "x0123456789 = ")
    sae = random_sae("jumprelu" if gemma else "topk", raw["hidden_size"], k=6, threshold=0.3)
    save_sae(sae, folder / "sae", model_name="test", layer=1, context=32)
    words = ["--model", folder / "model", "--layer", 1, "--data", text_folder, "--context", 32,
             "--tokens", 640, "--eval-tokens", 2048, "--batch-size", 2, "--lr", 1e-2,
             "--dtype", "float32", "--device", "cpu"]
    command("train", *words, "--sae", folder / "sae", "--rank", 2, "--out", folder / "run")
    command("train", *words, "--method", "topk", "--width", 64, "--k", 4,
            "--out", folder / "sae-run")
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
    command("eval", run, "--suite", "tokens", "--draw")         # from the file alone
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
    assert not {"ce_adapted", "gap_closed"} & set(numbers) and "loss_recovered_sae" in numbers
    assert "no adapter" in refusal("eval", place / "sae-run", "--suite", "tokens")


def test_folders_that_cannot_be_evaluated_are_answered_in_one_line(place, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in "nowhere", "empty":
        assert f"{name} has no config.json" in refusal("eval", tmp_path / name)
    (tmp_path / "empty" / "config.json").write_text("[1]")
    assert "is not a JSON object" in refusal("eval", tmp_path / "empty")
    assert "unknown" in misuse(capsys, "eval", place / "run", "--suite", "fidelity,magic")
    half = shutil.copytree(place / "run", tmp_path / "half")
    (half / "adapter" / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal("eval", half)
    shutil.rmtree(half / "adapter")
    assert "no adapter yet" in refusal("eval", half) and f"--resume {half}" in refusal("eval", half)
    shutil.rmtree(shutil.copytree(place / "sae-run", tmp_path / "young") / "sae")
    assert "no sae yet" in refusal("eval", tmp_path / "young")
    (place / "run" / "rank-4.bak").mkdir(exist_ok=True)
    command("eval", place / "run", "--suite", "tokens")         # is no run of a rank
    assert "eval-tokens.json" in refusal("eval", tmp_path / "young", "--suite", "tokens", "--draw")

    # The adapter of another model, even if it would fit
    foreign = shutil.copytree(place / "run", tmp_path / "foreign")
    path = foreign / "adapter" / "adapter_config.json"
    write_json(path, {**read(path), "base_model_name_or_path": "other/model"})
    assert "an adapter of other/model" in refusal("eval", foreign)
