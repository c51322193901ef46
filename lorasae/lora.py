"""Low-rank adapters (paper Eq. 1; Hu et al. 2021) on the frozen linear layers.

    add_lora(model, layers=range(13, 26), rank=64)        attach to all seven projections of those blocks
    with base(model): ...                                 the untouched model
    merge_lora(model)                                     fold them into the weights

Their files, in PEFT's format, are io/adapters.py. Shapes: R rank.
"""
from contextlib import contextmanager

import torch
from torch import nn
import torch.nn.functional as F

from lorasae.errors import InputError
from lorasae.linear import Linear, linear

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(Linear):
    """y = W x + (alpha / R) · B A dropout(x)  (Eq. 1): W frozen in its own dtype, A [R, in] and B [out, R] fp32.

    A starts uniform in ±1/√in and B at zero, so that a fresh adapter is the identity. The low-rank product is computed in
    the dtype of x; gradients and optimiser states stay fp32.
    """

    def __init__(self, frozen, rank, alpha, dropout):
        nn.Module.__init__(self)
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.weight, self.bias = frozen.weight, None

        masters = dict(bias=False, device=frozen.weight.device, dtype=torch.float32)
        self.lora_A = nn.Linear(self.in_features, rank, **masters)      # nn.Linear's own initialisation is ±1/√in
        self.lora_B = nn.Linear(rank, self.out_features, **masters)
        nn.init.zeros_(self.lora_B.weight)

        self.scale = alpha / rank
        self.dropout = dropout
        self.enabled = True

    def forward(self, x):
        if not self.enabled:
            return linear(x, self.weight)
        if self.sum_is_cheaper(x):
            return linear(x, self.weight + self.delta())
        dropped = F.dropout(x, self.dropout, self.training)
        return linear(x, self.weight) + self.low_rank(dropped)

    def low_rank(self, x):
        """(alpha / R) · B A x"""
        low = linear(x, self.lora_A.weight.to(x.dtype))
        return linear(low * self.scale, self.lora_B.weight.to(x.dtype))

    def delta(self):
        """(alpha / R) · B A, [out, in] fp32"""
        return self.scale * (self.lora_B.weight @ self.lora_A.weight)

    def sum_is_cheaper(self, x):
        """Whether (W + (alpha / R) B A) x takes fewer multiplications than W x + (alpha / R) B A x: in small layers alone.

        For N tokens and R ranks the sum takes 3 R · in · out, to make B A and the gradients of A and B from that of the
        whole matrix, which takes N · in · out. The low-rank path takes 3 N R (in + out), forward and backward. In bf16,
        and in the TF32 of GPUs, the sum would round B A away, and under dropout W and B A see different x.
        """
        exact = x.dtype == self.weight.dtype == torch.float32 and not x.is_cuda and not (self.training and self.dropout)
        whole = self.in_features * self.out_features
        rank, tokens = self.lora_A.out_features, x.numel() // self.in_features
        return exact and (tokens + 3 * rank) * whole < 3 * tokens * rank * (self.in_features + self.out_features)


# ---- Attaching ---------------------------------------------------------------------------------------------------------

def add_lora(model, layers, rank, alpha=32, dropout=0.1):
    """Freezes the model and attaches adapters to the seven projections of each block in `layers`; returns the model.

    alpha is 32 at every rank in the paper, so the scale alpha / R falls as the rank grows. Raises InputError for blocks
    that the model does not have, a rank below 1, a dropout outside [0, 1), or where there are adapters already.
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
            for name, frozen in list(part.named_children()):
                if name in TARGETS:
                    adapter = LoRALinear(frozen, rank, alpha, dropout)
                    setattr(part, name, adapter.train(part.training))
    return model


def adapters(model):
    """{module name: LoRALinear} of every adapted projection, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def blocks_with_adapters(model):
    """The numbers of the blocks that have adapters, sorted."""
    blocks = enumerate(model.layers)
    return [layer for layer, block in blocks if adapters(block)]


def lora_parameters(model):
    """The trainable tensors: A and B of every adapter. model: one, or the adapters that detach_lora returned."""
    modules = model if isinstance(model, dict) else adapters(model)
    parameters = []
    for module in modules.values():
        parameters += [module.lora_A.weight, module.lora_B.weight]
    return parameters


# ---- Switching off, taking off, merging --------------------------------------------------------------------------------

@contextmanager
def base(model):
    """Switches the adapters off inside the `with`: the model as it was before adapting."""
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
    """Takes the adapters off, leaving plain linears; returns them, {module name: LoRALinear}, for attach_lora."""
    modules = adapters(model)
    for name, module in modules.items():
        plain = Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight = module.weight
        replace_module(model, name, plain)
    return modules


def attach_lora(model, modules):
    """Puts the adapters of detach_lora in their places, or in those of other adapters; returns the model."""
    for name, module in modules.items():
        replace_module(model, name, module)
    return model


@torch.no_grad()
def merge_lora(model):
    """Folds each adapter into its weight, W ← W + (alpha / R) B A, leaving plain linears; returns the model."""
    for module in detach_lora(model).values():
        module.weight.copy_(module.weight.float() + module.delta())
    return model


def replace_module(model, name, module):
    """Puts `module` where `name` is. It takes the mode of its surroundings: in an eval model, dropout is off."""
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, child, module.train(parent.training))
