"""The objectives, straight from hidden states: KL(base ‖ adapted) for training (Eq. 7), CE and KL a token for evaluation.

The vocabulary is the largest dimension of the whole computation: for one Gemma-2 sequence the naive formula holds seven
[1024, 256000] fp32 tensors. Here the logits of a few hundred tokens at a time are made, turned into losses and gradients, and
dropped. Exercised by `python -m lorasae.bench kl`.

Shapes: N tokens (B*T), D d_model, V vocabulary. Hidden states come after the final norm; `weight` is the head [V, D].
"""
from functools import cache
from typing import NamedTuple

import torch

from lorasae.linear import linear

CHUNK_ELEMENTS = {"cpu": 2 ** 21, "cuda": 2 ** 27}      # logits of a model held at once: 8 MB on a CPU, 0.5 GB on a GPU
CACHED_ELEMENTS = 2 ** 18                               # of these, worked on at once by a CPU: 1 MB stays in its cache


def naive_kl(target, hidden, weight, softcap=None):
    """Σ_tokens KL(p ‖ q), p = softmax(cap(target Wᵀ)), q = softmax(cap(hidden Wᵀ)): Eq. 7 written out with all its logits."""
    log_p, log_q = (capped(rows.float() @ weight.float().T, softcap).log_softmax(-1) for rows in (target, hidden))
    return (log_p.exp() * (log_p - log_q)).sum()


def linear_kl(target, hidden, weight, softcap=None, chunk=None, compiled=False):
    """naive_kl without its [N, V] tensors: same value, same gradient to `hidden`, peak memory a few chunks of logits.

    target [..., D] of the base model and weight [V, D] are frozen and get no gradient. hidden [..., D] of the adapted model, or
    [S, ..., D] of S of them, which share the base's logits. Returns the *sum* over tokens, in nats, fp32: a scalar, or [S].
    chunk: tokens at a time (None: by device). compiled: the elementwise part becomes one or two kernels.

    The direction is the base first: the student pays where the base puts mass. Logits and softmax are fp32 even for bf16
    weights, because at the paper's end range (KL 0.01 to 0.2) bf16 logits put errors of 10 % and more into the gradient.
    """
    target = target.detach().reshape(-1, target.shape[-1])
    students = hidden.reshape(-1, *target.shape)
    chunk = chunk or 2 * chunk_rows(weight) // (1 + len(students))
    losses = LinearKL.apply(students, target, weight.detach(), softcap, chunk, compiled)
    return losses if len(students) > 1 else losses[0]


class LinearKL(torch.autograd.Function):
    """With u = hidden Wᵀ, z = c tanh(u / c):  ∂KL/∂u = (q - p) (1 - (z / c)²),  ∂KL/∂hidden = (∂KL/∂u) W.

    The gradient is made in the forward pass, while the logits of the chunk exist; [S, N, D] is all that is kept.
    """

    @staticmethod
    def forward(ctx, hidden, target, weight, softcap, chunk, compiled):
        S, N, _ = hidden.shape
        pair = compiled_kl_and_gradient() if compiled else kl_and_gradient
        totals = torch.zeros(S, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, N, chunk):
            rows = slice(start, start + chunk)
            states = torch.cat([target[None, rows], hidden[:, rows]])                     # W is read once for all
            logits = matmul_fp32(states.flatten(0, 1), weight.T).unflatten(0, states.shape[:2])
            for piece in logits.split(cached_rows(weight) if hidden.device.type == "cpu" else chunk, dim=1):
                totals += pair(piece[0], piece[1:], softcap)
            if gradient is not None:
                gradient[:, rows] = matmul_fp32(logits[1:].to(weight.dtype).flatten(0, 1), weight).view_as(states[1:])
        ctx.save_for_backward(gradient)
        return totals

    @staticmethod
    def backward(ctx, d_totals):
        gradient, = ctx.saved_tensors
        return gradient * d_totals.to(gradient.dtype)[:, None, None], None, None, None, None, None


def kl_and_gradient(teacher, students, softcap):
    """Uncapped fp32 logits, [n, V] of the base and [S, n, V] -> Σ KL [S]. In place of the students' logits it leaves ∂KL/∂logits.

    c tanh(u / c) = 2c σ(2u / c) - c: no softmax sees the last term, and σ is ten times as fast as tanh on a CPU.
    """
    logits, slope = students, 1
    if softcap is not None:
        teacher, students = (torch.sigmoid(u * (2 / softcap)) for u in (teacher, students))
        slope = 4 * students * (1 - students)                           # d(c tanh(u / c))/du = 1 - tanh²
        teacher, students = 2 * softcap * teacher, 2 * softcap * students
    log_p, log_q = teacher.log_softmax(-1), students.log_softmax(-1)
    p = log_p.exp()
    logits.copy_((log_q.exp() - p) * slope)
    return (p * (log_p - log_q)).sum((-2, -1))


@cache
def compiled_kl_and_gradient():
    return torch.compile(kl_and_gradient, dynamic=False)


class TokenLosses(NamedTuple):
    """Losses in nats, [N] fp32 each."""
    ce: torch.Tensor                                    # -log q(label)
    kl: torch.Tensor | None                             # KL(p ‖ q) to the base; None where no target was given


@torch.no_grad()
def token_losses(hidden, labels, weight, softcap=None, target=None, chunk=None):
    """Cross-entropy and KL of every token in one pass over the head.

    hidden, target [..., D] after the final norm (target: the base model's); labels [...] the tokens to be predicted.
    """
    D, shape = hidden.shape[-1], labels.shape
    hidden, labels = hidden.reshape(-1, D), labels.reshape(-1)
    target = target.reshape(-1, D) if target is not None else None
    ce, kl = torch.empty(len(hidden), device=hidden.device), torch.zeros(len(hidden), device=hidden.device)
    chunk = chunk or chunk_rows(weight)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        log_q = capped(matmul_fp32(hidden[rows], weight.T), softcap).log_softmax(-1)
        ce[rows] = -log_q.gather(-1, labels[rows, None])[:, 0]
        if target is not None:
            log_p = capped(matmul_fp32(target[rows], weight.T), softcap).log_softmax(-1)
            kl[rows] = (log_p.exp() * (log_p - log_q)).sum(-1)
    return TokenLosses(ce.view(shape), kl.view(shape) if target is not None else None)


def capped(logits, softcap):
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def chunk_rows(weight):
    """How many tokens' logits to hold at once."""
    return max(32, CHUNK_ELEMENTS["cuda" if weight.is_cuda else "cpu"] // len(weight))


def cached_rows(weight):
    """How many tokens' logits a CPU keeps in its cache."""
    return max(1, CACHED_ELEMENTS // len(weight))


def matmul_fp32(a, b):
    """a [n, k] @ b [k, m] in fp32, also from bf16: CUDA accumulates and returns fp32, a CPU widens a slice of b at a time."""
    if a.dtype == torch.float32:
        return linear(a, b.T)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    a = a.float()
    if b.stride(0) == 1:                                                # a transposed head: slice its columns, the vocabulary
        return torch.cat([a @ part.float() for part in b.split(2 ** 14, dim=1)], dim=1)
    out = torch.zeros(len(a), b.shape[1])
    for rows, part in zip(a.split(2 ** 14, dim=1), b.split(2 ** 14, dim=0)):
        out += rows @ part.float()
    return out


