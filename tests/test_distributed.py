"""Two processes on the CPU: the steps of one, one writer, and an end that is clear when one of them dies."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers import metrics, read

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)


@pytest.fixture
def arguments(whole_model, sae_folder, text_folder):
    return [str(word) for word in (
        "--model", whole_model, "--sae", sae_folder, "--layer", 1, "--data", text_folder, "--context", 32, "--tokens", 2560,
        "--eval-tokens", 256, "--batch-size", 4, "--lr", 1e-3, "--dropout", 0, "--rank", 4, "--dtype", "float32", "--device", "cpu")]


def start(processes, *words):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "localhost:0"] if processes > 1 else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launcher, str(ROOT / "train.py"), *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment)


def run(processes, *words):
    process = start(processes, *words)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def losses(folder, name="kl"):
    return [line[name] for line in metrics(folder)]


@pytest.mark.parametrize("more", [[], ["--shard"], ["--adapt", "after", "--micro-batch", 1, "--ahead", 8], ["--rank", 1, 4],
                                  ["--train-sae", "--sae-lr", 1e-5, "--optimizer", "muon"]],
                         ids=["data parallel", "sharded", "parts", "ranks", "with the SAE"])
def test_two_processes_take_the_steps_of_one(arguments, tmp_path, more):
    one, two = tmp_path / "one", tmp_path / "two"
    output = run(2, *arguments, *more, "--out", two)
    run(1, *arguments, *[word for word in more if word != "--shard"], "--out", one)
    name = "kl_r4" if "--rank" in more else "kl"
    assert losses(two, name) == pytest.approx(losses(one, name), rel=1e-4) and len(losses(two, name)) == 2
    place = "rank-4/adapter" if "--rank" in more else "adapter"
    found, expected = (load_file(folder / place / "adapter_model.safetensors") for folder in (two, one))
    for key in expected:
        assert (found[key] - expected[key]).norm() <= 1e-3 * expected[key].norm(), key
    results, alone = (read(folder / "results.json") for folder in (two, one))
    if "--rank" in more:
        results, alone = results["ranks"]["4"], alone["ranks"]["4"]
    for key in ("ce_base", "ce_sae", "ce_adapted", "kl_adapted", "kl_gap_closed"):
        assert results[key] == pytest.approx(alone[key], rel=1e-4)
    assert results["l0"] == alone["l0"]
    assert output.count("adapting blocks") == 1 and not list(two.rglob("*.part"))       # one of them speaks and writes


def test_a_killed_process_ends_the_run_and_the_run_resumes(arguments, tmp_path):
    arguments += ["--tokens", "6400", "--checkpoint-every", "5"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(2, *arguments, "--out", whole)
    process = start(2, *arguments, "--out", killed)
    while not list(killed.glob("checkpoint/step-*10.pt")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode != 0 and "another process of this run ended" in errors
    run(2, "--resume", killed)
    assert (killed / "adapter/adapter_model.safetensors").read_bytes() == (whole / "adapter/adapter_model.safetensors").read_bytes()
    assert metrics(killed) == metrics(whole)


@pytest.mark.parametrize("more, message", [(["--batch-size", 3], "multiple of 2"), (["--rank", 1, 4, "--shard"], "one rank")])
def test_what_two_processes_cannot_do_is_one_clear_line(arguments, tmp_path, more, message):
    process = start(2, *arguments, *more, "--out", tmp_path / "run")
    _, errors = process.communicate()
    assert process.returncode != 0 and message in errors


def test_sharding_needs_several_processes(arguments, tmp_path):
    process = start(1, *arguments, "--shard", "--out", tmp_path / "run")
    assert "torchrun" in process.communicate()[1] and process.returncode == 1
