"""Beyond the paper: an SAE that is there already, trained on, alone or together with the adapters.

    python train.py --method finetune --sae SOURCE          the SAE alone, the model as it is     (Karvonen 2025)
    python train.py --method lora --train-sae               both at once, on Eq. 7

    KL          KL(base ‖ with SAE)                         Eq. 7; without adapters it is the end-to-end loss of §3.2
    MSE         ‖x - x̂‖² over the variance of x             §3.1
    balanced    ½ (MSE + KL · sg[MSE / KL])                 Karvonen (2025), arXiv 2503.17272: sg stops the gradient, so that
                                                            both parts have the size of the MSE, whatever the SAE
    + L0        (L0 / L0 of the SAE as it came - 1)²        §3.3, of a JumpReLU: its thresholds follow the straight-through
                                                            gradient, and its L0 stays; of frozen thresholds it is free

    naive_loss      KL, MSE or both balanced as they are written, without the penalty
    learn           the same without waste, as adapt.learn
    take_step       one step on adapters, SAE, or both
    train           the loop

What stays: every decoder row keeps the norm it came with, so that latents before and after can be compared. A JumpReLU
loses nothing by it, as a row's norm and the scale of its latent are one and the same freedom. The norms of a foreign SAE,
which need not be 1, are not touched.

Shapes: B batch, T tokens, D d_model, M latents, N positions that the SAE learns from.
"""
from contextlib import nullcontext
from typing import NamedTuple

import torch

from lorasae import dictionary
from lorasae.beyond.muon import new_optimizer
from lorasae.adapt import compiled_blocks, first_differing, learning_rate, objective, step_seed
from lorasae.dictionary import alone, fvu, l0_penalty
from lorasae.errors import InputError
from lorasae.linear import linear
from lorasae.lora import base
from lorasae.sae import JumpReLU, learned_positions

L0_WEIGHT = 10.0        # of the penalty: with 1, L0 stays where the pulls of both losses are equal


# ---- The objective -----------------------------------------------------------------------------------------------------

def combined(name, kl, mse):
    """The objective `kl`, `mse` or `balanced` of the two losses a token.

    The MSE is in units of the activations' variance (the FVU), so that one weight of the L0 penalty serves every model;
    the balance, and Adam, do not see a constant. Raises InputError where there is no KL to balance.
    """
    if name == "kl":
        return kl
    if name == "mse":
        return mse
    if kl <= 0:
        raise InputError(f"the KL of a step is {kl.item():g}, so the balanced loss ½ (MSE + KL · MSE / KL) has nothing to "
                         "balance: with this SAE the model is as without; pass --objective mse")
    return (mse + kl * (mse / kl).detach()) / 2


def naive_loss(model, saes, tokens, name):
    """The objective of that name of the SAE of {layer: SAE}, a token's, for tokens [B, T], with all logits and in plain autograd.

    Autograd through it gives every gradient but that of a JumpReLU's thresholds, which the formula does not have.
    """
    (layer, sae), = saes.items()
    with torch.no_grad(), base(model):
        log_p = model(tokens).log_softmax(-1)
    log_q = model(tokens, saes).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    x = model.run(model.embed(tokens), 0, layer + 1)
    learned = learned_positions(sae, model.special(tokens))
    mse = fvu(sae(x[learned]), x[learned])
    return combined(name, kl, mse)


# ---- The SAE in training -----------------------------------------------------------------------------------------------

class Held(NamedTuple):
    """What stays as it was while an SAE is trained, and what its thresholds need."""
    norms: torch.Tensor                     # [M, 1] of the decoder's rows
    encoder: tuple | None                   # W_enc [M, D], b_enc [M], θ [M] of a JumpReLU as it came, if its θ learns
    unit: float                             # rms distance of the activations from b_dec: of a JumpReLU's biases and thresholds
    bandwidth: torch.Tensor                 # [M] ε of the straight-through gradient


@torch.no_grad()
def hold(sae, x):
    """The Held of an SAE that is to be trained on activations such as x [N, D].

    A latent's values are in units of 1 / its row's norm, so its bandwidth is too. A TopK has no thresholds: its unit is 1.
    Raises InputError for an SAE that is silent on x.
    """
    norms = sae.W_dec.norm(dim=1, keepdim=True)
    if not any((sae.encode(rows) > 0).any() for rows in x.split(256)):
        raise InputError(f"no latent of the SAE is active at any of {len(x):,} positions, so there is nothing to train: "
                         "is it of this model and layer?")

    encoder, unit = None, 1.0
    if isinstance(sae, JumpReLU):
        unit = (x - sae.b_dec).square().sum(1).mean().sqrt().item()
        if sae.threshold.requires_grad:
            encoder = tuple(parameter.detach().clone() for parameter in (sae.W_enc, sae.b_enc, sae.threshold))
    bandwidth = dictionary.BANDWIDTH * unit / norms[:, 0].clamp(min=torch.finfo(norms.dtype).tiny)
    return Held(norms, encoder, unit, bandwidth)


@torch.no_grad()
def active_as_it_came(held, x):
    """How many latents the JumpReLU as it came has active on x [N, D], in all.

    The L0 that is wanted is that of the very text of the step. Against a number fixed for all text, the penalty would
    also press on how L0 varies from text to text, which it can do only by a smaller L0.
    """
    W_enc, b_enc, threshold = held.encoder
    return sum((linear(rows, W_enc, b_enc) > threshold).sum() for rows in x.split(256)).float()


class InTraining:
    """An SAE in its place in the model: x [B, T, D] -> x̂, with every gradient that training needs.

    It works on the positions that the SAE learns from, learned [B, T] bool, and leaves the others alone. `x`, `x_hat`
    [N, D] and `active` say afterwards what it did.
    """
    on_special = True                       # it looks after BOS and EOS itself

    def __init__(self, sae, held, learned):
        self.sae, self.held, self.learned = sae, held, learned

    def __call__(self, x):
        self.x = x[self.learned].float()
        self.x_hat, _, self.active = dictionary.reconstruct(self.sae, self.x, self.held.bandwidth)
        return x.index_put((self.learned,), self.x_hat.to(x.dtype))


class Learners(NamedTuple):
    """What learns, and where."""
    layer: int                              # the block whose output the SAE replaces
    sae: torch.nn.Module
    held: Held
    adapters: list                          # parameters of the adapters that learn too; the model may have others, which stay


def of_sae(sae):
    """What the SAE trains: ([matrices], [vectors])."""
    trained = [parameter for parameter in sae.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() == 2]
    vectors = [parameter for parameter in trained if parameter.dim() == 1]
    return matrices, vectors


# ---- One step ----------------------------------------------------------------------------------------------------------

def first_trained(model, layer):
    """The first block that differs between teacher and student. An SAE in training is none of the shared prefix's."""
    return first_differing(model, {layer: None})


def learn(model, learners, lesson, first, config, everywhere=alone):
    """The student's part: a Lesson, made by adapt.teach without SAEs -> (loss, {name: value}), both a token's.

    Differentiable in the adapters and in the SAE. config: objective, compile.
    """
    layer, sae, held, _ = learners
    learned = learned_positions(sae, lesson.special)
    training = InTraining(sae, held, learned)
    x = training(lesson.x) if first == layer + 1 else lesson.x
    reads_on = config.objective != "mse"                        # what comes after the SAE does not concern its MSE
    stop = len(model.layers) if reads_on else layer + 1
    x = model.run(x, first, stop, {layer: training}, lesson.special)

    kl = None
    if reads_on:
        hidden = model.norm(x)
        total = objective(model, lesson, hidden, config.compile)
        kl = everywhere(total) / everywhere(total.new_full((), learned.numel()))
    mse = fvu(training.x_hat, training.x, everywhere)
    loss = combined(config.objective, kl, mse)

    active = everywhere(training.active)
    positions = everywhere(mse.new_full((), len(training.x)))
    l0 = active / positions
    if held.encoder is not None:
        as_it_came = everywhere(active_as_it_came(held, training.x)).clamp(min=1)      # to divide by
        loss = loss + L0_WEIGHT * l0_penalty(l0, as_it_came / positions)

    values = {"kl": kl, "fvu": mse, "l0": l0}
    return loss, {name: value.detach() for name, value in values.items() if value is not None}


class Optimizers:
    """Several optimisers as one."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        if "parts" not in state:
            raise InputError("the checkpoint was written by an earlier version, which cannot be continued: start the run anew, "
                             "with another --out")
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def optimizers(learners, config, sae_lr):
    """AdamW on the SAE, a group for its matrices and one for its vectors, and before it the adapters' optimiser, if any learn.

    A JumpReLU's vectors have the scale of its activations, so their rate does too (dictionary.begin). Weight decay is the
    adapters' alone: it would shrink an SAE's rows and thresholds, whose sizes mean something.
    """
    matrices, vectors = of_sae(learners.sae)
    groups = [
        {"params": matrices, "rate": sae_lr},
        {"params": vectors, "rate": sae_lr * learners.held.unit},
    ]
    of_the_sae = torch.optim.AdamW(groups, lr=sae_lr, weight_decay=0.0, fused=True)
    if not learners.adapters:
        return Optimizers(of_the_sae)
    of_the_adapters = new_optimizer([{"params": learners.adapters, "rate": config.lr}], config)
    return Optimizers(of_the_adapters, of_the_sae)


def trained_parameters(optimizer):
    """All that an optimiser trains, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def take_step(model, learners, lesson, first, optimizer, config, everywhere=alone, all_reduce=None):
    """One step on a lesson. Returns {name: value}: the losses a token, and the gradients' norms before clipping.

    As in adapt.take_step a loss is summed over a sequence's tokens, and `clip` bounds the gradient of that. Adapters and
    SAE are clipped apart, each by its own norm, so that neither's step depends on how large the other's gradient is.
    """
    loss, values = learn(model, learners, lesson, first, config, everywhere)
    (loss * lesson.special.shape[1]).backward()
    if all_reduce is not None:
        all_reduce([parameter.grad for parameter in trained_parameters(optimizer)])

    along_sphere(learners.sae, learners.held)
    matrices, vectors = of_sae(learners.sae)
    values["grad_norm"] = torch.nn.utils.clip_grad_norm_(matrices + vectors, config.clip)
    if learners.adapters:
        values["grad_norm_lora"] = torch.nn.utils.clip_grad_norm_(learners.adapters, config.clip)

    optimizer.step()
    optimizer.zero_grad()
    back_to_norms(learners.sae, learners.held)
    return values


@torch.no_grad()
def along_sphere(sae, held):
    """Takes out of the decoder's gradient what would only change the norms of its rows."""
    rows = sae.W_dec / held.norms.clamp(min=torch.finfo(held.norms.dtype).tiny)
    gradient = sae.W_dec.grad
    gradient -= (gradient * rows).sum(1, keepdim=True) * rows


@torch.no_grad()
def back_to_norms(sae, held):
    """Gives every decoder row the norm it came with. A threshold stays at least 0."""
    now = sae.W_dec.norm(dim=1, keepdim=True).clamp(min=torch.finfo(held.norms.dtype).tiny)
    sae.W_dec *= held.norms / now
    if isinstance(sae, JumpReLU):
        sae.threshold.clamp_(min=0)


# ---- The loop ----------------------------------------------------------------------------------------------------------

def train(model, learners, lessons, optimizer, config, start=0, everywhere=alone, all_reduce=None, process=0):
    """The loop: a step a lesson, from step `start` on. Yields (steps done, {name: value}) after each.

    config: steps, lr_decay, clip, seed, objective, compile (runs.config.Config has all of these).
    """
    first = first_trained(model, learners.layer)
    model.train(bool(learners.adapters))                        # dropout is of adapters that learn
    with compiled_blocks(model) if config.compile else nullcontext():
        for step, lesson in zip(range(start, config.steps), lessons):
            torch.manual_seed(step_seed(config.seed, step, process))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(group["rate"], step, config)
            values = take_step(model, learners, lesson, first, optimizer, config, everywhere, all_reduce)
            yield step + 1, values
    model.eval()
