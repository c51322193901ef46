"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

    save_adapter(model, folder); load_adapter(model, folder)      peft.PeftModel.from_pretrained reads and writes the same
"""
import math
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from lorasae.errors import InputError
from lorasae.io.disk import read_json, write_bytes, write_json
from lorasae.lora import TARGETS, LoRALinear, adapters, replace_module

PREFIX = "base_model.model."                                        # how PEFT names a wrapped model's modules


def adapter_state(model):
    """{PEFT's key: tensor}: A and B under base_model.model.<module>.lora_{A,B}.weight."""
    return {f"{PREFIX}{name}.lora_{side}.weight": getattr(module, f"lora_{side}").weight.detach()
            for name, module in adapters(model).items() for side in "AB"}


def save_adapter(model, folder, base_model=None):
    """Writes adapter_config.json and adapter_model.safetensors, which peft.PeftModel.from_pretrained loads as they are."""
    modules = adapters(model)
    if not modules:
        raise InputError("the model has no adapters to save")
    module = next(iter(modules.values()))
    rank = module.lora_A.out_features
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "r": rank, "lora_alpha": round(module.scale * rank, 6), "lora_dropout": module.dropout, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "layers_to_transform": sorted({int(name.split(".")[2]) for name in modules}), "layers_pattern": "layers",
        "fan_in_fan_out": False, "modules_to_save": None, "use_rslora": False, "use_dora": False,
        "init_lora_weights": True, "inference_mode": True,
    }
    tensors = {key: tensor.cpu().contiguous() for key, tensor in adapter_state(model).items()}
    write_bytes(Path(folder) / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    write_json(Path(folder) / "adapter_config.json", config)


def load_adapter(model, folder):
    """Attaches the adapter that save_adapter, or PEFT itself, wrote to `folder`; returns the model.

    Refuses by name what Eq. 1 has no place for: other PEFT methods, DoRA, rank or alpha patterns, biases, saved modules.
    """
    if adapters(model):
        raise InputError("the model already has adapters: merge them, or load a fresh model")
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder} holds a {config.get('peft_type')} adapter, but only LORA is supported")
    for option in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias",
                   "use_rslora_pattern", "layer_replication", "trainable_token_indices"):
        if config.get(option):
            raise InputError(f"{folder} uses PEFT's {option}, which is not supported: retrain the adapter without it")
    if config.get("bias", "none") != "none":
        raise InputError(f"{folder} trains biases (bias={config['bias']!r}), but only bias='none' is supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise InputError(f"{folder}/adapter_config.json states no r and lora_alpha, but r {rank} and lora_alpha {alpha}")
    if config.get("use_rslora"):
        alpha = alpha * math.sqrt(rank)                             # rank-stabilised: alpha / √R instead of alpha / R
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{folder} has no adapter_model.safetensors") from None
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}): copy or save it again") from None
    names = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}
    modules = dict(model.named_modules())
    model.requires_grad_(False)
    for name in sorted(names):
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear) or not name.endswith(TARGETS):
            raise InputError(f"{folder} adapts {name}, which this model does not have: it belongs to another model")
    for name in sorted(names):
        linear = modules[name]
        fresh = LoRALinear(linear, rank, alpha, config.get("lora_dropout", 0.0))
        for side in "AB":
            key = f"{PREFIX}{name}.lora_{side}.weight"
            target = getattr(fresh, f"lora_{side}").weight
            if key not in tensors or tensors[key].shape != target.shape:
                found = tuple(tensors[key].shape) if key in tensors else "nothing"
                raise InputError(f"{folder}: {key} should be {tuple(target.shape)} but the file has {found}: "
                                 "it belongs to another model or rank")
            target.data.copy_(tensors[key])
        replace_module(model, name, fresh)
    return model
