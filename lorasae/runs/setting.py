"""Loads the model, SAEs and text that a configuration names, and reopens finished runs."""
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import torch

from lorasae.errors import InputError
from lorasae.io.adapters import load_adapter
from lorasae.io.files import read_object
from lorasae.io.models import load_model, load_tokenizer
from lorasae.io.saes import load_sae
from lorasae.io.shards import Text
from lorasae.model import Transformer
from lorasae.runs import distributed
from lorasae.runs.adapting import adapter_names
from lorasae.runs.config import SCRATCH, Config, joined, read_config
from lorasae.runs.machine import settled
from lorasae.runs.training import same_model


class Setting(NamedTuple):
    """Model, SAEs and text of a run."""
    model: Transformer
    saes: dict                                          # {layer: SAE}, frozen
    text: Text
    config: Config
    folder: Path | None = None                          # the run's folder


def load_setting(config, folder, text=None):
    """The Setting of a run in `folder`. text: the folder with its text, by default folder/text.

    With `shard`, the model stays on the CPU until distributed.shard spreads it.
    """
    device = distributed.local(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)        # pinned memory is this GPU's too
        torch.set_float32_matmul_precision("high")      # TF32: changes L0 less than bf16
    model = load_model(config.model, device="cpu" if config.shard else device, dtype=config.dtype)
    check_context(config, model.config)
    saes = load_saes(config, model.config, device)
    special = model.config.bos_token_id, model.config.eos_token_id
    text = Text(config.data, load_tokenizer(config.model), *special, context=config.context,
                eval_tokens=config.eval_tokens, seed=config.seed, batch_size=config.batch_size,
                field=config.field, folder=text or folder / "text", process=distributed.number())
    return Setting(model, saes, text, config, folder)


def check_context(config, model_config):
    """Raises InputError if --context is longer than the model allows."""
    holds = model_config.max_position_embeddings
    if config.context > holds:
        raise InputError(f"--context {config.context} is too long for {config.model}: pass at "
                         f"most {holds}")


def load_saes(config, model_config, device):
    """{layer: SAE}, the frozen SAEs that a configuration names."""
    saes = {}
    for layer, source in sae_sources(config, model_config.num_hidden_layers):
        sae = load_sae(source, **config.which(layer), dtype=config.sae_dtype, device=device)
        check_sae(config, sae, model_config)
        saes[layer] = sae
    return saes


def check_sae(config, sae, model_config):
    """Raises InputError for an existing SAE that this run cannot use."""
    width, d_model = sae.W_enc.shape
    if d_model != model_config.hidden_size:
        raise InputError(f"the SAE reads activations of width {d_model}, but the model's have "
                         f"{model_config.hidden_size}: it was trained on another model")
    if config.width not in (None, width):
        raise InputError(f"--width {config.width}: the SAE has {width} latents")
    if config.thresholds == "frozen" and sae.l0_is_bounded:
        raise InputError("--thresholds frozen: this SAE has none; leave the option out")


def sae_sources(config, depth):
    """[(layer, source)] of a configuration's SAEs: one source for all layers, or one per layer."""
    layers, sources = config.layer, config.sae
    for layer in layers:
        if layer >= depth:
            raise InputError(f"--layer {layer} is out of range: {config.model} has blocks 0 to "
                             f"{depth - 1}")
    if len(sources) == 1:
        sources *= len(layers)
    needed = sources or config.method not in SCRATCH    # an SAE from scratch has no source
    if needed and len(sources) != len(layers):
        raise InputError(f"--sae names {len(sources)} SAEs for --layer {joined(layers)}: pass one "
                         "source for all, or one per layer")
    return list(zip(layers, sources))


# ---- Finished runs -------------------------------------------------------------------------------

def runs_in(folder):
    """A finished run's folders: one per adapter if it trained several, else the run's own."""
    names = adapter_names(read_config(folder))
    if not (folder / "results.json").exists():
        raise InputError(f"{folder} is not finished: python train.py --resume "
                         f"{quote(str(folder))} continues it")
    return [folder / name for name in names]


def open_run(folder, device=None, threads=None):
    """The Setting of a finished run, with its adapter attached and the SAE that it trained, if any.

    Held-out text is in its text/, or in its parent's if several adapters trained side by side.
    """
    config = settled(replace(read_config(folder, device), shard=False), threads)
    if config.trains_sae:
        config = replace(config, sae=(str((folder / "sae").resolve()),))
    run = folder if (folder / "text").exists() else folder.absolute().parent
    read_object(run / "text" / "text.json")             # fail rather than hold out other text
    setting = load_setting(config, folder, run / "text")
    if config.method == "lora":
        path = folder / "adapter" / "adapter_config.json"
        base = read_object(path).take("base_model_name_or_path", str, None)
        if not same_model(base, config.model):
            raise InputError(f"{path} is for an adapter of {base}, but this is a run on "
                             f"{config.model}")
        load_adapter(setting.model, folder)
    return setting
