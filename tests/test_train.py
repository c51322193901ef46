"""The two commands as a user meets them: what a run leaves behind, that evaluation agrees, and how mistakes are answered."""
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from conftest import write_model

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
    lines = [line for line in process.stderr.strip().splitlines() if line.startswith(("error:", "train.py: error:", "eval.py: error:"))]
    assert len(lines) == 1, process.stderr
    return lines[0]


def test_a_run_leaves_everything_behind_and_eval_agrees_with_it(command, arguments, tmp_path):
    process = command("train.py", *arguments, "--out", "run")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""                                         # not a terminal: no progress bar
    assert "with SAE + LoRA" in process.stdout and "gap closed" in process.stdout
    run = tmp_path / "run"
    config, results = (json.loads((run / name).read_text()) for name in ("config.json", "results.json"))
    for key in ("ce_base", "ce_sae", "ce_adapted", "gap_closed", "kl_sae", "kl_adapted", "l0", "eval_tokens", "train_tokens",
                "tokens_per_second", "peak_memory_bytes", "seconds"):
        assert key in results
    assert results["kl_adapted"] < results["kl_sae"] and results["train_tokens"] == 1280 and config["steps"] == 20
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert {path.name for path in (run / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}

    process = command("eval.py", "run")
    assert process.returncode == 0, process.stderr
    again = json.loads((run / "eval-fidelity.json").read_text())
    for key in ("ce_base", "ce_sae", "ce_adapted", "kl_sae", "kl_adapted", "gap_closed"):
        assert again[key] == pytest.approx(results[key], rel=1e-5)


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
    a, b = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts"))
    assert a["kl_adapted"] == pytest.approx(b["kl_adapted"], rel=1e-3)


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
@pytest.mark.parametrize("change, message", [
    (["--model", "no-such-model"], "no-such-model"),
    (["--sae", "no-such-sae"], "no-such-sae"),
    (["--layer", 4], "0 to 3"),
    (["--layer", -1], "0 to 3"),
    (["--layer", 1, 1], "twice"),
    (["--rank", 0], "rank"),
    (["--lr", -1], "lr"),
    (["--weight-decay", -1], "weight-decay"),
    (["--seed", -1], "seed"),
    (["--micro-batch", 0], "micro-batch"),
    (["--ahead", 0], "ahead"),
    (["--device", "gpu"], "cuda"),
    (["--k", 8], "no effect"),
    (["--tokens", "many"], "15M"),
    (["--adapt", "before"], "after, all, next"),
    (["--adapt", 7], "0 to 3"),
    (["--data", "no-such-text"], "no-such-text"),
    (["--data", "empty.txt"], "empty.txt"),
    (["--data", "latin1.txt"], "UTF-8"),
    (["--context", 1], "context"),
    (["--eval-tokens", "1M"], "too short"),
    (["--out", "taken"], "already holds files"),
])
def test_mistakes_are_answered_in_one_line_and_leave_nothing(command, arguments, tmp_path, change, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("café\n".encode("latin-1") * 5000)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    before = {path for path in tmp_path.rglob("*")}
    process = command("train.py", *arguments, *([] if "--out" in change else ["--out", "run"]), *change)
    assert message in one_line(process)
    assert {path for path in tmp_path.rglob("*")} == before


def test_an_sae_of_another_width_is_refused(command, arguments, tmp_path):
    from lorasae.sae import TopK
    from lorasae.io.sae_formats import save_sae
    save_sae(TopK(40, 64, 4), tmp_path / "narrow", model_name="other", layer=1, context=32)
    assert "40" in one_line(command("train.py", *arguments, "--sae", tmp_path / "narrow", "--out", "run"))


def test_around_the_last_block_there_is_nothing_after_to_adapt(command, arguments, raw_config, tmp_path):
    from lorasae.sae import TopK
    from lorasae.io.sae_formats import save_sae
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
    assert "unknown" in one_line(command("eval.py", "run", "--suite", "magic"))
    (tmp_path / "run" / "adapter" / "adapter_config.json").unlink()
    assert "adapter" in one_line(command("eval.py", "run"))


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
    assert "nothing to merge" in one_line(command("train.py", "--merge", "other"))


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
