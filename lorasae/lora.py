"""Low-rank adapters (paper Eq. 1; Hu et al. 2021) on the frozen linear layers.

    add_lora(model, layers=range(13, 26), rank=64)      attach to all projections of those blocks
    with base(model): ...                               the untouched model
    merge_lora(model)                                   fold them into the weights

io/adapters.py reads and writes them in PEFT's format. Shapes: R rank.
"""
from contextlib import contextmanager

import torch
from torch import nn
import torch.nn.functional as F

from lorasae.errors import InputError
from lorasae.linear import Linear, linear

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(Linear):
    """y = W x + b + (alpha / R) · B A dropout(x)  (Eq. 1), with A [R, in] and B [out, R] in fp32.

    The letters are PEFT's: the paper's A is our B, and its B is our A. W and any b stay frozen in
    their own dtype. A starts uniform in ±1/√in and B at zero, so a fresh adapter changes nothing.
    The low-rank product has the dtype of x; gradients and optimiser states stay fp32.
    """
    parts = ("lora_A.weight", "lora_B.weight")          # PEFT's names for the trained tensors
    peft = {}                                           # extra entries for adapter_config.json

    def __init__(self, frozen, rank, alpha, dropout):
        nn.Module.__init__(self)
        self.in_features = frozen.in_features
        self.out_features = frozen.out_features
        self.weight = frozen.weight
        self.bias = frozen.bias

        # fp32 master weights, which `low_rank` casts. nn.Linear starts uniform in ±1/√in.
        masters = dict(bias=False, device=frozen.weight.device, dtype=torch.float32)
        self.lora_A = nn.Linear(self.in_features, rank, **masters)
        self.lora_B = nn.Linear(rank, self.out_features, **masters)
        nn.init.zeros_(self.lora_B.weight)

        self.scale = alpha / rank
        self.dropout = dropout
        self.enabled = True

    def forward(self, x):
        y = linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        dropped = F.dropout(x, self.dropout, self.training)
        return y + self.low_rank(dropped)

    def low_rank(self, x):
        """(alpha / R) · B A x"""
        low = linear(x, self.lora_A.weight.to(x.dtype))
        return linear(low * self.scale, self.lora_B.weight.to(x.dtype))

    def delta(self):
        """(alpha / R) · B A, [out, in] fp32"""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)


# ---- Attaching -----------------------------------------------------------------------------------

def add_lora(model, layers, rank, alpha=32, dropout=0.1, targets=TARGETS):
    """Freezes the model and adapts the `targets` of each block in `layers`; returns the model.

    targets: the last parts of names. alpha is 32 in the paper: the scale falls as the rank grows.

    Raises InputError for blocks or targets the model lacks, a rank below 1, or existing adapters.
    """
    # Refuse what cannot be adapted.
    layers, depth = sorted(layers), len(model.layers)
    if rank < 1:
        raise InputError(f"rank is {rank}, but an adapter needs a rank of at least 1")
    if not layers or layers[0] < 0 or layers[-1] >= depth:
        raise InputError(f"cannot adapt blocks {layers}: the model has blocks 0 to {depth - 1}")
    if adapters(model):
        raise InputError("the model already has adapters: merge them, or load a fresh model")
    known = {name.split(".")[-1] for name in projections(model.layers)}
    unknown = set(targets) - known
    if unknown or not targets:
        raise InputError(f"cannot adapt {sorted(unknown)}: the projections of this model are "
                         f"{', '.join(sorted(known))}")

    # Replace each target by an adapter.
    model.requires_grad_(False)
    for layer in layers:
        block = model.layers[layer]
        for name, frozen in projections(block).items():
            if name.split(".")[-1] in targets:
                replace_module(block, name, LoRALinear(frozen, rank, alpha, dropout))
    return model


def projections(module, kind=nn.Linear):
    """{name: linear layer} of a module, or only of one kind, in the module's order."""
    return {name: child for name, child in module.named_modules() if isinstance(child, kind)}


def adapters(model):
    """{module name: LoRALinear} of every adapted projection, in the model's order."""
    return projections(model, LoRALinear)


def blocks_with_adapters(model):
    """The numbers of the blocks that have adapters, sorted."""
    return [layer for layer, block in enumerate(model.layers) if adapters(block)]


def lora_parameters(model):
    """The trainable tensors of a model's adapters, or of the adapters that detach_lora returned."""
    modules = model if isinstance(model, dict) else adapters(model)
    return [module.get_parameter(part) for module in modules.values() for part in module.parts]


# ---- Switching off, detaching, merging -----------------------------------------------------------

@contextmanager
def base(model):
    """Switches the adapters off inside the `with` block: the model as it was before adapting."""
    modules = adapters(model).values()
    before = [module.enabled for module in modules]
    try:
        for module in modules:
            module.enabled = False
        yield model
    finally:
        for module, enabled in zip(modules, before):
            module.enabled = enabled


def detach_lora(model):
    """Detaches the adapters and returns them, {module name: LoRALinear}; plain layers remain."""
    modules = adapters(model)
    for name, module in modules.items():
        plain = Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight, plain.bias = module.weight, module.bias
        replace_module(model, name, plain)
    return modules


def attach_lora(model, modules):
    """Reattaches detached adapters, replacing any that are there; returns the model."""
    for name, module in modules.items():
        replace_module(model, name, module)
    return model


@torch.no_grad()
def merge_lora(model):
    """Folds each adapter into its weight, W ← W + (alpha / R) B A; returns the model."""
    for module in detach_lora(model).values():
        module.weight.copy_(module.weight + module.delta())
    return model


def replace_module(model, name, module):
    """Replaces the module `name`. The new one inherits train or eval mode from its parent."""
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    setattr(parent, child, module.train(parent.training))
