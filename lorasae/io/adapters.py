"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

    save_adapter(model, folder)         writes files that peft.PeftModel loads too
    load_adapter(model, folder)         reads them, or files that PEFT wrote
"""
import math
import re
from pathlib import Path

from torch import nn

from lorasae.errors import InputError
from lorasae.io.files import (
    Tensors, check_tensor, local, read_object, shown, write_json, write_tensors)
from lorasae.lora import LoRALinear, adapters, replace_module

PREFIX = "base_model.model."                            # PEFT's name for a wrapped model
KEY = re.compile(re.escape(PREFIX) + rf"(.+)\.({'|'.join(map(re.escape, LoRALinear.parts))})")
BLOCKS = "model.layers."
BESIDE_VISION = "model.language_model."                 # instead of model., with a vision tower

# PEFT options that Eq. 1 does not cover: they change the function, or the modules that compute it.
UNSUPPORTED = (
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias",
    "use_qalora", "use_bdlora", "layer_replication", "trainable_token_indices",
    "target_parameters", "alora_invocation_tokens", "arrow_config", "kasa_config")
STARTS = (True, False, "gaussian", "orthogonal", "eva")     # others also change the base weights


def adapter_state(model):
    """{PEFT's key: tensor}: A and B under base_model.model.<module>.lora_{A,B}.weight."""
    return {key_of(model, name, part): module.get_parameter(part).detach()
            for name, module in adapters(model).items() for part in module.parts}


def save_adapter(model, folder, base_model=None):
    """Writes adapters for load_adapter and PEFT. base_model: its name, for AutoPeftModel."""
    modules = adapters(model)
    if not modules:
        raise InputError("the model has no adapters to save")
    module = next(iter(modules.values()))
    rank = module.lora_A.out_features

    write_tensors(
        Path(folder) / "adapter_model.safetensors", adapter_state(model), {"format": "pt"})
    targets = {
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "layers_to_transform": sorted({int(name.split(".")[2]) for name in modules}),
        "layers_pattern": "layers",
    }
    if model.config.with_vision:                        # whose layers share these names
        names = [re.escape(peft_name(model, name)) for name in modules]
        targets = {"target_modules": "|".join(names)}
    write_json(Path(folder) / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "r": rank, "lora_alpha": float(f"{module.scale * rank:.12g}"),
        "lora_dropout": module.dropout, "bias": "none",
        **module.peft,
        **targets,
        "inference_mode": True,
    })


def load_adapter(model, folder):
    """Attaches the adapters that save_adapter or PEFT wrote to `folder`, and returns the model.

    folder: may also be a run's. Any linear module in a block may be adapted (an adapter on the head
    would have no effect here). What Eq. 1 does not cover is refused by name: other PEFT methods,
    DoRA, rank or alpha patterns, biases, saved modules. Refused files leave the model unchanged.
    """
    if adapters(model):
        raise InputError("the model already has adapters: merge them, or load a fresh model")
    folder = local(folder)
    folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
    rank, alpha, dropout = read_config(folder / "adapter_config.json")
    tensors = Tensors(folder / "adapter_model.safetensors")
    modules = dict(model.named_modules())

    # Build all adapters before attaching the first.
    fresh = {}
    for name in adapted_modules(tensors):
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear) or not name.startswith(BLOCKS):
            raise InputError(
                f"{folder} adapts {shown(name)}, but this model's blocks have no such linear "
                "module: the adapter belongs to another model")
        fresh[name] = LoRALinear(linear, rank, alpha, dropout)
        for part in LoRALinear.parts:
            key = key_of(model, name, part)
            tensor, weight = tensors[key], fresh[name].get_parameter(part)
            check_tensor(f"{tensors.path}: {key}", tensor, weight.shape)
            weight.data.copy_(tensor)

    model.requires_grad_(False)
    for name, module in fresh.items():
        replace_module(model, name, module)
    return model


def read_config(path):
    """adapter_config.json -> rank, alpha, dropout"""
    config = read_object(path)
    config.only(peft_type="LORA", bias="none")
    for option in UNSUPPORTED:
        if config.get(option) and option not in LoRALinear.peft:
            raise InputError(
                f"{path} uses PEFT's {option}, which is not supported: retrain the adapter "
                "without it")

    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        raise InputError(
            f"{path}: init_lora_weights {shown(start)} changed the base model too: save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion")

    rank = config.take("r", int, at_least=1, below=2**20)
    alpha = config.take("lora_alpha", float, above=0)
    if config.take("use_rslora", bool, False):
        alpha = alpha * math.sqrt(rank)                 # alpha / √R instead of alpha / R
    return rank, alpha, config.take("lora_dropout", float, 0.0, at_least=0, below=1)


def adapted_modules(tensors):
    """The modules that the file has an A or B for, sorted. It must contain nothing else."""
    names = set()
    for key in tensors:
        match = KEY.fullmatch(key)
        if match is None:
            raise InputError(
                f"{tensors.path} contains {shown(key)}, which is not the A or B of a LoRA adapter")
        names.add(match[1].replace(BESIDE_VISION, "model."))
    if not names:
        raise InputError(f"{tensors.path} contains no adapter: it has no tensors")
    return sorted(names)


def key_of(model, name, part):
    return f"{PREFIX}{peft_name(model, name)}.{part}"


def peft_name(model, name):
    """A module's name in the full model, of which ours may be only the text part."""
    return name.replace("model.", BESIDE_VISION, 1) if model.config.with_vision else name
