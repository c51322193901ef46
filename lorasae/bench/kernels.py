"""Benchmarks of the kernels against their naive twins or the usual implementations.

    python -m lorasae.bench kl          the loss (objectives.py)
    python -m lorasae.bench topk        only top-k, and a TopK SAE's whole step (topk.py)

Shapes: N tokens, D d_model, V vocabulary, M latents, k active latents.
"""
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from lorasae import objectives, topk
from lorasae.bench.race import race

K = 64


# ---- The loss ------------------------------------------------------------------------------------

def bench_kl(device, quick):
    """KL and its gradient: one sequence, Gemma-2's vocabulary, a quarter of its width."""
    N, D, V = (64, 32, 4096) if quick else (1024, 576, 256_000)
    yield from race(f"KL, N {N} D {D} V {V}", partial(kl_contenders, N, D, V), device, quick)


def kl_contenders(N, D, V, device):
    g = torch.Generator(device).manual_seed(0)
    target = torch.randn(N, D, device=device, generator=g)
    hidden = (target + 0.5 * torch.randn(N, D, device=device, generator=g)).requires_grad_()
    head = torch.randn(V, D, device=device, generator=g) * 2 / D ** 0.5

    def run(loss, **how):
        value = loss(target, hidden, head, softcap=30.0, **how)
        return [value.detach(), *torch.autograd.grad(value, hidden)]

    compiled = device == "cuda"
    return {"naive": lambda: run(objectives.naive_kl),
            "lorasae": lambda: run(objectives.linear_kl, compiled=compiled)}


# ---- TopK ----------------------------------------------------------------------------------------

def bench_topk(device, quick):
    """k 64, D 2304 (Gemma-2-2B), M from 7 to 57 times D."""
    for N, M in [(64, 4096)] if quick else [(2048, 16384), (2048, 131072)]:
        build = partial(topk_contenders, N, M)
        yield from race(f"top-k, N {N} M {M}", build, device, quick, tolerance=0)
    for N, D, M in [(64, 32, 4096)] if quick else [(2048, 2304, 16384), (1024, 2304, 65536)]:
        build = partial(step_contenders, N, D, M)
        # A tie for the k-th place that falls differently on a GPU changes gradients by 4e-3.
        tolerance = 1e-2 if device == "cuda" else None
        yield from race(f"SAE step, N {N} D {D} M {M}", build, device, quick, tolerance)


def topk_contenders(N, M, device):
    """Their answers: the values, and whether each is at the index that comes with it."""
    x = torch.randn(N, M, device=device, generator=torch.Generator(device).manual_seed(0))

    def contender(function, **how):
        take = partial(function, x, K, **how)

        def answer():
            values, indices = take()
            return [values.sort(-1).values, (x.gather(-1, indices) == values).float()]

        take.answer = answer
        return take

    return {"torch.topk": contender(torch.topk, sorted=False), "lorasae": contender(topk.topk)}


def step_contenders(N, D, M, device):
    """The step at the start of training: decoder rows of norm 1, and an equal encoder."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, D, device=device, generator=g)
    W_dec = F.normalize(torch.randn(M, D, device=device, generator=g))
    tensors = W_dec.clone(), torch.zeros(M, device=device), W_dec, torch.zeros(D, device=device)
    for tensor in tensors:
        tensor.requires_grad_()

    def run(step):
        reconstruction, *_ = step(x, *tensors, K)
        loss = (reconstruction - x).square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, tensors)]

    contenders = {"dense autograd": partial(run, topk.naive_step)}
    if find_spec("sparsify"):
        contenders["sparsify"] = partial(run, sparsify_step)
    return {**contenders, "lorasae": partial(run, topk.sae_step)}


def sparsify_step(x, W_enc, b_enc, W_dec, b_dec, k):
    """EleutherAI/sparsify's step: torch.topk, and an encoder gradient that sums [N, k, D] rows."""
    from sparsify.fused_encoder import fused_encoder
    values, indices, _ = fused_encoder(x - b_dec, W_enc, b_enc, k, "topk")
    return [F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec]
