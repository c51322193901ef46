"""Hugging Face model folders <-> Transformer: config.json, safetensors in shards, the tokenizer.

Weights load strictly: the files must have every tensor of the architecture, in the shape that the
configuration implies, and no others. The model is built on the meta device and filled tensor by
tensor, so it is never in memory twice.
"""
import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from lorasae.errors import InputError
from lorasae.io.console import note
from lorasae.io.files import (
    DTYPES, Fields, Tensors, as_dtype, check_tensor, damage, dtype_name, local, read_object, shown,
    write_bytes, write_json)
from lorasae.io.hub import BESIDE_WEIGHTS, OutOfReach, model_files
from lorasae.io.presets import preset
from lorasae.lora import adapters
from lorasae.model import FAMILIES, Transformer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Models with a vision tower: their model_type; names of tensors, as transformers 5 and older
# versions write them; and the sizes that the text part of config.json omits if they equal these.
WITH_VISION = "gemma3"
TEXT_PART = re.compile(r"^(?:model\.language_model\.|language_model\.model\.)")
VISION = ("vision_tower.", "multi_modal_projector.")
UNLESS_STATED = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "num_attention_heads": 8}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_model(name_or_dir, *, device="cpu", dtype=None):
    """A frozen Transformer in eval mode from a preset, a local folder, or OWNER/NAME on the Hub.

    dtype: a torch dtype or its name; None means the one that config.json states. Whatever is wrong
    with the files is a one-line error.
    """
    folder = model_files(name_or_dir)
    fields = read_object(folder / "config.json")
    config = parse_config(fields, folder)
    dtype = as_dtype(dtype or stated_dtype(fields))

    with torch.device("meta"):
        model = Transformer(config)

    # The files must have all tensors, and no others.
    files = weight_files(folder)
    wanted = dict(model.named_parameters())
    stored = stored_names(files, config.tie_word_embeddings)
    for name in sorted(wanted.keys() ^ stored.keys()):
        what = "lacks" if name in wanted else "has, beyond the model's tensors,"
        raise InputError(f"{folder} {what} {shown(name)}: it does not fit its config.json")

    # Read one file at a time.
    tensors = {}
    for path in sorted(set(files.values())):
        file = Tensors(path)
        for name in [name for name in wanted if files[stored[name]] == path]:
            tensor = file[stored[name]].to(device=device, dtype=dtype, copy=True)
            check_tensor(f"{path}: {stored[name]}", tensor, wanted[name].shape)
            tensors[name] = tensor
    model.load_state_dict(tensors, assign=True)
    if config.with_vision:
        note(f"note: {folder} has a vision tower too; only its text model is read")
    return model.requires_grad_(False).eval()


def load_config(name_or_dir):
    """A model's configuration, without its weights.

    If the Hub is out of reach: a preset's sizes from presets.py, and defaults for the rest.
    """
    try:
        folder = model_files(name_or_dir, ["config.json"])
    except OutOfReach:
        known = preset(name_or_dir)
        if known is None:
            raise
        return parse_config(known.config, known.repo)
    return parse_config(read_object(folder / "config.json"), folder)


# ---- config.json ---------------------------------------------------------------------------------

def parse_config(raw, where):
    """config.json, in old or new spelling -> its family's Config. where: its folder, for errors."""
    fields = Fields(raw, f"{where}/config.json")
    fields.take("model_type", str, one_of=[*FAMILIES, WITH_VISION])
    text = text_part(fields)
    config = FAMILIES[text["model_type"]].parse(text)
    return replace(config, with_vision=text is not fields)


def text_part(fields):
    """The Fields of a config.json; of a model with a vision tower, only its text model's."""
    if fields.get("model_type") != WITH_VISION:
        return fields
    text = fields.take("text_config", dict)
    for key in ("bos_token_id", "eos_token_id"):
        if key in fields:
            text.setdefault(key, fields[key])
    for key, value in UNLESS_STATED.items():
        text.setdefault(key, value)
    text.update(model_type="gemma3_text", architectures=["Gemma3ForCausalLM"])
    return text


def text_config(folder):
    """A folder's config.json as a dict; for a model with a vision tower, its text model's part."""
    return dict(text_part(read_object(folder / "config.json")))


def stated_dtype(fields):
    """The dtype that config.json states; float32 if it states none."""
    keys = ("dtype", "torch_dtype")
    new, old = (fields.take(key, str, None, one_of=list(DTYPES)) for key in keys)
    return new or old or "float32"


# ---- Weights -------------------------------------------------------------------------------------

def weight_files(folder):
    """{tensor name: file} of a folder with a single weight file, or with shards and their index."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() or not index.exists():           # the order transformers uses
        return dict.fromkeys(Tensors(single), single)
    weight_map = read_object(index).take("weight_map", dict)
    with damage(index):                                 # with_name refuses paths into other folders
        return {tensor: index.with_name(name) for tensor, name in weight_map.items()}


def stored_names(files, tied):
    """{parameter: its name in the files}, without the tensors of a vision tower.

    A tied embedding may be stored under the head's name, or under both names.
    """
    stored = {}
    for name in files:
        beside = name.removeprefix("model.").startswith(VISION)
        if not beside and not name.endswith("rotary_emb.inv_freq"):
            stored[TEXT_PART.sub("model.", name)] = name
    if tied and HEAD in files:
        del stored[HEAD]
        twice = stored.setdefault(EMBEDDING, HEAD) == EMBEDDING
        if twice and not torch.equal(*(Tensors(files[name])[name] for name in (EMBEDDING, HEAD))):
            raise InputError(
                f"{files[HEAD].parent}: {HEAD} and {EMBEDDING} differ, but config.json ties them: "
                'if the head has its own weights, set "tie_word_embeddings": false in it')
    return stored


def save_model(model, folder, *, config, shard_bytes=5_000_000_000):
    """Writes a checkpoint that transformers can load. config: the contents of its config.json."""
    if adapters(model):
        raise InputError("merge the adapters before writing a plain checkpoint")
    folder = local(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(model.state_dict(), folder, max_shard_size=shard_bytes)
    config = {**config, "torch_dtype": dtype_name(next(model.parameters()))}
    config.pop("dtype", None)                           # the newer name of torch_dtype
    write_json(folder / "config.json", config)


# ---- The tokenizer and other files next to the weights -------------------------------------------

def encode(tokenizer, text):
    """text -> its tokens [1, T], BOS first. tokenizer: from load_tokenizer, or a model's name."""
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    return torch.tensor([tokenizer.encode(text).ids])


def load_tokenizer(name_or_dir):
    """A model's tokenizer, set to put BOS first and neither truncate nor pad."""
    path = model_files(name_or_dir, ["config.json", *BESIDE_WEIGHTS]) / "tokenizer.json"
    config = load_config(name_or_dir)
    vocab_size, fields = config.vocab_size, read_object(path)

    # Every token needs an embedding. Added tokens without one, such as [PAD], are left out.
    with damage(path):
        added = [token for token in fields["added_tokens"] if token["id"] < vocab_size]
        tokenizer = Tokenizer.from_str(json.dumps({**fields, "added_tokens": added}))
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"{path} has token ids up to {largest}, but the model's vocab_size is {vocab_size}: "
            "the tokenizer belongs to another model")

    tokenizer.no_truncation()
    tokenizer.no_padding()
    bos = [("BOS", config.bos_token_id)]
    tokenizer.post_processor = TemplateProcessing(single="BOS $A", special_tokens=bos)
    return tokenizer


def copy_beside_weights(name_or_dir, folder):
    """Copies the tokenizer's files and the generation config, as far as the model has them."""
    source = model_files(name_or_dir)
    for pattern in BESIDE_WEIGHTS:
        for path in filter(Path.is_file, source.glob(pattern)):
            write_bytes(folder / path.name, path.read_bytes())
