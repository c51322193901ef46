"""What both block families share: rotary positions, causal attention with its key-value cache, and the gated MLP.

Shapes: B batch, T query positions, S key positions (S >= T; the queries are the last T), H heads, G key-value heads,
C head_dim.
"""
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn
import torch.nn.functional as F

from lorasae.linear import Linear


def rotary_frequencies(head_dim, theta, scaling=None, device=None):
    """Inverse wavelengths θ^(-2i/C), [C/2], always fp32: in bf16 they would rotate late positions to the wrong angle.

    `scaling` (Llama-3, a RopeScaling) divides the frequencies whose wavelength exceeds the old context by `factor`,
    leaves the short ones alone and interpolates between; it applies at every length, short prompts included.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return frequencies
    old, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    turns = old / (2 * math.pi / frequencies)                       # full turns within the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)             # 0: stretched by `factor`, 1: left alone
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rotary_table(positions, frequencies, dtype):
    """cos and sin, [T, C] each, of the angles position * frequency; both halves of C carry the same angles."""
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, rotary):
    """Rotary embedding in halves (Hugging Face's layout): x [B, H, T, C] turned by rotary = (cos, sin)."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def causal_mask(T, S, window, device):
    """[T, S], True where query t (at absolute position S - T + t) may look: at itself, and less than `window` back."""
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def naive_attention(q, k, v, scale, softcap=None, window=None):
    """softmax(mask(cap · tanh(q kᵀ scale / cap))) v, written out; first the soft-cap, then the mask; an fp32 softmax.

    q [B, H, T, C], k and v [B, G, S, C] -> [B, H, T, C].
    """
    k, v = repeat_heads(k, q), repeat_heads(v, q)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap

    mask = causal_mask(q.shape[2], k.shape[2], window, q.device)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


def repeat_heads(x, q):
    """x [B, G, S, C] -> [B, H, S, C]: each key-value head once for every query head that it serves."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def attention(q, k, v, scale, softcap=None, window=None, masks={}):
    """naive_attention by the fastest exact kernel at hand. masks: those of Positions.

    PyTorch's fused kernels know neither soft-cap nor window. FlexAttention does, but only once it is compiled into a
    block: alone it would hold every score, and compile anew for each length. Everything else goes blockwise.
    """
    T, S = q.shape[2], k.shape[2]
    if window is not None and S <= window:
        window = None                                               # the window cannot bind

    if softcap is None and window is None and (T == S or T == 1):
        return fused_attention(q, k, v, scale)

    if window in masks and T == S and torch.compiler.is_compiling():
        return flex_attention(q, k, v, scale, softcap, masks[window])

    rows = 1024 if q.is_cuda else 64
    return blockwise_attention(q, k, v, scale, softcap, window, rows)


def fused_attention(q, k, v, scale):
    """naive_attention by PyTorch's fused kernels: no soft-cap, no window, T = S or T = 1.

    On CUDA those for fp32 know no grouped queries, and PyTorch would silently take the kernel that stores every score.
    """
    if q.is_cuda and q.dtype == torch.float32:
        k, v = repeat_heads(k, q), repeat_heads(v, q)
    causal = q.shape[2] > 1                                         # a single query is the last position: it sees all
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1])


def blockwise_attention(q, k, v, scale, softcap=None, window=None, rows=64):
    """naive_attention for `rows` queries at a time: half the work under a causal mask, in pieces for a CPU's cache.

    Keys that no query of a piece may see, behind its last one or out of its first one's window, are never touched. The
    soft-cap is cap · tanh(u) + cap = 2 cap · σ(2u): no softmax sees the constant, and a CPU takes a sixth of the time for σ.
    """
    T, S = q.shape[2], k.shape[2]
    k, v = repeat_heads(k, q).transpose(-1, -2), repeat_heads(v, q)
    q = q * (scale if softcap is None else 2 * scale / softcap)
    parts = []

    for start in range(0, T, rows):
        stop = min(start + rows, T)
        first_key, last_key = 0, S - T + stop
        if window is not None:
            first_key = max(0, S - T + start + 1 - window)

        scores = (q[:, :, start:stop] @ k[..., first_key:last_key]).float()
        if softcap is not None:
            scores = 2 * softcap * scores.sigmoid()
        hidden = ~causal_mask(stop - start, last_key - first_key, window, q.device)
        scores += torch.zeros(hidden.shape, device=q.device).masked_fill_(hidden, -torch.inf)   # small, and spread by the sum

        weights = scores.softmax(dim=-1).to(q.dtype)
        parts.append(weights @ v[:, :, first_key:last_key])
    return torch.cat(parts, dim=2)


def flex_attention(q, k, v, scale, softcap, mask):
    """naive_attention by FlexAttention, in a compiled block: soft-cap and products in one, masked blocks skipped.

    The kernel for training is asked for by name. Left alone, PyTorch takes the one for decoding below 128 queries,
    which does not exist for two query heads a key-value head (every Gemma-2; pytorch/pytorch#185349).
    """
    from torch.nn.attention import flex_attention as flex               # here, for it takes a while to import

    def cap(score, batch, head, query, key):
        return softcap * torch.tanh(score / softcap)

    return flex.flex_attention(q, k, v, score_mod=None if softcap is None else cap, block_mask=mask, scale=scale,
                               enable_gqa=True, kernel_options={"FORCE_USE_FLEX_ATTENTION": True})


@lru_cache(maxsize=4)
def flex_mask(T, window, device):
    """causal_mask for FlexAttention, which wants to know what blocks of 128 x 128 are empty. It takes some 30 kernels."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch, head, query, key):
        inside = key <= query
        return inside if window is None else inside & (key > query - window)

    return create_block_mask(seen, None, None, T, T, device=device)


class Positions(NamedTuple):
    """What a block has to know of the positions of its input."""
    rotary: tuple                                       # cos and sin, [T, C] each
    masks: dict                                         # {window: FlexAttention's mask}; empty where that is not used


def positions(config, start, x):
    """The Positions start .. start + T - 1 of x [B, T, D]."""
    T = x.shape[1]
    numbers = torch.arange(start, start + T, device=x.device)
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, x.device)
    rotary = rotary_table(numbers, frequencies, x.dtype)

    masks = {}
    if x.is_cuda and config.attn_logit_softcapping is not None:
        masks[None] = flex_mask(T, None, x.device)
        if config.sliding_window < T:
            masks[config.sliding_window] = flex_mask(T, config.sliding_window, x.device)
    return Positions(rotary, masks)


class Attention(nn.Module):
    """Grouped-query attention: softmax(cap(q kᵀ scale)) v with rotary q and k, optionally soft-capped and windowed."""

    def __init__(self, config, layer, scale, softcap=None, window=None):
        super().__init__()
        D, C = config.hidden_size, config.head_dim
        self.q_proj = Linear(D, config.num_attention_heads * C, bias=False)
        self.k_proj = Linear(D, config.num_key_value_heads * C, bias=False)
        self.v_proj = Linear(D, config.num_key_value_heads * C, bias=False)
        self.o_proj = Linear(config.num_attention_heads * C, D, bias=False)
        self.layer, self.head_dim = layer, C
        self.scale, self.softcap, self.window = scale, softcap, window

    def forward(self, x, positions, cache=None):
        q = rearrange(self.q_proj(x), "b t (h c) -> b h t c", c=self.head_dim)
        k = rearrange(self.k_proj(x), "b t (g c) -> b g t c", c=self.head_dim)
        v = rearrange(self.v_proj(x), "b t (g c) -> b g t c", c=self.head_dim)

        q, k = rotate(q, positions.rotary), rotate(k, positions.rotary)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)

        y = attention(q, k, v, self.scale, self.softcap, self.window, positions.masks)
        return self.o_proj(rearrange(y, "b h t c -> b t (h c)"))


class MLP(nn.Module):
    """down(activation(gate x) · up x): the gated MLP, with tanh-GELU in Gemma-2 and SiLU in Llama-3."""

    def __init__(self, config, activation):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = activation

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Cache:
    """The keys and values of the positions seen so far, one pair a block, for generating token by token."""

    def __init__(self):
        self.pairs = {}

    @property
    def length(self):
        """How many positions it holds."""
        if not self.pairs:
            return 0
        keys, _ = next(iter(self.pairs.values()))
        return keys.shape[2]

    def extend(self, layer, k, v):
        """Appends k, v [B, G, T, C] of a block; returns all of its keys and values [B, G, S, C]."""
        if layer in self.pairs:
            earlier_k, earlier_v = self.pairs[layer]
            k = torch.cat([earlier_k, k], dim=2)
            v = torch.cat([earlier_v, v], dim=2)
        self.pairs[layer] = k, v
        return k, v
