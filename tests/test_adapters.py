"""Adapters in PEFT's format on some modules only; test_lora.py has those on all seven."""
import json

import pytest
import torch

from helpers import moved
from lorasae.io.adapters import load_adapter, save_adapter
from lorasae.io.models import load_model
from lorasae.lora import LoRALinear, adapters, replace_module


def adapted(folder, names, rank=3):
    """The model with adapters on these modules that are not the identity."""
    torch.manual_seed(0)
    model, modules = load_model(folder), dict(load_model(folder).named_modules())
    for name in names:
        replace_module(model, name, LoRALinear(modules[name], rank, alpha=8, dropout=0.0))
    return moved(model).eval()


ATTENTION = [f"model.layers.{layer}.self_attn.{name}" for layer in (1, 3)
             for name in ("q_proj", "v_proj")]


def test_an_adapter_of_the_attention_only_goes_both_ways(model_folder, tokens, tmp_path):
    model = adapted(model_folder, ATTENTION)
    save_adapter(model, tmp_path / "adapter", str(model_folder))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["layers_to_transform"] == [1, 3]

    back = load_adapter(load_model(model_folder), tmp_path / "adapter")
    assert sorted(adapters(back)) == sorted(ATTENTION)
    assert torch.equal(back(tokens), model(tokens))

    peft = pytest.importorskip("peft", reason="the oracle is peft")
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder, attn_implementation="eager")
    oracle = peft.PeftModel.from_pretrained(oracle, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model(tokens)
        error = (oracle(tokens).logits - expected).abs().max()
    assert error <= 1e-5 * max(1, expected.abs().max())


def test_a_linear_module_of_another_name_may_have_an_adapter(model_folder, tokens, tmp_path):
    """A family may have more projections than the seven of Gemma-2 and Llama-3."""
    def with_gate(model):
        gate = torch.nn.Linear(model.config.hidden_size, 4)
        model.layers[2].add_module("gate", gate)
        return model, gate

    model, gate = with_gate(load_model(model_folder))
    replace_module(model, "model.layers.2.gate", LoRALinear(gate, 3, alpha=8, dropout=0.0))
    save_adapter(moved(model), tmp_path / "adapter")
    back, _ = with_gate(load_model(model_folder))
    assert list(adapters(load_adapter(back, tmp_path / "adapter"))) == ["model.layers.2.gate"]
