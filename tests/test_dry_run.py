"""--dry-run: what a run would fetch, train and hold in memory, from configurations alone."""
import os
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

import train
from conftest import GEMMA, write_model, write_sae
from helpers import command, processes, read, refusal, words
from lorasae.io import sae_readers
from lorasae.io.presets import PRESETS
from lorasae.io.saes import load_sae
from lorasae.runs import dry_run

TOKENIZER = Path(__file__).parents[1] / "lorasae/tiny/gemma-2/tokenizer.json"


@pytest.fixture
def plan(capsys):
    """plan(*words): the rows of the table that --dry-run prints, {name: value}."""
    def run(*arguments):
        capsys.readouterr()
        command("train", *arguments, "--dry-run")
        lines = [line for line in capsys.readouterr().out.splitlines()
                 if not line.startswith("fetch")]
        return {line[:16].strip(): line[16:] for line in lines}
    return run


def trainable(rows):
    return int(rows["trainable"].split()[0].replace(",", ""))


@pytest.mark.parametrize("kind, more", [
    ("lora", ()), ("lora", ("--targets", "q_proj", "v_proj", "--adapt", "next")), ("several", ()),
    ("both", ()), ("finetune", ()), ("topk", ()), ("jumprelu", ())])
def test_parameters_are_counted_as_the_run_counts_them(site, finished, plan, kind, more):
    run = finished(kind, *more)
    results = read(run / "results.json")
    if kind == "several":
        expected = sum(own["trainable_parameters"] for own in results["ranks"].values())
    elif kind in ("topk", "jumprelu"):
        expected = sum(parameter.numel() for parameter in load_sae(run).parameters())
    else:
        expected = results["trainable_parameters"]
    assert trainable(plan(*words(site, kind, *more))) == expected


def test_a_dry_run_describes_the_run_and_writes_nothing(site, plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = plan(*words(site))
    assert rows["steps"] == "20 of 2 x 32 tokens, 1,280 in all" and rows["text"] == f"{site}/text"
    assert rows["SAE"] == "128 latents at the output of block 1"
    assert rows["recipe"].startswith("paper: adamw at 0.001, dropout 0.1")
    assert "of blocks 0 to 3" in rows["adapters"]                      # a TopK's default
    assert "of blocks 2 3" in plan(*words(site, "lora", "--adapt", "after"))["adapters"]
    assert rows["time"].startswith("unknown") and not list(tmp_path.iterdir())


def test_the_time_is_estimated_from_an_earlier_run(site, finished, plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished("lora"), tmp_path / "runs/earlier")
    joint = shutil.copytree(finished("several"), tmp_path / "runs/joint")       # a slower pace
    for path in (joint / "metrics.jsonl", joint / "rank-4/results.json"):
        os.utime(path, (2e9, 2e9))                      # the newest
    (tmp_path / "runs/half").mkdir()
    (tmp_path / "runs/half/results.json").write_text("[]")              # not one of our runs
    assert "tokens/s of runs/earlier" in plan(*words(site, "lora", "--tokens", "1M"))["time"]
    assert plan(*words(site, "topk"))["time"].startswith("unknown")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_planned_offline_and_without_a_gpu(name, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for method in ("lora", "topk", "jumprelu", "e2e", "finetune"):
        if PRESETS[name].sae or method not in ("lora", "finetune"):
            plan("--model", name, "--method", method, "--device", "cuda")
    if name == "gemma-2-2b":                            # the paper's headline run
        rows = plan("--model", name)
        assert trainable(rows) == 41_533_440 and rows["trainable"].endswith(" 2,614,341,888")


def test_no_matrix_of_an_sae_is_read(site, plan, monkeypatch):
    monkeypatch.setattr(sae_readers.Parts, "matrix", lambda self, name: 1 / 0)
    for kind in ("lora", "finetune"):
        assert plan(*words(site, kind))["SAE"].startswith("128 latents")


@pytest.mark.parametrize("kind, change", [              # for adapters: tests/test_train.py
    ("both", ["--thresholds", "frozen"]), ("topk", ["--k", 97]), ("jumprelu", ["--l0", 96]),
    ("e2e", ["--layer", 4])], ids=str)
def test_the_run_refuses_what_the_plan_refuses_in_the_same_words(site, tmp_path, kind, change):
    arguments = words(site, kind, *change, "--out", tmp_path / "run")
    expected = refusal("train", *arguments)
    assert refusal("train", *arguments, "--dry-run") == expected
    assert not list(tmp_path.iterdir())


def test_the_plan_warns_if_there_is_too_little_memory(site, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "memory_of", lambda device: 10 ** 6)
    command("train", *words(site), "--dry-run")
    assert "cpu has 1.00MB: try --dtype bfloat16 or lower --micro-batch" in capsys.readouterr().err


def peak(folder, arguments):
    """The peak memory of a run in its own process, in bytes."""
    process = processes().Process(target=train.main, args=([*arguments, "--out", str(folder)],))
    process.start()
    process.join()
    return read(folder / "results.json")["peak_memory_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the peak of one process")
@pytest.mark.parametrize("kind", ["lora", "topk"])
def test_the_estimate_is_within_a_factor_of_1_5_of_the_memory_used(site, kind, tmp_path, plan):
    raw = {**GEMMA, "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 16384,
           "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = write_model(tmp_path / "model", raw, scale=0.02)
    shutil.copy(TOKENIZER, model)
    write_sae(model / "sae", 256)
    arguments = words(tmp_path, kind, "--data", site / "text", "--context", 256, "--tokens", 1024,
                      "--eval-tokens", 1024, model="model")
    size = plan(*arguments)["memory"].split()[1]
    estimate = float(size[:-2]) * {"MB": 1e6, "GB": 1e9}[size[-2:]]

    almost_nothing = peak(tmp_path / "tiny", words(site, kind, "--tokens", 64))
    runs = [peak(tmp_path / name, arguments) for name in ("run", "again")]
    measured = min(runs) - almost_nothing               # text is written meanwhile
    assert measured / 1.5 < estimate < 1.5 * measured, f"measured {measured / 1e6:.0f} MB"
