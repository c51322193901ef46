"""Training an SAE by reconstruction (§3.1; JumpReLU §3.3) or end to end, on Eq. 7 (§3.2).

    python train.py --method topk --k 16
    python train.py --method jumprelu --l0 16
    python train.py --method e2e --k 16
    python train.py --sae RUN_DIR               adapts the model to the result

    new_sae, begin          a fresh SAE, its biases fitted to the first batch, and its optimiser
    observe                 the frozen model's part of a step: the activations to reconstruct
    take_step               an Adam step on FVU or Eq. 7, L0 penalty, AuxK; decoder rows keep norm 1

Code for only one kind of SAE is in its class (sae.py), except AuxK. TopK and e2e follow the
published code (except that by default they leave out BOS, EOS and attention sinks: `max_norm`), and
JumpReLU follows Rajamanoharan et al. (2024).

Shapes: B batch, T tokens, D d_model, M latents, N tokens in a step.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lorasae import topk
from lorasae.adapt import ALONE, FrozenPart, adapted_loss, frozen_forward
from lorasae.sae import KINDS, START_L0, StandIn, norms, splice, used_positions

WARMUP = 1000           # steps from 0 to the full learning rate; at most a tenth of the run
AUX_WEIGHT = 1 / 32     # weight of AuxK relative to the loss (Gao et al. 2024, where it is the FVU)
BANDWIDTH = 0.05        # ε of the straight-through gradients, in units of the SAE's `unit`
L0_WEIGHT = 1.0         # weight of the L0 penalty relative to the FVU
RAMP = 0.2              # the fraction of a run over which the target L0 falls to --l0


# ---- The losses ----------------------------------------------------------------------------------
# `world`: the processes that share a step's tokens. world.sum sums a value over all of them.

def fvu(x_hat, x, world=ALONE):
    """Fraction of variance unexplained: §3.1's ‖x - x̂‖², summed over tokens and divided by
    Σ‖x - x̄‖², as in the published code. x, x̂ [N, D]; x̄ the mean of x.
    """
    count = x.new_full((), len(x))
    mean = (world.sum(x.sum(0)) / world.sum(count)).detach()   # minimises the variance: no gradient
    error = world.sum((x - x_hat).square().sum())
    variance = world.sum((x - mean).square().sum())
    return error / variance


def aux_loss(e_hat, x_hat, x, world=ALONE):
    """AuxK (Gao et al. 2024): Σ‖e - ê‖² / Σ‖e‖², with the residual e = x - x̂ detached.

    ê [N, D] is the dead latents' reconstruction. The loss is the fraction of the residual that they
    do not explain: 1 if they do nothing. x̂ already includes b_dec, so ê does not.
    """
    e = (x - x_hat).detach()
    left = world.sum((e - e_hat).square().sum())
    residual = world.sum(e.square().sum())
    return left / residual.clamp(min=torch.finfo(e.dtype).tiny)


# ---- The start -----------------------------------------------------------------------------------

def new_sae(method, d_model, width, k, on_special=None):
    """A fresh SAE: W_enc uniform in ±1/√D, W_dec the same rows at norm 1; `begin` does the rest."""
    kind = "topk" if method == "e2e" else method                # e2e trains a TopK, as in the paper
    sae = KINDS[kind](d_model, width, k, on_special=on_special)
    bound = d_model ** -0.5
    nn.init.uniform_(sae.W_enc, -bound, bound)
    sae.W_dec.data = F.normalize(sae.W_enc.detach(), dim=1)
    return sae


class Training(NamedTuple):
    """The state of an SAE in training: everything that a checkpoint stores."""
    tensors: list                   # parameters, then `idle` [M]: tokens since each latent fired
    optimizer: torch.optim.Optimizer


@torch.no_grad()
def begin(sae, seen, config):
    """Fits a fresh SAE to its first FrozenPart -> Training.

    Positions with norms above config.max_norm medians do not train it. A few positions are
    attention sinks (BOS above all), with norms up to 200 times the others': squared, they would
    make up 99.9 % of the variance to explain.

    JumpReLU's learning rates assume activations of rms norm 1. Adam ignores a gradient's scale, so
    for raw activations it is enough to multiply the rates of biases and thresholds by `unit`.
    """
    if config.max_norm:
        ordinary = norms(seen.x)[~seen.special]
        sae.max_norm = config.max_norm * ordinary.median().item()
    x = seen.x[used_positions(sae, seen.x, seen.special)].float()
    sae.start(x, config.l0)

    matrices = [sae.W_enc, sae.W_dec]
    vectors = [parameter for parameter in sae.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "unit": 1.0}, {"params": vectors, "unit": sae.unit(x)}]
    optimizer = torch.optim.Adam(groups, lr=config.lr, fused=True)

    idle = torch.zeros_like(sae.b_enc, dtype=torch.int64)
    return Training([*matrices, *vectors, idle], optimizer)


# ---- The forward passes --------------------------------------------------------------------------

@torch.no_grad()
def observe(model, sae, layer, tokens, end_to_end):
    """Runs the frozen model: tokens [B, T] -> FrozenPart: what the SAE reads, and e2e's target."""
    tokens = tokens.to(model.device, non_blocking=True)
    if end_to_end:
        return frozen_forward(model, {}, tokens, layer + 1)
    x = model.read(tokens, sae, layer)                          # runs no later block
    return FrozenPart(x, None, model.special(tokens))


class InTraining(StandIn):
    """Stands in for an SAE while it trains: x [B, T, D] -> x̂, with the gradients of training_step.

    Positions that the SAE is not trained on do not change. Each call sets `x` and `x_hat` [N, D],
    `fired` [M] (the number of tokens on which each latent fired) and `active` (their sum).
    """

    def __init__(self, sae, special, bandwidth):
        super().__init__(sae, everywhere=True)
        self.special = special
        self.bandwidth = bandwidth

    def __call__(self, x):
        used = used_positions(self.sae, x, self.special)
        places = used.nonzero(as_tuple=True)                    # syncs with the GPU once
        self.x = x[places].float()
        self.x_hat, self.fired, self.active = self.sae.training_step(self.x, self.bandwidth)
        return x.index_put(places, self.x_hat.to(x.dtype))


# ---- One step ------------------------------------------------------------------------------------

def take_step(model, sae, layer, part, step, training, config, world=ALONE):
    """One Adam step on a FrozenPart -> {name: value}: losses, L0, gradient norm before clipping.

    The loss is the FVU, or Eq. 7 for end-to-end training. If gradients reach L0, a penalty keeps it
    at its target. --auxk adds AuxK on the latents that have not fired for `dead_after` tokens.
    """
    *parameters, idle = training.tensors

    # The reconstruction replaces the activation. ε has the unit of the biases and thresholds.
    unit = training.optimizer.param_groups[1]["unit"]
    stand_in = InTraining(sae, part.special, BANDWIDTH * unit)
    spliced = splice(part.x, stand_in)
    x = stand_in.x
    x_hat = stand_in.x_hat
    if part.target is None:
        loss = fvu(x_hat, x, world)
        values = {"fvu": loss.detach()}
    else:
        # Eq. 7 without adapters (§3.2), summed over a sequence and logged per token.
        seen = part._replace(x=spliced)
        total, sums = adapted_loss(model, {}, seen, layer + 1, config)
        loss = world.sum(total) / config.batch_size
        length = spliced.shape[1]
        values = {name: world.sum(value) / config.batch_size / length
                  for name, value in sums.items()}

    # L0, over all processes.
    tokens = world.sum(x.new_full((), len(x)))
    fired = world.sum(stand_in.fired)
    l0 = world.sum(stand_in.active) / tokens
    if sae.gates_train:
        loss = loss + L0_WEIGHT * sae.penalty(l0, target_l0(config, step))

    # AuxK: the D / 2 strongest dead latents fit the residual of the others.
    dead = idle >= config.dead_after
    if config.auxk:
        half = x.shape[1] // 2
        read = x - sae.b_dec.detach()
        e_hat = topk.aux_decode(read, sae.W_enc, sae.b_enc, sae.W_dec, dead, half)
        loss = loss + AUX_WEIGHT * aux_loss(e_hat, x_hat, x, world)
    values |= {"l0": l0.detach(), "dead": dead.float().mean()}

    # The gradient, clipped.
    loss.backward()
    world.all_reduce([parameter.grad for parameter in parameters])
    values["grad_norm"] = nn.utils.clip_grad_norm_(parameters, config.clip)

    # The step.
    factor = schedule(step, config.steps)
    for group in training.optimizer.param_groups:
        group["lr"] = config.lr * group["unit"] * factor
    update(sae, training.optimizer)
    idle.add_(tokens.long()).masked_fill_(fired > 0, 0)
    return values


def target_l0(config, step):
    """The target L0 at step 0, 1, ...: it falls from START_L0 · l0 to l0 and stays there."""
    remaining = max(0, 1 - (step + 1) / (RAMP * config.steps))
    return config.l0 * START_L0 ** remaining


def schedule(step, steps):
    """The factor on the learning rate at step 0, 1, ...: linear warm-up, then linear decay to 0."""
    warmup = min(WARMUP, -(-steps // 10))
    rising = (step + 1) / warmup
    falling = (steps - step) / (steps - warmup + 1)
    return min(rising, falling)


@torch.no_grad()
def update(sae, optimizer):
    """An optimiser step that keeps decoder rows at norm 1."""
    project_out_norm_gradient(sae.W_dec, sae.W_dec)
    optimizer.step()
    optimizer.zero_grad()
    sae.W_dec.copy_(F.normalize(sae.W_dec, dim=1))
    sae.after_step()


@torch.no_grad()
def project_out_norm_gradient(W_dec, directions):
    """Removes from W_dec's gradient what only changes row norms. directions: the rows at norm 1."""
    gradient = W_dec.grad
    gradient -= (gradient * directions).sum(1, keepdim=True) * directions
