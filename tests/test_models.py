"""The hand-written models against transformers, and how they load, splice and refuse."""
import json
import math

import pytest
import torch
from torch import nn
from safetensors.torch import save_file

from conftest import GEMMA, LLAMA, random_weights, write_model
from lorasae.io.models import load_model, parse_config, save_model
from lorasae.errors import InputError
from lorasae.io.files import read_json, write_json
from lorasae.attention import Cache, attention, causal_mask, naive_attention, rotary_frequencies
from lorasae.llama3 import RopeScaling
from lorasae.sae import JumpReLU, TopK

GEMMA_27B = {**GEMMA, "hidden_size": 40, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
LLAMA_TIED = {**LLAMA, "tie_word_embeddings": True}


def logits_of(folder, tokens, dtype=None):
    with torch.no_grad():
        return load_model(folder, dtype=dtype)(tokens)


def write_shards(folder, raw, shards=3):
    tensors = random_weights(raw)
    names = sorted(tensors)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    folder.mkdir()
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file, {"format": "pt"})
    weight_map = {name: files[i % shards] for i, name in enumerate(names)}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
    write_json(folder / "config.json", raw)
    return folder


@pytest.mark.parametrize("raw", [GEMMA, GEMMA_27B, LLAMA, LLAMA_TIED], ids=["gemma", "gemma-27b", "llama", "llama-tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_equal_transformers(raw, dtype, tmp_path, monkeypatch):
    """200 positions: twelve times the sliding window, three times the length where the rotary scaling starts to bend.

    fp32 goes through the fused attention kernel. In bf16 every rounding counts, so both sides run the written-out formula.
    """
    if dtype == torch.bfloat16:
        monkeypatch.setattr("lorasae.attention.attention", lambda *qkv_to_window_masks: naive_attention(*qkv_to_window_masks[:6]))
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    folder = write_model(tmp_path / "model", raw)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    tokens = torch.randint(0, 97, (2, 200))
    with torch.no_grad():
        expected = oracle(tokens).logits
    ours = logits_of(folder, tokens, dtype)
    assert expected.float().std() > 0.1 and (raw["model_type"] != "gemma2" or expected.abs().max() > 1.5)
    assert (ours - expected).abs().max() <= 1e-4


def test_sharded_files_give_the_same_logits_as_one_file(raw_config, model_folder, tokens, tmp_path):
    sharded = write_shards(tmp_path / "sharded", raw_config)
    assert torch.equal(logits_of(sharded, tokens), logits_of(model_folder, tokens))


def test_saved_checkpoints_read_back_and_shard(raw_config, model_folder, tokens, tmp_path):
    model = load_model(model_folder)
    save_model(model, tmp_path / "copy", config=raw_config, shard_bytes=40_000)
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(tmp_path / "copy", tokens), model(tokens).detach())


def test_new_spellings_of_the_configuration_mean_the_same():
    new = {**LLAMA, "rope_parameters": {**LLAMA["rope_scaling"], "rope_theta": LLAMA["rope_theta"]}, "dtype": "float32"}
    for key in ("rope_scaling", "rope_theta", "torch_dtype"):
        del new[key]
    assert parse_config(new, "new") == parse_config(LLAMA, "old")
    assert parse_config({**GEMMA, "head_dim": 6}, "g").head_dim == 6


def test_llama3_rotary_scaling_keeps_short_waves_and_stretches_long_ones():
    scaling = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    plain, bent = rotary_frequencies(64, 5e5), rotary_frequencies(64, 5e5, scaling)
    wavelength = 2 * math.pi / plain
    assert torch.equal(bent[wavelength < 2048], plain[wavelength < 2048])
    torch.testing.assert_close(bent[wavelength > 8192], plain[wavelength > 8192] / 32)
    middle = (wavelength > 2048) & (wavelength < 8192)
    assert middle.any() and (bent[middle] < plain[middle]).all() and (bent[middle] > plain[middle] / 32).all()


def test_the_window_hides_what_is_too_far_back():
    mask = causal_mask(3, 6, window=2, device="cpu")                   # queries stand at positions 3, 4, 5
    assert mask.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("T, S", [(20, 20), (1, 20), (7, 20)])
@pytest.mark.parametrize("softcap, window", [(None, None), (None, 8), (4.0, None), (4.0, 8)])
def test_fast_attention_is_the_naive_formula(T, S, softcap, window):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, T, 16, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 2, S, 16, generator=generator, requires_grad=True) for _ in range(2))
    results = []
    for function in (attention, naive_attention):
        y = function(q, k, v, 0.3, softcap, window)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for fast, naive in zip(*results):
        torch.testing.assert_close(fast, naive, rtol=1e-4, atol=1e-5)


def test_running_in_ranges_is_running_at_once(model, tokens):
    x = model.run(model.embed(tokens), 0, 2)
    assert torch.equal(model.logits(model.run(x, 2, 4)), model(tokens))


@pytest.mark.parametrize("pieces", [[40], [39, 1], [10, 20, 10], [1] * 40])
def test_a_cache_gives_the_same_logits_piece_by_piece(model, tokens, pieces):
    cache, parts = Cache(), []
    for part in tokens.split(pieces, dim=1):
        parts.append(model(part, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-4)


class Identity(nn.Module):
    def forward(self, x):
        return x


def test_an_identity_sae_changes_nothing_at_any_layer(model, tokens):
    saes = {layer: Identity() for layer in range(4)}
    assert torch.equal(model(tokens, saes), model(tokens))


@pytest.mark.parametrize("kind", [TopK, JumpReLU])
def test_several_saes_are_spliced_after_their_blocks(model, tokens, kind):
    """Eq. 5 by hand: each block in turn, its output replaced where an SAE stands."""
    D = model.config.hidden_size
    torch.manual_seed(0)
    saes = {layer: (TopK(D, 64, 4) if kind is TopK else JumpReLU(D, 64)) for layer in (1, 3)}
    for sae in saes.values():
        nn.init.normal_(sae.W_enc), nn.init.normal_(sae.W_dec, std=0.1)
    x = model.embed(tokens)
    for layer in range(4):
        x = model.run(x, layer, layer + 1)
        if layer in saes:
            sae = saes[layer]
            x = (sae.encode(x) @ sae.W_dec + sae.b_dec).to(x.dtype)
    torch.testing.assert_close(model(tokens, saes), model.logits(x), rtol=1e-4, atol=1e-5)


def test_special_positions_are_untouched_whatever_an_sae_says_that_never_saw_them(model, tokens):
    class Zeros:
        on_special = False

        def __call__(self, x):
            return torch.zeros_like(x)

    special = torch.zeros_like(tokens, dtype=torch.bool)
    special[:, [0, 7]] = True
    spoiled = model.run(model.embed(tokens), 0, 2, {1: Zeros()}, special)
    plain = model.run(model.embed(tokens), 0, 2)
    assert torch.equal(spoiled[special], plain[special]) and not spoiled[~special].any()


def broken(folder, change):
    """Applies `change` to a copy's files and returns the folder."""
    change(folder)
    return folder


@pytest.mark.parametrize("change, message", [
    (lambda f: (f / "config.json").unlink(), "config.json"),
    (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "not a whole"),
    (lambda f: (f / "model.safetensors").unlink(), "neither"),
    (lambda f: write_json(f / "config.json", {**read_json(f / "config.json"), "hidden_size": 32}), "shape"),
    (lambda f: write_json(f / "config.json", {**read_json(f / "config.json"), "num_hidden_layers": 5}), "lacks"),
    (lambda f: write_json(f / "config.json", {**read_json(f / "config.json"), "num_hidden_layers": 3}), "does not know"),
    (lambda f: write_json(f / "config.json", {**read_json(f / "config.json"), "architectures": ["MambaForCausalLM"]}), "MambaForCausalLM"),
    (lambda f: write_json(f / "config.json", {k: v for k, v in read_json(f / "config.json").items() if k != "hidden_size"}), "config.json lacks hidden_size"),
])
def test_a_broken_folder_is_one_clear_line(model_folder, change, message):
    with pytest.raises(InputError, match=message) as error:
        load_model(broken(model_folder, change))
    assert "\n" not in str(error.value)


def test_a_missing_shard_and_a_shard_outside_the_folder_are_refused(raw_config, tmp_path):
    folder = write_shards(tmp_path / "sharded", raw_config)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="lacks the shard model-00002"):
        load_model(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: "../secret.safetensors" for name in index["weight_map"]}
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(InputError, match="outside its folder"):
        load_model(folder)
