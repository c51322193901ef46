"""The TopK SAE (paper §3.1, Eq. 4; Gao et al. 2024) without its dense half: only K of the M latents are touched.

    encode      the k largest of ReLU(x W_encᵀ + b_enc), a chunk of latents at a time: no [N, M] where M is large
    decode      Σ_k value · row of W_dec
    sae_step    both, with one backward: the active (token, latent) pairs are sorted by latent once, which serves every
                weight gradient, and nothing of size N x K x D is made
    aux_decode  AuxK: what the dead latents would add
    naive_*     the same in plain dense autograd, to which tests/test_topk.py ties every value and every gradient

Speed and memory beside torch.topk, dense autograd and a sparsify-style step: python -m lorasae.bench topk

Shapes: N tokens, D d_model, M latents, K active latents. W_enc and W_dec are [M, D], a latent is a row. x has the dtype
of the weights; pre-activations are fp32 even where those are bf16, as rounding them makes ties at the K-th place.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lorasae.errors import InputError
from lorasae.linear import linear

CHUNK = 16384       # latents encoded at once: a GEMM at full speed, and an eighth of the memory at M = 131,072
LANES = 32          # neighbours in memory go to different groups, so that maxima are taken lane by lane
ROWS = 256          # a CPU takes the top k of so many tokens at a time: what it looks at twice stays in its cache


def topk(x, k):
    """x [..., M] -> values [..., k], indices [..., k]: torch.topk(x, k, sorted=False) up to order and ties.

    Looks only into the k groups with the largest maxima (found the same way): they hold k entries, those maxima, that
    no entry of another group exceeds. As in torch.topk, NaN is larger than any number.
    """
    _check(k, x.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    parts = [rows]
    if x.device.type == "cpu":
        parts = rows.split(ROWS)

    found = [_topk(part, k) for part in parts]
    values = torch.cat([values for values, _ in found])
    indices = torch.cat([indices for _, indices in found])
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


def _topk(x, k):
    """The same for x [N, M], whose columns lie in blocks, lanes and groups like this, with LANES = 4 and size = 3:

                        lane 0   1   2   3
        block 0      column  0   1   2   3      Group 0 is lane 0 of block 0: columns 0, 4, 8. Group 6 is lane 2 of
                             4   5   6   7      block 1: columns 14, 18, 22. So group g is lane g % LANES of block
                             8   9  10  11      g // LANES; it begins at column
        block 1             12  13  14  15
                            16  17  18  19          g // LANES · size · LANES + g % LANES
                            20  21  22  23
        rest                24  25              and goes on in steps of LANES.
    """
    M = x.shape[-1]
    size = 16 if M >= 512 * k else 8
    block = size * LANES
    if M < max(32 * k, 2 * block):                                      # too few groups to leave many out
        return torch.topk(x, k, sorted=False)

    # The k groups with the largest maxima.
    rest = M % block                                                    # columns in no group: always looked at
    blocks = x[:, :M - rest].unflatten(1, (-1, size, LANES))
    maxima, groups = _topk(blocks.amax(2).flatten(1), k)

    # Their columns, k · size of them, and the rest.
    lane = groups % LANES
    first = (groups - lane) * size + lane                               # groups - lane is g // LANES · LANES
    steps = torch.arange(0, block, LANES, device=x.device)
    columns = (first[:, None] + steps[:, None]).flatten(1)
    if rest:
        last = torch.arange(M - rest, M, device=x.device)
        columns = torch.cat([columns, last.expand(len(x), rest)], 1)

    # Entries below the k-th maximum cannot win. Made equal, they halve the time of the CPU's selection: its branches
    # become predictable. (A NaN maximum says nothing about the other maxima: it counts as infinite.)
    values = x.gather(1, columns)
    with torch.no_grad():                                               # changes no winner
        floor = maxima.nan_to_num(torch.inf, torch.inf, -torch.inf).amin(1, keepdim=True)
        below = floor.nextafter(floor.new_full((), -torch.inf))
        torch.maximum(values, below, out=values)

    values, winners = torch.topk(values, k, sorted=False)
    return values, columns.gather(1, winners)


def encode(x, W_enc, b_enc, k, chunk=CHUNK):
    """x [N, D], b_dec already subtracted -> values [N, k] after ReLU, indices [N, k], in no particular order.

    Values are fp32, or fp64 where x is. The backward costs k, not M, and only what is asked for: with frozen weights
    one bag of W_enc's rows a token.
    """
    return _Encode.apply(x, W_enc, b_enc, k, chunk)


def decode(values, indices, W_dec):
    """values [N, k], indices [N, k] -> Σ_k values · W_dec[indices]  [N, D] in W_dec's dtype. b_dec is not added."""
    return _Decode.apply(values, indices, W_dec)


def sae_step(x, W_enc, b_enc, W_dec, b_dec, k, chunk=CHUNK):
    """x [N, D] -> reconstruction [N, D], values [N, k], indices [N, k]: the TopK SAE (Eq. 4, 5), for training.

    Equal to decode(*encode(x - b_dec, W_enc, b_enc, k), W_dec) + b_dec, with one sort for two.
    """
    return _Step.apply(x, W_enc, b_enc, W_dec, b_dec, k, chunk)


def aux_decode(x, W_enc, b_enc, W_dec, dead, k):
    """x [N, D], b_dec already subtracted; dead [M] bool -> [N, D]: what the k strongest dead latents make of x.

    AuxK (Gao et al. 2024) fits it, without b_dec, to the detached residual, so that dead latents learn. Zeros where no
    latent is dead; all dead latents where they are fewer than k.
    """
    rows = dead.nonzero().squeeze(1)
    if not len(rows):
        return torch.zeros_like(x)
    values, indices = encode(x, W_enc.index_select(0, rows), b_enc.index_select(0, rows), min(k, len(rows)))
    return decode(values, rows[indices], W_dec)


def naive_encode(x, W_enc, b_enc, k):
    values, indices = torch.topk(F.linear(x, W_enc, b_enc), k)
    return values.relu(), indices


def naive_decode(values, indices, W_dec):
    return values.new_zeros(len(values), len(W_dec)).scatter(1, indices, values) @ W_dec


def naive_step(x, W_enc, b_enc, W_dec, b_dec, k):
    values, indices = naive_encode(x - b_dec, W_enc, b_enc, k)
    return naive_decode(values, indices, W_dec) + b_dec, values, indices


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, k, chunk):
        values, indices = _select(x, W_enc, b_enc, k, chunk)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        x, W_enc, values, indices = ctx.saved_tensors
        need_x, need_W, need_b = ctx.needs_input_grad[:3]
        grad = grad.masked_fill(values <= 0, 0)                         # ReLU's backward: NaN passes, as in torch's own
        grad_x = grad_W = grad_b = None

        if need_x:
            grad_x = _combine(indices, grad, W_enc)
        if need_W or need_b:
            pairs = _ByLatent(indices, len(W_enc))
        if need_W:
            grad_W = pairs.sum(grad, x)
        if need_b:
            grad_b = pairs.sum(grad).to(W_enc.dtype)
        return grad_x, grad_W, grad_b, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, W_dec):
        ctx.save_for_backward(values, indices, W_dec)
        return _combine(indices, values, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, indices, W_dec = ctx.saved_tensors
        need_values, _, need_W = ctx.needs_input_grad
        pairs = _ByLatent(indices, len(W_dec))
        grad_values = grad_W = None

        if need_values:
            grad_values = pairs.dot(grad, W_dec).to(values.dtype)
        if need_W:
            grad_W = pairs.sum(values, grad)
        return grad_values, None, grad_W


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, k, chunk):
        x = x - b_dec
        values, indices = _select(x, W_enc, b_enc, k, chunk)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W_enc, W_dec, values, indices)
        ctx.mark_non_differentiable(indices)
        return _combine(indices, values, W_dec).add_(b_dec), values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_values, _):
        x, W_enc, W_dec, values, indices = ctx.saved_tensors
        need_x, need_W_enc, need_b_enc, need_W_dec, need_b_dec = ctx.needs_input_grad[:5]
        grad_x = grad_W_enc = grad_b_enc = grad_W_dec = grad_b_dec = None

        # What reaches the pre-activations, and its sum over the tokens.
        pairs = _ByLatent(indices, len(W_enc))
        grad_pre = (grad_values + pairs.dot(grad, W_dec)).masked_fill(values <= 0, 0)
        grad_pre_sum = pairs.sum(grad_pre).to(W_enc.dtype)

        if need_x:
            grad_x = _combine(indices, grad_pre, W_enc)
        if need_W_enc:
            grad_W_enc = pairs.sum(grad_pre, x)
        if need_b_enc:
            grad_b_enc = grad_pre_sum
        if need_W_dec:
            grad_W_dec = pairs.sum(values, grad)
        if need_b_dec:
            # Through the encoder it is -Σ_t grad_x[t] = -(Σ_t grad_pre[t]) W_enc: sum first, multiply once.
            grad_b_dec = grad.sum(0) - grad_pre_sum @ W_enc
        return grad_x, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, None, None


class _ByLatent:
    """The active (token, latent) pairs sorted by latent: a sum over tokens is then one bag of rows, without atomics."""

    def __init__(self, indices, M):
        self.shape = indices.shape
        self.latents, self.order = indices.flatten().sort(stable=True)
        self.tokens = self.order // self.shape[1]
        self.offsets = torch.searchsorted(self.latents, torch.arange(M, device=indices.device))

    def sum(self, weights, rows=None):
        """weights [N, k], rows [N, D] -> each latent's Σ_t weights[t] rows[t]  [M, D]; no rows: Σ_t weights[t]  [M]."""
        if rows is None:
            return self.sum(weights, weights.new_ones(len(weights), 1)).squeeze(1)
        weights = weights.flatten()[self.order].to(rows.dtype)
        return F.embedding_bag(self.tokens, rows.contiguous(), self.offsets, per_sample_weights=weights, mode="sum")

    def dot(self, x, rows):
        """x [N, D], rows [M, D] -> x · rows[indices]  [N, k]: embedding_bag's own backward for its weights.

        A bag is a latent, not a token, so that what is read at random is x, which fits a cache, and not the rows.
        CUDA's kernel has no bf16 in PyTorch 2.11 (pytorch/pytorch#185808): there the product is taken in fp32.
        """
        dtype = x.dtype
        if x.is_cuda and dtype == torch.bfloat16:
            x, rows = x.float(), rows.float()

        mode = 0                                                        # "sum"
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            rows.contiguous(), x.contiguous(), self.tokens, self.offsets, self.latents, mode)
        in_order = torch.empty_like(dots).scatter_(0, self.order, dots)
        return in_order.view(self.shape).to(dtype)


def _combine(indices, weights, rows):
    """[N, k], [N, k], [M, D] -> Σ_k weights · rows[indices]  [N, D]."""
    return F.embedding_bag(indices, rows.contiguous(), per_sample_weights=weights.to(rows.dtype), mode="sum")


def _select(x, W_enc, b_enc, k, chunk):
    """The k largest pre-activations of each token after ReLU and their latents [N, k], a chunk of latents at a time."""
    _check(k, len(W_enc))
    values = indices = None
    for start in range(0, len(W_enc), chunk):
        W, b = W_enc[start:start + chunk], b_enc[start:start + chunk]
        new, found = topk(_preactivations(x, W, b), min(k, len(W)))
        found += start
        if start:                                                       # the best of this chunk, and of those before it
            both, latents = torch.cat([values, new], 1), torch.cat([indices, found], 1)
            new, winners = torch.topk(both, min(k, both.shape[1]), sorted=False)
            found = latents.gather(1, winners)
        values, indices = new, found
    return values.relu_(), indices


def _preactivations(x, W, b):
    """x Wᵀ + b  [N, M], accumulated and kept in fp32 where x and W are bf16."""
    if x.dtype in (torch.bfloat16, torch.float16):
        if x.is_cuda:
            return torch.mm(x, W.T, out_dtype=torch.float32).add_(b)
        x, W, b = x.float(), W.float(), b.float()                       # only CUDA knows out_dtype
    return linear(x, W, b)


def _check(k, M):
    if not 1 <= k <= M:
        raise InputError(f"k is {k}, but {M} latents need 1 <= k <= {M}")
