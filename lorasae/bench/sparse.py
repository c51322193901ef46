"""Top-k alone, the encoder, and the whole step of a TopK SAE (topk.py): python -m lorasae.bench
topk

Shapes: N tokens, D d_model, M latents, k active latents.
"""
from functools import partial

import torch
import torch.nn.functional as F

from lorasae import topk
from lorasae.bench.race import differing_tensors, race


def bench_topk(device, quick):
    """Top-k alone, the encoder, the whole TopK SAE step: k 64, D 2304 (Gemma-2-2B), M from 8 to 57
    times D.
    """
    rows = []
    for N, M in [(64, 4096)] if quick else [(2048, 16384), (2048, 131072)]:
        rows += race(f"top-k, N {N} M {M}", partial(topk_contenders, N, M, 64), differing_entries,
                     3 if quick else 15, device, not quick)
    for N, D, M in [(64, 32, 4096)] if quick else [(1024, 2304, 131072)]:
        rows += race(f"encoder, N {N} D {D} M {M}", partial(encode_contenders, N, D, M, 64),
                     differing_tensors,
                     3, device, not quick)
    for N, D, M in [(64, 32, 4096)] if quick else [(2048, 2304, 16384), (1024, 2304, 65536)]:
        rows += race(f"SAE step, N {N} D {D} M {M}", partial(step_contenders, N, D, M, 64),
                     differing_tensors,
                     3 if quick else 5, device, not quick)
    return rows


def topk_contenders(N, M, k, device):
    x = torch.randn(N, M, device=device, generator=torch.Generator(device).manual_seed(0))
    return {"torch.topk": lambda: (x, *torch.topk(x, k, sorted=False)),
            "lorasae": lambda: (x, *topk.topk(x, k))}


def differing_entries(answer, reference):
    """None where they are exactly the k largest, each at the place that its index names, no place
    twice.
    """
    (x, values, indices), (_, expected, _) = answer, reference
    if not torch.equal(values.sort(-1).values, expected.sort(-1).values):
        return "these are not the k largest"
    if not torch.equal(x.gather(-1, indices), values):
        return "an index points elsewhere"
    if (indices.sort(-1).values.diff(dim=-1) == 0).any():
        return "an index comes twice"
    return None


def problem(N, D, M, device):
    """x [N, D] and the tensors of an SAE at the start of its training: unit decoder rows, the
    encoder equal to them.
    """
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, D, device=device, generator=g)
    W_dec = F.normalize(torch.randn(M, D, device=device, generator=g))
    tensors = W_dec.clone(), torch.zeros(M, device=device), W_dec, torch.zeros(D, device=device)
    return [x, *(t.requires_grad_() for t in tensors)]


def encode_contenders(N, D, M, k, device):
    x, W_enc, b_enc, _, _ = (t.detach() for t in problem(N, D, M, device))
    return {"dense": lambda: {"values": topk.naive_encode(x, W_enc, b_enc, k)[0].sort(-1).values},
            "lorasae": lambda: {"values": topk.encode(x, W_enc, b_enc, k)[0].sort(-1).values}}


def step_contenders(N, D, M, k, device):
    tensors = problem(N, D, M, device)

    def run(step):
        reconstruction = step(*tensors, k)[0]
        loss = (reconstruction - tensors[0]).square().sum()
        gradients = torch.autograd.grad(loss, tensors[1:])
        return {"loss": loss.detach(), **dict(zip(["W_enc", "b_enc", "W_dec", "b_dec"], gradients))}

    return {"dense autograd": partial(run, topk.naive_step),
            "sparsify-style": partial(run, sparsify_step),
            "lorasae": partial(run, topk.sae_step)}


def sparsify_step(x, W_enc, b_enc, W_dec, b_dec, k):
    """The usual sparse way (EleutherAI/sparsify): dense pre-activations, torch.topk, embedding_bag
    with its backward,
    and an encoder gradient that adds up the rows of an [N, k, D] tensor."""
    values, indices = SparsifyEncoder.apply(x - b_dec, W_enc, b_enc, k)
    return F.embedding_bag(indices, W_dec, per_sample_weights=values,
                           mode="sum") + b_dec, values, indices


class SparsifyEncoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, k):
        values, indices = torch.topk(F.linear(x, W_enc, b_enc).relu(), k, sorted=False)
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
