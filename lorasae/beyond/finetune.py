"""Beyond the paper: finetuning an existing SAE, alone or together with the adapters.

    python train.py --method finetune --sae SOURCE      trains only the SAE
    python train.py --method lora --train-sae           both at once, on Eq. 7

    KL          KL(base ‖ with SAE)             Eq. 7; without adapters the end-to-end loss of §3.2
    MSE         ‖x - x̂‖² / variance of x        §3.1
    balanced    ½ (MSE + KL · sg[MSE / KL])     Karvonen (2025), arXiv 2503.17272: sg stops the
                                                gradient, so both parts have the size of the MSE
    + L0        (L0 / original L0 - 1)²         §3.3, for a JumpReLU: its thresholds follow the
                                                straight-through gradient, and its L0 stays. With
                                                frozen thresholds, L0 is free

    naive_loss      KL, MSE or both balanced, as written above, without the penalty
    loss_of         its fast version, like adapt.adapted_loss
    take_step       one step on the SAE, with or without adapters

Every decoder row keeps its norm, which need not be 1, so latents before and after can be compared.
A JumpReLU loses nothing: a row's norm and its latent's scale are one degree of freedom.

Shapes: B batch, T tokens, D d_model, M latents, N positions that the SAE is trained on.
"""
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lorasae import adapt
from lorasae.adapt import ALONE, objective
from lorasae.beyond.muon import Optimizers
from lorasae.dictionary import BANDWIDTH, InTraining, fvu, project_out_norm_gradient
from lorasae.errors import InputError
from lorasae.sae import SAE, splice, used_positions

L0_WEIGHT = 10.0        # of the penalty; with 1, L0 drifts to where both losses pull equally hard
ROWS = 256              # positions encoded at once to count active latents


# ---- The objective -------------------------------------------------------------------------------

def combined(name, kl, mse):
    """The objective `kl`, `mse` or `balanced`, from both losses per token.

    The MSE is in units of the activations' variance (the FVU), so that one weight of the L0 penalty
    suits every model. Raises InputError if there is no KL to balance.
    """
    if name == "kl":
        return kl
    if name == "mse":
        return mse
    if kl <= 0:
        raise InputError(f"the KL of a step is {kl.item():g}, so the balanced loss "
                         "½ (MSE + KL · MSE / KL) has nothing to balance: this SAE does not change "
                         "the model's predictions; pass --objective mse")
    return (mse + kl * (mse / kl).detach()) / 2


def naive_loss(model, saes, tokens, name):
    """The objective `name` of one SAE on tokens [B, T], per token, from all logits.

    Autograd gives all gradients but the thresholds' of a JumpReLU, which the formula lacks.
    """
    (layer, sae), = saes.items()
    kl = adapt.naive_loss(model, saes, tokens) / tokens.numel()

    x = model.read(tokens, sae, layer)
    used = used_positions(sae, x, model.special(tokens))
    x = x[used].float()
    return combined(name, kl, fvu(sae(x), x))


# ---- What trains, and what stays -----------------------------------------------------------------

class Reference(NamedTuple):
    """The SAE as it was loaded: what training preserves, and the scale of its thresholds."""
    norms: torch.Tensor                     # [M, 1] of the decoder's rows
    original: SAE | None                    # a frozen copy, if L0 is kept; W_dec is shared
    unit: float                             # sae.unit: the scale of biases and thresholds
    bandwidth: torch.Tensor                 # [M] ε of the straight-through gradient


@torch.no_grad()
def reference_of(sae, x):
    """The Reference of an SAE that will train on activations such as x [N, D].

    A latent's values and bandwidth scale with 1 / its row's norm. InputError if none fires.
    """
    if active_latents(sae, x) == 0:
        raise InputError(f"no latent of the SAE is active at any of {len(x):,} positions, so there "
                         "is nothing to train: is it for this model and layer?")

    norms = sae.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)        # safe to divide by
    unit = sae.unit(x)
    bandwidth = BANDWIDTH * unit / norms[:, 0]

    original = None
    if sae.gates_train:
        original = deepcopy(sae, {id(sae.W_dec): sae.W_dec})    # counting latents does not read it
    return Reference(norms, original, unit, bandwidth)


@torch.no_grad()
def active_latents(sae, x):
    """How many latents are active on x [N, D], in total.

    The penalty's target is the original SAE's L0 on the same text. With one target for all text, it
    would also penalise how L0 varies from text to text, which only a smaller L0 can reduce.
    """
    return sum((sae.encode(rows) > 0).sum() for rows in x.split(ROWS)).float()


class Trained(NamedTuple):
    """What trains, and where."""
    layer: int                              # the SAE's block
    sae: SAE
    reference: Reference
    adapters: list                          # parameters that train too; other adapters are fixed


def optimizers(trained, config, sae_lr, of_adapters):
    """Adam for the SAE's matrices and vectors, in two groups, after the adapters' optimiser.

    of_adapters(groups, config) makes the latter. A group's `rate` is its initial learning rate. A
    JumpReLU's vectors and their rate have the scale of its activations (see dictionary.begin). Only
    adapters have weight decay: the sizes of an SAE's rows and thresholds matter.
    """
    trainable = [parameter for parameter in trained.sae.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.dim() == 2]
    vectors = [parameter for parameter in trainable if parameter.dim() == 1]
    groups = [{"params": matrices, "rate": sae_lr},
              {"params": vectors, "rate": sae_lr * trained.reference.unit}]
    of_sae = torch.optim.Adam(groups, fused=True)
    if not trained.adapters:
        return Optimizers(of_sae)

    groups = [{"params": trained.adapters, "rate": config.lr}]
    return Optimizers(of_adapters(groups, config), of_sae)


def trained_parameters(optimizer):
    """All parameters of an optimiser, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# ---- One step ------------------------------------------------------------------------------------

def loss_of(model, trained, part, first, config, world=ALONE):
    """FrozenPart -> (loss, {name: value}), both per token. Adapters and SAE get gradients."""
    layer, sae, reference = trained.layer, trained.sae, trained.reference
    stand_in = InTraining(sae, part.special, reference.bandwidth)

    # The adapted model, with the trainable SAE spliced in; the MSE needs nothing that comes after.
    x = part.x
    if first == layer + 1:                              # the prefix ends with the SAE's block
        x = splice(x, stand_in)
    needs_logits = config.objective != "mse"
    stop = len(model.layers) if needs_logits else layer + 1
    x = model.run(x, first, stop, {layer: stand_in}, part.special)

    # Eq. 7 and the MSE, over all processes.
    kl, values = None, {}
    if needs_logits:
        total, sums = objective(model, part, model.norm(x), config)
        tokens = world.sum(total.new_full((), part.special.numel()))
        kl = world.sum(total) / tokens
        values = {name: world.sum(value) / tokens for name, value in sums.items()}
    mse = fvu(stand_in.x_hat, stand_in.x, world)
    loss = combined(config.objective, kl, mse)

    # The penalty keeps L0 where it was on this text.
    positions = world.sum(mse.new_full((), len(stand_in.x)))
    l0 = world.sum(stand_in.active) / positions
    if reference.original is not None:
        active = world.sum(active_latents(reference.original, stand_in.x))
        target = active.clamp(min=1) / positions        # never 0: penalty divides by it
        loss = loss + L0_WEIGHT * sae.penalty(l0, target)

    values |= {"fvu": mse.detach(), "l0": l0.detach()}
    return loss, values


def take_step(model, trained, part, first, optimizer, config, world=ALONE):
    """One optimiser step -> {name: value}: losses per token, gradient norms before clipping.

    As in adapt.take_step, `clip` bounds the gradient of the sum over a sequence's tokens. Adapters
    and SAE are clipped separately, so the step of one does not depend on the other's gradient.
    """
    loss, values = loss_of(model, trained, part, first, config, world)
    (loss * part.special.shape[1]).backward()
    world.all_reduce([parameter.grad for parameter in trained_parameters(optimizer)])

    # Clip.
    sae, norms = trained.sae, trained.reference.norms
    project_out_norm_gradient(sae.W_dec, sae.W_dec / norms)
    clip = torch.nn.utils.clip_grad_norm_
    values["grad_norm"] = clip(sae.parameters(), config.clip)
    if trained.adapters:
        values["grad_norm_lora"] = clip(trained.adapters, config.clip)

    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():                               # every decoder row keeps its norm
        sae.W_dec.copy_(norms * F.normalize(sae.W_dec, dim=1))
        sae.after_step()
    return values
