"""Adapters in PEFT's format."""
from pathlib import Path

import pytest
import torch

from helpers import adapted, moved, read, transformers_model
from lorasae import load_adapter, load_model, save_adapter
from lorasae.lora import TARGETS, LoRALinear, adapters, replace_module


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), TARGETS], ids=["some", "all"])
def test_an_adapter_goes_both_ways(model_folder, tokens, tmp_path, targets):
    torch.manual_seed(0)
    model = adapted(load_model(model_folder), [1, 3], alpha=8, targets=targets).eval()
    save_adapter(model, tmp_path / "adapter", str(model_folder))
    config = read(tmp_path / "adapter" / "adapter_config.json")
    assert sorted(config["target_modules"]) == sorted(targets)
    assert config["layers_to_transform"] == [1, 3]

    back = load_adapter(load_model(model_folder), tmp_path / "adapter")
    assert sorted(adapters(back)) == sorted(adapters(model))
    assert len(adapters(back)) == 2 * len(targets)
    assert torch.equal(back(tokens), model(tokens))

    peft = pytest.importorskip("peft", reason="the oracle is peft")
    oracle = transformers_model(model_folder)
    oracle = peft.PeftModel.from_pretrained(oracle, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model(tokens)
        error = (oracle(tokens).logits - expected).abs().max()
    assert error <= 1e-5 * max(1, expected.abs().max())


def test_a_runs_adapter_names_a_base_that_others_find(finished):
    named = read(finished("lora") / "adapter" / "adapter_config.json")["base_model_name_or_path"]
    assert Path(named).is_absolute() and (Path(named) / "config.json").exists()


def test_a_linear_module_of_another_name_may_have_an_adapter(model_folder, tmp_path):
    """A family may have more projections than the seven of Gemma-2 and Llama-3."""
    model, back = load_model(model_folder), load_model(model_folder)
    for one in (model, back):
        one.layers[2].add_module("gate", torch.nn.Linear(one.config.hidden_size, 4))
    lora = LoRALinear(model.layers[2].gate, 3, alpha=8, dropout=0.0)
    replace_module(model, "model.layers.2.gate", lora)
    save_adapter(moved(model), tmp_path / "adapter")
    load_adapter(back, tmp_path / "adapter")
    assert list(adapters(back)) == ["model.layers.2.gate"]
