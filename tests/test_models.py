"""The hand-written models against transformers, and how they load, splice and refuse."""
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from safetensors import safe_open

from conftest import GEMMA, GEMMA3, LLAMA, write_model, write_shards
from helpers import adapted, refuses, transformers_model
from lorasae.adapt import adapted_loss, first_differing, frozen_forward, naive_loss
from lorasae.attention import Cache, naive_attention
from lorasae.io.files import local, read_json, write_json
from lorasae.io.adapters import load_adapter, save_adapter
from lorasae.io.models import load_model, load_tokenizer, parse_config, save_model
from lorasae.io.presets import PRESETS
from lorasae.io.saes import load_sae, save_sae
from lorasae.io.text import files
from lorasae.lora import adapters, add_lora, lora_parameters
from lorasae.model import Transformer
from lorasae.sae import JumpReLU, TopK

GEMMA_27B = {**GEMMA, "hidden_size": 40, "head_dim": 16, "num_key_value_heads": 4}
GEMMA3_OLDER = {                                        # as transformers 4 wrote it
    **{key: GEMMA3[key] for key in GEMMA3.keys() - {"layer_types", "rope_parameters"}},
    "sliding_window_pattern": 3, "rope_theta": 1000000, "rope_local_base_freq": 10000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "cache_implementation": "hybrid"}

# What these families can do, but their published models do not
GEMMA_OTHER = {
    **GEMMA, "layer_types": ["full_attention"] * 2 + ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
GEMMA3_CAPPED = {**GEMMA3, "final_logit_softcapping": 3.0}


def logits_of(folder, tokens, dtype=None):
    with torch.no_grad():
        return load_model(folder, dtype=dtype)(tokens)


@pytest.mark.parametrize("raw", [
    GEMMA, GEMMA_27B, GEMMA_OTHER, LLAMA, {**LLAMA, "tie_word_embeddings": True}, GEMMA3,
    GEMMA3_OLDER, GEMMA3_CAPPED], ids=["gemma", "gemma-27b", "gemma-other", "llama", "llama-tied",
                                       "gemma-3", "gemma-3-older", "gemma-3-capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_equal_transformers(raw, dtype, tmp_path, monkeypatch):
    """200 positions: twelve sliding windows, three times the length where rotary scaling begins.

    fp32 goes through the fused attention kernel. In bf16 every rounding counts, so both sides run
    the written-out formula.
    """
    if dtype == torch.bfloat16:
        naive = lambda *qkv_to_masks: naive_attention(*qkv_to_masks[:6])                # noqa: E731
        monkeypatch.setattr("lorasae.attention.attention", naive)
    folder = write_model(tmp_path / "model", raw)
    oracle = transformers_model(folder, dtype=dtype)
    tokens = torch.randint(0, 97, (2, 200))
    with torch.no_grad():
        expected = oracle(tokens).logits
    ours = logits_of(folder, tokens, dtype)
    assert expected.float().std() > 0.1
    assert raw["model_type"] != "gemma2" or expected.abs().max() > 1.5
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=10)


def test_sharded_files_give_the_same_logits_as_one_file(raw_config, model_folder, tokens, tmp_path):
    sharded = write_shards(tmp_path / "sharded", raw_config)
    assert torch.equal(logits_of(sharded, tokens), logits_of(model_folder, tokens))

    # of two savings in one folder the single file counts, as in transformers
    write_model(sharded, raw_config, seed=1)
    other = write_model(tmp_path / "other", raw_config, seed=1)
    assert torch.equal(logits_of(sharded, tokens), logits_of(other, tokens))


def test_saved_models_read_back(raw_config, model_folder, tokens, tmp_path):
    model, copy = load_model(model_folder), tmp_path / "copy"
    index = copy / "model.safetensors.index.json"
    stale = {**raw_config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    save_model(model, copy, config=stale, shard_bytes=40_000)
    assert len(list(copy.glob("*.safetensors"))) > 2
    total = read_json(index)["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert torch.equal(logits_of(copy, tokens), model(tokens).detach())

    save_model(model, copy, config=stale)
    assert not index.exists() and safe_open(copy / "model.safetensors", "pt").metadata() == {
        "format": "pt"}
    assert torch.equal(logits_of(copy, tokens), model(tokens).detach())
    assert read_json(copy / "config.json") == raw_config and not list(copy.rglob("*.part"))


@pytest.mark.parametrize("name, parameters", [
    ("gemma-2-2b", 2_614_341_888), ("gemma-2-9b", 9_241_705_984), ("gemma-2-27b", 27_227_128_320),
    ("gemma-3-270m", 268_098_176), ("gemma-3-1b", 999_885_952), ("smollm2-135m", 134_515_008),
    ("smollm2-1.7b", 1_711_376_384), ("llama-3.2-1b", 1_235_814_400),
    ("llama-3.1-8b", 8_030_261_248)])
def test_the_presets_configurations_are_those_of_the_published_models(name, parameters):
    known = PRESETS[name]
    with torch.device("meta"):
        model = Transformer(parse_config(known.config, name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert known.weights == parameters * (4 if name.startswith("gemma-2") else 2)


def test_a_home_folder_is_harmless(whole_model, raw_config, tokens, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert local("~/model") == whole_model and local("~noone9/x") == Path("~noone9/x")
    for name in ("~/model", "~/model/", f"{whole_model}/"):
        assert load_tokenizer(name).get_vocab_size() > 90

    model = add_lora(load_model(whole_model), [3], 2)
    save_adapter(model, "~/a/adapter")
    for folder in ("~/a", "~/a/adapter/"):
        assert adapters(load_adapter(load_model("~/model"), folder))
    save_sae(TopK(8, 16, 4), "~/s", model_name="m", layer=0, context=8)
    assert load_sae("~/s/").k == 4
    save_model(load_model(whole_model), "~/copy", config=raw_config)
    assert torch.equal(logits_of("~/copy", tokens), logits_of(whole_model, tokens))
    (tmp_path / "t.jsonl").write_text('{"text": "a"}')
    assert [file.name for file in files("~/t.jsonl")] == [f"{tmp_path}/t.jsonl"]
    assert not (tmp_path / "~").exists()


def test_new_spellings_of_the_configuration_mean_the_same():
    """Gemma 3's: tests/test_real_formats.py."""
    both = {**GEMMA3, "rope_local_base_freq": 777.0}    # a stale one, beside the newer spelling
    assert parse_config(both, "both") == parse_config(GEMMA3, "new")
    new = {**LLAMA, "dtype": "float32"}
    theta, scaling, _ = (new.pop(key) for key in ("rope_theta", "rope_scaling", "torch_dtype"))
    new["rope_parameters"] = {**scaling, "rope_theta": theta}
    assert parse_config(new, "new") == parse_config(LLAMA, "old")
    assert parse_config({**GEMMA, "head_dim": 6}, "g").head_dim == 6


@pytest.mark.parametrize("pieces", [[40], [39, 1], [10, 20, 10], [1] * 40])
def test_a_cache_gives_the_same_logits_piece_by_piece(model, tokens, pieces):
    cache, parts = Cache(), []
    for part in tokens.split(pieces, dim=1):
        parts.append(model(part, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("site, after_norm", [("mlp", True), ("mlp", False), ("resid", False)])
def test_an_sae_is_spliced_in_where_it_was_trained(model, tokens, site, after_norm):
    """By hand: a hook on the block, on its MLP, or on the norm that follows this in Gemma.

    Special positions, which the SAE never saw, stay as they are.
    """
    tokens[:, [0, 7]] = model.config.bos_token_id
    sae = JumpReLU(model.config.hidden_size, 64).requires_grad_(False)
    for parameter in sae.parameters():
        nn.init.normal_(parameter, std=0.1)
    sae.site, sae.after_norm = site, after_norm
    block, special = model.layers[2], model.special(tokens)
    gemma = hasattr(block, "post_feedforward_layernorm")
    of_mlp = block.post_feedforward_layernorm if gemma and after_norm else block.mlp
    module = of_mlp if site == "mlp" else block
    seen = []

    def hook(module, inputs, output):
        seen.append(output)
        return torch.where(special[..., None], output, sae(output))

    handle = module.register_forward_hook(hook)
    expected = model(tokens)
    handle.remove()
    found = model(tokens, {2: sae})
    assert torch.equal(found, expected) and not torch.equal(found, model(tokens))
    assert torch.equal(model.read(tokens, sae, 2), seen[0])

    parameters = lora_parameters(adapted(model, [2, 3], std=0.1))
    expected = torch.autograd.grad(naive_loss(model, {2: sae}, tokens), parameters)
    first = first_differing(model, {2: sae})
    part = frozen_forward(model, {2: sae}, tokens, first)
    loss, _ = adapted_loss(model, {2: sae}, part, first, SimpleNamespace(compile=False))
    for a, b in zip(torch.autograd.grad(loss, parameters), expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("layers, message", [
    (5, "lacks 'model.layers.4"), (3, "has, beyond the model's tensors, 'model.layers.3")])
def test_a_model_of_other_blocks_is_one_clear_line(model_folder, raw_config, layers, message):
    other = {**raw_config, "num_hidden_layers": layers, "layer_types": None}
    write_json(model_folder / "config.json", other)
    refuses(message, load_model, model_folder)
