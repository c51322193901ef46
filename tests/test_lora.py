"""LoRA: the identity at the start, Eq. 1 after, PEFT's files both ways, and what is refused."""
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from conftest import GEMMA, write_model
from lorasae.io.models import load_model, save_model
from helpers import moved
from lorasae.errors import InputError
from lorasae.io.files import write_json
from lorasae.linear import Linear, linear
from lorasae.io.adapters import load_adapter, save_adapter
from lorasae.lora import (LoRALinear, adapters, add_lora, attach_lora, base, blocks_with_adapters, detach_lora,
                          lora_parameters, merge_lora)


KEY = "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight"


def trained(model, layers=(1, 3), rank=3, **how):
    """A model whose adapters are not the identity."""
    return moved(add_lora(model, layers, rank, **how)).eval()


def test_a_fresh_adapter_is_the_identity_and_only_it_trains(model, tokens):
    before = model(tokens)
    add_lora(model, [2, 3], rank=4)
    assert torch.equal(model(tokens), before)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * 2 and all("lora_" in name for name in trainable)


def test_forward_is_equation_1(model):
    trained(model, rank=3, alpha=12)
    module = model.layers[1].mlp.up_proj
    x = torch.randn(5, module.in_features)
    expected = x @ module.weight.T + 12 / 3 * (x @ module.lora_A.weight.T) @ module.lora_B.weight.T
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width, out, rank, tokens", [(64, 96, 16, 200), (64, 64, 32, 40), (16, 80, 4, 7)])
def test_the_sum_of_the_weights_has_the_values_and_gradients_of_the_low_rank_path(monkeypatch, width, out, rank, tokens):
    torch.manual_seed(0)
    module = LoRALinear(Linear(width, out, bias=False).requires_grad_(False), rank, alpha=32, dropout=0.0)
    torch.nn.init.normal_(module.lora_B.weight)
    x = torch.randn(2, tokens, width, requires_grad=True)
    direction = torch.randn(2, tokens, out)
    wanted = (x, module.lora_A.weight, module.lora_B.weight)

    found = {}
    for cheaper in (True, False):
        monkeypatch.setattr(module, "sum_is_cheaper", lambda x: cheaper)
        y = module(x)
        found[cheaper] = (y.detach(), *torch.autograd.grad(y, wanted, direction))
    for by_sum, by_rank in zip(found[True], found[False]):
        torch.testing.assert_close(by_sum, by_rank, rtol=1e-4, atol=1e-5 * by_rank.abs().max().item())


@pytest.mark.parametrize("width, out, rank, tokens", [
    (192, 352, 64, 512), (352, 192, 64, 512), (192, 64, 64, 512), (192, 352, 64, 256), (192, 352, 8, 512),
    (192, 128, 64, 1), (2304, 9216, 64, 1024), (2304, 9216, 256, 8192), (2048, 512, 256, 1024)])
def test_the_cheaper_of_both_paths_by_counted_flops_is_taken(monkeypatch, width, out, rank, tokens):
    with torch.device("meta"):
        module = LoRALinear(Linear(width, out, bias=False).requires_grad_(False), rank, alpha=32, dropout=0.0)
        x = torch.empty(tokens, width, requires_grad=True)
    chosen = module.sum_is_cheaper(x)

    flops = {}
    for cheaper in (True, False):
        monkeypatch.setattr(module, "sum_is_cheaper", lambda x: cheaper)
        with FlopCounterMode(display=False) as counted:
            module(x).sum().backward()
        flops[cheaper] = counted.get_total_flops()
    assert chosen == (flops[True] < flops[False])


def test_the_weights_are_not_added_in_bf16_nor_under_dropout_nor_on_a_gpu():
    module = LoRALinear(Linear(64, 64, bias=False).requires_grad_(False), 64, alpha=32, dropout=0.5)
    x = torch.randn(500, 64)
    assert not module.train().sum_is_cheaper(x) and module.eval().sum_is_cheaper(x)
    assert not module.sum_is_cheaper(x.bfloat16())
    assert not module.sum_is_cheaper(SimpleNamespace(dtype=x.dtype, numel=x.numel, is_cuda=True))
    assert not module.to(torch.bfloat16).sum_is_cheaper(x)


def test_dropout_acts_on_the_adapters_input_in_training_only(model):
    module = trained(model, dropout=0.5).layers[1].mlp.up_proj
    x = torch.randn(5, module.in_features)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))
    with base(model):
        assert torch.equal(module(x), linear(x, module.weight))


def test_base_switches_the_adapters_off_and_back_on_even_after_an_error(model, tokens):
    plain = model(tokens)
    trained(model)
    adapted = model(tokens)
    with pytest.raises(ZeroDivisionError), base(model):
        assert torch.equal(model(tokens), plain)
        1 / 0
    assert torch.equal(model(tokens), adapted) and not torch.equal(adapted, plain)


def test_merging_leaves_plain_linears_and_the_same_function(model, tokens):
    adapted = trained(model)(tokens)
    merge_lora(model)
    assert not adapters(model) and not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(tokens), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_new_modules_take_the_mode_of_their_surroundings(model, training):
    """In an eval model dropout is off, whoever put the module there."""
    model.train(training)
    modes = lambda: {module.training for module in model.modules()}
    add_lora(model, [1, 2], 3)
    assert modes() == {training}
    taken = detach_lora(model)
    assert modes() == {training}
    for module in taken.values():
        module.train(not training)
    attach_lora(model, taken)
    assert modes() == {training}
    merge_lora(model)
    assert modes() == {training}


def test_detached_adapters_go_back_as_they_were(model, tokens):
    plain = model(tokens)
    adapted = trained(model)(tokens)
    taken = detach_lora(model)
    assert torch.equal(model(tokens), plain) and not adapters(model) and blocks_with_adapters(model) == []
    assert torch.equal(attach_lora(model, taken)(tokens), adapted) and blocks_with_adapters(model) == [1, 3]
    assert all(a is b for a, b in zip(lora_parameters(taken), lora_parameters(model), strict=True))


def test_masters_stay_fp32_over_a_bf16_base(model_folder, tokens):
    model = trained(load_model(model_folder, dtype="bfloat16"))
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in lora_parameters(model))


def test_adapters_survive_saving_and_loading(model_folder, tokens, tmp_path):
    model = trained(load_model(model_folder), rank=5, alpha=7)
    save_adapter(model, tmp_path / "adapter", "some/model")
    assert torch.equal(load_adapter(load_model(model_folder), tmp_path / "adapter")(tokens), model(tokens))


@pytest.mark.parametrize("training", [False, True])
def test_a_loaded_adapter_takes_the_models_mode(model_folder, tokens, tmp_path, training):
    """In a model that evaluates, dropout must not act: two calls are one."""
    save_adapter(trained(load_model(model_folder), dropout=0.5), tmp_path / "adapter")
    model = load_adapter(load_model(model_folder).train(training), tmp_path / "adapter")
    assert {module.training for module in model.modules()} == {training}
    assert torch.equal(model(tokens), model(tokens)) is not training


def test_peft_loads_our_adapter(model_folder, tokens, tmp_path):
    peft = pytest.importorskip("peft", reason="the oracle is peft")
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    model = trained(load_model(model_folder), rank=5, alpha=7)
    save_adapter(model, tmp_path / "adapter", str(model_folder))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    oracle = peft.PeftModel.from_pretrained(oracle, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert (oracle(tokens).logits - model(tokens)).abs().max() <= 1e-5 * max(1, model(tokens).abs().max())


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_we_load_pefts_adapter(model_folder, tokens, tmp_path, options):
    peft = pytest.importorskip("peft", reason="the oracle is peft")
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    names = [f"model.layers.{layer}.mlp.{name}" for layer in (0, 2) for name in ("up_proj", "down_proj")]
    oracle = peft.get_peft_model(oracle, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names,
                                                         init_lora_weights=False, **options)).eval()
    oracle.save_pretrained(tmp_path / "adapter")
    model = load_adapter(load_model(model_folder), tmp_path / "adapter")
    assert sorted(adapters(model)) == sorted(names)
    bound = 5e-5 if model.config.attn_logit_softcapping else 1e-5           # random adapters enlarge a score's rounding, 4e-6
    with torch.no_grad():
        assert (oracle(tokens).logits - model(tokens)).abs().max() <= bound * max(1, model(tokens).abs().max())


def test_transformers_loads_the_merged_checkpoint(model_folder, raw_config, tokens, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    model = trained(load_model(model_folder))
    adapted = model(tokens).detach()
    save_model(merge_lora(model), tmp_path / "merged", config={**raw_config, "dtype": "bfloat16"})      # a stale one
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    with torch.no_grad():
        assert (oracle(tokens).logits - adapted).abs().max() <= 1e-4


@pytest.mark.parametrize("layers, rank, dropout, message", [
    ([1], 0, 0.1, "rank"), ([4], 2, 0.1, "0 to 3"), ([-1], 2, 0.1, "0 to 3"), ([], 2, 0.1, "0 to 3"), ([1], 2, 1.0, "dropout")])
def test_impossible_adapters_are_refused(model, layers, rank, dropout, message):
    with pytest.raises(InputError, match=message):
        add_lora(model, layers, rank, dropout=dropout)


def test_a_second_set_of_adapters_is_refused(model, tmp_path):
    save_adapter(add_lora(model, [1], 2), tmp_path / "adapter")
    with pytest.raises(InputError, match="already"):
        add_lora(model, [2], 2)
    with pytest.raises(InputError, match="already"):
        load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("change, message", [
    ({"peft_type": "IA3"}, "IA3"), ({"use_dora": True}, "use_dora"), ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"), ({"bias": "all"}, "bias"), ({"r": 9}, "another model or rank"),
    ({"r": None}, "r is None, but should be a whole number, at least 1"),
    ({"lora_alpha": "much"}, "lora_alpha is 'much', but should be a number, above 0")])
def test_adapters_outside_equation_1_are_refused_by_name(model_folder, tmp_path, change, message):
    save_adapter(trained(load_model(model_folder)), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    write_json(path, {**json.loads(path.read_text()), **change})
    with pytest.raises(InputError, match=message):
        load_adapter(load_model(model_folder), tmp_path / "adapter")


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path)


@pytest.mark.parametrize("change, message", [
    (lambda t: {}, "holds no adapter: there is no tensor in it"),
    (lambda t: {**t, KEY: t[KEY] * float("nan")}, "lora_A.weight holds values that are not finite: the adapter diverged"),
    (lambda t: {**t, KEY: t[KEY].to(torch.int8)}, "lora_A.weight is int8, but only float32"),
    (lambda t: {**t, KEY: t[KEY].to(torch.float8_e4m3fn)}, "is float8_e4m3fn, but only"),
    (lambda t: {**t, KEY: t[KEY].to(torch.complex64)}, "is complex64, but only"),
    (lambda t: {**t, KEY: t[KEY] > 0}, "is bool, but only"),
    (lambda t: {name: tensor for name, tensor in t.items() if name != KEY}, "lora_A.weight should be .* but the file has nothing"),
    (lambda t: {**t, KEY.replace("lora_A.weight", "lora_magnitude_vector"): t[KEY]}, "which is no A or B of a LoRA adapter"),
    (lambda t: {**t, KEY.replace("up_proj", "../../up_proj"): t[KEY]}, "which this model does not have"),
    (lambda t: {**t, "base_model.model.lm_head.lora_A.weight": t[KEY]}, "adapts 'lm_head', which this model does not have"),
], ids=["empty", "nan", "int8", "fp8", "complex", "bool", "half", "dora", "path", "head"])
def test_an_adapter_that_is_not_whole_is_refused_and_the_model_stays_as_it_was(model_folder, tmp_path, tokens, change, message):
    save_adapter(trained(load_model(model_folder)), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", change)
    model = load_model(model_folder)
    before = model(tokens)
    with pytest.raises(InputError, match=message) as error:
        load_adapter(model, tmp_path / "adapter")
    assert "\n" not in str(error.value) and not adapters(model) and torch.equal(model(tokens), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_adapters_of_every_floating_dtype_load_as_fp32_masters(model_folder, tmp_path, dtype):
    save_adapter(trained(load_model(model_folder)), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    model = load_adapter(load_model(model_folder), tmp_path / "adapter")
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("change, message", [
    ({"r": True}, "r is True"), ({"r": 2.0}, "r is 2.0"), ({"lora_alpha": 0}, "lora_alpha is 0, but should be a number, above 0"),
    ({"lora_dropout": 1}, "lora_dropout is 1, but should be a number, at least 0, below 1"), ({"use_rslora": 1}, "use_rslora is 1"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changed the base model too"), ({"alora_invocation_tokens": [5]}, "alora"),
    ({"target_parameters": ["x"]}, "target_parameters"), ({"r": 10**30}, "another model or rank")])
def test_values_of_the_wrong_kind_are_refused_by_name(model_folder, tmp_path, change, message):
    save_adapter(trained(load_model(model_folder)), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    write_json(path, {**json.loads(path.read_text()), **change})
    with pytest.raises(InputError, match=message):
        load_adapter(load_model(model_folder), tmp_path / "adapter")


def test_an_adapter_of_another_model_is_refused(model_folder, tmp_path):
    other = write_model(tmp_path / "other", {**GEMMA, "num_hidden_layers": 6, "intermediate_size": 96})
    save_adapter(trained(load_model(other), layers=[5]), tmp_path / "adapter")
    with pytest.raises(InputError, match="another model"):
        load_adapter(load_model(model_folder), tmp_path / "adapter")


def test_a_truncated_adapter_is_refused(model_folder, tmp_path):
    save_adapter(trained(load_model(model_folder)), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a whole"):
        load_adapter(load_model(model_folder), tmp_path / "adapter")
