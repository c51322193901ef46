"""Several rates in one pass: each adapter is its own run to the bit; and recipes that choose rates."""
import pytest
import torch
from safetensors.torch import load_file

from helpers import command, counted, interrupted_after, read, refusal
from lorasae.beyond.muon import muon
from lorasae.beyond.recipe import tuned, tuned_recipe
from lorasae.io.presets import PAPER, PRESETS
from lorasae.runs import adapting
from lorasae.runs.config import BY_METHOD, Config, read_config
from lorasae.runs.config import configure as configured

RATES = (3e-4, 1e-3)


def configure(given):
    return configured(given, {"tuned": tuned_recipe})


@pytest.fixture
def arguments(whole_model, sae_folder, text_folder):
    return ["--model", whole_model, "--sae", sae_folder, "--layer", 1, "--data", text_folder, "--context", 32, "--tokens", 640,
            "--eval-tokens", 256, "--batch-size", 2, "--dropout", 0.1, "--lr-decay", "--dtype", "float32", "--device", "cpu"]


def same_run(found, expected):
    a, b = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (found, expected))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
    assert read(found / "config.json") == read(expected / "config.json")
    assert read(found / "results.json")["ce_adapted"] == read(expected / "results.json")["ce_adapted"]


@pytest.mark.parametrize("raw_config", ["llama", "gemma2"], indirect=True)
def test_rates_and_ranks_end_as_their_own_runs_to_the_bit(
        raw_config, arguments, tmp_path, capsys):
    """Rates alone; and ranks and rates in pairs, by Muon."""
    pairs = [(4, rate) for rate in RATES]
    names, ranks = [f"lr-{rate}" for rate in RATES], (4,)
    if raw_config["model_type"] == "gemma2":
        pairs = [(2, 1e-3), (2, 5e-05), (8, 1e-3)]
        names, ranks = [f"rank-{rank}-lr-{rate}" for rank, rate in pairs], (2, 2, 8)
        arguments += ["--optimizer", "muon"]
    rates = [rate for _, rate in pairs]
    command("train", *arguments, "--rank", *ranks, "--lr", *rates, "--out", tmp_path / "sweep")
    results = read(tmp_path / "sweep/results.json")
    assert list(next(iter(results.values()))) == [
        name.replace("rank-", "").replace("lr-", "") for name in names]
    for name, (rank, rate) in zip(names, pairs):
        own = tmp_path / f"own-{name}"
        command("train", *arguments, "--rank", rank, "--lr", rate, "--out", own)
        same_run(tmp_path / "sweep" / name, own)
    line = (tmp_path / "sweep/metrics.jsonl").read_text().splitlines()[-1]
    for name in names:
        assert f'"kl_{name.replace("rank-", "r").replace("lr-", "lr")}"' in line

    capsys.readouterr()
    command("eval", tmp_path / "sweep")
    written = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".json")]
    assert written == [str(tmp_path / "sweep" / name / "eval-fidelity.json") for name in names]
    assert "merge one of them, such as" in refusal("train", "--merge", tmp_path / "sweep")
    command("train", "--merge", tmp_path / "sweep" / names[1])


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_an_interrupted_sweep_of_rates_resumes_to_the_bit(arguments, tmp_path):
    arguments += ["--rank", 4, "--lr", *RATES, "--optimizer", "muon", "--checkpoint-every", 4]
    command("train", *arguments, "--out", tmp_path / "whole")
    with interrupted_after(6, adapting.Adapting, "take_side_by_side"), pytest.raises(SystemExit):
        command("train", *arguments, "--out", tmp_path / "cut")
    with counted(adapting.Adapting, "take_side_by_side") as steps:
        command("train", "--resume", tmp_path / "cut")
    assert len(steps) == read_config(tmp_path / "cut").steps - 4        # from the checkpoint, not from the beginning
    for rate in RATES:
        same_run(tmp_path / f"cut/lr-{rate}", tmp_path / f"whole/lr-{rate}")


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_numbers_of_ranks_and_rates_that_do_not_match_are_refused_in_one_line(arguments):
    assert "--rank names 3 ranks and --lr 2 rates" in refusal("train", *arguments, "--rank", 1, 2, 4, "--lr", 1e-3, 1e-2)
    assert "twice" in refusal("train", *arguments, "--lr", 1e-3, 1e-3)
    assert "twice" in refusal("train", *arguments, "--rank", 4, 4)
    assert "twice" in refusal("train", *arguments, "--rank", 4, 4, "--lr", 1e-3, 1e-3)
    assert "positive" in refusal("train", *arguments, "--lr", 1e-3, 0)
    assert "one rate" in refusal("train", *arguments, "--lr", 1e-3, 1e-2, "--shard")


def test_variants_are_the_configurations_of_their_own_runs():
    assert Config(rank=(4,), lr=(1e-3,)) == Config(rank=(4,), lr=1e-3)
    lone = Config(lr=1e-3)
    assert lone.variants == [lone]
    assert Config(lr=(1e-3, 1e-2)).variants == [Config(lr=1e-3), Config(lr=1e-2)]
    assert Config(rank=(1, 2), lr=1e-2).variants == [Config(rank=(1,), lr=1e-2), Config(rank=(2,), lr=1e-2)]


# ---- Recipes -------------------------------------------------------------------------------------

def test_a_recipe_decides_what_is_not_given_and_no_recipe_leaves_the_presets():
    assert tuned(2304, 26)["lr"] < tuned(1024, 26)["lr"] < tuned(1024, 6)["lr"]
    preset = PRESETS["tiny-gemma-2"]
    assert configure({}).lr == tuned(192, 6)["lr"] and configure({}).batch_size == preset.lora["batch_size"] == 2
    assert configure({"optimizer": "adamw"}).lr == tuned(192, 6, "adamw")["lr"] != configure({}).lr
    small = configure({"model": "tiny-gemma-2-small", "sae": ("an SAE",)})
    assert small.lr == tuned(64, 4)["lr"] and small.batch_size == 2
    paper = configure({"recipe": "paper"})
    assert {name: getattr(paper, name) for name in PAPER} == PAPER
    assert configure({"recipe": "paper", "lr": 1e-3}).lr == 1e-3
    found = configure({"recipe": "tuned"})
    expected = tuned(192, 6)
    assert {name: getattr(found, name) for name in expected} == expected and found.sae_lr is None
    assert found.tokens == preset.lora["tokens"]
    both, expected = configure({"recipe": "tuned", "train_sae": True}), tuned(192, 6, train_sae=True)
    assert {name: getattr(both, name) for name in expected} == expected and both.optimizer == "muon" and both.batch_size == 1
    assert configure({"train_sae": True}).sae_lr == both.sae_lr
    of_paper = configure({"recipe": "paper", "train_sae": True})
    assert of_paper.sae_lr == preset.finetune["lr"]
    assert configure({"optimizer": "adamw", "train_sae": True}).lr == tuned(192, 6, "adamw")["lr"] != both.lr
    assert configure({"method": "finetune", "sae": (preset.sae,)}).lr == preset.finetune["lr"]


def test_the_paper_s_models_are_trained_as_published_unless_asked_otherwise():
    for name in ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b", "llama-3.1-8b"):
        assert not set(PAPER) & (set(PRESETS[name].lora) | set(PRESETS[name].common)), name
    assert {name: getattr(Config(), name) for name in PAPER} == PAPER


def test_an_sae_that_trains_is_float32_whatever_its_preset_says_of_frozen_ones():
    assert PRESETS["llama-3.1-8b"].lora["sae_dtype"] == "bfloat16"
    alone = configure({"model": "llama-3.1-8b", "sae": ("an SAE",), "method": "finetune"})
    both = configure({"model": "llama-3.1-8b", "sae": ("an SAE",), "train_sae": True})
    assert alone.sae_dtype == both.sae_dtype == "float32"
    assert alone.lr == both.sae_lr == BY_METHOD["finetune"]["lr"] and alone.lr_decay


def test_a_step_of_muon_moves_a_matrix_in_all_its_directions_at_about_one_speed():
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.zeros(8, 32))
    matrix.grad = torch.diag(torch.logspace(0, -2, 8)) @ torch.linalg.qr(torch.randn(32, 8)).Q.T
    muon([{"params": [matrix]}], Config(optimizer="muon", lr=1.0)).step()
    speeds = torch.linalg.svdvals(matrix.detach()) / (0.2 * 32 ** 0.5)              # in steps of AdamW's size
    assert matrix.grad.norm(dim=1).max() > 90 * matrix.grad.norm(dim=1).min()
    assert 0.5 < speeds.min() and speeds.max() < 1.5


@pytest.mark.parametrize("method, option, value", [
    ("finetune", "--optimizer", "muon"), ("topk", "--optimizer", "muon"),
    ("finetune", "--recipe", "tuned")])
def test_the_adapters_optimiser_and_recipes_are_for_adapters(method, option, value):
    assert f"{option} has no effect" in refusal("train", "--method", method, option, value)
