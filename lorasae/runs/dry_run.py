"""What a run would fetch, train and hold in memory, from configurations alone: train.py --dry-run.

Works without a network for presets, and for a device that is not there.
"""
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import constants

from lorasae.adapt import blocks_to_adapt
from lorasae.errors import InputError
from lorasae.io import hub, saes, text
from lorasae.io.console import note
from lorasae.io.files import DTYPES, read_json
from lorasae.io.models import load_config
from lorasae.lora import lora_parameters
from lorasae.model import Transformer
from lorasae.objectives import CHUNK_ELEMENTS
from lorasae.runs.adapting import listed, new_adapters, training_rates
from lorasae.runs.config import SCRATCH, joined, latents_to_train
from lorasae.runs.folder import RUNS
from lorasae.runs.sae_training import resolved
from lorasae.runs.setting import check_context, sae_sources
from lorasae.sae import KINDS, JumpReLU, TopK

FP32 = 4
TRAINED = 4 * FP32                                      # a number, its gradient, two averages


def dry_run(config):
    """Prints the plan of a run; refuses what the run itself would refuse."""
    model_config = load_config(config.model, offline=True)
    with torch.device("meta"):
        model = Transformer(model_config)
    frozen = size_of(model.parameters())
    check_context(config, model_config)
    if config.method in SCRATCH:
        config = resolved(config, model_config)
    if config.data not in text.NAMED:
        text.files(config.data)                         # InputError if there is no such text

    # What would be fetched, and what the SAEs are.
    files, kinds = hub.model_plan(config.model), {}
    shapes = [(KINDS.get(config.method, TopK), config.width)] * (config.method in SCRATCH)
    which = {"width": config.width, "l0": config.l0}
    for layer, source in sae_sources(config, model_config.num_hidden_layers):
        of_sae = hub.sae_plan(source, layer=layer, **which)
        files += of_sae
        if all(file.cached for file in of_sae):
            kind, width, d_model = saes.describe(source, layer=layer, **which,
                                                 llama_scope=config.llama_scope)
            saes.check_fits(d_model, model_config.hidden_size)
        else:                                           # the paper's public SAEs are JumpReLUs
            kind, width = JumpReLU, expected_latents(config, of_sae, model_config)
        kinds[layer] = kind
        shapes.append((kind, width))
    missing = [file for file in files if not file.cached]
    for file in missing:
        print(f"fetch {in_words(file.bytes):>9}  {file.repo}/{file.path}")

    # What would train.
    blocks, adapters = [], []
    if config.method == "lora":
        blocks = blocks_to_adapt(config.adapt, kinds, len(model.layers))
        adapters = new_adapters(model, blocks, config)
    with torch.device("meta"):
        meta = [kind(model_config.hidden_size, width) for kind, width in shapes]
    widths = [width for _, width in shapes]
    sae_numbers = sum(size_of(sae.parameters()) for sae in meta)
    trained = sum(size_of(lora_parameters(own)) for own in adapters)
    trained += sae_numbers * config.trains_sae

    to_fetch, in_all = (in_words(sum(file.bytes for file in some)) for some in (missing, files))
    rows = {"to fetch": f"{to_fetch} of {in_all}; free disk {in_words(free_disk())}"}
    if blocks:
        rows["recipe"] = (f"{config.recipe}: {config.optimizer} at {training_rates(config)}, "
                          f"dropout {config.dropout:g}")
        rows["adapters"] = (f"rank {joined(config.rank)} on {', '.join(config.targets)} of "
                            f"{listed(blocks)}")
    active = f", L0 {config.l0:g}" if config.l0 else ""
    rows |= {
        "SAE": f"{', '.join(f'{width:,}' for width in widths)} latents at the output of block "
               f"{joined(config.layer)}{active}",
        "trainable": f"{trained:,} parameters, {trained / frozen:.2%} of {frozen:,}",
        "text": config.data + ", streamed" * (config.data in text.NAMED),
        "steps": f"{config.steps:,} of {config.batch_size} x {config.context} tokens, "
                 f"{config.trained_tokens:,} in all",
        "time": time_at_hand(config)}

    # What it would hold in memory.
    parts = memory(model_config, config, blocks, widths)
    parts |= {
        "model": DTYPES[config.dtype].itemsize * frozen,
        "frozen SAEs": DTYPES[config.sae_dtype].itemsize * sae_numbers * (not config.trains_sae),
        "trained": TRAINED * trained}
    total = sum(parts.values())
    rows["memory"] = (f"about {in_words(total)} on {config.device}, beside Python's 0.5 GB; the "
                      f"model is {config.dtype}")
    rows |= {f"  {name}": in_words(bytes) for name, bytes in parts.items() if bytes}
    print("\n".join(f"{name:16}{value}" for name, value in rows.items()))
    room = memory_of(config.device)
    if room is not None and total > room:
        note(f"warning: {config.device} has {in_words(room)}: lower --micro-batch, --context or "
             "--ahead, pass --dtype bfloat16, or spread the model with torchrun and --shard")


def size_of(parameters):
    return sum(parameter.numel() for parameter in parameters)


def expected_latents(config, files, model_config):
    """The latents of an SAE that is still to be fetched: by its name, else by its size in bf16."""
    if config.width is not None:
        return latents_to_train(config.width)
    return sum(file.bytes for file in files) // (4 * model_config.hidden_size) // 1024 * 1024


def memory(model_config, config, blocks, widths):
    """Bytes that pass through, to about a third: {part: bytes}.

    Backward keeps, of every block from the SAE on, its norms' inputs in fp32, the products of
    attention and MLP and the adapters' inputs, and on a CPU the soft-capped scores.
    """
    D, I = model_config.hidden_size, model_config.intermediate_size
    heads, each = model_config.num_attention_heads, DTYPES[config.dtype].itemsize
    per_token = 4 * D * FP32 + (10 * D + 6 * heads * model_config.head_dim + 5 * I) * each
    if model_config.attn_logit_softcapping and config.device == "cpu":
        per_token += heads * config.context * FP32
    passed = len(config.variants) * (model_config.num_hidden_layers - min(config.layer))
    if config.method in KINDS or config.objective == "mse":
        passed = 0                                      # reconstruction ends at the SAE

    rows = config.micro_batch * config.context
    encoded = max(1024, 2 * rows if config.trains_sae else rows // 2)       # or in an evaluation
    device = "cuda" if config.device.startswith("cuda") else "cpu"
    logits = min(rows * model_config.vocab_size, CHUNK_ELEMENTS[device])
    return {"a step": rows * passed * per_token, "latents": 4 * FP32 * encoded * sum(widths),
            "logits": 3 * FP32 * logits}


def time_at_hand(config):
    """The time of a run, from the speed of the newest one in runs/ of this model and method."""
    same = ("model", "method", "context", "batch_size", "device")
    for path in sorted(RUNS.glob("*/results.json"), key=os.path.getmtime, reverse=True):
        try:
            earlier = dict(read_json(path.parent / "config.json"))
            rate = read_json(path)["tokens_per_second"]
        except (InputError, OSError, ValueError, TypeError, KeyError):
            continue                                    # no run of ours: its speed says nothing
        if all(earlier.get(name) == getattr(config, name) for name in same):
            minutes = config.trained_tokens / rate / 60
            return f"about {minutes:,.0f} minutes, at the {rate:,.0f} tokens/s of {path.parent}"
    return "unknown: no earlier run of this model and method is in runs/"


def free_disk():
    """Bytes left where the Hub's cache is, or will be."""
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def memory_of(device):
    """Bytes of memory that a device has, within the container's limit; None if unknown."""
    if device.startswith("cuda"):
        there = torch.cuda.is_available()
        return torch.cuda.get_device_properties(device).total_memory if there else None
    if not hasattr(os, "sysconf"):                      # Windows
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    in_container = limit.read_text().strip() if limit.exists() else "max"
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return room if in_container == "max" else min(room, int(in_container))


def in_words(bytes):
    if bytes >= 1e9:
        return f"{bytes / 1e9:,.1f} GB"
    return f"{bytes / 1e6:,.0f} MB" if bytes >= 1e6 else f"{bytes / 1e3:,.0f} kB"
