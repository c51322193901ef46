"""The headline command, against a server with all that the real one would fetch, but small.

It has google/gemma-2-2b (gated, as the real one), its ungated copy, google/gemma-scope-2b-pt-res in
its own layout, and the Pile as .jsonl.zst. The model is Gemma-2-2B in all but size: 26 blocks,
three shards, bf16 weights, the same names of files and tensors, a tokenizer that puts BOS first.
"""
import pytest
import zstandard

from conftest import TEXT
from helpers import (
    GEMMA_2B, Hub, command, gemma_2b_files, gemma_scope_files, lines, read, refusal, use_hub)

HEADLINE = ["train", "--model", "gemma-2-2b", "--layer", 12, "--rank", 64]
SHORT = ["--tokens", 1024, "--eval-tokens", 1024, "--device", "cpu"]    # what a test has time for


@pytest.fixture
def hub(tmp_path, monkeypatch):
    model = gemma_2b_files(tmp_path / "model")
    scope = gemma_scope_files(GEMMA_2B["hidden_size"], 2 ** 14, l0s=(22, 82))
    pile = zstandard.compress(lines([f"note {i}\n" + TEXT * 20 for i in range(100)]))
    with Hub() as server:
        use_hub(monkeypatch, server, tmp_path)
        monkeypatch.chdir(tmp_path)
        server.models = {"google/gemma-2-2b": model, "unsloth/gemma-2-2b": model,
                         "google/gemma-scope-2b-pt-res": scope}
        server.datasets = {"monology/pile-uncopyrighted": {"train/00.jsonl.zst": pile}}
        server.refused = {"google/gemma-2-2b": (403, "GatedRepo")}
        yield server


def test_the_headline_command_runs_to_its_end(hub, tmp_path, capsys):
    line = refusal(*HEADLINE, *SHORT)                   # without access
    for part in ("https://huggingface.co/google/gemma-2-2b", "hf auth login", "unsloth/gemma-2-2b"):
        assert part in line
    assert not (tmp_path / "runs/gemma-2-2b-lora/config.json").exists()

    hub.refused.clear()
    command(*HEADLINE, *SHORT, "--dry-run")
    planned = capsys.readouterr().out
    for part in ("model-00003-of-00003.safetensors", "of blocks 13 to 25",
                 "layer_12/width_16k/average_l0_82/params.npz"):
        assert part in planned, planned

    command(*HEADLINE, *SHORT)
    run = tmp_path / "runs" / "gemma-2-2b-lora"
    config, results = read(run / "config.json"), read(run / "results.json")
    expected = {"dtype": "bfloat16", "context": 1024, "batch_size": 1, "lr": 5e-5, "width": 16384,
                "l0": 82}
    assert {name: config[name] for name in expected} == expected
    assert results["train_tokens"] == 1024 == results["eval_tokens"] and results["kl_sae"] > 0
    adapter = read(run / "adapter" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"]) == (64, 32)
    assert adapter["layers_to_transform"] == list(range(13, 26))
    unneeded = ("README", "average_l0_22")
    assert not any(name in path for path in hub.requests for name in unneeded)
