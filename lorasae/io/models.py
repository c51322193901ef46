"""Hugging Face model folders <-> Transformer: config.json, one safetensors file or an index with shards, the tokenizer.

Weights load strictly: every tensor the architecture names must be in the files with the shape the configuration
implies, and nothing else may be. The model is built on the meta device and filled tensor by tensor, so it never exists
twice.
"""
import os
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer

from lorasae.errors import InputError
from lorasae.gemma2 import Gemma2Config
from lorasae.io.files import Fields, read_bytes, read_object, shown, write_bytes, write_json
from lorasae.io.hub import BESIDE_WEIGHTS, config_file, model_files
from lorasae.io.files import DTYPES, Tensors, as_dtype, is_finite, write_tensors
from lorasae.llama3 import Llama3Config, RopeScaling
from lorasae.lora import adapters
from lorasae.model import Transformer

ARCHITECTURES = {"gemma2": "Gemma2ForCausalLM", "llama": "LlamaForCausalLM"}
INDEX = "model.safetensors.index.json"
MANY = 10**9                                            # positions: no model has as many
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_model(name_or_dir, *, device="cpu", dtype=None):
    """A frozen Transformer in eval mode from a preset, a Hub repository id, or a local folder.

    dtype: a torch dtype or its name; None keeps the one the configuration states. Raises InputError with one line for
    anything that is wrong with the files.
    """
    folder = model_files(name_or_dir)
    fields = read_object(folder / "config.json")
    config = parse_config(fields, folder)

    dtype = as_dtype(dtype or _stated_dtype(fields))

    with torch.device("meta"):
        model = Transformer(config)
    fill(model, weight_files(folder), device, dtype)
    return model.requires_grad_(False).eval()


def load_config(name_or_dir):
    """The configuration alone, without weights."""
    path = config_file(name_or_dir)
    return parse_config(read_object(path), path.parent)


# ---- config.json -----------------------------------------------------------------------------------------------------

def parse_config(raw, where):
    """Hugging Face's config.json -> Gemma2Config or Llama3Config. Reads the old spellings and the new ones.

    The sizes must be there. What else is absent takes the value that transformers gives it, family by family (Gemma-2
    ties its embeddings without saying so). What would change the model's arithmetic and is not implemented is refused.
    """
    fields = Fields(raw, f"{where}/config.json")
    family = _family(fields, where)
    return {"gemma2": _gemma2_config, "llama": _llama3_config}[family](fields)


def _stated_dtype(fields):
    """The dtype that the weights are meant to be used in, by its new key or its old one; float32 without either."""
    for key in ("dtype", "torch_dtype"):
        name = fields.take(key, str, None)
        if name is not None:
            if name not in DTYPES:
                raise InputError(f"{fields.where}: {key} is {shown(name)}, which is not one of {', '.join(DTYPES)}")
            return name
    return "float32"


def _family(fields, where):
    """ "gemma2" or "llama", from `architectures` or, without it, `model_type`."""
    named = fields.take("architectures", [str], None)
    model_type = fields.take("model_type", str, None)
    name = named[0] if named else ARCHITECTURES.get(model_type, model_type)

    for family, architecture in ARCHITECTURES.items():
        if name == architecture:
            if model_type not in (family, None):
                raise InputError(f"{fields.where}: model_type is {shown(model_type)}, but architectures says "
                                 f"{architecture}")
            return family

    found = "names no architecture" if name is None else f"is a {shown(name)}"
    raise InputError(f"{where} {found}, but only {' and '.join(ARCHITECTURES.values())} are supported")


def _gemma2_config(fields):
    """The defaults are those of transformers' Gemma2Config."""
    # transformers reads hidden_activation, and files hold both: where the other contradicts it neither is guessed at
    fields.only(hidden_activation="gelu_pytorch_tanh", hidden_act="gelu_pytorch_tanh", attention_bias=False)
    if fields.take("use_bidirectional_attention", bool, None):
        raise InputError(f"{fields.where}: use_bidirectional_attention true is not supported: attention must be causal")

    sizes = _sizes(fields)
    _check_layer_types(fields, sizes["num_hidden_layers"])
    theta, scaling = _rotary(fields)
    if scaling is not None:
        raise InputError(f"{fields.where}: rotary scaling 'llama3' is not part of Gemma-2")

    return Gemma2Config(
        **sizes,
        **_heads(fields, key_value_heads=4, head_dim=256),
        **_special_tokens(fields, bos=2, eos=1),
        query_pre_attn_scalar=fields.take("query_pre_attn_scalar", float, 256.0, above=0),
        sliding_window=fields.take("sliding_window", int, 4096, at_least=1, at_most=MANY),
        attn_logit_softcapping=fields.take("attn_logit_softcapping", float, 50.0, nullable=True, above=0),
        final_logit_softcapping=fields.take("final_logit_softcapping", float, 30.0, nullable=True, above=0),
        rms_norm_eps=fields.take("rms_norm_eps", float, 1e-6, at_least=0),
        rope_theta=theta,
        tie_word_embeddings=fields.take("tie_word_embeddings", bool, True),
        max_position_embeddings=fields.take("max_position_embeddings", int, 8192, at_least=1, at_most=MANY))


def _llama3_config(fields):
    """The defaults are those of transformers' LlamaConfig, which are Llama 1's."""
    fields.only(hidden_act="silu", attention_bias=False, mlp_bias=False)
    theta, scaling = _rotary(fields)

    return Llama3Config(
        **_sizes(fields),
        **_heads(fields, key_value_heads=None, head_dim=None),
        **_special_tokens(fields, bos=1, eos=2),
        rms_norm_eps=fields.take("rms_norm_eps", float, 1e-6, at_least=0),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=fields.take("tie_word_embeddings", bool, False),
        max_position_embeddings=_context(fields))


def _sizes(fields):
    """What has no default. The upper bounds only keep nonsense from being built."""
    return {
        "vocab_size": fields.take("vocab_size", int, at_least=1, at_most=10**7),
        "hidden_size": fields.take("hidden_size", int, at_least=1, at_most=10**6),
        "intermediate_size": fields.take("intermediate_size", int, at_least=1, at_most=10**7),
        "num_hidden_layers": fields.take("num_hidden_layers", int, at_least=1, at_most=1000),
    }


def _heads(fields, key_value_heads, head_dim):
    """key_value_heads, head_dim: the family's defaults; None for as many as query heads, which share out the width."""
    queries = fields.take("num_attention_heads", int, at_least=1, at_most=10**4)
    pairs = fields.take("num_key_value_heads", int, key_value_heads, at_least=1) or queries
    if queries % pairs:
        raise InputError(f"{fields.where}: num_attention_heads {queries} is not a multiple of num_key_value_heads "
                         f"{pairs}")

    width = fields.take("head_dim", int, head_dim, at_least=1, at_most=10**5)
    if width is None:
        width, rest = divmod(fields["hidden_size"], queries)
        if rest:
            raise InputError(f"{fields.where}: hidden_size {fields['hidden_size']} is not a multiple of "
                             f"num_attention_heads {queries}, and no head_dim is given")
    if width % 2 or not width:
        raise InputError(f"{fields.where}: head_dim is {width}, but rotary embeddings need an even one")

    return {"num_attention_heads": queries, "num_key_value_heads": pairs, "head_dim": width}


def _special_tokens(fields, **defaults):
    """The ids of BOS and EOS; of several EOS (chat models) the first."""
    tokens = {}
    for name, default in defaults.items():
        key = f"{name}_token_id"
        several = isinstance(fields.get(key), list)
        token = fields.take(key, [int] if several else int, default, at_least=0, below=fields["vocab_size"])
        if token == []:
            raise InputError(f"{fields.where}: {key} is an empty list, but should be the id of a token")
        tokens[key] = token[0] if several else token
    return tokens


def _context(fields):
    return fields.take("max_position_embeddings", int, 2048, at_least=1, at_most=MANY)


def _rotary(fields):
    """-> theta, RopeScaling or None. Older files have rope_theta and rope_scaling apart, newer ones rope_parameters."""
    older = fields.take("rope_scaling", dict, None)
    newer = fields.take("rope_parameters", dict, None)
    rope = older or newer or Fields({}, fields.where)               # where both are, transformers reads the older
    for key, value in rope.items():
        if isinstance(value, dict):
            raise InputError(f"{rope.where}: rotary embeddings that differ by layer ({shown(key)}) are not supported")

    theta = rope.take("rope_theta", float, None, above=0)
    if theta is None:
        theta = fields.take("rope_theta", float, 10000.0, above=0)

    for place in (fields, rope):
        part = place.take("partial_rotary_factor", float, 1.0)
        if part != 1:
            raise InputError(f"{place.where}: partial_rotary_factor {part} is not supported, only 1")

    kind = rope.take("rope_type", str, None) or rope.take("type", str, None)
    if kind is None:
        if rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}:
            raise InputError(f"{rope.where} lacks rope_type: what else it says has no meaning without")
        kind = "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f"{rope.where}: rotary scaling {shown(kind)} is not supported, only 'llama3' or none")

    low = rope.take("low_freq_factor", float, above=0)
    return theta, RopeScaling(
        factor=rope.take("factor", float, above=0),
        low_freq_factor=low,
        high_freq_factor=rope.take("high_freq_factor", float, above=low),
        original_max_position_embeddings=rope.take(
            "original_max_position_embeddings", int, _context(fields), at_least=1, at_most=MANY))


def _check_layer_types(fields, depth):
    """gemma2.Block slides in every even block: a file may say so, and nothing else."""
    kinds = ("sliding_attention", "full_attention")
    expected = [kinds[layer % 2] for layer in range(depth)]
    if fields.take("layer_types", [str], None) not in (None, expected):
        raise InputError(f"{fields.where}: layer_types is not supported but as {', '.join(kinds)} in turn, "
                         f"{depth} in all (num_hidden_layers)")


# ---- Weights ---------------------------------------------------------------------------------------------------------

def weight_files(folder):
    """{tensor name: file} of a folder, from the index where there is one. Names that leave the folder are refused."""
    folder = Path(folder)
    index = folder / INDEX
    if not os.path.lexists(index):
        single = folder / "model.safetensors"
        if not os.path.lexists(single):
            raise InputError(f"{folder} has neither {single.name} nor {INDEX}")
        return {name: single for name in Tensors(single).names}

    weight_map = read_object(index).take("weight_map", dict)
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
            raise InputError(f"{index} points outside its folder, to {shown(name)}, which is no safetensors file there")
        if not os.path.exists(folder / name):
            raise InputError(f"{folder} lacks the shard {name}, which its index names: download it again")
    return {tensor: folder / name for tensor, name in weight_map.items()}


def fill(model, files, device, dtype):
    """Puts the tensors of {name: file} into a model on the meta device, one at a time, as `dtype` on `device`."""
    wanted = dict(model.named_parameters())
    stored = _stored_names(files, model.config.tie_word_embeddings)

    missing, unknown = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or unknown:
        folder = next(iter(files.values())).parent if files else "the folder"
        what = f"lacks {missing[0]}" if missing else f"has {shown(unknown[0])}, which the architecture does not know"
        raise InputError(f"{folder} {what} ({len(missing)} missing, {len(unknown)} unknown tensors): "
                         "it does not fit its config.json")

    for path in sorted(set(files.values())):
        tensors = Tensors(path)
        for name in sorted(name for name in wanted if files[stored[name]] == path):
            shape, implied = tensors.shape(stored[name]), tuple(wanted[name].shape)
            if shape != implied:
                raise InputError(f"{path}: {stored[name]} has shape {shape}, but config.json implies {implied}")

            tensor = tensors[stored[name]].to(device=device, dtype=dtype, copy=True)
            if not is_finite(tensor):
                raise InputError(f"{path}: {stored[name]} holds values that are not finite as {dtype}: the file is "
                                 "damaged, or needs another --dtype")
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))


def _stored_names(files, tied):
    """{parameter: the name it is stored under}. A tied embedding may be stored as itself, as the head, or as both."""
    stored = {name: name for name in files if not name.endswith("rotary_emb.inv_freq")}
    if tied and HEAD in files:
        del stored[HEAD]
        if EMBEDDING not in files:
            stored[EMBEDDING] = HEAD
        elif not torch.equal(Tensors(files[EMBEDDING])[EMBEDDING], Tensors(files[HEAD])[HEAD]):
            raise InputError(f"{files[HEAD].parent}: {HEAD} and {EMBEDDING} differ, but config.json ties them: if the "
                             'head is one of its own, set "tie_word_embeddings": false there')
    return stored


def save_model(model, folder, *, config, shard_bytes=5_000_000_000):
    """Writes a plain Hugging Face checkpoint (config.json = `config`, weights in shards of at most shard_bytes).

    Adapters must be merged before: the format has no place for them. transformers.AutoModelForCausalLM loads it.
    """
    if adapters(model):
        raise InputError("merge the adapters before writing a plain checkpoint")
    folder = Path(folder)

    shards, size = [{}], 0
    for name, tensor in model.state_dict().items():
        size += tensor.nbytes
        if size > shard_bytes and shards[-1]:
            shards.append({})
            size = tensor.nbytes
        shards[-1][name] = tensor

    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards):
        write_tensors(folder / name, shard, {"format": "pt"})

    if len(shards) > 1:
        weight_map, total = {}, 0
        for name, shard in zip(names, shards):
            for key, tensor in shard.items():
                weight_map[key] = name
                total += tensor.nbytes
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = {key: value for key, value in config.items() if key != "dtype"}       # the new spelling of torch_dtype
    write_json(folder / "config.json", {**config, "torch_dtype": dtype})


# ---- The tokenizer, and what else lies beside the weights ------------------------------------------------------------

def load_tokenizer(name_or_dir, config=None):
    """The tokenizer of a model (a preset, a Hub repository, a local folder), whose configuration may be at hand."""
    path = model_files(name_or_dir) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_buffer(read_bytes(path))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is not a tokenizer of the tokenizers library ({error})") from None
    check_tokenizer(tokenizer, config or load_config(name_or_dir), path)
    return tokenizer


def check_tokenizer(tokenizer, config, path):
    """InputError where the tokenizer knows ids that the model has no embedding for."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= config.vocab_size:
        raise InputError(f"{path} makes tokens up to {largest}, but the model's vocab_size is {config.vocab_size}: the "
                         "tokenizer belongs to another model")


def copy_beside_weights(name_or_dir, folder):
    """Copies what a model carries beside its weights, as far as it does: the tokenizer's and generation's files."""
    source = model_files(name_or_dir)
    for name in BESIDE_WEIGHTS:
        if os.path.lexists(source / name):
            write_bytes(Path(folder) / name, read_bytes(source / name))
