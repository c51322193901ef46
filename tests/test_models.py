"""The hand-written models against transformers: loading, splicing, generating, bad files."""
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import GEMMA, GEMMA3, LLAMA, write_model
from helpers import adapted, random_sae, refuses, same_tensors, transformers_model, without_cache
from lorasae.adapt import adapted_loss, first_differing, frozen_forward, naive_loss
from lorasae.attention import Cache, naive_attention
from lorasae.generation import generate
from lorasae.io.files import local, read_json, write_json
from lorasae.io.adapters import load_adapter, save_adapter
from lorasae.io.models import load_model, load_tokenizer, parse_config, save_model, text_config
from lorasae.io.presets import PRESETS
from lorasae.io.saes import load_sae, save_sae
from lorasae.io.text import files
from lorasae.lora import adapters, add_lora, lora_parameters, merge_lora
from lorasae.model import Transformer
from lorasae.sae import JumpReLU, TopK

GEMMA_27B = {**GEMMA, "hidden_size": 40, "head_dim": 16, "num_key_value_heads": 4}
GEMMA3_OLDER = {                                        # as transformers 4 wrote it
    **{key: GEMMA3[key] for key in GEMMA3.keys() - {"layer_types", "rope_parameters"}},
    "sliding_window_pattern": 3, "rope_theta": 1000000, "rope_local_base_freq": 10000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "cache_implementation": "hybrid"}

# What these families support, but their published models do not use
GEMMA_OTHER = {
    **GEMMA, "layer_types": ["full_attention"] * 2 + ["sliding_attention", "full_attention"],
    "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
GEMMA3_CAPPED = {**GEMMA3, "final_logit_softcapping": 3.0}


@pytest.mark.parametrize("raw", [
    GEMMA, GEMMA_27B, GEMMA_OTHER, LLAMA, {**LLAMA, "tie_word_embeddings": True}, GEMMA3,
    GEMMA3_OLDER, GEMMA3_CAPPED], ids=["gemma", "gemma-27b", "gemma-other", "llama", "llama-tied",
                                       "gemma-3", "gemma-3-older", "gemma-3-capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_equal_transformers(raw, dtype, tmp_path, monkeypatch):
    """200 positions: twelve sliding windows, thrice the original context of rotary scaling.

    fp32 goes through the fused attention kernel. In bf16 every rounding counts, so both sides run
    the written-out formula.
    """
    if dtype == torch.bfloat16:
        naive = lambda *qkv_to_masks: naive_attention(*qkv_to_masks[:6])                # noqa: E731
        monkeypatch.setattr("lorasae.attention.attention", naive)
    folder = write_model(tmp_path / "model", raw)
    oracle = transformers_model(folder, dtype=dtype)
    tokens = torch.randint(0, 97, (2, 200))
    expected = oracle(tokens).logits
    ours = load_model(folder, dtype=dtype)(tokens)
    assert expected.float().std() > 0.1
    assert raw["model_type"] != "gemma2" or expected.abs().max() > 1.5
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=10)


def test_saved_models_load_again_unchanged(raw_config, model_folder, tokens, tmp_path):
    model, copy = load_model(model_folder), tmp_path / "copy"
    index = copy / "model.safetensors.index.json"
    stale = {**raw_config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    save_model(model, copy, config=stale, shard_bytes=40_000)
    assert len(list(copy.glob("*.safetensors"))) > 2
    total = read_json(index)["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert torch.equal(load_model(copy)(tokens), model(tokens))

    # a single file takes precedence over shards in the same folder, as in transformers
    other = write_model(tmp_path / "other", raw_config, seed=1)
    shutil.copy(other / "model.safetensors", copy)
    assert torch.equal(load_model(copy)(tokens), load_model(other)(tokens))

    save_model(model, copy, config=stale)
    assert not index.exists() and safe_open(copy / "model.safetensors", "pt").metadata() == {
        "format": "pt"}
    assert torch.equal(load_model(copy)(tokens), model(tokens))
    assert read_json(copy / "config.json") == raw_config and not list(copy.rglob("*.part"))


@pytest.mark.parametrize("name, parameters", [
    ("gemma-2-2b", 2_614_341_888), ("gemma-2-9b", 9_241_705_984), ("gemma-2-27b", 27_227_128_320),
    ("gemma-3-270m", 268_098_176), ("gemma-3-1b", 999_885_952), ("smollm2-135m", 134_515_008),
    ("smollm2-1.7b", 1_711_376_384), ("llama-3.2-1b", 1_235_814_400),
    ("llama-3.1-8b", 8_030_261_248)])
def test_preset_configurations_match_the_published_models(name, parameters):
    known = PRESETS[name]
    with torch.device("meta"):
        model = Transformer(parse_config(known.config, name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert known.weights == parameters * (4 if name.startswith("gemma-2") else 2)


def test_a_tilde_means_the_home_folder(whole_model, raw_config, tokens, monkeypatch, tmp_path):
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
    assert torch.equal(load_model("~/copy")(tokens), load_model(whole_model)(tokens))
    (tmp_path / "t.jsonl").write_text('{"text": "a"}')
    assert [file.name for file in files("~/t.jsonl")] == [f"{tmp_path}/t.jsonl"]
    assert not (tmp_path / "~").exists()


def test_new_spellings_of_the_configuration_mean_the_same():
    """For Gemma 3's, see tests/test_real_formats.py."""
    both = {**GEMMA3, "rope_local_base_freq": 777.0}    # a stale key next to the newer one
    assert parse_config(both, "both") == parse_config(GEMMA3, "new")
    new = {**LLAMA, "dtype": "float32"}
    theta, scaling, _ = (new.pop(key) for key in ("rope_theta", "rope_scaling", "torch_dtype"))
    new["rope_parameters"] = {**scaling, "rope_theta": theta}
    assert parse_config(new, "new") == parse_config(LLAMA, "old")


@pytest.mark.parametrize("pieces", [[40], [39, 1], [10, 20, 10], [1] * 40])
def test_a_cache_gives_the_same_logits_piece_by_piece(model, tokens, pieces):
    cache, parts = Cache(), []
    for part in tokens.split(pieces, dim=1):
        parts.append(model(part, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("site, after_norm", [("mlp", True), ("mlp", False), ("resid", False)])
def test_an_sae_is_spliced_in_where_it_was_trained(model, tokens, site, after_norm):
    """Against a hook on the block, its MLP, or the norm that follows the MLP in Gemma.

    Special positions, which the SAE never saw, stay unchanged.
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
    same_tensors(torch.autograd.grad(loss, parameters), expected)


@pytest.mark.parametrize("layers, message", [
    (5, "lacks 'model.layers.4"), (3, "has, beyond the model's tensors, 'model.layers.3")])
def test_a_wrong_number_of_blocks_is_one_clear_line(model_folder, raw_config, layers, message):
    other = {**raw_config, "num_hidden_layers": layers, "layer_types": None}
    write_json(model_folder / "config.json", other)
    refuses(message, load_model, model_folder)


# ---- Gemma 3 with a vision tower -----------------------------------------------------------------

@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A random model with a vision tower, as transformers saves it."""
    transformers = pytest.importorskip("transformers", reason="transformers makes the model")
    text = {key: value for key, value in GEMMA3.items() if key not in ("architectures",)}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision,
                                       mm_tokens_per_image=4, bos_token_id=2, eos_token_id=[1, 5])
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("seeing")
    model.save_pretrained(folder)
    return folder, model


def test_the_text_model_next_to_a_vision_tower_matches_transformers(seeing, tokens, capsys):
    folder, oracle = seeing
    model = load_model(folder)
    assert "vision tower" in capsys.readouterr().err
    expected = oracle(input_ids=tokens).logits
    assert (model(tokens) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (model.config.eos_token_id, model.config.with_vision) == (1, True)


def test_both_spellings_of_its_tensor_names_load(seeing, tokens, tmp_path):
    folder, _ = seeing
    weights = load_file(folder / "model.safetensors")
    renamed = {}
    for name, tensor in weights.items():
        for new, old in (("model.language_model.", "language_model.model."),
                         ("language_model.model.", "model.language_model."),
                         ("model.vision_tower.", "vision_tower."),
                         ("vision_tower.", "model.vision_tower.")):
            if name.startswith(new):
                name = old + name.removeprefix(new)
                break
        renamed[name] = tensor
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    write_json(tmp_path / "config.json", read_json(folder / "config.json"))
    assert torch.equal(load_model(tmp_path)(tokens), load_model(folder)(tokens))


def test_its_adapters_load_in_peft_and_merge_into_a_plain_model(seeing, tokens, tmp_path):
    peft = pytest.importorskip("peft", reason="peft loads the adapters")
    transformers = pytest.importorskip("transformers", reason="transformers loads the merged model")
    folder, oracle = seeing
    model = adapted(load_model(folder), [1, 3], rank=4, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_model(folder), tmp_path / "adapter")
    assert torch.equal(again(tokens), model(tokens))

    theirs = peft.PeftModel.from_pretrained(
        transformers.Gemma3ForConditionalGeneration.from_pretrained(folder), tmp_path / "adapter")
    found = theirs.eval()(input_ids=tokens).logits
    assert (found - model(tokens)).abs().max() <= 1e-5 * found.abs().max()
    assert (found - oracle(input_ids=tokens).logits).abs().max() > 1e-2
    assert not [name for name, _ in theirs.named_modules() if "vision" in name and "lora" in name]

    expected = model(tokens)
    save_model(merge_lora(model), tmp_path / "merged", config=text_config(folder))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain).__name__ == "Gemma3ForCausalLM"
    assert (plain(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


# ---- Generated text ------------------------------------------------------------------------------

@pytest.fixture
def saes(model, tokens):
    """SAEs for a model whose EOS does not occur in the text that it generates."""
    saes = {1: random_sae("topk", model), 2: random_sae("jumprelu", model)}
    model.config.__dict__["eos_token_id"] = 0
    seen = [without_cache(model, tokens, 12, saes) for saes in (saes, {})]
    unseen = set(range(3, 97)) - set(torch.cat(seen).flatten().tolist())
    model.config.__dict__["eos_token_id"] = min(unseen)
    return saes


def test_generation_is_greedy_and_splices_the_saes_at_new_positions(model, tokens, saes):
    found = generate(model, tokens, 12, saes)
    assert torch.equal(found, without_cache(model, tokens, 12, saes))
    assert not torch.equal(found, generate(model, tokens, 12))
    assert torch.equal(generate(model, tokens, 0), tokens)
    refuses("blocks 0 to 3", generate, model, tokens, 1, {4: saes[1]})

    # Rows are independent, and prompts can have any length.
    lengths = [40, 23]
    ragged = generate(model, tokens, 12, saes, lengths=lengths)
    assert torch.equal(ragged[0], found[0])
    alone = without_cache(model, tokens[1:, :23], 12, saes)
    assert torch.equal(ragged[1, :35], alone[0])
    assert (ragged[1, 35:] == model.config.eos_token_id).all()
    nothing = generate(model, tokens, 0, saes, lengths=lengths)
    assert torch.equal(nothing[1, :23], tokens[1, :23]) and torch.equal(nothing[0], tokens[0])
    assert (nothing[1, 23:] == model.config.eos_token_id).all()


def test_a_row_ends_at_eos_or_when_it_is_told_to_stop(model, tokens, saes):
    free = generate(model, tokens, 12)
    new = free[:, 40:].tolist()
    model.config.__dict__["eos_token_id"] = eos = new[0][4]
    first = new[0].index(eos)
    found = generate(model, tokens[:1], 12)
    assert torch.equal(found, free[:1, :40 + first + 1])
    both = generate(model, tokens, 12)
    assert (both[0, 40 + first:] == eos).all()

    asked = []
    stopped = generate(model, tokens, 12, stop=lambda row, ids: asked.append((row, len(ids))))
    assert torch.equal(stopped, free) and sorted(asked) == [
        (row, length) for row in (0, 1) for length in range(1, 13)]
    assert generate(model, tokens, 12, stop=lambda row, ids: len(ids) == 3).shape == (2, 43)


def test_a_temperature_samples_from_the_softmax_and_a_seed_repeats_it(model, tokens, saes):
    def drawn(seed, temperature=0.7, prompts=tokens, count=4):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, prompts, count, saes, temperature, generator)

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert torch.equal(drawn(0, 1e-6), generate(model, tokens, 4, saes))
    many = drawn(0, 0.7, tokens[:1, :8].expand(4000, -1), count=1)[:, 8]
    p = (model(tokens[:1, :8], saes)[0, -1] / 0.7).softmax(-1)
    found = many.bincount(minlength=97) / 4000
    assert (found - p).abs().max() < 4 * (p * (1 - p) / 4000).sqrt().max()
