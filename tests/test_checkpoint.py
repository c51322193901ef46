"""Model folders: transformers' defaults, what is refused by name, tied heads, the tokenizer."""
import json
import struct
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import GEMMA, LLAMA, random_weights, write_model, write_tokenizer
from lorasae.errors import InputError
from lorasae.io.models import check_tokenizer, copy_beside_weights, load_model, load_tokenizer, parse_config
from lorasae.io.files import write_json

RAW = {"gemma2": GEMMA, "llama": LLAMA}
TIED = [GEMMA, {**LLAMA, "tie_word_embeddings": True}]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@torch.no_grad()
def logits(folder, tokens):
    return load_model(folder)(tokens)


# ---- Heads -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("raw", TIED, ids=["gemma2", "llama"])
@pytest.mark.parametrize("names", [[HEAD], [HEAD, EMBEDDING]], ids=["alone", "twice"])
def test_a_tied_head_may_be_stored_as_the_head(raw, names, tmp_path, tokens):
    expected = logits(write_model(tmp_path / "usual", raw), tokens)
    folder = write_model(tmp_path / "head", raw)
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop(EMBEDDING)
    save_file({**tensors, **{name: weight.clone() for name in names}}, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(folder, tokens), expected)

    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        assert (oracle(tokens).logits - expected).abs().max() <= 1e-4


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path):
    folder = write_model(tmp_path, GEMMA)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, HEAD: tensors[EMBEDDING] + 1}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lm_head.weight and model.embed_tokens.weight differ, but config.json ties them"):
        load_model(folder)


# ---- config.json -----------------------------------------------------------------------------------------------------

OPTIONAL = {
    "gemma2": ["num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window", "attn_logit_softcapping",
               "final_logit_softcapping", "rms_norm_eps", "rope_theta", "bos_token_id", "eos_token_id", "tie_word_embeddings",
               "max_position_embeddings", "hidden_activation"],
    "llama": ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling", "bos_token_id", "eos_token_id",
              "tie_word_embeddings", "max_position_embeddings", "hidden_act"],
}

@pytest.mark.parametrize("family, key", [(family, key) for family, keys in OPTIONAL.items() for key in [*keys, "all of them"]])
def test_an_absent_key_means_what_it_means_to_transformers(family, key):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    absent = set(OPTIONAL[family]) if key == "all of them" else {key}
    raw = {name: value for name, value in RAW[family].items() if name not in absent}
    raw["num_attention_heads"] = 4                                  # Gemma-2's default of 4 key-value heads divides it
    ours = parse_config(raw, "here")

    make = {"gemma2": transformers.Gemma2Config, "llama": transformers.LlamaConfig}[family]
    theirs = make(**{name: deepcopy(value) for name, value in raw.items() if name not in ("architectures", "model_type")})
    for name in vars(ours):
        if name not in ("rope_theta", "rope_scaling", "model_type"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.rope_scaling is None) == (theirs.rope_parameters["rope_type"] == "default")


def test_the_length_that_llamas_scaling_starts_from_is_by_default_the_models():
    scaling = {key: value for key, value in LLAMA["rope_scaling"].items() if key != "original_max_position_embeddings"}
    assert parse_config({**LLAMA, "rope_scaling": scaling}, "here").rope_scaling.original_max_position_embeddings == 8192


def test_a_null_that_transformers_takes_is_taken():
    config = parse_config({**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None}, "here")
    assert config.attn_logit_softcapping is config.final_logit_softcapping is None
    config = parse_config({**LLAMA, "head_dim": None, "num_key_value_heads": None, "rope_scaling": None}, "here")
    assert (config.head_dim, config.num_key_value_heads, config.rope_scaling) == (16, 4, None)


@pytest.mark.parametrize("raw", [GEMMA, LLAMA], ids=["gemma2", "llama"])
@pytest.mark.parametrize("change, message", [
    ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported, only"),
    ({"attention_bias": True}, "attention_bias True is not supported"),
    ({"hidden_size": "48"}, "hidden_size is '48', but should be a whole number, at least 1"),
    ({"num_hidden_layers": -2}, "num_hidden_layers is -2"),
    ({"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1000000, but should be a whole number, at least 1, at most 1000"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_attention_heads": 3}, "num_attention_heads 3 is not a multiple of num_key_value_heads 2"),
    ({"head_dim": 7}, "head_dim is 7, but rotary embeddings need an even one"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, but should be a number, at least 0"),
    ({"rope_theta": 0}, "rope_theta is 0, but should be a number, above 0"),
    ({"bos_token_id": 97}, "bos_token_id is 97, but should be a whole number, at least 0, below 97"),
    ({"eos_token_id": []}, "eos_token_id is an empty list"),
    ({"vocab_size": None}, "vocab_size is None"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, but should be true or false"),
    ({"architectures": "Gemma2ForCausalLM"}, "architectures is 'Gemma2ForCausalLM', but should be a list, each of it a string"),
    ({"model_type": "mamba"}, "model_type is 'mamba', but architectures says"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rotary scaling 'yarn' is not supported"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_scaling lacks rope_type"),
    ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "that differ by layer"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ({"rope_theta": 10**400}, "rope_theta is 1000"),
])
def test_a_wrong_value_is_one_line_that_names_file_and_key(raw, change, message):
    with pytest.raises(InputError, match=message) as error:
        parse_config({**raw, **change}, "folder")
    assert "folder/config.json" in str(error.value) and "\n" not in str(error.value)


def test_a_dtype_that_is_none_is_one_line(tmp_path):
    folder = write_model(tmp_path, {**LLAMA, "torch_dtype": "int8"})
    with pytest.raises(InputError, match="config.json: torch_dtype is 'int8', which is not one of float32, bfloat16, float16"):
        load_model(folder)
    assert load_model(folder, dtype="float32")


@pytest.mark.parametrize("change, message", [
    ({"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported, only 'gelu_pytorch_tanh'"),
    ({"use_bidirectional_attention": True}, "must be causal"),
    ({"layer_types": ["full_attention"] * 4}, "layer_types is not supported but as sliding_attention, full_attention in turn"),
    ({"layer_types": ["sliding_attention", "full_attention"]}, r"in turn, 4 in all"),
    ({"sliding_window": None}, "sliding_window is None"),
    ({"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0, but should be a number, above 0"),
    ({"rope_parameters": LLAMA["rope_scaling"]}, "'llama3' is not part of Gemma-2"),
])
def test_gemmas_own_keys_are_checked(change, message):
    with pytest.raises(InputError, match=message):
        parse_config({**GEMMA, **change}, "here")
    assert parse_config({**GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2}, "here")


@pytest.mark.parametrize("change, message", [
    ({"mlp_bias": True}, "mlp_bias True is not supported"),
    ({"num_attention_heads": 6}, "hidden_size 64 is not a multiple of num_attention_heads 6, and no head_dim"),
    ({"rope_scaling": {**LLAMA["rope_scaling"], "high_freq_factor": 1.0}}, "rope_scaling: high_freq_factor is 1.0, .* above 1.0"),
])
def test_llamas_own_keys_are_checked(change, message):
    with pytest.raises(InputError, match=message):
        parse_config({**LLAMA, **change}, "here")


# ---- Weights ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64])
def test_weights_that_are_codes_are_refused_and_not_cast(dtype, tmp_path):
    folder = write_model(tmp_path, LLAMA)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=f"model.safetensors: model.norm.weight is {name}, but only float32"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_floating_dtype_load(dtype, tmp_path, tokens):
    folder = write_model(tmp_path, LLAMA)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    model = load_model(folder)
    assert all(torch.equal(p, tensors[name].float()) for name, p in model.named_parameters())


def test_a_value_that_is_not_finite_is_refused_also_when_the_cast_makes_it(tmp_path):
    folder = write_model(tmp_path, LLAMA)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6                           # more than float16 holds
    save_file(tensors, folder / "model.safetensors")
    assert load_model(folder).norm is not None
    with pytest.raises(InputError, match="model.norm.weight holds values that are not finite as torch.float16"):
        load_model(folder, dtype="float16")


def header(entries, data=b"\0" * 64):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize("data", [
    header({"a": ONE, "b": {**ONE, "data_offsets": [8, 24]}}), header({"a": {**ONE, "data_offsets": [0, 1000]}}),
    header({"a": {**ONE, "shape": [5]}}), header({"a": {**ONE, "shape": [-4]}}), header({"a": {**ONE, "dtype": "F31"}}),
    header({"a": {**ONE, "data_offsets": [16, 0]}}), header(b'{"a": 1'), header(b"[]"), struct.pack("<Q", 2**62) + b"{}",
    header({"a": {**ONE, "data_offsets": [16, 32]}}), header({"__metadata__": {"x": 1}, "a": ONE})],
    ids=["overlap", "beyond", "shape", "negative", "dtype", "backwards", "cut", "list", "endless", "hole", "metadata"])
def test_a_wrong_header_is_one_line(data, tmp_path):
    folder = write_model(tmp_path, LLAMA)
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="model.safetensors is refused: not a whole file of named tensors") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_name_that_a_header_holds_twice_never_hides_a_tensor(tmp_path):
    entry = json.dumps(ONE)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(header(f'{{"a": {entry}, "a": {entry}}}'.encode(), bytes(16)))
    with pytest.raises(InputError):
        load_model(tmp_path)


# ---- Beside the weights ----------------------------------------------------------------------------------------------

def test_the_tokenizer_is_loaded_and_must_not_be_larger_than_the_model(tmp_path):
    write_tokenizer(tmp_path, LLAMA, "some text to learn from")
    tokenizer = load_tokenizer(tmp_path, parse_config(LLAMA, "here"))
    largest = max(tokenizer.get_vocab().values())
    check_tokenizer(tokenizer, parse_config({**LLAMA, "vocab_size": largest + 1}, "here"), "tokenizer.json")
    with pytest.raises(InputError, match=f"tokenizer.json makes tokens up to {largest}, but the model's vocab_size is {largest}"):
        load_tokenizer(tmp_path, parse_config({**LLAMA, "vocab_size": largest}, "here"))


@pytest.mark.parametrize("text", ["{}", "[]", "", "{", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', '{"model": 7}',
                                  '{"version": "1.0", "added_tokens": [{"id": "x"}], "model": {"type": "WordLevel"}}', "\xff"])
def test_a_damaged_tokenizer_is_one_line(text, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="tokenizer.json is not a tokenizer of the tokenizers library") as error:
        load_tokenizer(tmp_path, parse_config(LLAMA, "here"))
    assert "\n" not in str(error.value)


def test_a_missing_tokenizer_is_one_line(tmp_path):
    with pytest.raises(InputError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path, parse_config(LLAMA, "here"))


def test_what_lies_beside_the_weights_is_copied_as_far_as_it_is_there(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    files = {"tokenizer.json": "{}", "special_tokens_map.json": "[]", "generation_config.json": '{"do_sample": true}'}
    source.mkdir()
    for name, text in {**files, "config.json": "{}", "README.md": "no", "pytorch_model.bin": "no"}.items():
        (source / name).write_text(text)
    copy_beside_weights(source, target)
    assert {path.name: path.read_text() for path in target.iterdir()} == files


def test_transformers_reads_the_tokenizer_that_was_copied(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
    source = write_model(tmp_path / "source", LLAMA)
    write_tokenizer(source, LLAMA, "some text to learn from")
    write_json(source / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>"})
    copy_beside_weights(source, tmp_path / "target")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "target")
    assert tokenizer("text")["input_ids"][0] == tokenizer.bos_token_id == LLAMA["bos_token_id"]


def test_a_missing_tensor_is_named_with_its_folder(tmp_path):
    folder = write_model(tmp_path, LLAMA)
    tensors = random_weights(LLAMA)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks model.layers.2.mlp.up_proj.weight \(1 missing, 0 unknown tensors\)"):
        load_model(folder)
