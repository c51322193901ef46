"""The hand-written models against transformers, and how they load, splice and refuse."""
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import GEMMA, GEMMA3, LLAMA, random_weights, write_model
from lorasae.adapt import adapted_loss, first_differing, frozen_forward, naive_loss
from lorasae.attention import Cache, causal_mask, naive_attention, rotary_frequencies
from lorasae.errors import InputError
from lorasae.family import RopeScaling
from lorasae.io.files import read_json, write_json
from lorasae.io.models import load_model, parse_config, save_model
from lorasae.io.presets import PRESETS
from lorasae.lora import add_lora, lora_parameters
from lorasae.model import Transformer
from lorasae.sae import JumpReLU, TopK

GEMMA_27B = {**GEMMA, "hidden_size": 40, "head_dim": 16, "num_key_value_heads": 4}
GEMMA3_OLDER = {                                        # as transformers 4 wrote it
    **{key: GEMMA3[key] for key in GEMMA3.keys() - {"layer_types", "rope_parameters"}},
    "sliding_window_pattern": 3, "rope_theta": 1000000, "rope_local_base_freq": 10000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "cache_implementation": "hybrid"}


def logits_of(folder, tokens, dtype=None):
    with torch.no_grad():
        return load_model(folder, dtype=dtype)(tokens)


def write_shards(folder, raw, shards=3):
    tensors = random_weights(raw)
    names = sorted(tensors)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    folder.mkdir(exist_ok=True)
    for i, file in enumerate(files):
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
    weight_map = {name: files[i % shards] for i, name in enumerate(names)}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", raw)
    return folder


@pytest.mark.parametrize("raw", [
    GEMMA, GEMMA_27B, LLAMA, {**LLAMA, "tie_word_embeddings": True}, GEMMA3, GEMMA3_OLDER],
    ids=["gemma", "gemma-27b", "llama", "llama-tied", "gemma-3", "gemma-3-older"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_equal_transformers(raw, dtype, tmp_path, monkeypatch):
    """200 positions: twelve sliding windows, three times the length where rotary scaling begins.

    fp32 goes through the fused attention kernel. In bf16 every rounding counts, so both sides run
    the written-out formula.
    """
    if dtype == torch.bfloat16:
        naive = lambda *qkv_to_masks: naive_attention(*qkv_to_masks[:6])                # noqa: E731
        monkeypatch.setattr("lorasae.attention.attention", naive)
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    folder = write_model(tmp_path / "model", raw)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager")
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


def test_saved_checkpoints_read_back_in_one_file_and_in_shards(
        raw_config, model_folder, tokens, tmp_path):
    model, copy = load_model(model_folder), tmp_path / "copy"
    index = copy / "model.safetensors.index.json"
    save_model(model, copy, config=raw_config, shard_bytes=40_000)
    assert len(list(copy.glob("*.safetensors"))) > 2
    total = read_json(index)["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert torch.equal(logits_of(copy, tokens), model(tokens).detach())

    save_model(model, copy, config=raw_config)
    assert not index.exists() and safe_open(copy / "model.safetensors", "pt").metadata() == {
        "format": "pt"}
    assert torch.equal(logits_of(copy, tokens), model(tokens).detach())
    assert read_json(copy / "config.json") == raw_config and not list(copy.rglob("*.part"))


@pytest.mark.parametrize("name, parameters", [
    ("gemma-2-2b", 2_614_341_888), ("gemma-2-9b", 9_241_705_984), ("gemma-2-27b", 27_227_128_320),
    ("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248)])
def test_the_presets_configurations_are_those_of_the_published_models(name, parameters):
    known = PRESETS[name]
    with torch.device("meta"):
        model = Transformer(parse_config(known.config, name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert known.weights == parameters * (4 if name.startswith("gemma") else 2)


def test_a_home_folder_and_a_trailing_slash_are_harmless(model_folder, tokens, monkeypatch):
    monkeypatch.setenv("HOME", str(model_folder.parent))
    expected = logits_of(model_folder, tokens)
    for name in ("~/model", "~/model/", f"{model_folder}/"):
        assert torch.equal(logits_of(name, tokens), expected)


def test_new_spellings_of_the_configuration_mean_the_same():
    assert parse_config(GEMMA3_OLDER, "old") == parse_config(GEMMA3, "new")
    both = {**GEMMA3, "rope_local_base_freq": 777.0}    # a stale one, beside the newer spelling
    assert parse_config(both, "both") == parse_config(GEMMA3, "new")
    plain = {key: GEMMA3[key] for key in GEMMA3.keys() - {"layer_types", "rope_parameters"}}
    config = parse_config({**plain, "num_hidden_layers": 7}, "plain")
    assert config.layer_types.index("full_attention") == 5
    assert (config.rope_theta, config.rope_scaling, config.local_rope_theta) == (1e6, None, 1e4)

    new = {**LLAMA, "dtype": "float32"}
    theta, scaling, _ = (new.pop(key) for key in ("rope_theta", "rope_scaling", "torch_dtype"))
    new["rope_parameters"] = {**scaling, "rope_theta": theta}
    assert parse_config(new, "new") == parse_config(LLAMA, "old")
    assert parse_config({**GEMMA, "head_dim": 6}, "g").head_dim == 6


def test_llama3_rotary_scaling_keeps_short_waves_and_stretches_long_ones():
    scaling = RopeScaling(32.0, 1.0, 4.0, original_max_position_embeddings=8192)
    plain, bent = rotary_frequencies(64, 5e5), rotary_frequencies(64, 5e5, scaling)
    wavelength = 2 * math.pi / plain
    assert torch.equal(bent[wavelength < 2048], plain[wavelength < 2048])
    torch.testing.assert_close(bent[wavelength > 8192], plain[wavelength > 8192] / 32)
    middle = (wavelength > 2048) & (wavelength < 8192)
    assert middle.any() and (bent[middle] < plain[middle]).all()
    assert (bent[middle] > plain[middle] / 32).all()


def test_the_window_hides_what_is_too_far_back():
    mask = causal_mask(3, 6, window=2, device="cpu")    # queries stand at positions 3, 4, 5
    assert mask.int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]


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


def test_an_sae_that_never_saw_special_positions_leaves_them(model, tokens):
    class Zeros:
        on_special = False

        def __call__(self, x):
            return torch.zeros_like(x)

    special = torch.zeros_like(tokens, dtype=torch.bool)
    special[:, [0, 7]] = True
    spoiled = model.run(model.embed(tokens), 0, 2, {1: Zeros()}, special)
    plain = model.run(model.embed(tokens), 0, 2)
    assert torch.equal(spoiled[special], plain[special]) and not spoiled[~special].any()


@pytest.mark.parametrize("after_norm", [True, False])
def test_an_sae_of_an_mlp_is_spliced_into_the_mlps_output(model, tokens, after_norm):
    """By hand: a hook on the MLP, or on the norm that follows it in Gemma."""
    sae = JumpReLU(model.config.hidden_size, 64).requires_grad_(False)
    for parameter in sae.parameters():
        nn.init.normal_(parameter, std=0.1)
    sae.site, sae.after_norm = "mlp", after_norm
    block, special = model.layers[2], model.special(tokens)
    gemma = hasattr(block, "post_feedforward_layernorm")
    module = block.post_feedforward_layernorm if gemma and after_norm else block.mlp
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

    add_lora(model, [2, 3], 4, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    parameters = lora_parameters(model)
    expected = torch.autograd.grad(naive_loss(model, {2: sae}, tokens), parameters)
    first = first_differing(model, {2: sae})
    part = frozen_forward(model, {2: sae}, tokens, first)
    loss, _ = adapted_loss(model, {2: sae}, part, first, SimpleNamespace(compile=False))
    for a, b in zip(torch.autograd.grad(loss, parameters), expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def rewrite(**changes):
    """Changes keys of a config.json; None takes a key out."""
    def change(folder):
        raw = {**read_json(folder / "config.json"), **changes}
        raw = {key: value for key, value in raw.items() if value is not None}
        write_json(folder / "config.json", raw)
    return change


@pytest.mark.parametrize("change, message", [
    (rewrite(hidden_size=32), r"but should be \[.*32"),
    (rewrite(num_hidden_layers=5, layer_types=None), "lacks 'model.layers.4"),
    (rewrite(num_hidden_layers=3, layer_types=None),
     "has, beyond the model's tensors, 'model.layers.3"),
    (rewrite(model_type="mamba"), "model_type is 'mamba'"),
    (rewrite(hidden_size=None), "config.json lacks hidden_size"),
])
def test_a_broken_folder_is_one_clear_line(model_folder, change, message):
    change(model_folder)
    with pytest.raises(InputError, match=message) as error:
        load_model(model_folder)
    assert "\n" not in str(error.value)


def test_an_sae_for_a_layer_that_is_not_there_is_refused(model, tokens):
    with pytest.raises(InputError, match=r"layers \[9\], but the model has blocks 0 to 3"):
        model(tokens, {9: lambda x: x})
