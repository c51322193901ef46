"""The objectives, straight from hidden states: KL(base ‖ adapted) for training (Eq. 7), CE and KL for evaluation.

The vocabulary is the largest dimension of the whole computation: for one Gemma-2 sequence the naive formula holds seven
[1024, 256000] fp32 tensors. Here the logits of a few hundred tokens at a time are made, turned into losses and
gradients, and dropped. Exercised by `python -m lorasae.bench kl`.

Of everything p belongs to the base model and q to the adapted one: u_p, u_q are their logits as the head gives them,
z_p, z_q the same under the soft-cap, z = cap(u).

Shapes: N tokens (B*T), n tokens of a chunk, D d_model, V vocabulary, S students (adapted models side by side). Hidden
states come after the final norm; `weight` is the head [V, D].
"""
from functools import cache
from typing import NamedTuple

import torch

from lorasae.linear import linear

CHUNK_ELEMENTS = {"cpu": 2 ** 22, "cuda": 2 ** 27}  # logits of a model held at once: 16 MB on a CPU, 0.5 GB on a GPU
CACHED_ELEMENTS = 2 ** 18                           # of these, worked on at once by a CPU: 1 MB stays in its cache


def naive_kl(target, hidden, weight, softcap=None):
    """Σ_tokens KL(p ‖ q), p = softmax(cap(target Wᵀ)), q = softmax(cap(hidden Wᵀ)): Eq. 7 with all its logits."""
    z_p = capped(target.float() @ weight.float().T, softcap)
    z_q = capped(hidden.float() @ weight.float().T, softcap)
    log_p = z_p.log_softmax(-1)
    log_q = z_q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def linear_kl(target, hidden, weight, softcap=None, chunk=None, compiled=False):
    """naive_kl without its [N, V] tensors: same value, same gradient to `hidden`, peak memory a few chunks of logits.

    target [..., D] of the base model and weight [V, D] are frozen and get no gradient. hidden [..., D] of the adapted
    model, or [S, ..., D] of S of them, which share the base's logits. Returns the *sum* over tokens, in nats, fp32: a
    scalar, or [S]. chunk: tokens at a time (None: by device). compiled: the elementwise part becomes one or two
    kernels.

    Loss and gradient of each of several students are, to the bit, those of a call with that student alone.

    The direction is the base first: the student pays where the base puts mass. Logits and softmax are fp32 even for
    bf16 weights, because at the paper's end range (KL 0.01 to 0.2) bf16 logits put errors of 10 % and more into the
    gradient.
    """
    target = target.detach().reshape(-1, target.shape[-1])
    students = hidden.reshape(-1, *target.shape)
    losses = LinearKL.apply(students, target, weight.detach(), softcap, chunk or chunk_rows(weight), compiled)
    return losses if len(students) > 1 else losses[0]


class LinearKL(torch.autograd.Function):
    """With u = hidden Wᵀ, z = c tanh(u / c):  ∂KL/∂u = (q - p) (1 - (z / c)²),  ∂KL/∂hidden = (∂KL/∂u) W.

    The gradient is made in the forward pass, while the logits of the chunk exist; [S, N, D] is all that is kept. Each
    student has products of its own, of the same shape however many there are, and so the same bits.
    """

    @staticmethod
    def forward(ctx, hidden, target, weight, softcap, chunk, compiled):
        S, N, _ = hidden.shape
        totals = torch.zeros(S, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None

        for start in range(0, N, chunk):
            rows = slice(start, start + chunk)
            u_p = to_logits(target[rows], weight)
            base = None if compiled else base_pieces(u_p, softcap, keep_p=S > 1)        # once for all students

            for s in range(S):
                u_q = to_logits(hidden[s, rows], weight)
                if compiled:
                    totals[s] += compiled_kl()(u_p, u_q, softcap)
                else:
                    add_kl(totals[s], base, u_q, softcap)

                d_logits = u_q.to(weight.dtype)                         # where the logits were is their gradient
                if gradient is not None:
                    gradient[s, rows] = to_hidden(d_logits, weight)
                del u_q, d_logits                                       # before the next ones are made
            del u_p, base

        ctx.save_for_backward(gradient)
        return totals

    @staticmethod
    def backward(ctx, d_totals):
        gradient, = ctx.saved_tensors
        return gradient * d_totals.to(gradient.dtype)[:, None, None], None, None, None, None, None


class Piece(NamedTuple):
    """The base model's distribution over the next token for some of a chunk's rows; tensors [rows, V] fp32."""
    rows: slice
    log_p: torch.Tensor
    p: torch.Tensor | None                              # None: each student makes its own from log_p


def base_pieces(u_p, softcap, keep_p):
    """Uncapped fp32 logits of the base [n, V] -> its Pieces, in whose log_p the logits are OVERWRITTEN."""
    found = []
    for rows in pieces(u_p):
        log_p = u_p[rows]
        log_p.copy_(log_probabilities(log_p, softcap))
        found.append(Piece(rows, log_p, log_p.exp() if keep_p else None))
    return found


def add_kl(total, base, u_q, softcap):
    """Adds the student's KL to the scalar `total`, Piece by Piece. Its logits u_q [n, V] become their gradient."""
    for rows, log_p, p in base:
        total += kl_and_gradient(log_p, p, u_q[rows], softcap)


def log_probabilities(u_p, softcap):
    """Uncapped fp32 logits of the base [n, V] -> log p [n, V]."""
    if softcap is None:
        return u_p.log_softmax(-1)
    sigmoid = torch.sigmoid(u_p * (2 / softcap))
    return shifted_cap(sigmoid, softcap).log_softmax(-1)


def kl_and_gradient(log_p, p, u_q, softcap):
    """log p and p (or None) of the base and uncapped logits of the student, [n, V] fp32 each -> Σ KL(p ‖ q), a scalar.

    OVERWRITES u_q: it returns holding ∂KL/∂u_q = (q - p) ∂z_q/∂u_q. Every step that can be done in place is: what is
    written again is in the cache.
    """
    if p is None:
        p = log_p.exp()

    if softcap is None:
        log_q = u_q.log_softmax(-1)
    else:
        sigmoid = u_q.mul_(2 / softcap).sigmoid_()
        slope = (4 * sigmoid).mul_(1 - sigmoid)                         # ∂z_q/∂u_q = 1 - tanh²
        log_q = shifted_cap(sigmoid, softcap).log_softmax(-1)

    d_logits = torch.exp(log_q, out=u_q).sub_(p)
    if softcap is not None:
        d_logits.mul_(slope)

    losses = torch.sub(log_p, log_q, out=log_q).mul_(p)
    return losses.sum()


def shifted_cap(sigmoid, softcap):
    """2c σ(2u / c), in place of σ(2u / c). It is c tanh(u / c) + c, and no softmax sees the constant.

    On a CPU σ takes a sixth of the time of tanh.
    """
    return sigmoid.mul_(2 * softcap)


@cache
def compiled_kl():
    """(u_p, u_q, softcap) -> kl_and_gradient of them, in one or two kernels. It overwrites u_q and leaves u_p alone.

    fullgraph, lest a shape too many make PyTorch fall back to the slow path in silence.
    """
    def kl(u_p, u_q, softcap):
        log_p = log_probabilities(u_p, softcap)
        return kl_and_gradient(log_p, None, u_q, softcap)

    return torch.compile(kl, dynamic=False, fullgraph=True)


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
    if target is not None:
        target = target.reshape(-1, D)
    ce = torch.empty(len(hidden), device=hidden.device)
    kl = torch.zeros(len(hidden), device=hidden.device)

    chunk = chunk or chunk_rows(weight)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        u_q = to_logits(hidden[rows], weight)
        u_p = to_logits(target[rows], weight) if target is not None else None

        for piece in pieces(u_q):
            log_q = capped(u_q[piece], softcap).log_softmax(-1)
            label = labels[rows][piece]
            ce[rows][piece] = -log_q.gather(-1, label[:, None])[:, 0]
            if target is not None:
                log_p = capped(u_p[piece], softcap).log_softmax(-1)
                kl[rows][piece] = (log_p.exp() * (log_p - log_q)).sum(-1)
    return TokenLosses(ce.view(shape), kl.view(shape) if target is not None else None)


def capped(logits, softcap):
    """cap(u) = c tanh(u / c)"""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


# ---- How much at once ------------------------------------------------------------------------------------------------

def chunk_rows(weight):
    """How many tokens' logits to hold at once. On CUDA a multiple of 128, which fills the tiles of a product."""
    V = len(weight)
    if weight.is_cuda:
        rows = CHUNK_ELEMENTS["cuda"] // V
        return max(128, rows - rows % 128)
    return max(64, CHUNK_ELEMENTS["cpu"] // V)


def pieces(logits):
    """logits [n, V] -> slices of its rows: on CUDA all, on a CPU as many at a time as its cache holds."""
    n, V = logits.shape
    rows = n if logits.is_cuda else max(1, CACHED_ELEMENTS // V)
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


# ---- The two products with the head W [V, D], in fp32 also where hidden states and W are bf16 ------------------------
# CUDA multiplies bf16 and returns its fp32 sums; a CPU widens a slice of W at a time.

def to_logits(hidden, weight):
    """hidden [n, D], weight [V, D] -> hidden Wᵀ [n, V] fp32."""
    if hidden.dtype == torch.float32:
        return linear(hidden, weight)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    hidden = hidden.float()
    parts = [hidden @ part.float().T for part in weight.split(2 ** 14)]
    return torch.cat(parts, dim=1)


def to_hidden(d_logits, weight):
    """d_logits [n, V], weight [V, D] -> d_logits W [n, D] fp32: the gradient on its way back."""
    if d_logits.dtype == torch.float32:
        return linear(d_logits, weight.T)
    if d_logits.is_cuda:
        return torch.mm(d_logits, weight, out_dtype=torch.float32)

    d_hidden = torch.zeros(len(d_logits), weight.shape[1])
    for columns, part in zip(d_logits.split(2 ** 14, dim=1), weight.split(2 ** 14)):
        d_hidden += columns.float() @ part.float()
    return d_hidden
