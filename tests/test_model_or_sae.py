"""The experiments beyond the paper, at their smallest: each arm trains what it says, files make
them resumable, and words follow figures."""
import pytest
import torch

from helpers import random_sae
from lorasae.adapt import blocks_to_adapt
from lorasae.errors import InputError
from lorasae.evals.common import percent
from lorasae.evals.figures import save_figure
from lorasae.io.files import read_json
from lorasae.lora import adapters
from lorasae.paper import arms, model_or_sae, recipe
from lorasae.paper.findings import show
from lorasae.paper.arms import (Case, adapted, asked, finetuned, for_tuning, measured, same_plan,
                                untouched)
from lorasae.runs.config import Config

LAYER = 1
PLAN = {"tokens": 512, "objective": "balanced", "eval_tokens": 128, "seeds": [0, 1],
        "lora_rates": [1e-3, 1e-2], "sae_rates": [1e-3]}
pytestmark = pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)


@pytest.fixture(params=["topk", "jumprelu"])
def case(model, request):
    torch.manual_seed(0)
    sae = random_sae(request.param, model)
    blocks = blocks_to_adapt((), {LAYER: sae}, 4)
    tokens = torch.randint(3, 97, (40, 32))
    tokens[:, 0] = model.config.bos_token_id
    config = Config(tokens=512, batch_size=4, context=32, rank=(2,), lr=1e-3, lr_decay=True,
                    dropout=0.0, dtype="float32")
    return Case("a case", model, sae, LAYER, blocks, config, tokens[:16], tokens[16:36], tokens[36:])


def same(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_each_arm_trains_what_it_says_and_leaves_model_and_sae_as_they_were(case):
    logits, before = case.model(case.tuning), case.sae.state_dict()
    sae_before = {name: value.clone() for name, value in before.items()}
    adapters_arm, sae_arm, both, then = (
        model_or_sae.train_arm(case, arm, {"lr": 1e-2, "sae_lr": 1e-3}, 512, 0, "balanced")
        for arm in model_or_sae.ARMS)
    assert adapters_arm.sae is case.sae and adapters_arm.adapters
    assert sae_arm.adapters is None and not same(sae_arm.sae, case.sae)
    assert both.adapters and not same(both.sae, case.sae)
    assert then.adapters and not same(then.sae, case.sae)

    config = asked(case, 256, 0, lr=1e-2)
    alone, = adapted(case, config)      # the first half of `then`: the SAE's half left it alone
    for name, module in alone.adapters.items():
        assert torch.equal(module.lora_B.weight, then.adapters[name].lora_B.weight)

    assert not adapters(case.model) and torch.equal(case.model(case.tuning), logits)
    assert all(torch.equal(value, sae_before[name]) for name, value in case.sae.state_dict().items())


def test_the_measure_of_an_arm_without_adapters_has_no_kl_without_its_sae(case):
    numbers = measured(case, finetuned(case, asked(case, 256, 0, objective="kl"), 1e-3))
    assert numbers["kl_without_sae"] == pytest.approx(0, abs=1e-6)
    assert numbers["kl"] < measured(case, untouched(case))["kl"]
    assert {"ce", "ce_base", "l0", "fvu", "dead_latents"} <= numbers.keys()


def test_an_experiment_continues_from_its_files_and_says_what_its_figures_say(
        case, tmp_path, monkeypatch, capsys):
    found = model_or_sae.compare(case, tmp_path, PLAN)
    assert {len(seeds) for budget in found["arms"].values() for seeds in budget.values()} == {2}
    assert found["arms"]["time"]["adapters"] == found["arms"]["tokens"]["adapters"]
    monkeypatch.setattr(model_or_sae, "train_arm", None)        # nothing is trained again
    assert model_or_sae.compare(case, tmp_path, PLAN) == found

    numbers = model_or_sae.finished(PLAN, {"a case": found})
    show(model_or_sae.tables(numbers))
    assert "adapters, then SAE" in capsys.readouterr().out
    cases = {"a": found, "b topk": found, "b jumprelu": found}
    claims = model_or_sae.claims({**numbers, "cases": cases})
    assert [claim.of_paper for claim in claims] == [False] * 3
    best = max(model_or_sae.ARMS, key=lambda arm: model_or_sae.gaps(found, "tokens", arm).mean())
    assert f"over the 1 cases, is: {model_or_sae.ARMS[best]}" in numbers["conclusions"][0]
    assert "by more than the interval over seeds" in numbers["conclusions"][0]

    # A single seed has no interval, so no arm is ahead and no bar is drawn
    first_seeds = {budget: {arm: seeds[:1] for arm, seeds in arms.items()}
                   for budget, arms in found["arms"].items()}
    one = model_or_sae.finished({**PLAN, "seeds": [0]}, {"a case": {**found, "arms": first_seeds}})
    assert "nothing is said about which is ahead" in one["conclusions"][0]
    one_case = one["cases"]["a case"]
    assert not any(model_or_sae.ahead(one_case, "tokens", "both", arm) for arm in model_or_sae.ARMS)
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    for numbers in numbers, one:
        save_figure(model_or_sae.draw, numbers, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 0


def test_a_search_finds_the_tokens_that_every_recipe_needs(case, tmp_path, monkeypatch, capsys):
    plan = {"tokens": 512, "budgets": [4, 2], "rates": [1e-3, 1e-2], "ranks": [2],
            "optimizers": ["adamw", "muon"], "schedules": ["falling", "constant"],
            "batches": [1, 4], "sae_rates": [1e-3]}
    found = recipe.search(case, tmp_path, plan, seed=0)
    assert len(found["tried"]) == 2 * (2 * 2 * 2 * 2 + 1)
    losses = {recipe.recipe_of(trial): trial["kl"] for trial in found["tried"]
              if trial["tokens"] == 256}
    falling = recipe.Recipe("adamw", 1e-2, "falling", 1, 2)
    assert losses[falling] != losses[falling._replace(schedule="constant")]
    assert read_json(tmp_path / "paper-0.json") == found["paper"] < found["before"]
    assert found["l0"] > 0 and all(
        trial["l0"] == found["l0"] for trial in found["tried"] if trial["sae_lr"] is None)
    monkeypatch.setattr(recipe, "adapted", None)                # nothing is trained again
    assert recipe.search(case, tmp_path, plan, seed=0) == found

    tables = recipe.tables({"plan": plan, "cases": {"a case": [found, found]}})
    _, _, *by_budget = tables
    assert [len(table.rows) for table in by_budget] == [2 * 2 * 2 * 2 + 1] * 2
    of_falling, = (row for row in by_budget[0].rows if row[0] == str(falling))
    assert of_falling[1] == percent(recipe.closed(found, losses[falling]))
    show(tables)
    shown = capsys.readouterr().out
    assert "muon 0.01 falling, batch 4, rank 2" in shown
    assert ", batch 1, rank 2, SAE 0.001" in shown and "mean of 2 seeds" in shown
    assert recipe.spread([None, 12.0]) == "- to 12.0x" and recipe.spread([15.04]) == "15.0x"


def test_what_is_claimed_of_recipes_follows_from_the_tokens_they_need(model):
    def trial(lr, sae_lr, tokens, kl):
        how = recipe.Recipe("adamw", lr, "falling", 1, 64, sae_lr)._asdict()
        return {**how, "tokens": tokens, "kl": kl}
    assert model_or_sae.smallest([None, 0.3, 0.2]) == 2         # None: it diverged
    with pytest.raises(InputError, match="every rate that was tried diverged"):
        model_or_sae.smallest([None, None])
    curve = [(100, 0.5), (1000, 0.3)]                   # on a line over their logarithm between
    assert recipe.needed(curve, 0.4) == pytest.approx(100 * 10 ** 0.5)
    assert recipe.needed(curve, 0.6) == 100 and recipe.needed(curve, 0.2) is None
    tried = [trial(1e-3, None, 100, 0.41), trial(1e-3, None, 200, 0.39),
             trial(1e-3, 1e-4, 100, 0.4), trial(1e-3, 1e-4, 200, 0.3),
             trial(9e-3, None, 100, 0.6), trial(9e-3, None, 200, 0.6)]
    found = {"before": 0.5, "paper": 0.4, "tried": tried}
    diverged = trial(1.0, None, 100, None)
    assert recipe.ratio({**found, "tried": [diverged]}, recipe.recipe_of(diverged), 2400) is None
    numbers = {"plan": {"tokens": 2400}, "cases": {"a case": [found]}}
    alone, both = recipe.claims(numbers)
    assert "17.0x" in alone.ours and alone.verdict == "agrees in direction"     # 2400 / (100 · √2)
    assert "24.0x" in both.ours and both.verdict == "agrees in direction"
    numbers["plan"]["tokens"] = 1200
    assert [claim.verdict for claim in recipe.claims(numbers)] == ["does not agree"] * 2
    numbers["cases"]["a case"][0]["paper"] = 0.2
    assert [claim.ours for claim in recipe.claims(numbers)] == ["none in every case, one seed"] * 2


def test_no_two_texts_share_a_document_and_rates_are_chosen_on_tuning_text(model, monkeypatch):
    seen = {}

    def noted(documents, count):
        seen["documents"], seen["chosen"] = documents, for_tuning(documents, count)
        return seen["chosen"]

    monkeypatch.setattr(arms, "for_tuning", noted)
    config = arms.case_config("tiny-gemma-2", "jumprelu")
    case = arms.load_case("a case", config, 20_000, eval_tokens=1000, tuning_tokens=2000)
    tuning, text, held_out = (
        {tuple(row.tolist()) for row in text} for text in (case.tuning, case.text, case.held_out))
    assert (len(case.tuning), len(case.text), len(case.held_out)) == (8, 79, 4)
    assert not tuning & text and not tuning & held_out and not text & held_out
    documents, chosen = seen["documents"], seen["chosen"]
    assert not set(documents[chosen].tolist()) & set(documents[~chosen].tolist())

    with pytest.raises(InputError, match="--eval-tokens 50001: at most 50,000"):
        arms.load_case("a case", config, 1000, eval_tokens=50_001)

    found = arms.on_tuning_text(case._replace(text=None, held_out=None), untouched(case))
    case.sae.W_dec.data *= torch.nan
    assert found["kl"] > 0 and found["l0"] > 1
    assert arms.on_tuning_text(case, untouched(case))["kl"] is None


def test_tuning_text_is_at_least_four_whole_documents(model):
    documents = torch.tensor([0] * 30 + [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6])[torch.randperm(41)]
    chosen = for_tuning(documents, 8)
    names = set(documents[chosen].tolist())
    assert 0 not in names and len(names) >= 4 and 8 <= chosen.sum() <= 9
    assert all(chosen[documents == name].all() for name in names)
    with pytest.raises(InputError, match="too few short documents for 20 sequences"):
        for_tuning(documents, 20)


def test_adapters_then_sae_never_see_the_same_text_twice(case):
    config = asked(case, 256, 0)
    halves = [arms.Ordered(case, config, start) for start in (0, config.steps)]
    seen = torch.cat([half.batch(step) for half in halves for step in range(config.steps)])
    assert len(seen.unique(dim=0)) == len(seen) == 2 * config.steps * config.batch_size
    other = arms.Ordered(case, asked(case, 256, 1))
    assert not torch.equal(other.batch(0), halves[0].batch(0))


def test_the_cases_are_those_that_the_options_name(model, sae_folder, whole_model):
    def named(*words):
        return arms.wanted(recipe.arguments([*map(str, words), "--device", "cpu"]))
    assert list(named()) == [f"{name} {kind}" for name in arms.MODELS for kind in arms.KINDS]
    found = named("--models", whole_model, "--saes", sae_folder, "--layer", 1)
    name = f"{whole_model} {sae_folder}"
    assert list(found) == [name] and found[name].layer == (1,)


@pytest.mark.parametrize("words, message", [
    (["--models", "tiny-gemma-2", "nosuch"], "nosuch"),
    (["--saes", "jumprelu", "nosuch"], "nosuch"),
    (["--models", "tiny-gemma-2-small", "--saes", "topk"], "topk"),
    (["--models", "tiny-gemma-2-small"], "no public SAE"),
    (["--device", "nosuch"], "--device nosuch"),
    (["--sae-rates", "nan"], "--sae-rates nan: pass rates above 0"),
])
@pytest.mark.parametrize("experiment", [recipe, model_or_sae])
def test_what_is_not_there_is_said_before_any_work(
        model, tmp_path, monkeypatch, capsys, experiment, words, message):
    monkeypatch.setattr(experiment, "load_case", None)
    with pytest.raises(SystemExit) as stopped:
        experiment.main([*words, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err if stopped.value.code == 2 else stopped.value.code
    assert message in said.splitlines()[-1] and not (tmp_path / "out").exists()


def test_an_experiment_begun_with_other_arguments_is_refused_in_one_line(model, tmp_path):
    for _ in range(2):
        same_plan(tmp_path, PLAN)
    with pytest.raises(InputError, match="^[^\n]*was begun with tokens 512, not 1024[^\n]*$"):
        same_plan(tmp_path, {**PLAN, "tokens": 1024})
