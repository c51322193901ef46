"""What a run would fetch, train and keep in memory, from configurations alone: train.py --dry-run.

Presets need no network, and the device need not be present. train.py --list shows all presets.
"""
import math
import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import constants
from tqdm import tqdm

from lorasae.errors import InputError
from lorasae.evals.report import table_text
from lorasae.io import hub, text
from lorasae.io.console import note
from lorasae.io.files import DTYPES, read_object
from lorasae.io.models import load_config, load_tokenizer, weight_files
from lorasae.io.presets import PRESETS
from lorasae.io.saes import describe
from lorasae.lora import lora_parameters
from lorasae.model import Transformer
from lorasae.objectives import chunk_rows
from lorasae.runs import training
from lorasae.runs.adapting import blocks_to_adapt, new_adapters
from lorasae.runs.config import SCRATCH, Config, read_config
from lorasae.runs.folder import RUNS
from lorasae.runs.sae_training import resolved
from lorasae.runs.setting import check_context, check_sae, sae_sources
from lorasae.sae import KINDS, JumpReLU, TopK

FP32 = 4
TRAINED = 4 * FP32                                      # parameter, gradient, two averages
WIDE = 47                                               # of the only text column of --list
HEADINGS = [
    "model", "block", "SAE", "L0", "available SAEs".ljust(WIDE), "download", "memory", "licence"]
NOTES = """
block, SAE and L0 are a run's defaults. available SAEs: their blocks, widths, and the L0s of the
default width. download: with the SAE. memory: the model's weights; --dry-run estimates the run's.
The included models, tiny-*, need no download and take 10 MB."""


def dry_run(config):
    """Prints a run's plan; refuses mistakes that show without loading the model."""
    model_config = load_config(config.model)
    check_context(config, model_config)
    if config.data not in text.NAMED:
        text.files(config.data)                         # InputError if the text is missing

    # Find the files to fetch, and build the SAEs on the meta device.
    files, saes, meta = hub.model_plan(config.model), {}, torch.device("meta")
    if all(file.cached for file in files):
        weight_files(hub.model_files(config.model))
        load_tokenizer(config.model)
    if config.method in SCRATCH:
        config = resolved(config, model_config)
        kind = KINDS.get(config.method, TopK)
        with meta:
            saes[config.layer[0]] = kind(model_config.hidden_size, config.width)
    for layer, source in sae_sources(config, model_config.num_hidden_layers):
        of_sae = hub.sae_plan(source, **config.which(layer))
        files += of_sae
        if all(file.cached for file in of_sae):
            saes[layer] = describe(source, **config.which(layer))
            check_sae(config, saes[layer], model_config)
        else:                                           # TopK if sparsify's, otherwise JumpReLU
            in_fp32 = sum(file.bytes for file in of_sae) // (8 * model_config.hidden_size)
            width = config.width or in_fp32 // 1024 * 1024
            kind = TopK if of_sae[0].path.endswith("sae.safetensors") else JumpReLU
            with meta:
                saes[layer] = kind(model_config.hidden_size, width)

    # Find what would train.
    with meta:
        model = Transformer(model_config).requires_grad_(False)
    of_model = training.size_of(model.parameters())
    of_saes = sum(training.size_of(sae.parameters()) for sae in saes.values())
    widths = [len(sae.W_enc) for sae in saes.values()]
    trained, blocks = of_saes * config.trains_sae, []
    if config.thresholds == "frozen":
        trained -= sum(widths)
    if config.method == "lora":
        blocks = blocks_to_adapt(config.adapt, saes, len(model.layers))
        adapters = new_adapters(model, blocks, config)
        trained += sum(training.size_of(lora_parameters(own)) for own in adapters)

    # Estimate the memory.
    first = min([*blocks, *config.layer] if config.trains_sae else blocks)
    parts = memory(model_config, config, widths, first)
    parts |= {
        "model": DTYPES[config.dtype].itemsize * of_model,
        "frozen SAEs": DTYPES[config.sae_dtype].itemsize * of_saes * (not config.trains_sae),
        "trained": TRAINED * trained}
    total = sum(parts.values())

    # Print the table.
    missing = [file for file in files if not file.cached]
    for file in missing:
        print(f"fetch {in_words(file.bytes):>9}  {file.repo}/{file.path}")
    to_fetch, in_all = (in_words(sum(file.bytes for file in some)) for some in (missing, files))
    training.show({
        "to fetch": f"{to_fetch} of {in_all}; free disk {in_words(free_disk())}",
        **training.what_trains(config, model, saes, blocks, trained),
        "text": config.data + ", streamed" * (config.data in text.NAMED),
        "time": time_at_hand(config),
        "memory": f"about {in_words(total)} on {config.device}, plus 0.5 GB of host memory for "
                  f"Python; model in {config.dtype}",
        **{f"  {name}": in_words(bytes) for name, bytes in parts.items() if bytes}})
    room = memory_of(config.device)
    if total > room:
        less = ("--batch-size or --context" if config.trains_sae else
                "--micro-batch, --context or --ahead, or use torchrun with --shard")
        note(f"warning: {config.device} has {in_words(room)}: try --dtype bfloat16 or lower {less}")


def in_words(bytes):
    return tqdm.format_sizeof(bytes, "B")               # 10.5GB


def memory(model_config, config, widths, first):
    """Bytes of temporary tensors, accurate to about a third: {part: bytes}.

    For the backward pass, every block from `first` on keeps its norms' inputs in fp32, the products
    of attention and MLP, the adapters' inputs and, on a CPU, the soft-capped scores.
    """
    D, I = model_config.hidden_size, model_config.intermediate_size
    heads, each = model_config.num_attention_heads, DTYPES[config.dtype].itemsize
    per_token = 4 * D * FP32 + (10 * D + 6 * heads * model_config.head_dim + 5 * I) * each
    if model_config.attn_logit_softcapping and config.device == "cpu":
        per_token += heads * config.context * FP32
    passed = len(config.variants) * (model_config.num_hidden_layers - first)
    if config.method in KINDS or config.objective == "mse":
        passed = 0                                      # reconstruction stops at the SAE

    rows = config.micro_batch * config.context
    at_once = max(config.micro_batch, config.ahead) * config.context
    encoded = max(1024, 2 * rows if config.trains_sae else at_once // 2)    # 1024 in evaluation
    V = model_config.vocab_size
    at_a_time = min(rows, chunk_rows(V, config.device.startswith("cuda")))
    return {"activations": rows * passed * per_token,
            "latents": 4 * FP32 * encoded * sum(widths), "logits": 3 * FP32 * at_a_time * V}


def time_at_hand(config):
    """A run's time, from the speed of the newest run in runs/ with this model and method."""
    same = ("model", "method", "context", "batch_size", "rank", "device")
    for log in sorted(RUNS.rglob("metrics.jsonl"), key=os.path.getmtime, reverse=True):
        run = log.parent
        with suppress(InputError, OSError):             # not a finished run
            earlier = read_config(run)
            rate = read_object(run / "results.json").take("tokens_per_second", float, above=0)
            alike = all(getattr(earlier, name) == getattr(config, name) for name in same)
            if alike and len(earlier.rates) == len(config.rates):
                return (f"about {config.trained_tokens / rate / 60:,.0f} minutes, at the "
                        f"{rate:,.0f} tokens/s of {run}")
    return "unknown: no run in runs/ has this model, method, context, batch size, rank and device"


def free_disk():
    """Free bytes on the disk where the Hub's cache is or will be."""
    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return shutil.disk_usage(there).free


def memory_of(device):
    """A device's memory in bytes, within the container's limit; infinity if unknown."""
    if device.startswith("cuda") and (torch.device(device).index or 0) < torch.cuda.device_count():
        return torch.cuda.get_device_properties(device).total_memory
    if device.startswith("cuda") or not hasattr(os, "sysconf"):         # absent GPU; Windows
        return math.inf
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):                 # no limit, or no such file
        room = min(room, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return room


def show_presets():
    """Prints the models with their SAEs, sizes and licences: train.py --list."""
    rows = []
    for name, known in PRESETS.items():
        is_on_hub = known.sae and not Path(known.sae).is_dir()
        _, of_sae = known.sae_size() if is_on_hub else (0, 0)
        dtype = DTYPES[known.common.get("dtype", Config.dtype)]
        rows.append([
            name, str(known.layer), known.width or "", str(known.l0 or ""), known.saes.ljust(WIDE),
            in_words(known.weights + of_sae),
            in_words(dtype.itemsize * known.parameters), known.licence])
    print(table_text(rows, HEADINGS))
    print(NOTES)
