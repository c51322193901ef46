"""Losses from final hidden states: Eq. 7 for training, CE and KL per token for evaluation.

The vocabulary is the largest dimension of all: for one Gemma-2 sequence the naive formula keeps
seven [1024, 256000] fp32 tensors. The functions below compute the logits of one chunk of tokens,
turn them into losses and gradients, and drop them. Benchmark: `python -m lorasae.bench kl`.

Suffix _p: base model; _q: adapted model. u: the head's raw logits; z = cap(u): soft-capped ones.

Shapes: N tokens (B*T), n tokens in a chunk, D d_model, V vocabulary, S adapted models side by side.
Hidden states have passed the final norm; `weight` is the head [V, D].
"""
from functools import cache

import torch
from torch.autograd.function import once_differentiable

from lorasae.linear import linear_fp32

# Logits of one model in memory at a time: 25 MB (or LEAST_ROWS tokens) on a CPU, 0.5 GB on a GPU.
CHUNK_ELEMENTS = {"cpu": 3 * 2 ** 21, "cuda": 2 ** 27}
LEAST_ROWS = 96                 # minimum per chunk on a CPU: with fewer, products get slow

# Logits that a CPU processes at a time: 1 MB stays in its cache.
CACHED_ELEMENTS = 2 ** 18


def naive_kl(target, hidden, weight, softcap=None):
    """Eq. 7: Σ_tokens KL(p ‖ q), with p = softmax(cap(target Wᵀ)), q = softmax(cap(hidden Wᵀ))."""
    z_p = capped(target.float() @ weight.float().T, softcap)
    z_q = capped(hidden.float() @ weight.float().T, softcap)
    log_p = z_p.log_softmax(-1)
    log_q = z_q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def linear_kl(target, hidden, weight, softcap=None, compiled=False):
    """naive_kl without its [N, V] tensors: the same value, and the same gradient for `hidden`.

    target [..., D] is the base model's; it and weight [V, D] get no gradient. hidden [..., D] is
    the adapted model's, or [S, ..., D] for S models. They share the base model's logits; each
    result is bitwise as if alone. compiled: compile the elementwise part.

    Returns the *sum* over tokens, in nats, fp32: a scalar, or [S] if S > 1. Peak memory is a few
    chunks of logits. Logits and softmax are fp32 even for bf16 weights: at a KL of 0.02,
    near where the paper's runs end, bf16 logits put an error of 13 % into the gradient.
    """
    target = target.flatten(0, -2)
    models = hidden.reshape(-1, *target.shape)
    losses = LinearKL.apply(models, target, weight, softcap, compiled)
    return losses if len(models) > 1 else losses[0]


class LinearKL(torch.autograd.Function):
    """∂KL/∂u = (q - p) (1 - (z / c)²) with z = c tanh(u / c), and ∂KL/∂hidden = (∂KL/∂u) W.

    The forward pass computes the gradient while a chunk's logits exist, and keeps only [S, N, D].
    Each model's products have the same shapes for any S, so its results are bitwise the same.
    """

    @staticmethod
    def forward(ctx, hidden, target, weight, softcap, compiled):
        S, N, _ = hidden.shape
        totals = torch.zeros(S, device=hidden.device)
        gradient = torch.empty_like(hidden)

        log_softmax, kl = log_probabilities, kl_and_gradient
        if compiled:
            log_softmax, kl = compile_once(log_softmax), compile_once(kl)

        chunk = chunk_rows(len(weight), weight.is_cuda)
        for start in range(0, N, chunk):
            # The base model's log-probabilities, once for all adapted models.
            rows = slice(start, start + chunk)
            log_p = linear_fp32(target[rows], weight)
            for piece in pieces(log_p, compiled):
                log_softmax(log_p[piece], softcap)

            for s in range(S):
                # The loss. The gradient of the logits overwrites them.
                u_q = linear_fp32(hidden[s, rows], weight)
                for piece in pieces(u_q, compiled):
                    totals[s] += kl(log_p[piece], u_q[piece], softcap)

                # Back through the head. The chunk is freed before the next one is made.
                d_logits = u_q.to(weight.dtype)
                gradient[s, rows] = linear_fp32(d_logits, weight.T)
                del u_q, d_logits
            del log_p

        ctx.save_for_backward(gradient)
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx, d_totals):
        gradient, = ctx.saved_tensors
        d_hidden = gradient * d_totals[:, None, None]           # in fp32, like d_totals
        return d_hidden.to(gradient.dtype), None, None, None, None


def log_probabilities(u, softcap):
    """Uncapped fp32 logits of a model [n, V] -> its log-probabilities [n, V], which OVERWRITE them.

    The soft-cap is c tanh(u / c) = 2c σ(2u / c) - c. The constant cancels in the softmax, and on a
    CPU σ takes a sixth of tanh's time.
    """
    if softcap is not None:
        u.mul_(2 / softcap).sigmoid_().mul_(2 * softcap)
    return u.copy_(u.log_softmax(-1))


def kl_and_gradient(log_p, u_q, softcap):
    """log p and the adapted model's uncapped fp32 logits, both [n, V] -> Σ KL(p ‖ q).

    OVERWRITES u_q with ∂KL/∂u_q = (q - p) ∂z_q/∂u_q. Mostly works in place, to stay in cache.
    """
    p = log_p.exp()

    # log q, and the slope of the soft-cap.
    if softcap is None:
        log_q = u_q.log_softmax(-1)
    else:
        sigmoid = u_q.mul_(2 / softcap).sigmoid_()
        slope = (4 * sigmoid).mul_(1 - sigmoid)         # ∂z_q/∂u_q = 1 - tanh²
        log_q = sigmoid.mul_(2 * softcap).log_softmax(-1)

    # The gradient overwrites the logits.
    d_logits = torch.exp(log_q, out=u_q).sub_(p)
    if softcap is not None:
        d_logits.mul_(slope)

    return torch.sub(log_p, log_q, out=log_q).mul_(p).sum()


@cache
def compile_once(function):
    """torch.compile; with fullgraph=True a recompile limit is an error, not a silent eager run."""
    return torch.compile(function, dynamic=False, fullgraph=True)


@torch.no_grad()
def token_losses(hidden, labels, weight, softcap=None):
    """CE and KL(p ‖ q) of every token, in one pass over the head: nats, fp32, [S, ...] each.

    hidden [S, ..., D] after the final norm: the base model's first, then the others'. labels [...]:
    the tokens to predict. The base model's logits are computed once for all.
    """
    shape = hidden.shape[:-1]
    hidden, labels = hidden.flatten(1, -2), labels.flatten()
    S, N, _ = hidden.shape
    ce = torch.zeros(S, N, device=hidden.device)
    kl = torch.zeros_like(ce)

    chunk = chunk_rows(len(weight), weight.is_cuda)
    for start in range(0, N, chunk):
        rows = slice(start, start + chunk)
        label = labels[rows, None]
        for s in range(S):
            logits = linear_fp32(hidden[s, rows], weight)
            if s == 0:
                log_p = logits                          # once the loop below has overwritten them
            for piece in pieces(logits):
                log_q = log_probabilities(logits[piece], softcap)
                ce[s, rows][piece] = -log_q.gather(-1, label[piece])[:, 0]
                if s > 0:
                    kl[s, rows][piece] = (log_p[piece].exp() * (log_p[piece] - log_q)).sum(-1)
    return ce.view(shape), kl.view(shape)


def capped(logits, softcap):
    """cap(u) = c tanh(u / c)"""
    if softcap is None:
        return logits
    return torch.tanh(logits / softcap) * softcap


# ---- Chunk sizes ---------------------------------------------------------------------------------

def chunk_rows(V, on_cuda):
    """Tokens per chunk of logits. On CUDA a multiple of 128, the tile size of matrix products."""
    if on_cuda:
        rows = CHUNK_ELEMENTS["cuda"] // V
        return max(128, rows - rows % 128)
    return max(LEAST_ROWS, CHUNK_ELEMENTS["cpu"] // V)


def pieces(logits, whole=False):
    """logits [n, V] -> slices of rows that fit a CPU's cache; one slice on CUDA, or if `whole`."""
    n, V = logits.shape
    rows = n if whole or logits.is_cuda else max(1, CACHED_ELEMENTS // V)
    return [slice(start, start + rows) for start in range(0, n, rows)]
