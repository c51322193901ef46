"""The two commands as a user meets them: what a run leaves, that eval agrees, how errors end."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import command, metrics, misuse, products, read, refusal, words
from lorasae.io.saes import load_sae, save_sae
from lorasae.runs import folder as run_folder
from lorasae.runs.config import read_config
from lorasae.runs.setting import open_run, runs_in
from lorasae.runs.training import same_model
from lorasae.sae import TopK

ROOT = Path(__file__).parent.parent
AGREES = ("ce_base", "ce_sae", "kl_sae", "gap_closed", "kl_gap_closed", "l0_sae")


# ---- What a run leaves ---------------------------------------------------------------------------

def test_a_run_says_where_it_writes_how_far_it_is_and_what_it_found(site, tmp_path, capsys):
    run = tmp_path / "run"
    command("train", *words(site, "lora"), "--out", run)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == ""                            # not a terminal: no progress bar
    assert lines[0] == f"writing to {run}/"
    assert lines[1].endswith("paper: adamw at 0.001, dropout 0.1")
    assert lines[5].endswith(" 20 of 2 x 32 tokens, 1,280 in all")
    assert lines[6].startswith("before training, on 8 of 8 held-out sequences: CE ")
    tenths = re.findall(r"^ *(\d+)%  step (\d+) of 20  ", printed.out, re.MULTILINE)
    assert tenths == [(f"{10 * i}", f"{2 * i}") for i in range(1, 11)]
    assert any(line.startswith("with SAE + LoRA") for line in lines)
    assert "KL gap closed" in printed.out and f"python eval.py {run} recomputes" in lines[-1]

    config, results = (read(run / name) for name in ("config.json", "results.json"))
    assert results["kl_adapted"] < results["kl_sae"] and config["steps"] == 20
    assert results["train_tokens"] == 1280 and results["eval_tokens"] == 256
    assert {"seconds", "tokens_per_second", "peak_memory_bytes", *AGREES} < results.keys()
    assert config["rank"] == [4] and config["versions"].keys() == {"python", "torch", "numpy"}
    assert [line["step"] for line in metrics(run)] == [8, 10, 16, 20]
    assert metrics(run)[0].keys() == {"step", "tokens", "kl", "grad_norm"}


LEFT = {"config.json", "metrics.jsonl", "results.json", "checkpoint", "text", ".lock"}
TENTHS = {f"sae-{10 * i}pct" for i in range(1, 10)}
MADE = {
    "lora": {"adapter", "sequences.json"}, "several": {"rank-1", "rank-4", "rank-16"},
    "both": {"adapter", "sae", "sequences.json"}, "finetune": {"sae", "sequences.json"},
    **dict.fromkeys(("topk", "jumprelu", "e2e"), {"sae", "sequences.json", *TENTHS})}


@pytest.mark.parametrize("kind", MADE)
def test_eval_finds_in_a_runs_files_what_training_found(finished, tmp_path, kind):
    run = Path(shutil.copytree(finished(kind), tmp_path / "run"))
    assert {path.name for path in run.iterdir()} == LEFT | MADE[kind]
    assert {path.name for path in (run / "text").iterdir()} >= {"held-out.npy", "text.json"}
    command("eval", run)
    for folder in runs_in(run):
        results, again = (read(folder / name) for name in ("results.json", "eval-fidelity.json"))
        sequences = read(folder / "sequences.json")
        assert np.mean(sequences["sae"]["ce"]) == pytest.approx(results["ce_sae"])
        assert len(sequences["documents"]) == len(sequences["base"]["kl"]) == 8
        names = [name for name in (*AGREES, "ce_adapted", "kl_adapted", "l0") if name in again]
        for name in names:
            assert results[name] == again[name], name
        assert len(names) >= (4 if kind in ("topk", "jumprelu", "e2e") else 6)


def test_the_sae_of_each_tenth_says_what_it_is(finished):
    run = finished("topk")
    made = read(run / "sae-50pct/training.json")
    assert (made["percent"], made["step"], made["tokens"]) == (50, 10, 640)
    assert not torch.equal(load_sae(run / "sae-50pct").W_enc, load_sae(run).W_enc)


def test_the_same_seed_gives_the_same_adapter(site, finished, tmp_path):
    for name, seed in (("same", 42), ("other", 2)):             # adapters, dropout, order of text
        command("train", *words(site, "lora", "--seed", seed), "--out", tmp_path / name)
    same, other = (products(tmp_path / name) for name in ("same", "other"))
    assert same == products(finished("lora")) != other


def test_micro_batches_and_frozen_parts_ahead_change_memory_and_not_the_result(
        site, finished, tmp_path):
    ways = ([], ["--micro-batch", 1], ["--ahead", 8])
    found = [read(finished("lora", "--dropout", 0, *way) / "results.json") for way in ways]
    for other in found[1:]:
        assert other["kl_adapted"] == pytest.approx(found[0]["kl_adapted"], rel=1e-4)


def test_adapters_may_be_on_some_projections_only(site, finished):
    run = finished("lora", "--targets", "q_proj", "v_proj", "--adapt", "next")
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    assert {name.split(".self_attn.")[1].split(".")[0] for name in tensors} == {"q_proj", "v_proj"}
    assert all(".layers.2." in name for name in tensors)
    assert read(run / "adapter/adapter_config.json")["target_modules"] == ["q_proj", "v_proj"]
    assert read_config(run).targets == ("q_proj", "v_proj")
    results = read(run / "results.json")
    assert results["trainable_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    adapters = [name for name, _ in open_run(run).model.named_modules() if name.endswith("lora_A")]
    assert len(adapters) == 2


# ---- A run's files are enough --------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["lora", "several", "both"])
def test_eval_needs_neither_the_text_nor_the_folder_where_the_run_began(
        site, tmp_path, monkeypatch, kind):
    """Model, SAE and text are given as relative paths; then the text goes, and the run moves."""
    for name in ("gemma2", "text"):
        shutil.copytree(site / name, tmp_path / "there" / name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    command("train", *words(".", kind, "--tokens", 128), "--out", "run")
    config = read("run" / Path("config.json"))
    assert config["model"] == str(tmp_path / "there/gemma2")
    assert config["sae"] == [str(tmp_path / "there/gemma2/sae")]
    assert config["data"] == str(tmp_path / "there/text")

    shutil.move(tmp_path / "there/run", tmp_path / "here/run")
    shutil.rmtree(tmp_path / "there/text")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("LORASAE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("lorasae.io.shards.files", lambda source: 1 / 0)
    run = Path("run/rank-4" if kind == "several" else "run")
    command("eval", run)
    results, again = (read(run / name) for name in ("results.json", "eval-fidelity.json"))
    assert again["kl_adapted"] == results["kl_adapted"]
    command("train", "--merge", run)
    assert (run / "merged/model.safetensors").exists()


@pytest.mark.parametrize("model", ["gemma2", "llama"])
def test_a_merged_run_loads_in_transformers_with_the_adapted_logits(site, model, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    from lorasae import load_adapter, load_model
    run = tmp_path / "run"
    command("train", *words(site, "lora", "--tokens", 256, model=model), "--out", run)
    command("train", "--merge", run)
    make = transformers.AutoModelForCausalLM.from_pretrained
    oracle = make(run / "merged", attn_implementation="eager")
    tokens = torch.randint(3, 97, (2, 40))
    with torch.no_grad():
        adapted = load_adapter(load_model(site / model), run / "adapter").eval()(tokens)
        assert (oracle(tokens).logits - adapted).abs().max() <= 1e-4
    assert (run / "merged/tokenizer.json").exists()
    assert "merged already exists" in refusal("train", "--merge", run)


# ---- What is looked at before training -----------------------------------------------------------

def saved(sae, folder, model_name, layer=1):
    save_sae(sae, folder, model_name=model_name, layer=layer, context=32)
    return folder


def test_what_the_sae_costs_is_said_before_training(site, finished, tmp_path, capsys):
    results = read(finished("lora") / "results.json")
    capsys.readouterr()
    command("train", *words(site, "lora", "--tokens", 64), "--out", tmp_path / "run")
    printed = capsys.readouterr()
    before, after = results["ce_base"], results["ce_sae"]
    line = (f"CE {before:.4f} -> {after:.4f} with the SAE ({after - before:+.4f}), L0 8.0, "
            f"explained variance {results['explained_variance_sae']['1']:.1%}")
    assert line in printed.out and printed.err == ""


def test_an_sae_of_another_model_or_one_that_explains_nothing_is_a_warning(
        site, tmp_path, capsys):
    sae = load_sae(site / "gemma2/sae")
    sae.W_enc.data *= 100
    folder = saved(sae, tmp_path / "sae", "google/gemma-9")
    arguments = words(site, "lora", "--tokens", 64, "--sae", folder)
    command("train", *arguments, "--out", tmp_path / "run")
    less, other = capsys.readouterr().err.splitlines()
    assert less.startswith("warning: the SAE at layer 1 explains less than its mean would")
    assert "was trained on google/gemma-9, as its file says, not on" in other


@pytest.mark.parametrize("name, model, same", [
    ("google/gemma-9", "/here/gemma2", False), ("gemma2-large", "/here/gemma2", False),
    ("someone/Gemma2", "/here/gemma2", True), ("", "gemma-2-2b", True),
    (None, "gemma-2-2b", True), ("gemma-2-2b", "gemma-2-2b", True),
    ("google/gemma-2-2b", "gemma-2-2b", True), ("unsloth/gemma-2-2b", "gemma-2-2b", True),
    ("gemma-2-9b", "gemma-2-2b", False), ("gemma-2-2b", "google/gemma-2-2b", True)])
def test_a_model_has_several_names(name, model, same):
    assert same_model(name, model) == same


# ---- Mistakes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (["--model", "no-such-model"], "there is no model no-such-model"),
    (["--model", "bare"], "config.json"),
    (["--sae", "no-such-sae"], "there is no SAE no-such-sae"),
    (["--sae", "narrow"], "reads activations of width 40, but the model's have 48"),
    (["--sae", "narrow", "narrow"], "--sae names 2 SAEs for --layer 1"),
    (["--layer", 4], "--layer 4 is out of range"), (["--layer", 1, 1], "names a layer twice"),
    (["--rank", 0], "options: --rank is 0, but should be a whole number, at least 1"),
    (["--lr", "nan"], "--lr is nan, but should be a number, above 0"),
    (["--dropout", 1], "--dropout is 1.0, but should be a number, at least 0, below 1"),
    (["--width", "many"], "pass a number of latents"), (["--seed", 2 ** 63], "--seed is 9223"),
    (["--k", 8], "--k has no effect with --method lora: leave it out"),
    (["--sae-lr", 1], "--sae-lr has no effect with --method lora: leave it out, or pass --train-"),
    (["--train-sae", "--sae-lr", 1, "--thresholds", "frozen"], "this SAE has none; leave it out"),
    (["--device", "gpu"], "--device gpu is not supported: pass cpu, cuda, cuda:1 or mps"),
    (["--device", "cuda:99"], "--device cuda:99: PyTorch sees"),
    (["--device", "meta"], "--device meta is not supported"),
    (["--shard"], "--shard spreads a model over several processes"),
    (["--adapt", "before"], "--adapt before: expected after, all, next"),
    (["--adapt", "²"], "expected after, all, next"),
    (["--adapt", 7], "cannot adapt blocks [7]: the model has blocks 0 to 3"),
    (["--layer", 3], "sae was trained on block 1, not 3: pass --layer 1, or another SAE"),
    (["--sae", "last", "--layer", 3, "--adapt", "after"], "no block comes after the SAE at layer"),
    (["--data", "no-such-text"], "no file or folder no-such-text"),
    (["--data", "empty.txt"], "empty.txt"), (["--data", "latin1.txt"], "UTF-8"),
    (["--data", ""], "no file or folder ; expected one"),
    (["--context", 10 ** 6], "--context 1000000 is more than"),
    (["--eval-tokens", "1M"], "is too short"),
    (["--out", "taken"], "--resume taken alone"), (["--out", "mine"], "already holds files"),
    (["--out", "empty.txt/run"], "empty.txt/run"),
])
def test_mistakes_are_answered_in_one_line_and_leave_nothing(
        site, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("café\n".encode("latin-1") * 5000)
    for name in ("taken/config.json", "mine/notes.txt", "bare/notes.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    saved(TopK(40, 64, 4), tmp_path / "narrow", "other")
    saved(TopK(48, 64, 4), tmp_path / "last", "gemma2", layer=3)
    before = {path for path in tmp_path.rglob("*")}
    out = [] if "--out" in change else ["--out", "run/inside"]
    assert message in refusal("train", *words(site, "lora", *change), *out)
    assert {path for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("given, message", [
    (["--tokens", "many"], "'many' is not a positive number of tokens, such as 15M, 1.5e6"),
    (["--tokens", "²"], "'²' is not"), (["--eval-tokens", "-5"], "'-5' is not"),
    (["--tokens", "1e30"], "'1e30' is not"), (["--tokens", "1.5"], "'1.5' is not"),
    (["--rank", "²"], "--rank: invalid int value: '²'"),
    (["--lr", "fast"], "--lr: invalid float value"),
    (["--method", "magic"], "--method: invalid choice: 'magic'"),
    (["--targets", "head"], "--targets: invalid choice: 'head'"),
    (["--nothing", "1"], "unrecognized arguments: --nothing 1"),
    (["--tok", "5"], "unrecognized arguments: --tok 5"),
    (["--out"], "--out: expected one argument"),
    (["--resume", "run", "--lr", "1"], "--resume takes every other argument from the run's "
     "config.json: leave out --lr"),
    (["--merge", "run", "--device", "cpu"], "--merge takes every other argument")])
def test_words_that_cannot_be_read_are_one_line_and_status_2(
        capsys, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    assert message in misuse(capsys, "train", *given) and not list(tmp_path.iterdir())


def test_what_is_not_a_finished_run_is_one_clear_line(site, finished, tmp_path, capsys):
    half = tmp_path / "half"
    half.mkdir()
    for script, *how in (("eval",), ("train", "--merge"), ("train", "--resume")):
        assert "has no config.json" in refusal(script, *how, half)
    shutil.copy(finished("lora") / "config.json", half)
    for script, *how in (("eval",), ("train", "--merge")):
        assert "is not finished: python train.py --resume" in refusal(script, *how, half)
    assert "nothing to merge" in refusal("train", "--merge", finished("topk"))
    sweep = finished("several")
    assert f"merge one of them, such as {sweep}/rank-1" in refusal("train", "--merge", sweep)
    assert "no adapter, so --suite tokens" in refusal("eval", finished("topk"), "--suite", "tokens")
    assert "'magic' is unknown" in misuse(capsys, "eval", half, "--suite", "magic")

    other = Path(shutil.copytree(finished("lora"), tmp_path / "other"))
    config = read(other / "config.json")
    (other / "config.json").write_text(json.dumps({**config, "sae": []}))
    assert "--sae names 0 SAEs for --layer 1" in refusal("eval", other)
    (other / "config.json").write_text(json.dumps(config))
    path = other / "adapter/adapter_config.json"
    path.write_text(path.read_text().replace("/gemma2", "/gemma3"))
    assert "is an adapter of" in refusal("eval", other)
    path.unlink()
    assert "adapter_config.json" in refusal("eval", other)


def test_a_loss_that_turns_nan_stops_the_run_and_says_at_which_step(site, tmp_path):
    how = ("--lr", 1e15, "--clip", 1e15, "--checkpoint-every", 1)
    line = refusal("train", *words(site, "lora", *how), "--out", tmp_path / "run")
    assert re.search(r"became nan at step \d+: start again with a lower --lr", line)
    assert not (tmp_path / "run/adapter").exists()


def test_runs_without_out_get_folders_of_their_own_named_after_the_model(
        site, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(site / "gemma2", tmp_path / "gemma2"))
    arguments = words(site, "lora", "--tokens", 64, "--model", ".", "--sae")
    for sae in ("sae", "sae", "nowhere"):
        if sae == "nowhere":
            refusal("train", *arguments, sae)
        else:
            command("train", *arguments, sae)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["gemma2-lora", "gemma2-lora-2"]


# ---- Terminals, pipes and disks ------------------------------------------------------------------

def started(arguments, **environment):
    """train.py in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment})


def test_the_script_runs_in_a_terminal_that_knows_no_greek(site, tmp_path):
    """The tables have ± and the help has √: question marks take their places."""
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    short = words(site, "lora", "--tokens", 64)
    for given, status in (([*short, "--out", tmp_path / "añb"], 0), (["--help"], 0),
                          ([*short, "--out", tmp_path / "ñ", "--lr", "nan"], 1)):
        process = started(given, **ascii_only)
        printed, errors = process.communicate()
        assert process.returncode == status and (printed + errors).isascii()
        assert errors.count("\n") == status             # one line if it fails, else none
    assert (tmp_path / "añb/results.json").exists()


@pytest.mark.parametrize("last_line_read", ["writing to", "100%"])
def test_a_reader_who_leaves_is_one_line_and_costs_no_finished_results(
        site, tmp_path, last_line_read):
    """python train.py | head"""
    process = started([*words(site, "lora"), "--out", tmp_path / "run"])
    while last_line_read not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0                          # the work goes on in silence
    assert errors.count("\n") == 1 and "standard output was closed" in errors
    assert (tmp_path / "run/results.json").exists()
    assert (tmp_path / "run/adapter/adapter_config.json").exists()


@pytest.mark.parametrize("full", [
    "metrics.jsonl", "step-00000008.pt", "config.json", "held-out.npy", "adapter_model.safetensors",
    "results.json"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
        site, tmp_path, monkeypatch, full):
    """Whichever file it meets; no part of a file stays."""
    def no_room(path):
        raise OSError(28, "No space left on device", str(path))

    def opened(path, *how, **named):
        return no_room(path) if Path(path).name == full else open(path, *how, **named)

    def replaced(source, target):
        return no_room(target) if Path(target).name == full else replace(source, target)

    run, replace = tmp_path / "run", os.replace
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "open", opened, raising=False)
        patch.setattr(os, "replace", replaced)
        line = refusal("train", *words(site, "lora"), "--out", run)
    assert f"{run}/" in line and full in line and "No space left" in line
    assert not list(tmp_path.rglob("*.part"))
    if full in ("config.json", "held-out.npy"):         # it had not begun
        assert not run.exists()
        return
    command("train", "--resume", run)
    assert read(run / "results.json")["train_tokens"] == 1280


def test_a_run_with_the_name_of_a_preset_is_evaluated_with_its_own_sae(
        finished, tmp_path, monkeypatch):
    shutil.copytree(finished("topk"), tmp_path / "tiny-gemma-2")
    monkeypatch.chdir(tmp_path)
    command("eval", "tiny-gemma-2")
    found, trained = (read(folder / name) for folder, name in (
        (tmp_path / "tiny-gemma-2", "eval-fidelity.json"), (finished("topk"), "results.json")))
    assert found["ce_sae"] == trained["ce_sae"]


def test_an_sae_of_a_run_that_is_not_finished_is_named_or_refused(site, finished, tmp_path):
    run = Path(shutil.copytree(finished("topk"), tmp_path / "run"))
    shutil.rmtree(run / "sae")
    for tenth in list(run.glob("sae-*pct"))[1:]:
        shutil.rmtree(tenth)
    message = refusal("train", *words(site, "lora", "--sae", run), "--out", tmp_path / "out")
    assert "is a run without an SAE in sae/: finish it" in message and "sae-50pct" in message
