"""The two commands as a user sees them: what a run leaves, agreement with eval, and errors."""
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import GEMMA
from helpers import (
    command, counted, metrics, misuse, random_sae, read, refusal, transformers_model, words)
from lorasae.io.saes import load_sae, save_sae
from lorasae.lora import base
from lorasae.runs import folder as run_folder, setting as run_setting
from lorasae.runs.config import BOTH, OPTIONS, Config
from lorasae.runs.folder import Run
from lorasae.runs.setting import open_run, runs_in
from lorasae.runs.training import same_model
from lorasae.sae import TopK
from test_bad_files import FILES as DAMAGES, JSONS

ROOT = Path(__file__).parent.parent
AGREES = ("ce_base", "ce_sae", "kl_sae", "gap_closed", "kl_gap_closed", "l0_sae")


# ---- What a run leaves behind --------------------------------------------------------------------

def test_a_run_prints_where_it_writes_how_far_it_is_and_what_it_found(site, tmp_path, capsys):
    run = tmp_path / "run"
    with counted(Run, "log") as logged, counted(torch.nn.functional, "dropout") as dropped:
        command("train", *words(site, "lora"), "--out", run)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == ""                            # not a terminal: no progress bar
    assert lines[0] == f"writing to {run}/"
    tenths = re.findall(r"^ *(\d+)%  step (\d+) of 20  ", printed.out, re.MULTILINE)
    assert tenths == [(f"{10 * i}", f"{2 * i}") for i in range(1, 11)]
    assert any(line.startswith("with SAE + LoRA") for line in lines)
    assert "KL gap closed" in printed.out and f"python eval.py {run} recomputes" in lines[-1]

    config, results = (read(run / name) for name in ("config.json", "results.json"))
    before, after = results["ce_base"], results["ce_sae"]
    assert lines[6] == (
        f"before training, on 8 of 8 held-out sequences: CE {before:.4f} -> {after:.4f} with the "
        f"SAE ({after - before:+.4f}), L0 8.0, explained variance "
        f"{results['explained_variance_sae']['1']:.1%}")
    assert results["kl_adapted"] < results["kl_sae"] and config["steps"] == 20
    assert results["train_tokens"] == 1280 and results["eval_tokens"] == 256
    assert {"seconds", "tokens_per_second", "peak_memory_bytes", *AGREES} < results.keys()
    assert config["rank"] == [4] and config["versions"].keys() == {"python", "torch", "numpy"}
    assert [line["step"] for line in metrics(run)] == [8, 10, 16, 20]
    assert metrics(run)[0].keys() == {"step", "tokens", "kl", "grad_norm"}
    of_steps = [call.args[2] for call in logged.call_args_list[:8]]
    for name in ("kl", "grad_norm"):
        mean = sum(float(values[name]) for values in of_steps) / 8
        assert metrics(run)[0][name] == pytest.approx(mean)
    assert {call.args[2] for call in dropped.call_args_list} == {True, False}   # training, or not


LEFT = {"config.json", "metrics.jsonl", "results.json", "checkpoint", "text", ".lock"}
TENTHS = {f"sae-{10 * i}pct" for i in range(1, 10)}
MADE = {
    "lora": {"adapter", "sequences.json"}, "several": {"rank-1", "rank-4", "rank-16"},
    "both": {"adapter", "sae", "sequences.json"}, "finetune": {"sae", "sequences.json"},
    **dict.fromkeys(("topk", "jumprelu", "e2e"), {"sae", "sequences.json", *TENTHS})}


@pytest.mark.parametrize("kind", MADE)
def test_eval_of_a_runs_files_finds_what_training_found(finished, tmp_path, kind):
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


def test_a_model_is_adapted_to_two_saes_on_its_mlps_outputs(site, tmp_path):
    two = {layer: tmp_path / str(layer) for layer in (1, 2)}
    for layer, folder in two.items():
        sae = random_sae("topk", GEMMA["hidden_size"], seed=layer)
        sae.site, sae.after_norm = "mlp", True
        save_sae(sae, folder, model_name="gemma2", layer=layer, context=32)
    arguments = words(site, "lora", "--site", "mlp", "--layer", *two, "--sae", *two.values())
    command("train", *arguments, "--out", tmp_path / "run")
    with counted(run_setting, "settled") as settled:
        command("eval", tmp_path / "run", "--threads", 7)
    assert settled.call_args.args[1] == 7
    files = (tmp_path / "run/results.json", tmp_path / "run/eval-fidelity.json")
    results, again = map(read, files)
    assert all(results[name] == again[name] for name in AGREES)
    assert results["l0_sae"].keys() == {"1", "2"}

    setting = open_run(tmp_path / "run")
    tokens = setting.text.held_out
    for losses, attached in (("ce_adapted", nullcontext), ("ce_sae", partial(base, setting.model))):
        with attached():
            logits = setting.model(tokens, setting.saes)
        ce = torch.nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:])
        assert results[losses] == pytest.approx(ce.item(), rel=1e-5)


MODES = {"several": "lora", "both": BOTH}               # runs whose kind is not their method
OUTSIDE = ("check", "__post_init__")                    # these read every field


@pytest.mark.parametrize("kind", MADE)
def test_every_option_of_a_method_is_read_during_its_run(site, tmp_path, monkeypatch, kind):
    """An option that is never read has no effect and should be refused."""
    def watched(config, name):
        caller = sys._getframe(1).f_code
        if caller.co_name not in OUTSIDE and "dataclasses" not in caller.co_filename:
            read.add(name)
        return object.__getattribute__(config, name)

    read, mode = set(), MODES.get(kind, kind)
    monkeypatch.setattr(Config, "__getattribute__", watched)
    command("train", *words(site, kind, "--tokens", 128), "--out", tmp_path / "run")
    assert {name for name in OPTIONS if mode in OPTIONS[name]["read_by"]} <= read


# ---- A run's files are enough --------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["several", "both"])
def test_eval_needs_neither_the_text_nor_the_original_folder(site, tmp_path, monkeypatch, kind):
    """Model, SAE and text are relative paths; then the text is deleted and the run is moved."""
    for name in ("gemma2", "text"):
        shutil.copytree(site / name, tmp_path / "there" / name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    command("train", *words(".", kind, "--tokens", 128), "--out", "run")
    shutil.move(tmp_path / "there/run", tmp_path / "here/run")
    shutil.rmtree(tmp_path / "there/text")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("LORASAE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("lorasae.io.shards.files", lambda source: 1 / 0)
    run = Path("run/rank-4" if kind == "several" else "run")
    command("eval", f"~/{run}")
    results, again = (read(run / name) for name in ("results.json", "eval-fidelity.json"))
    assert again["kl_adapted"] == results["kl_adapted"]
    command("train", "--merge", f"~/{run}")
    assert (run / "merged/model.safetensors").exists()

    shutil.move(tmp_path / "there/gemma2", tmp_path / "here")
    for script, *how in (("eval",), ("train", "--merge")):
        shutil.rmtree(run / "merged", ignore_errors=True)
        assert f"there is no model {tmp_path}/there/gemma2" in refusal(script, *how, run)


@pytest.mark.parametrize("model, dtype", [
    ("gemma2", "float32"), ("gemma3", "float32"), ("llama", "bfloat16")])
def test_a_merged_run_loads_in_transformers_with_the_adapted_logits(
        site, model, dtype, tmp_path, capsys):
    """Merging a bf16 run, too, loses no part of the adapter."""
    from lorasae import load_adapter, load_model
    run, how = tmp_path / "run", words(site, "lora", "--tokens", 256, model=model)
    command("train", *how, "--dtype", dtype, "--out", run)
    command("train", "--merge", run)
    oracle = transformers_model(run / "merged")
    tokens = torch.randint(3, 97, (2, 40))
    adapted = load_adapter(load_model(site / model), run / "adapter")(tokens)
    assert (oracle(tokens).logits - adapted).abs().max() <= 1e-4
    assert (run / "merged/tokenizer.json").exists()
    assert "merged already exists" in refusal("train", "--merge", run)


# ---- Damaged files -------------------------------------------------------------------------------

SPOILT = {name: (DAMAGES | JSONS)[name]
          for name in ("half", "garbage", "a folder", "null", "a list", "deep")}
FACTS = [                               # command, kind of run, file, a key in the file
    ("--suite tenths", "topk", "sae-50pct/training.json", "tokens"),
    ("--suite fidelity", "both", "sequences.json", "before"),
    ("--card", "lora", "results.json", "ci90"),
    ("--card", "topk", "results.json", "l0_sae"),
    ("--card", "several", "rank-4/results.json", "ce_adapted"),
    ("--card", "lora", "adapter/adapter_config.json", None),
]


@pytest.mark.parametrize("how, kind, name, key", FACTS)
def test_a_wrong_or_missing_fact_in_a_run_is_one_line(finished, tmp_path, how, kind, name, key):
    good = finished(kind)
    values = ["gone", "seven", [1]]
    if key == "before":
        values.append({**read(good / name)[key], "l0": {"1": "seven"}})
    for number, value in enumerate(values):
        run = Path(shutil.copytree(good, tmp_path / f"run{number}"))
        facts = read(good / name)
        facts = {**facts, key: value} if key else value
        if value == "gone":
            facts.pop(key) if key else (run / name).unlink()
        (run / name).write_text(json.dumps(facts))
        names = ["--model", "google/gemma-2-2b"] + ["--sae", "o/s"] * (kind != "topk")
        call = ["train", how, run, *names] if how == "--card" else ["eval", run, *how.split()]
        assert str(run) in refusal(*call)
        assert not [*run.glob("eval-*")]


# ---- Checks before training ----------------------------------------------------------------------

def test_an_sae_that_is_useless_or_of_another_model_gives_a_warning(site, tmp_path, capsys):
    sae = load_sae(site / "gemma2/sae")
    sae.W_enc.data *= 100
    save_sae(sae, tmp_path / "sae", model_name="google/gemma-9", layer=1, context=32)
    arguments = words(site, "lora", "--tokens", 64, "--sae", tmp_path / "sae")
    command("train", *arguments, "--out", tmp_path / "run")
    less, other = capsys.readouterr().err.splitlines()
    assert less.startswith("warning: the SAE at layer 1 explains less than the mean activation")
    assert "was trained on google/gemma-9, as its file says, not on" in other


@pytest.mark.parametrize("model, same, others", [
    ("/here/gemma2", ["someone/Gemma2"], ["google/gemma-9", "gemma2-large"]),
    ("gemma-2-2b", ["", None, "gemma-2-2b", "google/gemma-2-2b", "unsloth/gemma-2-2b"],
     ["gemma-2-9b"]),
    ("google/gemma-2-2b", ["gemma-2-2b"], []),
    ("google/gemma-3-1b-pt", ["gemma-3-1b"], [])])
def test_a_model_can_have_several_names(model, same, others):
    assert all(same_model(name, model) for name in same)
    assert not any(same_model(name, model) for name in others)


# ---- Mistakes ------------------------------------------------------------------------------------

LATE = (                                                # --dry-run does not find these
    "can't decode byte", "is too short", "--device cuda:99: PyTorch sees",
    "--shard spreads a model over", "empty.txt/run")


@pytest.mark.parametrize("change, message", [
    (["--model", "bare"], "config.json"),
    (["--sae", "narrow"], "reads activations of width 40, but the model's have 48"),
    (["--sae", "narrow", "narrow"], "--sae names 2 SAEs for --layer 1"),
    (["--layer", 4], "--layer 4 is out of range"),
    (["--width", 64], "--width 64: the SAE has 128 latents"),
    (["--train-sae", "--sae-lr", 1, "--thresholds", "frozen"], "this SAE has none"),
    (["--device", "cuda:99"], LATE[2]), (["--shard"], LATE[3]),
    (["--adapt", "3-5"], "or block numbers such as 3 4 5"),
    (["--adapt", 7], "cannot adapt blocks [7]: the model has blocks 0 to 3"),
    (["--l0", 30], "does not state its L0: leave out --l0"),
    (["--layer", 3], "sae was trained on block 1, not 3: pass --layer 1, or another SAE"),
    (["--sae", "last", "--layer", 3, "--adapt", "after"], "no block comes after the SAE at layer"),
    (["--data", "empty.txt"], LATE[1]), (["--data", "latin1.txt"], LATE[0]),
    (["--data", ""], "there is no file or folder : expected"),
    (["--context", 10 ** 6], "--context 1000000 is too long for"),
    (["--eval-tokens", "1M"], LATE[1]),
    (["--out", "taken"], "--resume taken continues"), (["--out", "mine"], "mine is not empty"),
    (["--out", "empty.txt/run"], LATE[4]),
])
def test_mistakes_are_one_line_and_leave_no_files(site, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("café\n".encode("latin-1") * 5000)
    for name in ("taken/config.json", "mine/notes.txt", "bare/notes.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    for name, D, layer in (("narrow", 40, 1), ("last", 48, 3)):
        save_sae(TopK(D, 64, 4), tmp_path / name, model_name="gemma2", layer=layer, context=32)
    before = {path for path in tmp_path.rglob("*")}
    out = [] if "--out" in change else ["--out", "run/inside"]
    arguments = words(site, "lora", *change, *out)
    line = refusal("train", *arguments)
    assert message in line
    assert message in LATE or refusal("train", *arguments, "--dry-run") == line
    assert {path for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("given, message", [
    (["--eval-tokens", "-5"], "'-5' is not"),
    (["--rank", "²"], "--rank: expected a whole number, not '²'"),
    (["--lr", "fast"], "--lr: expected a number, not 'fast'"),
    (["--l0", "x" * 5000], "--l0: expected a number, not 'xxxxxxx"),
    (["--lr", "1e-3,5e-4"], "'1e-3,5e-4'; separate values by spaces"),
    (["--targets", "q_proj,v_proj"], "separate values by spaces"),
    (["--method", "magic"], "--method: invalid choice: 'magic'"),
    (["--tok", "5"], "unrecognized arguments: --tok 5"),
    (["--out"], "--out: expected one argument"),
    (["--resume", "run", "--lr", "1"], "--resume takes the run's settings: leave out --lr")])
def test_bad_arguments_exit_with_status_2(capsys, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    assert message in misuse(capsys, "train", *given) and not list(tmp_path.iterdir())


def test_a_run_that_cannot_be_used_is_one_clear_line(site, finished, tmp_path, capsys):
    half = tmp_path / "half"
    half.mkdir()
    for script, *how in (("eval",), ("train", "--merge"), ("train", "--resume")):
        assert f"there is no run in {half}" in refusal(script, *how, half)
    shutil.copy(finished("lora") / "config.json", half)
    for script, *how in (("eval",), ("train", "--merge")):
        assert "is not finished: python train.py --resume" in refusal(script, *how, half)
    assert "nothing to merge" in refusal("train", "--merge", finished("topk"))
    sweep = finished("several")
    assert f"merge one of them, such as {sweep}/rank-1" in refusal("train", "--merge", sweep)
    other = Path(shutil.copytree(finished("lora"), tmp_path / "other"))
    config = read(other / "config.json")
    (other / "config.json").write_text(json.dumps({**config, "sae": []}))
    assert "--sae names 0 SAEs for --layer 1" in refusal("eval", other)
    (other / "config.json").write_text(json.dumps(config))
    path = other / "adapter/adapter_config.json"
    path.write_text(path.read_text().replace("/gemma2", "/gemma3"))
    assert "is for an adapter of" in refusal("eval", other)


def test_a_nan_loss_stops_the_run_and_names_the_step(site, tmp_path):
    how = ("--lr", 1e15, "--clip", 1e15, "--checkpoint-every", 1)
    line = refusal("train", *words(site, "lora", *how), "--out", tmp_path / "run")
    assert re.search(r"became nan at step \d+: start again with a lower --lr", line)
    assert not (tmp_path / "run/adapter").exists()


# ---- Terminals, pipes and disks ------------------------------------------------------------------

def started(arguments, stdout=subprocess.PIPE, **environment):
    """train.py in a separate process."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)], text=True,
        stdout=stdout, stderr=subprocess.PIPE, env={**os.environ, **environment})


def test_the_script_runs_in_an_ascii_terminal(site, tmp_path):
    """The tables' ± is printed as a question mark."""
    arguments = [*words(site, "lora", "--tokens", 64), "--out", tmp_path / "añb"]
    process = started(arguments, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    printed, errors = process.communicate()
    assert process.returncode == 0 and printed.isascii() and not errors
    assert (tmp_path / "añb/results.json").exists()


def test_a_closed_pipe_is_one_line_and_loses_no_results(site, tmp_path):
    """python train.py | head"""
    process = started([*words(site, "lora", "--tokens", 640), "--out", tmp_path / "run"])
    assert process.stdout.readline().startswith("writing to")
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0                          # the run continues silently
    assert errors.count("\n") == 1 and "standard output was closed" in errors
    assert (tmp_path / "run/results.json").exists()
    assert (tmp_path / "run/adapter/adapter_config.json").exists()


def no_room(path):
    raise OSError(28, "No space left on device", str(path))


def test_a_full_output_device_is_one_line_and_leaves_no_files(site, tmp_path):
    with open("/dev/full", "w") as full:
        process = started([*words(site), "--out", tmp_path / "run"], stdout=full)
        _, errors = process.communicate()
    assert process.returncode == 1 and errors.count("\n") == 1 and "No space left" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("full", [
    "metrics.jsonl", "step-00000008.pt", "config.json", "held-out.npy",
    "adapter_model.safetensors"])
def test_a_run_resumes_after_a_full_disk(site, tmp_path, monkeypatch, full):
    """Whichever file did not fit. No partial file is left."""
    def opened(path, *how, **named):
        return no_room(path) if Path(path).name == full else open(path, *how, **named)

    def replaced(source, target):
        return no_room(target) if Path(target).name == full else replace(source, target)

    run, replace = tmp_path / "run", os.replace
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "open", opened, raising=False)
        patch.setattr(os, "replace", replaced)
        line = refusal("train", *words(site, "lora", "--tokens", 640), "--out", run)
    assert f"{run}/" in line and full in line and "No space left" in line
    assert not list(tmp_path.rglob("*.part"))
    if full in ("config.json", "held-out.npy"):         # the run had not begun
        assert not run.exists()
        return
    command("train", "--resume", run)
    assert read(run / "results.json")["train_tokens"] == 640


def test_a_disk_too_full_to_merge_leaves_no_partial_checkpoint(finished, tmp_path, monkeypatch):
    run = Path(shutil.copytree(finished("lora"), tmp_path / "run"))
    before = set(run.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("train.copy_beside_weights", lambda *_: no_room(run / "tokenizer.json"))
        assert "No space left" in refusal("train", "--merge", run)
    assert set(run.rglob("*")) == before


def test_a_run_with_a_presets_name_is_evaluated_with_its_own_sae(finished, tmp_path, monkeypatch):
    shutil.copytree(finished("topk"), tmp_path / "tiny-gemma-2")
    monkeypatch.chdir(tmp_path)
    command("eval", "tiny-gemma-2")
    found, trained = (read(folder / name) for folder, name in (
        (tmp_path / "tiny-gemma-2", "eval-fidelity.json"), (finished("topk"), "results.json")))
    assert found["ce_sae"] == trained["ce_sae"]


def test_an_unfinished_sae_run_is_refused_and_its_partial_saes_are_named(site, finished, tmp_path):
    run = Path(shutil.copytree(finished("topk"), tmp_path / "run"))
    shutil.rmtree(run / "sae")
    for tenth in list(run.glob("sae-*pct"))[1:]:
        shutil.rmtree(tenth)
    message = refusal("train", *words(site, "lora", "--sae", run), "--out", tmp_path / "out")
    assert "is a run without an SAE in sae/: finish it" in message and "sae-50pct" in message
