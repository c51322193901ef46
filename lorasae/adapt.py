"""THE METHOD (paper §3.4): low-rank adapters fit a model to its frozen SAEs.

They minimise KL(base ‖ adapted with SAE) = Σ p log(p / q), where p is the base model's
distribution. The paper writes KL(ŷ, y) (Eq. 7); its code computes the KL given here.

    naive_loss, naive_train         Eq. 7 in plain PyTorch, and the training loop: read these first
    frozen_forward, adapted_loss    the same loss, fast: shared blocks run once; no logits are kept
    take_step                       one optimiser step, clipped as the published code clips

`python train.py` runs it; runs/training.py is the loop that resumes, logs and saves.
The paper's symbols and their names in the code:

    paper                       code
    M, the base model           the model with its adapters switched off, `with base(model):`
    M adapted, with its SAE     the same model, adapters on, SAEs spliced in
    A, B of every W (Eq. 1)     an adapter; `lora_parameters(model)` lists all of them
    h_1 .. h_i                  blocks 0 .. i - 1, which both models share; i: `first_differing`
    y, ŷ (Eq. 7)                softmax(cap(head(target))), softmax(cap(head(hidden))), in chunks
    (none)                      `part`, a FrozenPart: what the frozen model computes for a step

A layer is a block's number, counted from 0. `config` holds train.py's options (runs/config.py).
Shapes: B batch, T tokens, D d_model, S adapted models trained side by side.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch

from lorasae.lora import base, blocks_with_adapters, lora_parameters
from lorasae.objectives import linear_kl
from lorasae.sae import is_in_mlp, splice


# ---- As written ----------------------------------------------------------------------------------

def naive_loss(model, saes, tokens):
    """Eq. 7: Σ_tokens KL(p_base ‖ p_adapted with SAE) in nats. tokens [B, T]; saes {layer: SAE}."""
    with torch.no_grad(), base(model):
        log_p = model(tokens).float().log_softmax(-1)
    log_q = model(tokens, saes).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def naive_train(model, saes, batches, lr=5e-5, weight_decay=0.01, clip=1.0):
    """The whole method: trains the adapters on batches [B, T]; yields each step's KL per token."""
    parameters = lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)

    for tokens in batches:
        # Eq. 7, with dropout, summed over a sequence's tokens and averaged over sequences.
        model.train()
        loss = naive_loss(model, saes, tokens) / len(tokens)
        loss.backward()

        # With sums this large, the clip binds at almost every step.
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        yield loss.item() / tokens.shape[1]


# ---- The fast version ----------------------------------------------------------------------------

class FrozenPart(NamedTuple):
    """Outputs of the frozen model that one training step uses."""
    x: torch.Tensor                 # [B, T, D] the prefix's output, spliced if it ends with an SAE
    target: torch.Tensor | None     # [B, T, D] base model after the final norm; None if not needed
    special: torch.Tensor           # [B, T] bool: BOS and EOS, which some SAEs leave unchanged


def first_differing(model, saes):
    """The first block that the base and the adapted model cannot share.

    The blocks before it run once for both. An MLP's SAE acts inside its block, so that one differs.
    """
    differing = blocks_with_adapters(model)
    for layer, sae in saes.items():
        differing.append(layer if is_in_mlp(sae) else layer + 1)
    return min(differing, default=len(model.layers))


@torch.no_grad()
def frozen_forward(model, saes, tokens, first):
    """Runs the base model: tokens [B, T] -> FrozenPart, whose x is the input of block `first`."""
    with base(model):
        # The shared prefix, then the rest of the base model, without SAEs.
        x = model.run(model.embed(tokens), 0, first)
        last = model.run(x, first, len(model.layers))
        target = model.norm(last)

    # The splice, if the prefix ends with an SAE. (An MLP's SAE is in block `first` or later.)
    special = model.special(tokens)
    if first - 1 in saes:
        x = splice(x, saes[first - 1], special)
    return FrozenPart(x, target, special)


def adapted_loss(model, saes, part, first, config):
    """Runs the adapted model on a FrozenPart -> what `objective` returns, with gradients."""
    x = model.run(part.x, first, len(model.layers), saes, part.special)
    return objective(model, part, model.norm(x), config)


def objective(model, part, hidden, config):
    """Eq. 7, the loss for adapters, end-to-end SAEs and finetuning.

    hidden: with adapters and SAEs, after the final norm: [B, T, D], or [S, B, T, D] for S models.
    Returns (loss, {name: detached value to log}), all sums over tokens: scalars, or [S].
    """
    kl = linear_kl(part.target, hidden, model.head, model.softcap, compiled=config.compile)
    return kl, {"kl": kl.detach()}


# ---- One step ------------------------------------------------------------------------------------

class World(NamedTuple):
    """The processes that share each batch. By default there is only one, so sums change nothing."""
    number: int = 0                                         # this process's number
    count: int = 1
    all_reduce: Callable = lambda tensors: None             # sums each tensor in place
    sum: Callable = lambda value: value                     # sums a value, differentiably


ALONE = World()


def adamw(groups, config):
    """The optimiser of the paper's code. groups: parameters, or parameter groups."""
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def take_step(model, saes, part, first, optimizer, config, world=ALONE):
    """One optimiser step -> {name: value}: losses per token, and the gradient norm before clipping.

    The loss of a sequence is the *sum* of its tokens' KL, and `clip` bounds that sum's gradient, as
    in the published code (utils.py:521). With the paper's batch of one, the clip binds at almost
    every step, so a mean over tokens would be a different algorithm.

    `micro_batch` sequences run at a time, to save memory; the result differs only in dropout masks.
    """
    parameters = lora_parameters(model)
    totals = {}
    for piece in split(part, config.micro_batch):
        loss, values = adapted_loss(model, saes, piece, first, config)
        (loss / config.batch_size).backward()
        for name, value in values.items():
            totals[name] = totals.get(name, 0) + value / config.batch_size

    # Each process ran its share of the batch: sum the losses and gradients over all of them.
    gradients = [parameter.grad for parameter in parameters]
    world.all_reduce([*totals.values(), *gradients])

    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
    optimizer.step()
    optimizer.zero_grad()

    tokens = part.x.shape[1]
    per_token = {name: total / tokens for name, total in totals.items()}
    return {**per_token, "grad_norm": norm}


def split(part, size):
    """Splits a FrozenPart into parts of `size` sequences."""
    pieces = [tensor.split(size) for tensor in part]
    return [FrozenPart(*tensors) for tensors in zip(*pieces)]
