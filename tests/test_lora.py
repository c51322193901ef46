"""LoRA: the identity at first, then Eq. 1; files to and from PEFT; what is refused."""
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import adapted, moved, read, refuses, transformers_model
from lorasae.io.models import load_model
from lorasae.io.files import write_json
from lorasae.io.adapters import load_adapter, save_adapter
from lorasae.lora import (
    TARGETS, LoRALinear, adapters, add_lora, attach_lora, base, blocks_with_adapters, detach_lora,
    lora_parameters, merge_lora, replace_module)

KEY = "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight"

trained = partial(adapted, blocks=(1, 3))               # adapters that are not the identity


def test_forward_is_equation_1(model):
    trained(model, rank=3, alpha=12)
    module = model.layers[1].mlp.up_proj
    x = torch.randn(5, module.in_features)
    expected = x @ module.weight.T + 12 / 3 * (x @ module.lora_A.weight.T) @ module.lora_B.weight.T
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [(), TARGETS, TARGETS[:3]], ids=["none", "all", "q, k, v"])
def test_adapters_detach_reattach_unchanged_and_merge(model, tokens, with_bias):
    """Biases stay in the model. Qwen-2's q, k and v projections have them."""
    torch.manual_seed(0)
    for name, module in model.layers.named_modules():
        if name.split(".")[-1] in with_bias:
            module.bias = torch.nn.Parameter(torch.randn(module.out_features), requires_grad=False)
    plain = model(tokens)
    biases = {name: p.clone() for name, p in model.named_parameters() if name.endswith("bias")}
    assert len(biases) == 4 * len(with_bias)

    assert torch.equal(add_lora(model, [1, 3], 3)(tokens), plain)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * 2 and all("lora_" in name for name in trainable)
    own, adapted = lora_parameters(model), moved(model)(tokens)
    with pytest.raises(ZeroDivisionError), base(model.train()):         # no dropout either
        assert torch.equal(model(tokens), plain)
        1 / 0
    assert torch.equal(model.eval()(tokens), adapted) and not torch.equal(adapted, plain)
    assert all(parameter.dim() == 2 for parameter in own)
    taken = detach_lora(model)
    assert torch.equal(model(tokens), plain)
    assert not adapters(model) and blocks_with_adapters(model) == []
    assert torch.equal(attach_lora(model, taken)(tokens), adapted)
    assert blocks_with_adapters(model) == [1, 3]
    assert all(a is b for a, b in zip(own, lora_parameters(model), strict=True))
    merge_lora(model)
    assert not adapters(model) and not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(tokens), adapted, rtol=1e-4, atol=1e-5)
    for name, bias in biases.items():
        assert torch.equal(model.get_parameter(name), bias)


def test_only_the_targets_are_adapted_and_unknown_ones_are_refused(model):
    for targets, named in ((["q_proj", "qkv"], "'qkv'"), ((), ""),
                           (["self_attn.q_proj"], "'self_attn.q_proj'")):
        message = f"cannot adapt .{named}.: .*down_proj, gate_proj"
        refuses(message, add_lora, model, [1], 3, targets=targets)
        assert not adapters(model)
    add_lora(model, [1, 2], 3, targets=("q_proj", "down_proj"))
    assert sorted(adapters(model)) == [f"model.layers.{layer}.{name}" for layer in (1, 2)
                                       for name in ("mlp.down_proj", "self_attn.q_proj")]


@pytest.mark.parametrize("training", [True, False])
def test_new_modules_inherit_train_or_eval_mode(model, training):
    """In an eval model, dropout is off in modules added later too."""
    model.train(training)
    modes = lambda: {module.training for module in model.modules()}
    add_lora(model, [1, 2], 3)
    assert modes() == {training}
    taken = detach_lora(model)
    for module in taken.values():
        module.train(not training)
    assert modes() == {training}
    attach_lora(model, taken)
    assert modes() == {training}
    merge_lora(model)
    assert modes() == {training}


def test_merging_a_fresh_adapter_changes_nothing_in_any_dtype(model_folder):
    for dtype in "float64", "bfloat16":
        model = load_model(model_folder, dtype=getattr(torch, dtype))
        weight = model.layers[1].mlp.up_proj.weight
        weight.data.add_(1e-12 * (dtype == "float64"))
        before = weight.clone()
        merge_lora(add_lora(model, [1], 3))
        assert torch.equal(model.layers[1].mlp.up_proj.weight, before)


def test_adapters_stay_fp32_on_a_bf16_base(model_folder, tokens):
    model = trained(load_model(model_folder, dtype="bfloat16"))
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in lora_parameters(model))


# ---- PEFT and transformers -----------------------------------------------------------------------

def distance(oracle, model, tokens):
    """The largest difference, relative to the largest logit."""
    expected, found = oracle(tokens).logits, model(tokens)
    return (expected - found).abs().max() / max(1, found.abs().max())


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_an_adapter_saved_by_peft_loads(model_folder, tokens, tmp_path, options):
    peft = pytest.importorskip("peft", reason="the oracle is peft")
    names = [f"model.layers.{layer}.mlp.{name}"
             for layer in (0, 2) for name in ("down_proj", "up_proj")]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=names, init_lora_weights=False, **options)
    oracle = peft.get_peft_model(transformers_model(model_folder), config).eval()
    oracle.save_pretrained(tmp_path / "adapter")
    model = load_adapter(load_model(model_folder), tmp_path / "adapter")
    assert sorted(adapters(model)) == names
    # random adapters amplify the rounding of a score, 4e-6
    assert distance(oracle, model, tokens) <= (
        5e-5 if model.config.attn_logit_softcapping else 1e-5)


@pytest.mark.parametrize("targets, training", [(("q_proj", "v_proj"), False), (TARGETS, True)],
                         ids=["some", "all"])
def test_a_saved_adapter_loads_again_and_in_peft(model_folder, tokens, tmp_path, targets, training):
    """In eval mode dropout must be off: two calls give the same logits."""
    torch.manual_seed(0)
    model = adapted(load_model(model_folder), [1, 3], alpha=8, targets=targets, dropout=0.5)
    save_adapter(model, tmp_path / "adapter", str(model_folder))
    config = read(tmp_path / "adapter" / "adapter_config.json")
    assert sorted(config["target_modules"]) == sorted(targets)
    assert config["layers_to_transform"] == [1, 3]

    back = load_adapter(load_model(model_folder).train(training), tmp_path / "adapter")
    assert {module.training for module in back.modules()} == {training}
    assert torch.equal(back(tokens), back(tokens)) is not training
    assert sorted(adapters(back)) == sorted(adapters(model))
    assert len(adapters(back)) == 2 * len(targets)
    assert torch.equal(back.eval()(tokens), model(tokens))

    peft = pytest.importorskip("peft", reason="the oracle is peft")
    oracle = transformers_model(model_folder)
    oracle = peft.PeftModel.from_pretrained(oracle, tmp_path / "adapter").eval()
    assert distance(oracle, model, tokens) <= 1e-5


def test_a_runs_adapter_names_its_base_by_absolute_path(finished):
    named = read(finished("lora") / "adapter" / "adapter_config.json")["base_model_name_or_path"]
    assert Path(named).is_absolute() and (Path(named) / "config.json").exists()


def test_a_linear_module_of_any_name_can_be_adapted(model_folder, tmp_path):
    """A family may have more projections than the seven of Gemma-2 and Llama-3."""
    model, back = load_model(model_folder), load_model(model_folder)
    for one in (model, back):
        one.layers[2].add_module("gate", torch.nn.Linear(one.config.hidden_size, 4))
    lora = LoRALinear(model.layers[2].gate, 3, alpha=8, dropout=0.0)
    replace_module(model, "model.layers.2.gate", lora)
    save_adapter(moved(model), tmp_path / "adapter")
    load_adapter(back, tmp_path / "adapter")
    assert list(adapters(back)) == ["model.layers.2.gate"]


# ---- What is refused -----------------------------------------------------------------------------

def test_impossible_adapters_and_a_second_set_are_refused(model, tmp_path):
    for layers, rank, message in (
            ([1], 0, "rank"), ([4], 2, "0 to 3"), ([-1], 2, "0 to 3"), ([], 2, "0 to 3")):
        refuses(message, add_lora, model, layers, rank)
    save_adapter(add_lora(model, [1], 2), tmp_path / "adapter")
    refuses("already", add_lora, model, [2], 2)
    refuses("already", load_adapter, model, tmp_path / "adapter")


@pytest.fixture
def saved(model_folder, tmp_path):
    """A folder with a saved adapter for the model."""
    save_adapter(trained(load_model(model_folder)), tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path)


@pytest.mark.parametrize("change, message", [                   # wrong types: test_bad_files.py
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"), ({"r": 9}, "another model or rank"),
    ({"r": 2**52}, "a whole number, at least 1, below 1048576"),
    ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"), ({"use_rslora": 1}, "use_rslora is 1"),
    ({"alora_invocation_tokens": [5]}, "alora"), ({"target_parameters": ["x"]}, "target_param"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changed the base model too"),
    ({"lora_dropout": 1}, "lora_dropout is 1, but should be a number, at least 0, below 1")])
def test_adapters_outside_equation_1_are_refused_by_name(model_folder, saved, change, message):
    path = saved / "adapter_config.json"
    write_json(path, {**json.loads(path.read_text()), **change})
    refuses(message, load_adapter, load_model(model_folder), saved)


def and_also(name):
    """Adds a tensor to the adapter."""
    return lambda tensors: {**tensors, name: tensors[KEY]}


@pytest.mark.parametrize("change, message", [
    (lambda tensors: {}, "contains no adapter: it has no tensors"),
    (and_also(KEY.replace("lora_A.weight", "lora_magnitude_vector")),
     "which is not the A or B of a LoRA adapter"),
    (and_also(KEY.replace("up_proj", "../../up_proj")), "but this model's blocks have no such"),
    (and_also("base_model.model.lm_head.lora_A.weight"),
     "adapts 'lm_head', but this model's blocks have no such"),
], ids=["empty", "dora", "path", "head"])
def test_a_malformed_adapter_is_refused_and_the_model_stays_unchanged(
        model_folder, saved, tokens, change, message):
    rewrite(saved, change)
    model = load_model(model_folder)
    before = model(tokens)
    refuses(message, load_adapter, model, saved)
    assert not adapters(model) and torch.equal(model(tokens), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_adapters_of_any_floating_dtype_load_as_fp32(model_folder, saved, dtype):
    rewrite(saved, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    written = load_file(saved / "adapter_model.safetensors")
    model = load_adapter(load_model(model_folder), saved)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    found = model.layers[3].mlp.up_proj
    for name in ("A", "B"):
        expected = written[KEY.replace("lora_A", f"lora_{name}")]
        assert torch.equal(getattr(found, f"lora_{name}").weight, expected.float())
