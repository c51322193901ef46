"""Hugging Face model folders <-> Transformer: config.json, one safetensors file or an index with shards.

Weights load strictly: every tensor the architecture names must be in the files with the shape the configuration implies, and
nothing else may be. The model is built on the meta device and filled tensor by tensor, so it never exists twice.
"""
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lorasae.errors import InputError
from lorasae.io.disk import read_json, write_bytes, write_json
from lorasae.gemma2 import Gemma2Config
from lorasae.io.hub import config_file, model_files
from lorasae.llama3 import Llama3Config, RopeScaling
from lorasae.lora import adapters
from lorasae.model import Transformer

ARCHITECTURES = {"gemma2": "Gemma2ForCausalLM", "llama": "LlamaForCausalLM"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(name_or_dir, *, device="cpu", dtype=None):
    """A frozen Transformer in eval mode from a preset, a Hub repository id, or a local folder.

    dtype: a torch dtype or its name; None keeps the one the configuration states. Raises InputError with one line for
    anything that is wrong with the files.
    """
    folder = model_files(name_or_dir)
    raw = read_json(folder / "config.json")
    config = parse_config(raw, folder)
    if dtype is None:
        dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtype = DTYPES.get(dtype, dtype)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    with torch.device("meta"):
        model = Transformer(config)
    fill(model, weight_files(folder), device, dtype)
    return model.requires_grad_(False).eval()


def load_config(name_or_dir):
    """The configuration alone, without weights."""
    path = config_file(name_or_dir)
    return parse_config(read_json(path), path.parent)


def parse_config(raw, where):
    """Hugging Face's config.json -> Gemma2Config or Llama3Config. Reads the old spellings and the new ones.

    New: `rope_parameters` for rope_theta and rope_scaling. Absent keys take the values of the class on the Hub (Gemma-2 ties
    its embeddings without saying so).
    """
    architecture = (raw.get("architectures") or [raw.get("model_type")])[0]
    if architecture not in (*ARCHITECTURES, *ARCHITECTURES.values()):
        raise InputError(f"{where} is a {architecture}, but only {' and '.join(ARCHITECTURES.values())} are supported")
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    try:
        common = {key: raw[key] for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "rms_norm_eps", "max_position_embeddings")}
        common["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        for key in ("bos_token_id", "eos_token_id"):
            token = raw[key]
            common[key] = token[0] if isinstance(token, list) else token
        if architecture in ("gemma2", "Gemma2ForCausalLM"):
            if kind != "default":
                raise InputError(f"{where}: rotary scaling {kind!r} is not part of Gemma-2")
            return Gemma2Config(
                **common, rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta", 10000.0)),
                query_pre_attn_scalar=raw["query_pre_attn_scalar"], sliding_window=raw["sliding_window"],
                attn_logit_softcapping=raw["attn_logit_softcapping"],
                final_logit_softcapping=raw["final_logit_softcapping"],
                tie_word_embeddings=raw.get("tie_word_embeddings", True))
        if kind not in ("default", "llama3"):
            raise InputError(f"{where}: rotary scaling {kind!r} is not supported, only 'llama3' or none")
        if raw.get("attention_bias") or raw.get("mlp_bias"):
            raise InputError(f"{where}: linear layers with biases are not part of Llama-3")
        theta = float(rope.pop("rope_theta", None) or raw.get("rope_theta", 10000.0))
        scaling = RopeScaling(**{key: rope[key] for key in RopeScaling.__annotations__}) if kind == "llama3" else None
        return Llama3Config(**common, rope_theta=theta, rope_scaling=scaling,
                            tie_word_embeddings=raw.get("tie_word_embeddings", False))
    except KeyError as key:
        raise InputError(f"{where}/config.json lacks {key}, which a {architecture} needs") from None


def weight_files(folder):
    """{tensor name: file} of a folder, from the index where there is one. Names that leave the folder are refused."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise InputError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
        with open_weights(single) as file:
            return {name: single for name in file.keys()}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index} has no weight_map from tensor names to file names")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise InputError(f"{index} points outside its folder, to {name!r}: refused")
        if not (folder / name).exists():
            raise InputError(f"{folder} lacks the shard {name}, which its index names: download it again")
    return {tensor: folder / name for tensor, name in weight_map.items()}


def open_weights(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}): download it again") from None


def fill(model, files, device, dtype):
    """Puts the tensors of {name: file} into a model on the meta device, one at a time, as `dtype` on `device`."""
    wanted = dict(model.named_parameters())
    files = dict(files)
    if model.config.tie_word_embeddings:
        files.pop("lm_head.weight", None)                           # some exports repeat the tied embedding
    files = {name: path for name, path in files.items() if not name.endswith("rotary_emb.inv_freq")}
    missing, unknown = sorted(wanted.keys() - files.keys()), sorted(files.keys() - wanted.keys())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the architecture does not know"
        raise InputError(f"{next(iter(files.values())).parent if files else 'the folder'} {what} "
                         f"({len(missing)} missing, {len(unknown)} unknown tensors): it does not fit its config.json")
    for path in sorted(set(files.values())):
        with open_weights(path) as file:
            inside = set(file.keys())
            for name in sorted(name for name in files if files[name] == path):
                if name not in inside:
                    raise InputError(f"{path} lacks {name}, which its index places there: download it again")
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(wanted[name].shape):
                    raise InputError(f"{path}: {name} has shape {shape}, but config.json implies "
                                     f"{tuple(wanted[name].shape)}")
                owner, _, leaf = name.rpartition(".")
                tensor = file.get_tensor(name).to(device=device, dtype=dtype, copy=True)
                setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))


def save_model(model, folder, *, config, shard_bytes=5_000_000_000):
    """Writes a plain Hugging Face checkpoint (config.json = `config`, weights in shards of at most shard_bytes).

    Adapters must be merged before: the format has no place for them. transformers.AutoModelForCausalLM loads the folder.
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
        write_bytes(folder / name, save({key: t.cpu().contiguous() for key, t in shard.items()}, {"format": "pt"}))
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        total = sum(t.nbytes for shard in shards for t in shard.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = {key: value for key, value in config.items() if key != "dtype"}       # the new spelling of torch_dtype
    write_json(folder / "config.json", {**config, "torch_dtype": dtype})
