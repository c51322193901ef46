"""What a run would fetch, train and hold in memory, from configuration files and listings alone: `train.py --dry-run`.

`check_memory` asks the same before a run allocates anything: what cannot fit is refused in one line.
"""
import os
from pathlib import Path
from typing import NamedTuple

import torch

from lorasae.adapt import blocks_to_adapt
from lorasae.errors import InputError
from lorasae.io.models import load_config
from lorasae.io.hub import model_plan, sae_files, sae_plan
from lorasae.io.saes import load_sae
from lorasae.io.files import DTYPES
from lorasae.runs import distributed
from lorasae.runs.defaults import latents
from lorasae.runs.memory import adapter_parameters, estimate, model_parameters
from lorasae.runs.setting import check_context, check_layer, sae_sources
from lorasae.sae import JumpReLU


class Plan(NamedTuple):
    """What a run consists of."""
    model: object                                       # its configuration
    blocks: list                                        # the adapted ones; [] where an SAE alone is trained
    certain: bool                                       # False: if the SAE turns out to be a TopK, all blocks are adapted
    latents: list                                       # of each SAE, about
    fetched: list                                       # hub.Fetch of every file
    memory: object                                      # memory.Memory


def plan(config):
    """The Plan of a configuration. Nothing is loaded; InputError for what the run itself would refuse."""
    model = load_config(config.model)
    depth = model.num_hidden_layers
    check_context(config, model)
    for layer in config.layer:
        check_layer(config.model, layer, depth)

    fetched = []
    for layer, source in sae_sources(config):
        fetched += sae_plan(source, layer=layer, width=config.width, l0=config.l0)
    if config.sae:
        sizes = [size_of_sae(config, layer, source, model.hidden_size) for layer, source in sae_sources(config)]
    else:
        sizes = [config.width or 8 * model.hidden_size]
    blocks = []
    if config.method == "lora":
        blocks = blocks_to_adapt(config.adapt, saes_at_hand(config, fetched), depth)
    certain = bool(config.adapt) or config.method != "lora" or not fetched

    dtype, sae_dtype = DTYPES[config.dtype], DTYPES[config.sae_dtype]
    method = "finetune" if config.train_sae else config.method          # whose SAE is trained, too
    ranks = [variant.rank[0] for variant in config.variants] if blocks else []
    memory = estimate(model, method=method, blocks=blocks, ranks=ranks, latents=sizes, micro_batch=config.micro_batch,
                      context=config.context, ahead=config.ahead, dtype=dtype,
                      sae_dtype=sae_dtype, device=torch.device(config.device).type, compiled=config.compile,
                      dropout=config.dropout)
    return Plan(model, blocks, certain, sizes, fetched + model_plan(config.model), memory)


def saes_at_hand(config, fetched):
    """{layer: SAE} of local sources; of those still to be fetched, JumpReLUs as the public ones of the paper are."""
    if fetched:
        return dict.fromkeys(config.layer, JumpReLU(1, 1))
    return {layer: load_sae(source, layer=layer, width=config.width, l0=config.l0, llama_scope=config.llama_scope)
            for layer, source in sae_sources(config)}


def size_of_sae(config, layer, source, d_model):
    """How many latents an SAE has: as its width says, else about as many as its files hold in fp32."""
    if config.width is not None:
        return latents(config.width)
    found = sae_plan(source, layer=layer, width=config.width, l0=config.l0)
    size = sum(fetch.bytes for fetch in found)
    if not found:
        place = Path(sae_files(source, layer=layer, width=config.width, l0=config.l0))
        size = place.stat().st_size if place.is_file() else sum(file.stat().st_size for file in place.rglob("*.*"))
    return max(1, size // (8 * d_model))


def dry_run(config):
    """Prints the plan of a run."""
    made = plan(config)
    for fetch in made.fetched:
        print(f"{'here ' if fetch.cached else 'fetch'}  {fetch.bytes / 1e6:10,.1f} MB  {fetch.repo}/{fetch.path}")

    print()
    depth, d_model = made.model.num_hidden_layers, made.model.hidden_size
    frozen = model_parameters(made.model)
    if made.blocks:
        unsure = "" if made.certain else "; all of them if the SAE turns out to be a TopK"
        print(f"adapted blocks        {named(made.blocks)} ({len(made.blocks)} of {depth}){unsure}")
        trainable = sum(adapter_parameters(made.model, made.blocks, variant.rank) for variant in config.variants)
    else:
        print(f"SAE                   {made.latents[0]:,} latents at the output of block {config.layer[0]}")
        trainable = 0
    if config.method != "lora" or config.train_sae:
        width = made.latents[0]
        trainable += width * (2 * d_model + 1) + d_model + (width if config.method == "jumprelu" else 0)

    several = f" in {len(config.variants)} adapters" if len(config.variants) > 1 else ""
    print(f"trainable parameters  {trainable:,}{several} ({trainable / frozen:.2%} of {frozen:,})")
    print(f"training              {config.steps:,} steps of {config.batch_size} x {config.context} = {config.trained_tokens:,} "
          f"tokens of {config.data}")
    memory = made.memory                                # Python and its libraries take some 0.4 GB beside it
    print(f"memory, about         {size(memory.total)}: model {size(memory.model)}, SAEs {size(memory.saes)}, trained "
          f"{size(memory.training)}, and the largest of: a step {size(memory.step)} (activations {size(memory.activations)}, "
          f"logits {size(memory.logits)}), the frozen part ahead {size(memory.ahead)}, evaluation {size(memory.evaluation)}")
    complain(config, memory.total)


def named(blocks):
    """13 to 25, or 1, 3, 4"""
    whole = blocks[-1] - blocks[0] == len(blocks) - 1
    return f"{blocks[0]} to {blocks[-1]}" if whole else ", ".join(map(str, blocks))


def check_memory(config):
    """Raises InputError where a run cannot fit into this machine's memory."""
    complain(config, plan(config).memory.total)


def complain(config, needed):
    there = memory_of(config.device)
    if there is None or config.shard or needed <= there:
        return
    raise InputError(f"this run needs about {size(needed)}, but {config.device} has {size(there)}: lower --micro-batch, "
                     "--context, --rank or --ahead, take a smaller model or --dtype bfloat16, or spread the model by torchrun "
                     "and --shard")


def memory_of(device):
    """Bytes of memory that a device has in all; None where nobody says."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(distributed.local(device)).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):       # Windows
        return None


def size(bytes):
    if bytes >= 1e9:
        return f"{bytes / 1e9:,.1f} GB"
    return f"{bytes / 1e6:,.0f} MB" if bytes >= 1e6 else f"{bytes / 1e3:,.0f} kB"
