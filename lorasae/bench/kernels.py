"""Each beside its naive twin or the usual way.

    python -m lorasae.bench kl          the loss (objectives.py)
    python -m lorasae.bench topk        top-k alone, a TopK SAE's whole step (topk.py)

Shapes: N tokens, D d_model, V vocabulary, M latents, k active latents.
"""
from functools import partial

import torch
import torch.nn.functional as F

from lorasae import objectives, topk
from lorasae.bench.race import race

K = 64


# ---- The loss ------------------------------------------------------------------------------------

def bench_kl(device, quick):
    """KL(base ‖ adapted) and its gradient: one sequence, Gemma-2's vocabulary, a quarter of its
    width.
    """
    N, D, V = (64, 32, 4096) if quick else (1024, 576, 256_000)
    yield race(f"KL, N {N} D {D} V {V}", partial(kl_contenders, N, D, V), device, quick)


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
        yield race(f"top-k, N {N} M {M}", build, device, quick, tolerance=0)
    for N, D, M in [(64, 32, 4096)] if quick else [(2048, 2304, 16384), (1024, 2304, 65536)]:
        build = partial(step_contenders, N, D, M)
        yield race(f"SAE step, N {N} D {D} M {M}", build, device, quick)


class TopKOf:
    """Calling it takes the top k of x. Its answer: which values, and whether they are there."""

    def __init__(self, function, x):
        self.function, self.x = function, x

    def __call__(self):
        return self.function(self.x, K)

    def answer(self):
        values, indices = self()
        found = self.x.gather(-1, indices) == values
        return [values.sort(-1).values, found.float()]


def topk_contenders(N, M, device):
    x = torch.randn(N, M, device=device, generator=torch.Generator(device).manual_seed(0))
    return {"torch.topk": TopKOf(partial(torch.topk, sorted=False), x),
            "lorasae": TopKOf(topk.topk, x)}


def step_contenders(N, D, M, device):
    """The step at the start of training: unit decoder rows, the encoder equal to them."""
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

    return {"dense autograd": partial(run, topk.naive_step),
            "sparsify-style": partial(run, sparsify_step),
            "lorasae": partial(run, topk.sae_step)}


def sparsify_step(x, W_enc, b_enc, W_dec, b_dec, k):
    """The usual sparse way (EleutherAI/sparsify): dense pre-activations, torch.topk, embedding_bag
    with its backward, and an encoder gradient that adds up the rows of an [N, k, D] tensor.
    """
    values, indices = SparsifyEncoder.apply(x - b_dec, W_enc, b_enc, k)
    return [F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec]


class SparsifyEncoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, k):
        values, indices = F.linear(x, W_enc, b_enc).relu().topk(k, sorted=False)
        ctx.save_for_backward(x, W_enc, b_enc, indices, values)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad, _):
        x, W_enc, b_enc, indices, values = ctx.saved_tensors
        grad = grad * (values > 0)
        grad_x = F.embedding_bag(indices, W_enc, per_sample_weights=grad, mode="sum")  # for b_dec
        pairs = (grad.unsqueeze(2) * x.unsqueeze(1)).flatten(0, 1)                      # [N * k, D]
        grad_W = torch.zeros_like(W_enc).index_add_(0, indices.flatten(), pairs)
        grad_b = torch.zeros_like(b_enc).index_add_(0, indices.flatten(), grad.flatten())
        return grad_x, grad_W, grad_b, None
