"""The two commands as a user meets them: what a run leaves behind, that evaluation agrees, and how mistakes are answered."""
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from helpers import metrics, misuse, read, refusal
from lorasae.io.saes import save_sae
from lorasae.runs import folder as run_folder
from lorasae.sae import TopK

ROOT = Path(__file__).parent.parent


class Finished(NamedTuple):
    """What is left of a command."""
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Runs a script's main() in this process, in the test's folder; anything but SystemExit is a traceback and fails the test."""
    monkeypatch.chdir(tmp_path)

    def run(script, *words):
        module = importlib.import_module(script.removesuffix(".py"))
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        return Finished(code, *capfd.readouterr())
    return run


@pytest.fixture
def arguments(whole_model, sae_folder, text_folder):
    return ["--model", whole_model, "--sae", sae_folder, "--layer", 1, "--data", text_folder, "--context", 32, "--tokens", 1280,
            "--eval-tokens", 256, "--batch-size", 2, "--rank", 4, "--lr", 1e-3, "--dropout", 0, "--dtype", "float32", "--device", "cpu"]


def one_line(process):
    """The process failed as a user's mistake should: one line on stderr, no traceback, status not zero."""
    assert process.returncode != 0 and "Traceback" not in process.stderr
    lines = [line for line in process.stderr.strip().splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), process.stderr
    return lines[0]


def test_a_run_leaves_everything_behind_and_eval_agrees_with_it(command, arguments, tmp_path):
    process = command("train.py", *arguments, "--out", "run")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""                                         # not a terminal: no progress bar
    assert "with SAE + LoRA" in process.stdout and "gap closed" in process.stdout
    lines = process.stdout.splitlines()
    assert lines[0] == "run/ is where this run writes"
    tenths = [re.match(r" *(\d+)%  step (\d+) of 20  ", line).groups() for line in lines if "  step " in line]
    assert tenths == [(str(10 * i), str(2 * i)) for i in range(1, 11)]
    pasted = re.search(r"python eval.py (\S+) recomputes", process.stdout).group(1)
    run = tmp_path / "run"
    config, results = (read(run / name) for name in ("config.json", "results.json"))
    for key in ("ce_base", "ce_sae", "ce_adapted", "gap_closed", "kl_gap_closed", "kl_sae", "kl_adapted", "l0", "eval_tokens", "train_tokens",
                "tokens_per_second", "peak_memory_bytes", "seconds"):
        assert key in results
    assert results["kl_adapted"] < results["kl_sae"] and results["train_tokens"] == 1280 and config["steps"] == 20
    assert config["rank"] == [4] and config["layer"] == [1] and config["versions"].keys() == {"python", "torch", "numpy"}
    assert [line["step"] for line in metrics(run)] == [10, 20]
    assert {path.name for path in run.iterdir()} == {
        "config.json", "held-out.safetensors", "before.json", "metrics.jsonl", "checkpoint", "adapter", "results.json"}
    assert {path.name for path in (run / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}

    process = command("eval.py", pasted)
    assert process.returncode == 0, process.stderr
    again = read(run / "eval-fidelity.json")
    for key in ("ce_base", "ce_sae", "ce_adapted", "kl_sae", "kl_adapted", "kl_gap_closed"):
        assert again[key] == pytest.approx(results[key], rel=1e-5)
    assert (again["gap_closed"] is None) == (results["gap_closed"] is None)            # the SAE may lower a random model's CE


def test_the_script_itself_runs_and_keeps_a_pipe_clean(arguments, tmp_path):
    process = subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, arguments)], cwd=tmp_path, capture_output=True,
                             text=True)
    assert process.returncode == 0 and process.stderr == "" and (tmp_path / "runs" / "model-lora" / "results.json").exists()


def test_the_same_seed_gives_the_same_adapter(command, arguments, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):             # adapters, dropout and the order of the text
        assert command("train.py", *arguments, "--dropout", 0.1, "--seed", seed, "--out", name).returncode == 0
    a, b, c = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c


def test_micro_batches_change_memory_and_not_the_result(command, arguments, tmp_path):
    for name, more in (("whole", []), ("parts", ["--micro-batch", 1])):
        assert command("train.py", *arguments, *more, "--out", name).returncode == 0
    a, b = (read(tmp_path / name / "results.json") for name in ("whole", "parts"))
    assert a["kl_adapted"] == pytest.approx(b["kl_adapted"], rel=1e-3)


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
@pytest.mark.parametrize("change, message", [
    (["--model", "no-such-model"], "no-such-model"),
    (["--sae", "no-such-sae"], "no-such-sae"),
    (["--layer", 4], "0 to 3"),
    (["--layer", -1], "--layer is '-1', but it must be whole numbers of at least 0"),
    (["--layer", 1, 1], "twice"),
    (["--rank", 0], "--rank is '0', but it must be positive whole numbers"),
    (["--rank", 4, 4], "--rank 4 4 names a rank twice"),
    (["--lr", -1], "--lr is -1.0, but it must be a positive number"),
    (["--lr", "nan"], "--lr is nan, but it must be a positive number"),
    (["--lr", "inf"], "--lr is inf, but it must be a positive number"),
    (["--alpha", "nan"], "--alpha is nan"),
    (["--clip", "inf"], "--clip is inf"),
    (["--dropout", "nan"], "--dropout is nan"),
    (["--dropout", 1], "--dropout is 1.0, but it must be less than 1"),
    (["--weight-decay", -1], "weight-decay"),
    (["--weight-decay", "inf"], "--weight-decay is inf"),
    (["--seed", -1], "--seed is -1, but it must be a number that is not negative"),
    (["--seed", 2 ** 63], "--seed is 9223372036854775808, but it must be a whole number of at most 9223372036854775807"),
    (["--seed", 10 ** 40], "--seed"),
    (["--micro-batch", 0], "--micro-batch is 0"),
    (["--batch-size", 0], "--batch-size is 0"),
    (["--checkpoint-every", 0], "--checkpoint-every is 0"),
    (["--ahead", 0], "--ahead is 0"),
    (["--l0", "nan"], "--l0 is nan, but it must be a positive number"),
    (["--l0", 0], "--l0 is 0.0, but it must be a positive number"),
    (["--device", "gpu"], "--device gpu is no device that PyTorch knows: pass cpu, cuda, cuda:1 or mps"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--device", "cpu:x"], "--device cpu:x"),
    (["--device", "meta"], "not supported"),
    (["--k", 8], "--k has no effect with --method lora: leave it out"),
    (["--adapt", "before"], "after, all, next"),
    (["--adapt", "²"], "after, all, next"),
    (["--adapt", 7], "0 to 3"),
    (["--data", "no-such-text"], "no-such-text"),
    (["--data", "empty.txt"], "empty.txt"),
    (["--data", "latin1.txt"], "UTF-8"),
    (["--data", ""], "--data is '', but it must be a text that is not empty"),
    (["--context", 1], "--context is 1, but it must be at least 2 tokens"),
    (["--context", 10 ** 6], "is more than"),
    (["--eval-tokens", "1M"], "too short"),
    (["--out", "taken"], "already holds a run"),
    (["--out", "file"], "already holds files"),
])
def test_mistakes_are_answered_in_one_line_and_leave_nothing(command, arguments, tmp_path, change, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("café\n".encode("latin-1") * 5000)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    before = {path for path in tmp_path.rglob("*")}
    process = command("train.py", *arguments, *([] if "--out" in change else ["--out", "run"]), *change)
    assert message in one_line(process)
    assert {path for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("words, message", [
    (["--tokens", "many"], "'many' is not a positive number of tokens, such as 15M, 1.5e6 or 15_000_000"),
    (["--tokens", "²"], "'²' is not"), (["--tokens", "nan"], "'nan' is not"), (["--tokens", "inf"], "'inf' is not"),
    (["--eval-tokens", "-5"], "'-5' is not"), (["--tokens", "1e30"], "'1e30' is not"), (["--tokens", "1.5"], "'1.5' is not"),
    (["--rank", "²"], "--rank: invalid int value: '²'"), (["--lr", "fast"], "--lr: invalid float value"),
    (["--method", "magic"], "--method: invalid choice: 'magic'"), (["--nothing", "1"], "unrecognized arguments: --nothing 1"),
    (["--out"], "--out: expected one argument"), (["--resume", "run", "--lr", "1"], "--resume takes every other argument"),
    (["--merge", "run", "--lr", "1"], "--merge takes every other argument")])
def test_words_that_cannot_be_read_are_one_line_and_status_2(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in misuse(capsys, "train", *words) and not list(tmp_path.iterdir())


def test_an_sae_of_another_width_is_refused(command, arguments, tmp_path):
    save_sae(TopK(40, 64, 4), tmp_path / "narrow", model_name="other", layer=1, context=32)
    assert "40" in one_line(command("train.py", *arguments, "--sae", tmp_path / "narrow", "--out", "run"))


def test_around_the_last_block_there_is_nothing_after_to_adapt(command, arguments, raw_config, tmp_path):
    save_sae(TopK(raw_config["hidden_size"], 64, 4), tmp_path / "last", model_name="test", layer=3, context=32)
    words = [*arguments, "--layer", 3, "--sae", tmp_path / "last", "--adapt", "after", "--out", "run"]
    assert "no block comes after" in one_line(command("train.py", *words)) and not (tmp_path / "run").exists()


def test_a_loss_that_turns_nan_stops_the_run_and_says_at_which_step(command, arguments, tmp_path):
    process = command("train.py", *arguments, "--lr", 1e30, "--clip", 1e30, "--checkpoint-every", 1, "--out", "run")
    line = one_line(process)
    assert "step" in line and "lower --lr" in line and not (tmp_path / "run" / "adapter").exists()


def test_evaluating_what_is_not_a_finished_run_is_one_clear_line(command, arguments, tmp_path):
    assert "no folder" in one_line(command("eval.py", "nowhere"))
    (tmp_path / "half").mkdir()
    assert "config.json" in one_line(command("eval.py", "half"))
    assert command("train.py", *arguments, "--out", "run").returncode == 0
    assert "'magic' is unknown: choose from fidelity" in one_line(command("eval.py", "run", "--suite", "magic"))
    (tmp_path / "run" / "adapter" / "adapter_config.json").unlink()
    assert "adapter" in one_line(command("eval.py", "run"))


def test_runs_without_out_get_folders_of_their_own(command, arguments, tmp_path):
    for name in ("model-lora", "model-lora-2", "model-lora-3"):
        assert command("train.py", *arguments, "--tokens", 64).stdout.startswith(f"runs/{name}/ is where this run writes\n")
        assert (tmp_path / "runs" / name / "results.json").exists()
    assert "no-such-sae" in one_line(command("train.py", *arguments, "--sae", "no-such-sae"))
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"model-lora", "model-lora-2", "model-lora-3"}


def test_a_dry_run_says_what_would_happen_and_writes_nothing(command, arguments, tmp_path):
    before = {path for path in tmp_path.rglob("*")}
    process = command("train.py", *arguments, "--dry-run")
    assert process.returncode == 0 and "20 steps of 2 x 32 = 1,280 tokens" in process.stdout
    assert {path for path in tmp_path.rglob("*")} == before


def test_a_dry_run_names_the_blocks_that_the_run_adapts(command, arguments):
    stdout = command("train.py", *arguments, "--dry-run").stdout
    assert "0 to 3 (4 of 4)" in stdout                  # around a TopK
    assert "2 to 3 (2 of 4)" in command("train.py", *arguments, "--adapt", "after", "--dry-run").stdout


def test_a_dry_run_of_an_sae_counts_its_parameters(command):
    process = command("train.py", "--method", "topk", "--width", 100, "--dry-run")
    assert process.returncode == 0 and f"{100 * (2 * 192 + 1) + 192:,} (" in process.stdout


def test_a_model_that_does_not_exist_is_said_before_its_missing_sae(command, whole_model, tmp_path):
    (tmp_path / "bare").mkdir()
    assert "no-such-model" in (line := one_line(command("train.py", "--model", "no-such-model"))) and "--sae" not in line
    assert "config.json" in one_line(command("train.py", "--model", tmp_path / "bare"))
    assert "pass one with --sae" in one_line(command("train.py", "--model", whole_model))


def test_what_cannot_be_resumed_or_merged_is_one_clear_line(command, arguments, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gemma2"}')
    assert "not written by train.py" in one_line(command("train.py", "--resume", "other"))
    assert "not written by train.py" in one_line(command("train.py", "--merge", "other"))
    (tmp_path / "other" / "config.json").write_text('{"model": "tiny-gemma-2", "method": "topk", "layer": [2], "data": "stdlib"}')
    assert "nothing to merge" in one_line(command("train.py", "--merge", "other"))
    (tmp_path / "other" / "config.json").write_text(
        '{"model": "tiny-gemma-2", "method": "lora", "layer": [2], "data": "stdlib", "lr": 5e-5}')
    assert "--resume other" in one_line(command("train.py", "--merge", "other"))


def test_the_headline_run_has_41_million_trainable_parameters():
    """Gemma-2-2B, blocks 13 to 25, rank 64, counted on the meta device."""
    from lorasae.lora import add_lora, lora_parameters
    from lorasae.model import Transformer
    from lorasae.gemma2 import Gemma2Config
    config = Gemma2Config(256000, 2304, 9216, 26, 8, 4, 256, 256, 4096, 50.0, 30.0, 1e-6, 10000.0, 2, 1)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == 2_614_341_888
    assert sum(p.numel() for p in lora_parameters(add_lora(model, range(13, 26), 64))) == 41_533_440


def test_a_merged_run_loads_in_transformers_with_the_adapted_logits(command, arguments, whole_model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    from lorasae import load_adapter, load_model
    assert command("train.py", *arguments, "--out", "run").returncode == 0
    process = command("train.py", "--merge", "run")
    assert process.returncode == 0, process.stderr
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", attn_implementation="eager")
    tokens = torch.randint(3, 97, (2, 40))
    with torch.no_grad():
        adapted = load_adapter(load_model(whole_model), tmp_path / "run" / "adapter").eval()(tokens)
        assert (oracle(tokens).logits - adapted).abs().max() <= 1e-4
    assert (tmp_path / "run" / "merged" / "tokenizer.json").exists()
    assert "already" in one_line(command("train.py", "--merge", "run"))


# ---- Terminals, pipes and disks --------------------------------------------------------------------------------------

def in_a_process(words, **how):
    environment = {**os.environ, **how.pop("environment", {})}
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, words)], capture_output=True, env=environment, **how)


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_a_terminal_that_knows_no_greek_is_no_reason_to_fail(arguments, tmp_path):
    """The tables have ± and the help has √; where they cannot be written they become question marks."""
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    for words in ([*arguments, "--out", tmp_path / "run"], ["--help"], [*arguments, "--out", tmp_path / "añb", "--lr", "nan"]):
        process = in_a_process(words, environment=ascii_only, cwd=tmp_path)
        assert process.returncode == (1 if "nan" in words else 0) and b"Traceback" not in process.stderr, process.stderr
        assert process.stdout.isascii() and process.stderr.isascii()
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
@pytest.mark.parametrize("last_line_read", ["is where this run writes", "100%"])
def test_a_reader_who_leaves_is_one_line_and_costs_no_finished_results(arguments, tmp_path, last_line_read):
    """python train.py | head"""
    words = [sys.executable, str(ROOT / "train.py"), *map(str, arguments), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while last_line_read not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    while_it_worked = last_line_read != "100%"          # then the work goes on, in silence
    assert process.wait() == (0 if while_it_worked else 1) and errors.count("\n") == 1 and "nobody reads the output" in errors
    assert not list(tmp_path.rglob(".lock"))
    assert (tmp_path / "run" / "results.json").exists() and (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
@pytest.mark.parametrize("full", ["metrics.jsonl", "step-00000010.pt", "config.json", "adapter_model.safetensors", "results.json"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(arguments, tmp_path, monkeypatch, full):
    """Whatever file it meets; a checkpoint that could not be written leaves no part of itself."""
    def no_room(*_):
        raise OSError(28, "No space left on device")

    def half_full(real):
        def opened(path, *how, **named):
            if Path(str(path)).name == full:
                no_room()
            return real(path, *how, **named)
        return opened

    run = tmp_path / "run"
    words = [*arguments, "--checkpoint-every", 10, "--out", run]
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "open", half_full(open), raising=False)
        replace = os.replace
        patch.setattr(os, "replace", lambda source, target: no_room() if Path(target).name == full else replace(source, target))
        line = refusal("train", *words)
    assert f"cannot write {run}" in line and full in line and "No space left" in line
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.lock"))
    if full == "config.json":
        assert not run.exists()
        return
    from helpers import command
    command("train", "--resume", run)
    assert read(run / "results.json")["train_tokens"] == 1280
