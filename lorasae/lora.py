"""Low-rank adapters (paper Eq. 1; Hu et al. 2021) on the frozen linear layers, read and written in PEFT's format.

    add_lora(model, layers=range(13, 26), rank=64)        attach to all seven projections of those blocks
    with base(model): ...                                 the untouched model
    save_adapter(model, folder); load_adapter(model, folder); merge_lora(model)

Shapes: R rank.
"""
import math
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lorasae.errors import InputError
from lorasae.files import read_json, write_bytes, write_json
from lorasae.linear import Linear, linear

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."                                        # how PEFT names a wrapped model's modules


class LoRALinear(Linear):
    """y = W x + (alpha / R) · B A dropout(x)  (Eq. 1): W frozen in its own dtype, A [R, in] and B [out, R] fp32 masters.

    A starts uniform in ±1/√in and B at zero, so that a fresh adapter is the identity. The low-rank product is computed in
    the dtype of x; gradients and optimiser states stay fp32.
    """

    def __init__(self, linear, rank, alpha, dropout):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.weight = linear.weight
        make = dict(bias=False, device=linear.weight.device, dtype=torch.float32)
        self.lora_A = nn.Linear(self.in_features, rank, **make)     # nn.Linear's own initialisation is ±1/√in
        self.lora_B = nn.Linear(rank, self.out_features, **make)
        nn.init.zeros_(self.lora_B.weight)
        self.scale, self.dropout, self.enabled = alpha / rank, dropout, True

    def forward(self, x):
        y = linear(x, self.weight)
        return y + self.low_rank(F.dropout(x, self.dropout, self.training)) if self.enabled else y

    def low_rank(self, x):
        """(alpha / R) · B A x"""
        low = linear(x, self.lora_A.weight.to(x.dtype))
        return linear(low * self.scale, self.lora_B.weight.to(x.dtype))


class Students(nn.Module):
    """y_s = W x_s + (alpha / R_s) · B_s A_s dropout(x_s) for S independent adapters of one frozen layer, s = 1 .. S.

    x [S·B, T, in] holds the input of the first student, then that of the second, ...: W x is one product for all. They share
    dropout's mask, as S runs of their own with the same seed would.
    """

    def __init__(self, students):
        super().__init__()
        self.weight, self.students, self.enabled = students[0].weight, nn.ModuleList(students), True

    def forward(self, x):
        y = linear(x, self.weight)
        if not self.enabled:
            return y
        x = x.unflatten(0, (len(self.students), -1))
        x = x * F.dropout(torch.ones_like(x[0]), self.students[0].dropout, self.training)
        return y + torch.cat([student.low_rank(part) for student, part in zip(self.students, x)])


def adapters(model):
    """{module name: LoRALinear} of every adapted projection, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model):
    """The trainable tensors: A and B of every adapter. model: one, or the adapters that detach_lora returned."""
    modules = model if isinstance(model, dict) else adapters(model)
    return [p for module in modules.values() for p in (module.lora_A.weight, module.lora_B.weight)]


def add_lora(model, layers, rank, alpha=32, dropout=0.1):
    """Freezes the model and attaches adapters to the seven projections of each block in `layers`; returns the model.

    alpha is 32 at every rank in the paper, so the scale alpha / R falls as the rank grows.
    """
    layers = sorted(layers)
    depth = len(model.layers)
    if rank < 1:
        raise InputError(f"rank is {rank}, but an adapter needs a rank of at least 1")
    if not layers or layers[0] < 0 or layers[-1] >= depth:
        raise InputError(f"cannot adapt blocks {layers}: the model has blocks 0 to {depth - 1}")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout is {dropout}, but it must be at least 0 and less than 1")
    if adapters(model):
        raise InputError("the model already has adapters: merge them, or load a fresh model")
    model.requires_grad_(False)
    for layer in layers:
        for part in (model.layers[layer].self_attn, model.layers[layer].mlp):
            for name, linear in list(part.named_children()):
                if name in TARGETS:
                    setattr(part, name, LoRALinear(linear, rank, alpha, dropout))
    return model


@contextmanager
def base(model):
    """Switches the adapters off inside the `with`: the model as it was before adapting."""
    modules = [module for module in model.modules() if isinstance(module, (LoRALinear, Students))]
    before = [module.enabled for module in modules]
    try:
        for module in modules:
            module.enabled = False
        yield model
    finally:
        for module, enabled in zip(modules, before):
            module.enabled = enabled


def detach_lora(model):
    """Takes the adapters off, leaving plain linears; returns them, {module name: LoRALinear}, for attach_lora."""
    modules = adapters(model)
    for name, module in modules.items():
        plain = Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight = module.weight
        _replace(model, name, plain)
    return modules


def attach_lora(model, *students):
    """Puts adapters of detach_lora in their places: one set alone, or several side by side (Students); returns the model."""
    for name in students[0]:
        modules = [student[name] for student in students]
        _replace(model, name, modules[0] if len(modules) == 1 else Students(modules))
    return model


@torch.no_grad()
def merge_lora(model):
    """Folds each adapter into its weight, W ← W + (alpha / R) B A, leaving plain linears; returns the model."""
    for module in detach_lora(model).values():
        delta = module.scale * (module.lora_B.weight @ module.lora_A.weight)
        module.weight.copy_(module.weight.float() + delta)
    return model


def _replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


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
        _replace(model, name, fresh)
    return model
