"""Model folders: tied heads, transformers' defaults, wrong values, and the tokenizer."""
from copy import deepcopy
from dataclasses import MISSING, fields

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from conftest import GEMMA, GEMMA3, LLAMA, write_model, write_tokenizer
from helpers import one_line, refuses, transformers_model
from lorasae import gemma2, llama3, load_model, load_tokenizer
from lorasae.io.files import write_json
from lorasae.family import MADE
from lorasae.io.models import parse_config

RAW = {"gemma2": GEMMA, "llama": LLAMA}
TIED = [GEMMA, {**LLAMA, "tie_word_embeddings": True}]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("raw", TIED, ids=["gemma2", "llama"])
@pytest.mark.parametrize("names", [[HEAD], [HEAD, EMBEDDING]], ids=["alone", "twice"])
def test_a_tied_head_may_be_stored_as_lm_head(raw, names, tmp_path, tokens):
    expected = load_model(write_model(tmp_path / "usual", raw))(tokens)
    folder = write_model(tmp_path / "head", raw)
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop(EMBEDDING)
    tensors |= {name: weight.clone() for name in names}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_model(folder)(tokens), expected)
    assert (transformers_model(folder)(tokens).logits - expected).abs().max() <= 1e-4


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path):
    folder = write_model(tmp_path, GEMMA)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, HEAD: tensors[EMBEDDING] + 1}, folder / "model.safetensors")
    message = "lm_head.weight and model.embed_tokens.weight differ, but config.json ties them"
    refuses(message, load_model, folder)


def optional(config):
    return [known.name for known in fields(config)
            if known.default is not MISSING and known.name not in MADE]


OPTIONAL = {
    "gemma2": [*optional(gemma2.Config), "rope_theta", "hidden_activation"],
    "llama": [*optional(llama3.Config), "rope_theta", "rope_scaling", "hidden_act"],
}


@pytest.mark.parametrize("family, key", [
    (family, key) for family, keys in OPTIONAL.items() for key in [*keys, "all of them"]])
def test_an_absent_key_has_the_default_of_transformers(family, key):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    absent = set(OPTIONAL[family]) if key == "all of them" else {key}
    raw = {name: value for name, value in RAW[family].items() if name not in absent}
    raw["num_attention_heads"] = 4                      # a multiple of Gemma-2's default 4 KV heads
    ours = parse_config(raw, "here")

    make = {"gemma2": transformers.Gemma2Config, "llama": transformers.LlamaConfig}[family]
    theirs = make(**{name: deepcopy(value) for name, value in raw.items()
                     if name not in ("architectures", "model_type")})
    for name in vars(ours):
        if name == "layer_types":
            assert list(ours.layer_types) == theirs.layer_types
        elif name not in ("rope_theta", "model_type", *MADE):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.rope_scaling is None) == (theirs.rope_parameters["rope_type"] == "default")


def test_a_null_that_transformers_accepts_is_accepted():
    nulls = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = parse_config({**GEMMA, **nulls}, "here")
    assert config.attn_logit_softcapping is config.final_logit_softcapping is None
    nulls = {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None}
    config = parse_config({**LLAMA, **nulls}, "here")
    assert (config.head_dim, config.num_key_value_heads, config.rope_scaling) == (16, 4, None)
    scaling = {**LLAMA["rope_scaling"]}                 # its length defaults to the model's
    del scaling["original_max_position_embeddings"]
    config = parse_config({**LLAMA, "rope_scaling": scaling}, "here")
    assert config.rope_scaling.original_max_position_embeddings == 8192


@pytest.mark.parametrize("raw, change, message", [      # other wrong values: test_bad_files.py
    (LLAMA, {"num_hidden_layers": 1_000_000}, "1000000, but should be a whole number, below 1001"),
    (LLAMA, {"intermediate_size": 2**52}, "number, at least 1, below 16777216"),
    (LLAMA, {"num_attention_heads": 3}, "heads 3 is not a multiple of num_key_value_heads 2"),
    (LLAMA, {"num_attention_heads": 6}, "head_dim is 10.6.*, but .* need an even one"),
    (GEMMA, {"head_dim": 7}, "head_dim is 7, but rotary embeddings need an even one"),
    (LLAMA, {"bos_token_id": 97}, "is 97, but should be a whole number, at least 0, below 97"),
    (GEMMA, {"model_type": "mamba"}, "is 'mamba', but should be a string, one of ..gemma2'"),
    (GEMMA, {"hidden_activation": "gelu"}, "hidden_activation is 'gelu', but should be a string"),
    (GEMMA, {"layer_types": ["full_attention"] * 3}, "for each of the 4 blocks"),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
    (LLAMA, {"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "'None' is not supp"),
    (LLAMA, {"rope_scaling": {**LLAMA["rope_scaling"], "high_freq_factor": 1.0}},
     "rope_scaling: high_freq_factor is 1.0, .* above 1.0"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (GEMMA3, {"layer_types": ["linear"] * 4}, "layer_types must have"),
    (GEMMA3, {"attn_logit_softcapping": 50.0}, "must be null"),
    (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (GEMMA3, {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}, "yarn"),
    (GEMMA3, {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
     "no rotary scaling")])
def test_a_wrong_value_is_refused_in_one_line_with_file_and_key(raw, change, message):
    with one_line(message) as error:
        parse_config({**raw, **change}, "folder")
    assert "folder/config.json" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_floating_point_dtype_load(dtype, tmp_path, tokens):
    folder = write_model(tmp_path, LLAMA)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    model = load_model(folder)
    assert all(torch.equal(p, tensors[name].float()) for name, p in model.named_parameters())


def test_a_value_that_is_not_finite_is_refused_even_if_the_cast_makes_it_so(tmp_path):
    folder = write_model(tmp_path, LLAMA)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6      # too large for float16
    save_file(tensors, folder / "model.safetensors")
    load_model(folder)
    message = "model.norm.weight contains values that are not finite"
    refuses(message, load_model, folder, dtype="float16")


@pytest.fixture
def tokenizer(tmp_path):
    """The tokenizer in tokenizer.json, next to a config.json."""
    write_tokenizer(tmp_path, LLAMA, "some text to learn from")
    write_json(tmp_path / "config.json", LLAMA)
    return Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


def test_a_tokenizer_is_loaded_unless_it_is_larger_than_the_model(tmp_path, tokenizer):
    largest = max(tokenizer.get_vocab().values())
    write_json(tmp_path / "config.json", {**LLAMA, "vocab_size": largest + 1})
    load_tokenizer(tmp_path)
    write_json(tmp_path / "config.json", {**LLAMA, "vocab_size": largest})
    with one_line(f"tokenizer.json has token ids up to {largest}, but the model's vocab_size is"):
        load_tokenizer(tmp_path)


def test_truncation_and_padding_in_a_tokenizer_file_are_ignored(tmp_path, tokenizer):
    text = "some text " * 20
    expected = load_tokenizer(tmp_path).encode(text).ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=500)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(text).ids == expected and 4 < len(expected) < 500


def test_an_added_token_one_past_the_embedding_does_no_harm(tmp_path, tokenizer):
    """[PAD] is often added this way for training. In a text it is read as plain text."""
    largest = max(tokenizer.get_vocab().values())
    write_json(tmp_path / "config.json", {**LLAMA, "vocab_size": largest + 1})
    expected = load_tokenizer(tmp_path).encode("some text[PAD]").ids
    tokenizer.add_special_tokens(["[PAD]"])
    assert largest + 1 in tokenizer.encode("some text[PAD]").ids
    windows = "\ufeff" + tokenizer.to_str()
    (tmp_path / "tokenizer.json").write_text(windows, encoding="utf-8")
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text("\ufeff" + config, encoding="utf-8")
    assert load_tokenizer(tmp_path).encode("some text[PAD]").ids == expected


@pytest.mark.parametrize("text", [
    "{}", "", "\xff", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'])
def test_a_damaged_tokenizer_is_refused_in_one_line(text, tmp_path):
    write_json(tmp_path / "config.json", LLAMA)
    (tmp_path / "tokenizer.json").write_bytes(text.encode("latin-1"))
    refuses(r"cannot read .*/tokenizer.json \(", load_tokenizer, tmp_path)
