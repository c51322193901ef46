"""The TopK SAE (paper §3.1, Eq. 4; Gao et al. 2024). After x W_encᵀ, only K of M latents matter.

    encode      the k largest of ReLU(x W_encᵀ + b_enc), 16,384 latents at a time
    decode      Σ_k value · row of W_dec
    sae_step    both; weight gradients sum over active (token, latent) pairs: no N x K x D tensor
    aux_decode  AuxK: what the dead latents would add
    naive_*     the same in dense autograd: tests/test_topk.py compares every value and gradient

On a first reading, treat `topk` as torch.topk and sae_step as naive_step. To compare speed and
memory with torch.topk, dense autograd and a sparsify-style step: python -m lorasae.bench topk

Shapes: N tokens, D d_model, M latents, K active latents. W_enc and W_dec are [M, D], one row per
latent. x has the dtype of the weights; pre-activations are fp32 even for bf16 weights, because
rounding them creates ties at the K-th place.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lorasae.errors import InputError
from lorasae.linear import linear_fp32

CHUNK = 16384       # latents encoded at a time: full speed, an eighth of the memory at M = 131k
LANES = 32          # groups per block, interleaved, so that one vector instruction compares many
ROWS = 256          # tokens whose top k a CPU finds at a time, so that they stay in its cache


# ---- As written ----------------------------------------------------------------------------------

def naive_encode(x, W_enc, b_enc, k):
    values, indices = torch.topk(F.linear(x, W_enc, b_enc), k)
    return values.relu(), indices


def naive_decode(values, indices, W_dec):
    latents = values.new_zeros(len(values), len(W_dec))
    return latents.scatter(1, indices, values) @ W_dec


def naive_step(x, W_enc, b_enc, W_dec, b_dec, k):
    values, indices = naive_encode(x - b_dec, W_enc, b_enc, k)
    return naive_decode(values, indices, W_dec) + b_dec, values, indices


# ---- The fast version ----------------------------------------------------------------------------

def encode(x, W_enc, b_enc, k):
    """x [N, D], b_dec already subtracted -> values [N, k] after ReLU, indices [N, k], unordered.

    Values are fp32, or fp64 if x is. The backward pass touches k latents per token, not M.
    """
    return Encode.apply(x, W_enc, b_enc, None, k)


def decode(values, indices, W_dec):
    """values, indices [N, k] -> Σ_k values · W_dec[indices]  [N, D]. b_dec is not added."""
    return Decode.apply(values, indices, W_dec)


def sae_step(x, W_enc, b_enc, W_dec, b_dec, k):
    """x [N, D] -> reconstruction [N, D], values [N, k], indices [N, k], for training (Eq. 4, 5).

    Equals decode(*encode(x - b_dec, ...), W_dec) + b_dec, but b_dec's gradient does not need x's.
    """
    values, indices = Encode.apply(x, W_enc, b_enc, b_dec, k)
    x_hat = decode(values, indices, W_dec) + b_dec
    return x_hat, values, indices


def aux_decode(x, W_enc, b_enc, W_dec, dead, k):
    """x [N, D], b_dec already subtracted -> what the k strongest dead latents reconstruct [N, D].

    dead [M] bool. AuxK (Gao et al. 2024) fits this, without b_dec, to the detached residual, so
    that dead latents train. Zeros if no latent is dead; all dead latents if there are fewer than k.
    """
    rows = dead.nonzero().squeeze(1)
    if not len(rows):
        return torch.zeros_like(x)

    W_dead = W_enc.index_select(0, rows)
    b_dead = b_enc.index_select(0, rows)
    values, indices = encode(x, W_dead, b_dead, min(k, len(rows)))
    return decode(values, rows[indices], W_dec)


# ---- Selecting the k largest ---------------------------------------------------------------------

def topk(x, k):
    """x [N, M] -> values, indices [N, k]: torch.topk(x, k) up to order and ties; NaN is largest."""
    parts = [x]
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        parts = x.split(ROWS)

    found = [topk_by_groups(part, k) for part in parts]
    return [torch.cat(each) for each in zip(*found)]


def topk_by_groups(x, k):
    """topk for x [N, M] that searches only the k groups with the largest maxima.

    Those k maxima are k entries that no entry of another group exceeds; the function finds them by
    calling itself. Columns form blocks, lanes and groups like this, with LANES = 4 and size = 3:

                            lane 0   1   2   3
            block 0      column  0   1   2   3      Group 0 is lane 0 of block 0: columns 0, 4, 8.
                                 4   5   6   7      Group 6 is lane 2 of block 1: columns 14, 18,
                                 8   9  10  11      22. Group g is lane g % LANES of block
            block 1             12  13  14  15      g // LANES.
                                16  17  18  19
                                20  21  22  23
            rest                24  25              These are in no group.
    """
    M = x.shape[-1]
    size = 16 if M >= 512 * k else 8
    block_size = size * LANES
    if M < max(32 * k, 2 * block_size):                 # too few groups to leave many out
        return torch.topk(x, k, sorted=False)

    # The k groups with the largest maxima.
    rest = M % block_size
    blocks = x[:, :M - rest].unflatten(1, (-1, size, LANES))
    maxima, groups = topk_by_groups(blocks.amax(2).flatten(1), k)

    # Their columns [N, size · k], and the rest, which is always searched.
    block = groups // LANES
    lane = groups % LANES
    first = block * block_size + lane                   # column of each group [N, k]
    steps = torch.arange(0, block_size, LANES, device=x.device)
    columns = (first[:, None] + steps[:, None]).flatten(1)
    if rest:
        last = torch.arange(M - rest, M, device=x.device)
        columns = torch.cat([columns, last.expand(len(x), rest)], 1)

    # Entries below the k-th maximum cannot win. Making them equal halves the CPU's selection time:
    # branches become predictable. (A NaN maximum says nothing about the others: it counts as ∞.)
    values = x.gather(1, columns)
    known = maxima.nan_to_num(torch.inf, torch.inf, -torch.inf)
    floor = known.amin(1, keepdim=True)
    below = floor.nextafter(floor.new_full((), -torch.inf))
    torch.maximum(values, below, out=values)

    values, winners = torch.topk(values, k, sorted=False)
    return values, columns.gather(1, winners)


def select(x, W_enc, b_enc, k):
    """Each token's k largest pre-activations, after ReLU, and their latents: [N, k] each."""
    M = len(W_enc)
    if not 1 <= k <= M:
        raise InputError(f"k is {k}, but {M} latents need 1 <= k <= {M}")

    # The best of each chunk of latents, then the best of those.
    found = []
    for start in range(0, M, CHUNK):
        some = slice(start, start + CHUNK)
        pre = linear_fp32(x, W_enc[some], b_enc[some])
        values, indices = topk(pre, min(k, pre.shape[1]))
        found.append((values, indices + start))
    values, indices = [torch.cat(each, 1) for each in zip(*found)]
    values, winners = torch.topk(values, k, sorted=False)
    return values.relu_(), indices.gather(1, winners)


# ---- Sums over the active (token, latent) pairs --------------------------------------------------

def combine(indices, weights, rows):
    """indices, weights [N, k], rows [M, D] -> Σ_k weights · rows[indices]  [N, D]."""
    weights = weights.to(rows.dtype)
    return F.embedding_bag(indices, rows.contiguous(), per_sample_weights=weights, mode="sum")


class ByLatent:
    """Pairs sorted by latent: a latent's sum over tokens is an embedding bag, without atomics."""

    def __init__(self, indices, M):
        self.shape = indices.shape
        self.latents, self.order = indices.flatten().sort(stable=True)
        self.tokens = self.order // self.shape[1]

        # Where each latent's pairs begin.
        numbers = torch.arange(M, device=indices.device)
        self.offsets = torch.searchsorted(self.latents, numbers)

    def sum(self, weights, rows):
        """weights [N, k], rows [N, D] -> each latent's Σ_t weights[t] rows[t]  [M, D]."""
        weights = weights.flatten()[self.order].to(rows.dtype)
        return F.embedding_bag(
            self.tokens, rows.contiguous(), self.offsets, per_sample_weights=weights, mode="sum")

    def dot(self, x, rows):
        """x [N, D], rows [M, D] -> x · rows[indices]  [N, k].

        This is embedding_bag's backward pass for its weights, which has no public name. A bag is a
        latent, not a token, so the random reads are from x, which fits a cache, not from the rows.
        CUDA's kernel has no bf16 in PyTorch 2.11 (pytorch/pytorch#185808), so fp32 is used there.
        """
        dtype = x.dtype
        if x.is_cuda and dtype == torch.bfloat16:
            x, rows = x.float(), rows.float()

        mode = 0                                        # "sum"
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            rows.contiguous(), x.contiguous(), self.tokens, self.offsets, self.latents, mode)

        # Back from latent order to [N, k].
        in_order = torch.empty_like(dots).scatter_(0, self.order, dots)
        return in_order.view(self.shape).to(dtype)


# ---- Forward and backward ------------------------------------------------------------------------

class Encode(torch.autograd.Function):
    """The k largest of ReLU((x - b_dec) W_encᵀ + b_enc); b_dec may be None.

    If W_enc and the biases are frozen, no x is kept and no pairs are sorted.
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, b_dec, k):
        if b_dec is not None:
            x = x - b_dec
        values, indices = select(x, W_enc, b_enc, k)

        keep_x = any(ctx.needs_input_grad[1:4])
        ctx.save_for_backward(x if keep_x else None, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        x, W_enc, values, indices = ctx.saved_tensors
        grad_x = grad_W = grad_b = grad_b_dec = None

        grad = grad.masked_fill(values <= 0, 0)         # ReLU: NaN passes, as in torch's own
        if ctx.needs_input_grad[0]:
            grad_x = combine(indices, grad, W_enc)
        if x is not None:
            pairs = ByLatent(indices, len(W_enc))
            grad_W = pairs.sum(grad, x)
            ones = grad.new_ones(len(grad), 1)
            grad_b = pairs.sum(grad, ones)[:, 0].to(W_enc.dtype)

        # -Σ_t grad_x[t] = -(Σ_t grad[t]) W_enc, where the sum over tokens is grad_b.
        if ctx.needs_input_grad[3]:
            grad_b_dec = -(grad_b @ W_enc)
        return grad_x, grad_W, grad_b, grad_b_dec, None


class Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, W_dec):
        ctx.save_for_backward(values, indices, W_dec)
        return combine(indices, values, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, indices, W_dec = ctx.saved_tensors
        pairs = ByLatent(indices, len(W_dec))
        grad_values = pairs.dot(grad, W_dec).to(values.dtype)
        grad_W = pairs.sum(values, grad) if ctx.needs_input_grad[2] else None
        return grad_values, None, grad_W
