"""Training an SAE: by reconstruction (TopK, paper §3.1; JumpReLU, §3.3) or end to end, on the model's loss (§3.2).

    python train.py --method topk --k 16        python train.py --method jumprelu --l0 16
    python train.py --method e2e --k 16         python train.py --sae RUN_DIR       adapts the model around the result

    observe     the frozen model's part of a step: the activations that the SAE learns from
    loss_of     what it is trained on: FVU or KL, and where asked for the L0 penalty and AuxK
    train       the loop: one Adam step a batch, decoder rows kept at norm 1

TopK and e2e follow the published code, JumpReLU follows Rajamanoharan et al. (2024).

Shapes: B batch, T tokens, D d_model, M latents, K active latents, N tokens of a step.
"""
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lorasae import topk
from lorasae.adapt import Lesson, compiled_blocks, learn, teach
from lorasae.linear import linear
from lorasae.sae import JumpReLU, TopK, learned_positions

WARMUP = 1000                                   # steps from 0 to the full rate; at most a tenth of the run
AUX_WEIGHT = 1 / 32                             # of AuxK beside the FVU (Gao et al. 2024)
BANDWIDTH = 0.05                                # ε of the straight-through gradients, of the activations' rms norm
L0_WEIGHT = 1.0                                 # of (L0 / target - 1)² beside the FVU
START_L0, RAMP = 4, 0.2                         # the target falls from 4 l0 to l0 over a fifth of the run, see `fit_biases`


# ---- The losses --------------------------------------------------------------------------------------------------------
# Of several processes each holds a part of a step's tokens. `everywhere` sums a value over all of them; alone, it is the
# value itself.

def alone(value):
    """`everywhere` of a single process."""
    return value


def fvu(x_hat, x, everywhere=alone):
    """Fraction of variance unexplained, Σ‖x - x̂‖² / Σ‖x - x̄‖², over the tokens of a step; both [N, D], x̄ their mean."""
    count = x.new_full((), len(x))
    mean = everywhere(x.sum(0)) / everywhere(count)
    error = everywhere((x - x_hat).square().sum())
    variance = everywhere((x - mean).square().sum())
    return error / variance


def aux_loss(e_hat, x_hat, x, everywhere=alone):
    """AuxK (Gao et al. 2024): Σ‖e - ê‖² / Σ‖e‖² with the residual e = x - x̂ detached; ê [N, D] is made by dead latents alone.

    The part of the residual that they leave, so 1 where they do nothing. b_dec is in x̂ already and stays out of ê.
    """
    e = (x - x_hat).detach()
    left = everywhere((e - e_hat).square().sum())
    residual = everywhere(e.square().sum())
    return left / residual.clamp(min=torch.finfo(e.dtype).tiny)


def l0_penalty(l0, target):
    """(L0 / target - 1)²: instead of λ L0 (Eq. 6), so that the L0 wanted is asked for and no λ has to be searched."""
    return (l0 / target - 1).square()


def jump(pre, threshold, bandwidth):
    """pre [N, M], θ [M] -> latents z = pre · H(pre - θ) and gates H(pre - θ), both [N, M] (§3.3).

    A jump has no gradient that θ could follow, so θ gets the straight-through one of Rajamanoharan et al. (2024), with K the
    rectangle that is 1 on (-½, ½) and ε the bandwidth:   ∂z/∂θ = -(θ/ε) K((pre - θ)/ε),   ∂H/∂θ = -(1/ε) K((pre - θ)/ε).
    pre gets ∂z/∂pre = H and nothing from the gates.
    """
    return Jump.apply(pre, threshold, bandwidth)


class Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        gates = (pre > threshold).to(pre.dtype)
        return pre * gates, gates

    @staticmethod
    def backward(ctx, d_z, d_gates):
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        d_threshold = -((threshold * d_z + d_gates) * near).sum(0) / ctx.bandwidth
        return d_z * (pre > threshold), d_threshold, None


# ---- The start ---------------------------------------------------------------------------------------------------------

def new_sae(method, d_model, width, k):
    """A TopK or JumpReLU with W_enc uniform in ±1/√D and W_dec its rows at norm 1; `fit_biases` does the rest.

    The TopK learns BOS and EOS positions too, as in the paper; the JumpReLU leaves them alone, as Gemma Scope does.
    """
    sae = JumpReLU(d_model, width) if method == "jumprelu" else TopK(d_model, width, k)
    nn.init.uniform_(sae.W_enc, -d_model ** -0.5, d_model ** -0.5)
    sae.W_dec.data = F.normalize(sae.W_enc.detach(), dim=1)
    return sae


@torch.no_grad()
def fit_biases(sae, x, l0=None):
    """Fits a fresh SAE to activations x [N, D]. Returns the unit of its biases and thresholds, see `train`.

    Every latent of a JumpReLU starts out firing equally often, for an L0 of 4 l0. Where l0 is asked for at once, a third
    of the latents are below their thresholds for good before they have learned anything.
    """
    sae.b_dec.copy_(geometric_median(x))
    if isinstance(sae, TopK):
        return 1.0

    sae.b_enc.copy_(-sae.W_enc @ sae.b_dec)             # a TopK encoder reads x - b_dec, a JumpReLU reads x
    pre = x @ sae.W_enc.T + sae.b_enc
    firing = round(len(x) * START_L0 * l0 / len(sae.W_enc))             # tokens that are to fire each latent
    highest = pre.topk(min(firing + 1, len(x)), dim=0).values
    sae.threshold.copy_(highest[-1].clamp(min=0))
    return (x - sae.b_dec).square().sum(1).mean().sqrt().item()


def geometric_median(x, steps=100, tolerance=1e-6):
    """The point [D] with the smallest total distance to the rows of x [N, D], by Weiszfeld's iteration.

    Unlike the mean, it does not follow the few positions, such as BOS, whose norm is many times that of the others.
    """
    guess = x.mean(0)
    for _ in range(steps):
        distances = (x - guess).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        weights = 1 / distances
        last, guess = guess, weights @ x / weights.sum()
        if (guess - last).norm() <= tolerance * last.norm():
            break
    return guess


# ---- One step ----------------------------------------------------------------------------------------------------------

class Observation(NamedTuple):
    """What a step needs of the frozen model."""
    x: torch.Tensor                             # [B, T, D] the output of the SAE's block
    learned: torch.Tensor                       # [B, T] bool: the positions that the SAE learns from
    target: torch.Tensor | None = None          # [B, T, D] end to end: the teacher's final hidden state


@torch.no_grad()
def observe(model, sae, layer, tokens, end_to_end):
    """The frozen model's part of a step: tokens [B, T] -> Observation."""
    tokens = tokens.to(model.device, non_blocking=True)
    learned = learned_positions(sae, model.special(tokens))
    if end_to_end:
        lesson = teach(model, {}, tokens, layer + 1)
        return Observation(lesson.x, learned, lesson.target)
    x = model.run(model.embed(tokens), 0, layer + 1)                    # and no further
    return Observation(x, learned)


def reconstruct(sae, x, bandwidth):
    """x [N, D] -> x̂ [N, D]; how many tokens fired each latent [M]; the sum of those (with a JumpReLU's gradient)."""
    if isinstance(sae, TopK):
        x_hat, values, latents = topk.sae_step(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k)
        firing = (values > 0).flatten().to(values)
        fired = firing.new_zeros(len(sae.W_enc)).index_add_(0, latents.flatten(), firing)
        return x_hat, fired, firing.sum()

    pre = linear(x, sae.W_enc, sae.b_enc)
    z, gates = jump(pre, sae.threshold, bandwidth)
    return sae.decode(z), gates.detach().sum(0), gates.sum()


def aux_reconstruct(sae, x, dead):
    """x [N, D], dead [M] bool -> [N, D]: what the D / 2 strongest dead latents make of x."""
    encoded = x - sae.b_dec.detach() if isinstance(sae, TopK) else x
    return topk.aux_decode(encoded, sae.W_enc, sae.b_enc, sae.W_dec, dead, x.shape[1] // 2)


def loss_of(model, sae, layer, seen, step, idle, config, bandwidth, everywhere=alone):
    """The loss of a step on an Observation, and what is to be logged: (loss, fired [M], tokens, {name: value}).

    The FVU, or end to end KL(base ‖ with SAE) summed over a sequence (§3.2). A JumpReLU adds (L0 / target - 1)², --auxk
    adds AuxK on the latents that no token fired for `dead_after` tokens (idle [M] counts them).
    """
    x = seen.x.flatten(0, 1) if sae.on_special else seen.x[seen.learned]
    x = x.float()
    x_hat, fired, active = reconstruct(sae, x, bandwidth)
    tokens = everywhere(x.new_full((), len(x)))
    fired, active = everywhere(fired), everywhere(active)
    l0 = active / tokens

    if seen.target is not None:
        spliced = x_hat.view_as(seen.x).to(seen.x.dtype)
        lesson = Lesson(spliced, seen.target, None)
        total = learn(model, {}, lesson, layer + 1, config.compile)
        loss = everywhere(total) / config.batch_size
        values = {"kl": loss.detach() / seen.x.shape[1]}                # nats a token
    else:
        loss = fvu(x_hat, x, everywhere)
        values = {"fvu": loss.detach()}

    if isinstance(sae, JumpReLU):
        loss = loss + L0_WEIGHT * l0_penalty(l0, target_l0(config, step))

    dead = idle >= config.dead_after
    if config.auxk:
        e_hat = aux_reconstruct(sae, x, dead)
        loss = loss + AUX_WEIGHT * aux_loss(e_hat, x_hat.view_as(x), x, everywhere)

    values |= {"l0": l0.detach(), "dead": dead.float().mean()}
    return loss, fired, tokens, values


def target_l0(config, step):
    """The L0 that a JumpReLU is asked for at step 0, 1, ...: from START_L0 times too many down to l0, then there."""
    remaining = max(0, 1 - (step + 1) / (RAMP * config.steps))
    return config.l0 * START_L0 ** remaining


# ---- The loop ----------------------------------------------------------------------------------------------------------

class Training(NamedTuple):
    """What changes while an SAE is trained: all that a checkpoint holds."""
    tensors: list                               # its parameters, and `idle`
    optimizer: torch.optim.Optimizer


def begin(sae, config):
    """Training for a fresh SAE. JumpReLU's rates are meant for activations of rms norm 1.

    Adam ignores the scale of a gradient, so on raw activations it is enough to multiply the rates of biases and
    thresholds by that norm, which is their group's `unit`.
    """
    matrices = [sae.W_enc, sae.W_dec]
    vectors = [parameter for parameter in sae.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "unit": 1.0}, {"params": vectors, "unit": 1.0}]
    optimizer = torch.optim.Adam(groups, lr=config.lr, fused=True)
    idle = torch.zeros(len(sae.W_enc), dtype=torch.int64, device=sae.W_enc.device)      # tokens since each latent fired
    return Training([*matrices, *vectors, idle], optimizer)


def fit(sae, training, seen, l0):
    """Fits the biases of a fresh SAE to the first Observation."""
    x = seen.x[seen.learned].float()
    training.optimizer.param_groups[1]["unit"] = fit_biases(sae, x, l0)


def train(model, sae, layer, observations, training, config, start=0, everywhere=alone, all_reduce=None):
    """The loop: a step an Observation, from step `start` on. Yields (steps done, {name: value}) after each.

    config: method, steps, lr, clip, batch_size, l0, auxk, dead_after, compile (runs.config.Config has all of these).
    """
    *parameters, idle = training.tensors
    optimizer = training.optimizer
    bandwidth = BANDWIDTH * optimizer.param_groups[1]["unit"]
    with compiled_blocks(model) if config.compile else nullcontext():
        for step, seen in zip(range(start, config.steps), observations):
            loss, fired, tokens, values = loss_of(model, sae, layer, seen, step, idle, config, bandwidth, everywhere)
            loss.backward()
            if all_reduce is not None:
                all_reduce([parameter.grad for parameter in parameters])
            norm = nn.utils.clip_grad_norm_(parameters, config.clip)

            for group in optimizer.param_groups:
                group["lr"] = config.lr * group["unit"] * schedule(step, config.steps)
            update(sae, optimizer)
            idle.add_(tokens.long()).masked_fill_(fired > 0, 0)
            yield step + 1, {**values, "grad_norm": norm}


def schedule(step, steps):
    """The part of the rate that step 0, 1, ... takes: linear up in WARMUP steps, then linear down to 0 after the last."""
    warmup = min(WARMUP, -(-steps // 10))
    rising = (step + 1) / warmup
    falling = (steps - step) / (steps - warmup + 1)
    return min(rising, falling)


@torch.no_grad()
def update(sae, optimizer):
    """An Adam step that keeps decoder rows at norm 1: a gradient along a row would only change what is then undone."""
    W, gradient = sae.W_dec, sae.W_dec.grad
    gradient -= (gradient * W).sum(1, keepdim=True) * W
    optimizer.step()
    optimizer.zero_grad()
    W.copy_(F.normalize(W, dim=1))
    if isinstance(sae, JumpReLU):
        sae.threshold.clamp_(min=0)
