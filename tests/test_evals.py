"""Intervals, fidelity, tokens, distances and tenths; folders that eval.py cannot evaluate."""
import importlib
import json
import math
import shutil
import sys
from contextlib import nullcontext
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

from helpers import (
    adapted, command, misuse, random_sae, read, refusal, refuses, some_tokens)
from lorasae.evals import distances, fidelity, tokens as token_suite
from lorasae.evals.common import (
    interval, linearised, over_documents, ratio, t_quantile, without_interval)
from lorasae.evals.report import Table, as_text, line, plus_minus, with_interval
from lorasae.lora import add_lora, base

ALL = ("base", "sae", "adapted", "lora")                # settings of one model
NINE = torch.arange(9)                                  # documents: one per sequence


def sae_of(kind, model, layer=1, **how):
    return random_sae(kind, model, k=6, threshold=0.3, seed=layer, **how)


def adapt(model, blocks):
    """Adds adapters that are not the identity, with dropout that evaluations must switch off."""
    return adapted(model, blocks, dropout=0.5)


@pytest.fixture
def sequences(model):
    """Tokens [9, 32] with BOS in front, and EOS in the middle of one row."""
    return some_tokens(model, 9, 32, seed=3)


def setting_of(model, saes, sequences, documents=NINE, folder=None, **how):
    """A stand-in for the Setting that an evaluation is given."""
    config = SimpleNamespace(**{"method": "lora", "train_sae": False, "eval_batch": 4, **how})
    text = SimpleNamespace(held_out=sequences, documents=documents)
    return SimpleNamespace(model=model, saes=saes, text=text, config=config, folder=folder)


# ---- Intervals -----------------------------------------------------------------------------------

def test_t_quantiles_match_the_tables_and_scipy():
    for df, t in (1, 6.313752), (2, 2.919986), (3, 2.353363), (99, 1.6603912):
        assert t_quantile(df) == pytest.approx(t, abs=1e-6)
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle")
    for df in (*range(1, 40), 1.2, 4.37, 12.8, 976, 5000):
        assert t_quantile(df) == pytest.approx(stats.t.ppf(0.95, df), rel=1e-5)


def test_an_interval_is_students_t_and_a_single_value_has_none():
    values = torch.tensor([1., 2, 4, 8], dtype=torch.float64)
    mean, half = interval(values)
    assert (mean - half, mean + half) == pytest.approx((0.1073512, 7.3926488), abs=1e-6)
    assert interval(torch.tensor([3.])) == (3, None)
    assert interval(values.repeat(2), torch.arange(8)) == pytest.approx(interval(values.repeat(2)))
    assert over_documents(NINE.double(), NINE) == (*interval(NINE.double(), NINE), "9 documents")


def test_the_interval_of_a_ratio_accounts_for_paired_values():
    b = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    noise = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    two = torch.full((50,), 2.0, dtype=torch.float64)
    for documents in (None, torch.arange(50) // 4):
        mean, half = ratio(0.3 * b, b, documents)
        assert mean == pytest.approx(0.3) and (half is None or half < 1e-12)
        expected = interval(noise / 2, documents)
        assert ratio(noise, two, documents) == pytest.approx(expected)
        assert ratio(noise, b * 0, documents) == (None, None)


def test_the_interval_over_documents_matches_the_sandwich_formula_in_matrices():
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

    order = torch.randperm(n, generator=generator)      # the order of sequences must not matter
    mean, half = interval(x[order], documents[order])
    assert mean == pytest.approx(x.mean().item()) and 0 < rho < 1
    assert half == pytest.approx(t_quantile(df.item()) * math.sqrt(variance), rel=1e-9)


# Chunks of 256 tokens per document in 50,000 held-out tokens of the standard library, with all its
# held-out files mixed
SIZES = torch.tensor([34, 20, 18, 13, 10, 9, 9, 9, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 3, 2, 2, 2, 2]
                     + [1] * 5)


@pytest.mark.parametrize("correlation, skewed", [(0, False), (0.5, False), (0.3, True)])
def test_intervals_over_documents_have_the_coverage_they_claim(correlation, skewed):
    """For 900 texts with a known mean, paired difference, ratio, and difference of ratios on the
    same sequences, 87 to 93 % of the 90 % intervals contain the truth."""
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

    covered, naive, trials = [0, 0, 0, 0], 0, 900
    for _ in range(trials):
        gap, change, other = 1 + 0.2 * values(), 0.3 * values(), 2 + 0.3 * values()
        won, other_won = 0.4 * gap + change, 0.3 * other + 0.5 * change
        apart = linearised(won, gap) - linearised(other_won, other)
        found = [
            (interval(gap, documents), 1),
            (interval(gap - change, documents), 1),
            (ratio(won, gap, documents), 0.4),
            (interval(apart, documents), 0.1),
        ]
        for i, ((value, half), truth) in enumerate(found):
            covered[i] += abs(value - truth) <= half
        value, half = interval(gap)
        naive += abs(value - 1) <= half
    for count in covered:
        assert 0.87 <= count / trials <= 0.93
    assert correlation == 0 or naive / trials < 0.7     # as if sequences were independent


def test_too_few_documents_have_no_interval_whatever_the_number_of_sequences():
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    few, dominated = torch.arange(400) % 7, (torch.arange(400) - 300).clamp(min=0)
    for documents in (few, dominated, torch.zeros(400, dtype=int)):
        assert interval(values, documents) == (values.mean().item(), None)
        assert ratio(values, values + 3, documents)[1] is None
    assert interval(values, torch.arange(400) % 8)[1] > 0


def test_a_missing_interval_is_neither_printed_nor_drawn(capsys):
    assert plus_minus(None) == "" and with_interval(None, 1) == "" == with_interval(None, None)
    assert with_interval(0.5, None, "+.2f") == "+0.50"
    assert with_interval(2, 1, "+.1f") == "+2.0 ± 1.0"
    print(as_text([Table("", ["", "n"], [["one", 1.0]]), Table("two", ["x"], [["y"]], ["a note"])]))
    assert capsys.readouterr().out == "\n          n\none  1.0000\n\ntwo\n\nx\ny\n\na note\n"

    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib draws the pictures")
    axes = figures.Figure().subplots()
    line(axes, [0, 1], [(1, None), (2, 0.5)], "a")
    drawn, = axes.containers
    none, some = drawn[2][0].get_segments()
    assert len(none) == 0 and some[:, 1].tolist() == [1.5, 2.5]


# ---- Fidelity ------------------------------------------------------------------------------------

def log_probabilities(model, saes, tokens, setting):
    """Log-probabilities [B, T, V] of a setting's whole forward pass, adapters switched by hand."""
    saes = saes if setting in ("sae", "adapted") else {}
    with base(model) if setting in ("base", "sae") else nullcontext():
        return model(tokens, saes).double().log_softmax(-1)


@pytest.mark.parametrize("on_special", [False, True])
@pytest.mark.parametrize("kinds, blocks", [
    ({1: "jumprelu"}, [2, 3]), ({1: "topk"}, [0, 1, 2, 3]), ({0: "jumprelu", 2: "topk"}, [1, 3]),
    ({3: "jumprelu"}, [0])])
def test_every_setting_matches_its_whole_forward_pass(model, sequences, kinds, blocks, on_special):
    saes = {layer: sae_of(kind, model, layer, on_special=on_special)
            for layer, kind in kinds.items()}
    adapt(model, blocks)
    log_p = [log_probabilities(model, saes, sequences, name) for name in ALL]
    assert not any(torch.allclose(a, b) for a, b in combinations(log_p, 2))

    found = fidelity.measure(model, saes, sequences.split(4), ALL)
    assert found["sae"]["l0"].keys() == found["adapted"]["ev"].keys() == kinds.keys()
    assert fidelity.measure(model, saes, [sequences], ("lora",)).keys() == {"lora"}
    for name, log_q in zip(ALL, log_p):
        ce = -log_q[:, :-1].gather(-1, sequences[:, 1:, None])[..., 0]
        kl = (log_p[0].exp() * (log_p[0] - log_q)).sum(-1)[:, :-1]
        torch.testing.assert_close(found[name]["ce"], ce.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[name]["kl"], kl.mean(1), rtol=1e-5, atol=1e-5)
        assert ((found[name]["kl"] > 0.01) == (name != "base")).all()
    assert (found["base"]["kl"] == 0).all()


def test_l0_and_explained_variance_are_over_all_text_positions(model, sequences):
    sae = sae_of("topk", model)
    adapt(model, [0, 3])
    found = fidelity.measure(model, {1: sae}, sequences.split(1), ("sae", "adapted"))
    text = ~model.special(sequences)
    for setting in ("sae", "adapted"):
        with torch.no_grad(), base(model) if setting == "sae" else nullcontext():
            x = model.run(model.embed(sequences), 0, 2)[text].double()
        lost, varied = (x - sae(x.float())).square().sum(), (x - x.mean(0)).square().sum()
        assert found[setting]["ev"][1] == pytest.approx(1 - (lost / varied).item(), rel=1e-5)
        active = (sae.encode(x.float()) > 0).sum(-1).double().mean().item()
        assert found[setting]["l0"][1] == pytest.approx(active) and active <= sae.k
    assert found["sae"]["ev"][1] != found["adapted"]["ev"][1]       # adapters start before the SAE


def test_fresh_adapters_change_nothing(model, sequences):
    add_lora(model, [0, 1, 2, 3], 3)
    found = fidelity.measure(model, {1: sae_of("topk", model)}, [sequences], ALL)
    for loss in ("ce", "kl"):
        assert torch.equal(found["adapted"][loss], found["sae"][loss])
        assert torch.equal(found["lora"][loss], found["base"][loss])
    numbers = fidelity.summary(found, NINE)
    assert numbers["kl_gap_closed"] == 0 != numbers["excess_sae"]
    assert numbers["gap_closed"] in (0, None)
    assert numbers["excess_adapted"] == numbers["excess_sae"]
    apart = distances.evaluate(setting_of(model, {1: sae_of("topk", model)}, sequences))["all"]
    assert apart["l2"]["change"] == (0, 0, 0) and apart["l2"]["ci90"] == (None, None, None)
    assert (apart["cosine"]["change_after"], apart["cosine"]["ci90_after"]) == (0, None)


def results_of(**settings):
    """fidelity.measure's results for {setting: ([CE], [KL])} per sequence, repeated three times."""
    found = {}
    for name, losses in settings.items():
        ce, kl = (torch.tensor(values * 3, dtype=torch.float64) for values in losses)
        found[name] = {"ce": ce, "kl": kl, "l0": {1: 8.0}, "ev": {1: 0.5}, "left_out": {1: 0.01}}
    return found


def test_the_summary_is_computed_from_the_sequences():
    numbers = fidelity.summary(results_of(
        base=([1, 2, 3], [0] * 3), sae=([1.5, 2.4, 3.6], [0.2, 0.4, 0.6]),
        adapted=([1.2, 2.3, 3.3], [0.1] * 3)), NINE)
    assert numbers["ce_sae"] == 2.5 and numbers["excess_sae"] == pytest.approx(0.5)
    assert numbers["gap_closed"] == pytest.approx((0.3 + 0.1 + 0.3) / 1.5)
    assert numbers["kl_gap_closed"] == pytest.approx((0.4 - 0.1) / 0.4)
    half = t_quantile(8) * (0.06 / 8 / 9) ** 0.5        # squares of 0, ±0.1, ±0.1, three times
    assert numbers["ci90"]["excess_sae"] == pytest.approx(half)
    assert numbers["ci90"]["ce_sae"] > 0.5              # sequences differ more than the SAE costs
    assert numbers["documents"] == 9
    json.dumps(numbers, allow_nan=False)


@pytest.mark.parametrize("costs, said", [
    ([-0.1, -0.2, -0.3], "no gap"), ([0.3, -0.2, -0.05], "no gap"),
    ([0.1, 0.2, 0.3], "gap closed 50.0%")])
def test_the_gap_closed_is_undefined_if_there_is_no_gap(costs, said):
    after = [1 + costs[0] / 2, 2 + costs[1] / 2, 3 + costs[2] / 2]
    before = [1 + costs[0], 2 + costs[1], 3 + costs[2]]
    numbers = fidelity.summary(results_of(
        base=([1, 2, 3], [0] * 3), sae=(before, [0.4] * 3), adapted=(after, [0.1] * 3)), NINE)
    assert (numbers["gap_closed"] is None) == (said == "no gap")
    assert numbers["kl_gap_closed"] == pytest.approx(0.75)
    first, line = fidelity.tables(numbers)[-1].notes
    assert "BOS, EOS and outliers: 1.0% of the positions" in first
    assert said in line and "KL gap closed 75.0%" in line and "too few" not in line


@pytest.mark.parametrize("after, closed, kl_closed, won_back", [
    (dict(sae=([1.8, 2.8, 3.8], [0.9] * 3), adapted=([1.6, 2.6, 3.6], [0.6] * 3)), 0.4, 0.4, 0.25),
    (dict(sae=([1.7, 2.7, 3.7], [0.8] * 3)), 0.3, 0.2, None),      # with adapters; only the SAE
    (dict(sae=([1, 2, 3], [0.8] * 3), adapted=([0.9, 1.9, 2.9], [0.6] * 3)), 1.1, 0.4, None)])
def test_the_gap_is_that_of_the_original_sae(after, closed, kl_closed, won_back, capsys):
    numbers = fidelity.summary(results_of(
        base=([1, 2, 3], [0] * 3), before=([2, 3, 4], [1] * 3), **after), NINE)
    assert numbers["gap_closed"] == pytest.approx(closed)
    assert numbers["kl_gap_closed"] == pytest.approx(kl_closed)
    assert numbers.get("won_back_by_adapters") == (won_back and pytest.approx(won_back))
    assert numbers["ce_before"] == 3 and numbers["excess_before"] == 1
    assert numbers["l0_before"] == {1: 8.0}
    print(as_text(fidelity.tables(json.loads(json.dumps(numbers)))))      # as read from its file
    shown = capsys.readouterr().out
    assert "with original SAE" in shown and f"gap closed {closed:.1%}" in shown
    assert ("adapters win back 25.0%" in shown) == (won_back is not None)
    assert "L0, original  explained variance    L0  explained variance" in shown


def test_a_trained_sae_is_compared_with_the_original_in_the_runs_file(model, sequences, tmp_path):
    """eval.py gets the same numbers as the end of training."""
    came, trained = sae_of("topk", model, 1), sae_of("topk", model, 2)
    adapt(model, [2, 3])
    for method, names in (("lora", ALL), ("finetune", ("base", "sae"))):
        setting = setting_of(model, {1: trained}, sequences, folder=tmp_path, method=method,
                             train_sae=method == "lora")
        batches = sequences.split(4)
        results = fidelity.measure(model, {1: trained}, batches, names)
        results["before"] = fidelity.measure(model, {1: came}, batches, ("sae",))["sae"]
        fidelity.write_sequences(tmp_path, results, NINE)

        again = fidelity.read_sequences(tmp_path)
        assert torch.equal(again.pop("documents"), NINE) and again.keys() == results.keys()
        for name, values in results.items():
            assert all(torch.equal(again[name][loss], values[loss]) for loss in ("ce", "kl"))
            assert again[name].get("l0") == values.get("l0")
        expected = fidelity.summary(results, NINE)
        assert fidelity.evaluate(setting) == {**expected, "eval_tokens": 9 * 32}
        assert ("won_back_by_adapters" in expected) == (method == "lora")

    path = tmp_path / "sequences.json"
    whole = read(path)
    for damage in (None, [1, 2], {**whole, "documents": [0] * 9},       # of another run
                   {**whole, "before": {"ce": [1.0]}}, {"documents": list(range(9))}):
        path.write_text(json.dumps(damage))
        refuses("sequences.json", fidelity.evaluate, setting)


def test_tables_say_if_there_are_too_few_documents(model, sequences, capsys, tmp_path):
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib draws the pictures")
    setting = setting_of(adapt(model, [2, 3]), {1: sae_of("topk", model)}, sequences, NINE // 5,
                         folder=tmp_path)
    for suite in (fidelity, token_suite, distances):
        numbers = json.loads(json.dumps(suite.evaluate(setting), allow_nan=False))
        assert numbers["documents"] == 2
        print(as_text(suite.tables(numbers)))
        shown = capsys.readouterr().out
        assert without_interval(2) in shown and "± 0" not in shown
        if suite is not fidelity:
            suite.draw(numbers, figures.Figure())


# ---- Tokens --------------------------------------------------------------------------------------

def test_shares_of_tokens_and_of_improvement_are_right_for_planted_changes():
    change = torch.tensor([[0.5, -0.05, 0.0, 2.0], [0.005, -0.5, 0.02, 20.0]]).repeat(4, 1)
    numbers = token_suite.statistics(change, torch.arange(8))
    assert numbers["tokens"] == 32
    assert (numbers["share_worse"], numbers["share_better"]) == (1 / 4, 5 / 8)
    assert numbers["improvement"] == pytest.approx(21.975 / 8)
    assert numbers["from_middle"] == pytest.approx((0.5 - 0.05 - 0.5 + 0.02) / 21.975)
    assert numbers["ci90"]["share_worse"] is None       # a quarter of the tokens in every sequence
    assert numbers["ci90"]["from_middle"] > 0 < numbers["ci90"]["improvement"]
    assert sum(numbers["histogram"]["better"]) == 16    # 20 nats lie beyond the paper's last bin
    assert sum(numbers["histogram"]["worse"]) == 8


def test_the_mean_change_over_all_tokens_is_the_improvement_in_fidelity(model, sequences, tmp_path):
    setting = setting_of(adapt(model, [2, 3]), {1: sae_of("topk", model)}, sequences,
                         folder=tmp_path)
    numbers, whole = token_suite.evaluate(setting), fidelity.evaluate(setting)
    assert numbers["improvement"] == pytest.approx(whole["ce_sae"] - whole["ce_adapted"], abs=1e-6)
    assert numbers["tokens"] == 9 * 31 and 0 < numbers["share_worse"] < 1


# ---- Distances -----------------------------------------------------------------------------------

def test_distances_match_whole_forward_passes(model, sequences):
    saes = {1: sae_of("topk", model)}
    adapt(model, [0, 2])
    numbers = distances.evaluate(setting_of(model, saes, sequences))
    assert numbers["layers"] == [1, 2, 3] and numbers["documents"] == 9
    changes = {}
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
                change = found["change"][i], found["ci90"][i]
                assert change == pytest.approx(interval(after - before), rel=1e-3, abs=1e-6)
                changes.setdefault((name, measure), []).append(after - before)
    for (name, measure), (_, *after) in changes.items():        # mean over the later blocks
        found = numbers[name][measure]
        expected = interval(torch.stack(after).mean(0))
        assert (found["change_after"], found["ci90_after"]) == pytest.approx(
            expected, rel=1e-3, abs=1e-6)
    last = distances.evaluate(setting_of(model, {3: sae_of("topk", model)}, sequences))
    assert last["layers"] == [3] and last["all"]["l2"]["change_after"] is None


# ---- Whole runs ----------------------------------------------------------------------------------

@pytest.fixture
def place(finished, tmp_path):
    """A folder with two short runs, one of adapters and one of an SAE."""
    for kind, name in (("lora", "run"), ("topk", "sae-run")):
        shutil.copytree(finished(kind), tmp_path / name)
    return tmp_path


def test_every_suite_leaves_a_file_a_table_and_the_papers_figures(place, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib draws the pictures")
    run = place / "run"
    (run / "rank-4.bak").mkdir()                        # not a rank of the config
    command("eval", run, "--suite", "fidelity,tokens,distances")
    shown = capsys.readouterr().out
    for name, said in (("fidelity", "with SAE + LoRA"), ("tokens", "tokens that get worse"),
                       ("distances", "output of")):
        assert said in shown and f"{run}/eval-{name}.json" in shown
    pictures = sorted(run.rglob("eval-*.png"))
    assert [path.stem for path in pictures] == ["eval-distances", "eval-tokens"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)

    pictures[1].unlink()
    command("eval", run, "--suite", "fidelity,tokens,distances", "--draw")  # from the files alone
    assert pictures[1].exists() and capsys.readouterr().out == shown
    pictures[1].unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command("eval", run, "--suite", "tokens", "--draw")
    line, = capsys.readouterr().err.splitlines()
    assert f"pip install matplotlib && python eval.py {run} --suite tokens --draw" in line
    assert not pictures[1].exists()


@pytest.mark.parametrize("damage", [
    b"", b"[]", b"null", b"{}", b"\xff", b'{"rows": []}', b'{"rows": {}}',
    b'{"rows": [null], "layer": 1}', b'{"ci90": {}, "l0_sae": {}, "left_out_sae": {}}'])
def test_files_that_no_suite_wrote_are_refused_in_one_line(place, damage):
    pytest.importorskip("lm_eval", reason="one of the suites needs lm-eval")
    for name in importlib.import_module("eval").SUITES:
        path = place / "run" / f"eval-{name}.json"
        path.write_bytes(damage)
        line = refusal("eval", place / "run", "--suite", name, "--draw")
        assert str(path) in line and not path.with_suffix(".png").exists()


def test_every_parameter_of_a_suite_is_an_option_of_the_command(tmp_path):
    script = importlib.import_module("eval")
    options = vars(script.arguments([str(tmp_path)]))
    for name in script.SUITES:
        assert set(script.options_of(name)) <= options.keys(), name


@pytest.mark.parametrize("words, said", [
    (["--suite", "scr", "--seeds", 0], "--seeds: '0': pass 1 to 1000"),
    (["--seeds", 2], "--seeds has no effect with --suite fidelity"),
    (["--suite", "tokens,lm", "--labelled", "saebench"], "--labelled has no effect with --suite"),
    (["--suite", "absorption", "--words", 300, "--limit", 3], "--limit has no effect"),
    (["--suite", "lm", "--limit", 3, "--draw"], "--limit has no effect with --suite lm --draw"),
    (["--suite", "tests"], "--suite 'tests' is unknown")])
def test_options_without_effect_are_refused(words, said, tmp_path, capsys):
    assert said in misuse(capsys, "eval", tmp_path, *words)


def test_a_run_that_trained_an_sae_is_evaluated_without_adapters(place, capsys):
    run = place / "sae-run"
    command("eval", run, "--suite", "fidelity,tenths")
    numbers, results = read(run / "eval-fidelity.json"), read(run / "results.json")
    assert numbers["ce_sae"] == pytest.approx(results["ce_sae"], rel=1e-5)
    assert not {"ce_adapted", "gap_closed"} & set(numbers)
    assert "no adapter" in refusal("eval", run, "--suite", "tokens")

    rows = read(run / "eval-tenths.json")["rows"]
    assert [row["percent"] for row in rows] == list(range(10, 101, 10))
    assert rows[-1]["ce"] == pytest.approx(results["ce_sae"]) != rows[0]["ce"]
    assert rows[-1]["ci90"]["kl"] == pytest.approx(results["ci90"]["kl_sae"])
    assert rows[3]["tokens"] == 512 and rows[0]["seconds"] < rows[-1]["seconds"]
    assert "40 %" in capsys.readouterr().out
    assert "each tenth" in refusal("eval", place / "run", "--suite", "tenths")
    assert "eval-tokens.json" in refusal("eval", run, "--suite", "tokens", "--draw")
    shutil.rmtree(run / "sae")
    assert "there is no SAE" in refusal("eval", run)


def test_elsewhere_measures_fidelity_on_other_text(place):
    (place / "other").mkdir()
    for i in range(40):
        (place / "other" / f"{i}.txt").write_text(f"{i} more words of {i ** 2} kinds. " * 99)
    for name in "run", "sae-run":
        run = place / name
        call = "eval", run, "--suite", "elsewhere", "--data", place / "other", "--eval-tokens", 640
        command(*call)
        numbers, results = read(run / "eval-elsewhere.json"), read(run / "results.json")
        seen = fidelity.read_sequences(run / "elsewhere")
        assert numbers["ce_base"] == pytest.approx(seen["base"]["ce"].mean().item())
        assert abs(numbers["ce_base"] - results["ce_base"]) > 0.1
        assert len(seen["documents"]) == 20 != len(fidelity.read_sequences(run)["documents"])
        assert {"sae-10pct", "sae-90pct"} <= seen.keys() if name == "sae-run" else "lora" in seen

    for folder in run.glob("sae-??pct"):                # as after training for a single step
        shutil.rmtree(folder)
    command(*call)
    assert read(run / "eval-elsewhere.json")["ce_sae"] == pytest.approx(numbers["ce_sae"])
