"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

    save_adapter(model, folder)
    load_adapter(model, folder)         peft.PeftModel reads and writes the same
"""
import math
import re
from pathlib import Path

from torch import nn

from lorasae.errors import InputError
from lorasae.io.files import read_object, shown, write_json
from lorasae.io.files import Tensors, is_finite, write_tensors
from lorasae.lora import TARGETS, LoRALinear, adapters, replace_module

PREFIX = "base_model.model."                                        # how PEFT names a wrapped model's modules
KEY = re.compile(re.escape(PREFIX) + r"(.+)\.lora_[AB]\.weight")

# Options of PEFT that Eq. 1 has no place for: they change the function, or which modules compute it.
UNSUPPORTED = (
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias", "use_qalora",
    "use_bdlora", "layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens",
    "arrow_config", "kasa_config")
MOVES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")    # initialisations that change the base weights too


def adapter_state(model):
    """{PEFT's key: tensor}: A and B under base_model.model.<module>.lora_{A,B}.weight."""
    state = {}
    for name, module in adapters(model).items():
        state[_key(name, "A")] = module.lora_A.weight.detach()
        state[_key(name, "B")] = module.lora_B.weight.detach()
    return state


def save_adapter(model, folder, base_model=None):
    """Writes adapter_config.json and adapter_model.safetensors, which peft.PeftModel.from_pretrained loads."""
    modules = adapters(model)
    if not modules:
        raise InputError("the model has no adapters to save")
    module = next(iter(modules.values()))
    rank = module.lora_A.out_features

    write_tensors(Path(folder) / "adapter_model.safetensors", adapter_state(model), {"format": "pt"})
    write_json(Path(folder) / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "r": rank, "lora_alpha": round(module.scale * rank, 6), "lora_dropout": module.dropout, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "layers_to_transform": sorted({int(name.split(".")[2]) for name in modules}), "layers_pattern": "layers",
        "fan_in_fan_out": False, "modules_to_save": None, "use_rslora": False, "use_dora": False,
        "init_lora_weights": True, "inference_mode": True,
    })


def load_adapter(model, folder):
    """Attaches the adapter that save_adapter, or PEFT itself, wrote to `folder`; returns the model, in the mode it has.

    Refuses by name what Eq. 1 has no place for: other PEFT methods, DoRA, rank or alpha patterns, biases, saved
    modules. Where the files are refused the model is as it was.
    """
    if adapters(model):
        raise InputError("the model already has adapters: merge them, or load a fresh model")
    rank, alpha, dropout = _read_config(Path(folder) / "adapter_config.json")
    tensors = Tensors(Path(folder) / "adapter_model.safetensors")
    names = _adapted_modules(tensors)
    modules = dict(model.named_modules())

    # every module whole before the first is put in its place
    fresh = {}
    for name in names:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear) or name.rpartition(".")[2] not in TARGETS:
            raise InputError(f"{folder} adapts {shown(name)}, which this model does not have: it belongs to another "
                             "model")

        A = _weight(tensors, _key(name, "A"), (rank, linear.in_features))
        B = _weight(tensors, _key(name, "B"), (linear.out_features, rank))

        fresh[name] = LoRALinear(linear, rank, alpha, dropout).train(model.training)
        fresh[name].lora_A.weight.data.copy_(A)
        fresh[name].lora_B.weight.data.copy_(B)

    model.requires_grad_(False)
    for name, module in fresh.items():
        replace_module(model, name, module)
    return model


def _read_config(path):
    """-> rank, alpha, dropout of an adapter_config.json."""
    config = read_object(path)
    kind = config.take("peft_type", str)
    if kind != "LORA":
        raise InputError(f"{path} describes a {shown(kind)} adapter, but only LORA is supported")
    for option in UNSUPPORTED:
        if config.get(option):
            raise InputError(f"{path} uses PEFT's {option}, which is not supported: retrain the adapter without it")
    config.only(bias="none")

    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVES_THE_BASE):
        raise InputError(f"{path}: init_lora_weights {shown(start)} changed the base model too: save the adapter with "
                         "PEFT's path_initial_model_for_weight_conversion")

    rank = config.take("r", int, at_least=1)
    alpha = config.take("lora_alpha", float, above=0)
    if config.take("use_rslora", bool, False):
        alpha = alpha * math.sqrt(rank)                             # rank-stabilised: alpha / √R instead of alpha / R
    return rank, alpha, config.take("lora_dropout", float, 0.0, at_least=0, below=1)


def _adapted_modules(tensors):
    """The modules that the file has an A or a B of, in order; every tensor in it must be one."""
    if not tensors.names:
        raise InputError(f"{tensors.path} holds no adapter: there is no tensor in it")
    names = set()
    for key in sorted(tensors.names):
        match = KEY.fullmatch(key)
        if match is None:
            raise InputError(f"{tensors.path} holds {shown(key)}, which is no A or B of a LoRA adapter: not supported")
        names.add(match[1])
    return sorted(names)


def _weight(tensors, key, shape):
    """The tensor of that key, which must be finite and of this shape."""
    found = tensors.shape(key) if key in tensors else "nothing"
    if found != shape:
        raise InputError(f"{tensors.path}: {key} should be {shape} but the file has {found}: it belongs to another "
                         "model or rank")
    weight = tensors[key]
    if not is_finite(weight):
        raise InputError(f"{tensors.path}: {key} holds values that are not finite: the adapter diverged, or the file "
                         "is damaged")
    return weight


def _key(name, side):
    return f"{PREFIX}{name}.lora_{side}.weight"
