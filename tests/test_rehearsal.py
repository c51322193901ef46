"""The headline command as a user types it, against a server that holds everything the real one would fetch, but small.

The Hub of this test has google/gemma-2-2b (gated, as the real one), its ungated copy, google/gemma-scope-2b-pt-res in its own
layout, and the Pile as .jsonl.zst. The model is Gemma-2-2B in every respect but size: 26 blocks, three shards, bf16 or fp32
weights, the same file and tensor names, a tokenizer that puts BOS first.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TEXT
from helpers import GEMMA_2B, Hub, gemma_2b_files, gemma_scope_files, lines, read, zstd_compress

ROOT = Path(__file__).parent.parent
@pytest.fixture
def everything(tmp_path):
    model = gemma_2b_files(tmp_path)
    pile = lines([f"note {i}\n" + TEXT * 20 for i in range(200)])
    with Hub() as server:
        server.models = {"google/gemma-2-2b": model, "unsloth/gemma-2-2b": model,
                         "google/gemma-scope-2b-pt-res": gemma_scope_files(GEMMA_2B["hidden_size"])}
        server.datasets = {"monology/pile-uncopyrighted": {"train/00.jsonl.zst": zstd_compress(pile)}}
        server.refused = {"google/gemma-2-2b": (403, "GatedRepo")}
        yield server


def headline(server, tmp_path, *more):
    """python train.py --model gemma-2-2b --layer 12 --rank 64, with the text cut short to what a test has time for."""
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"),
                   "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_TOKEN", None)
    return subprocess.run([sys.executable, str(ROOT / "train.py"), "--model", "gemma-2-2b", "--layer", "12", "--rank", "64",
                           "--tokens", "4096", "--eval-tokens", "2048", "--device", "cpu", *more], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=300)


def test_without_access_one_line_names_the_licence_the_login_and_the_open_copy(everything, tmp_path):
    process = headline(everything, tmp_path)
    line, = [line for line in process.stderr.splitlines() if line.startswith("error:")]
    assert process.returncode == 1 and "Traceback" not in process.stderr
    for part in ("https://huggingface.co/google/gemma-2-2b", "hf auth login", "unsloth/gemma-2-2b"):
        assert part in line
    assert not (tmp_path / "runs").exists()


def test_the_headline_command_runs_to_its_end(everything, tmp_path):
    everything.refused.clear()
    dry = headline(everything, tmp_path, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "model-00003-of-00003.safetensors" in dry.stdout and "layer_12/width_16k/average_l0_82/params.npz" in dry.stdout
    assert "adapted blocks        13 to 25 (13 of 26)" in dry.stdout

    process = headline(everything, tmp_path)
    assert process.returncode == 0, process.stderr
    run = tmp_path / "runs" / "gemma-2-2b-lora"
    config, results = (read(run / name) for name in ("config.json", "results.json"))
    assert (config["dtype"], config["context"], config["batch_size"], config["lr"]) == ("bfloat16", 1024, 1, 5e-5)
    assert (config["width"], config["l0"], config["adapt"]) == ("16k", 82, ["after"])
    assert results["train_tokens"] == 4096 and results["eval_tokens"] == 2048 and results["kl_sae"] > 0
    adapter = read(run / "adapter" / "adapter_config.json")
    assert adapter["r"] == 64 and adapter["lora_alpha"] == 32 and adapter["layers_to_transform"] == list(range(13, 26))
    assert not any("README" in path or "average_l0_22" in path for path in everything.requests)       # only what is needed
