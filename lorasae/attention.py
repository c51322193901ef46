"""Layers that all model families share: rotary embeddings, causal attention, and the gated MLP.

naive_attention is the formula; `attention` computes it with the fastest exact kernel, one of the
three below it. The key-value cache for generating text comes last.

Shapes: B batch, T query positions, S key positions (S >= T; the queries are the last T), H heads,
G key-value heads, C head_dim, D d_model.
"""
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn
import torch.nn.functional as F

from lorasae.linear import Linear
from lorasae.objectives import capped


# ---- The layers ----------------------------------------------------------------------------------

class Attention(nn.Module):
    """Grouped-query attention: softmax(cap(q kᵀ scale)) v with rotary q and k.

    head_norm: builds a norm over a head's C channels, for the queries and for the keys (Gemma 3).
    """

    def __init__(self, config, layer, scale, softcap=None, window=None, head_norm=nn.Identity):
        super().__init__()
        D, C = config.hidden_size, config.head_dim
        queries = config.num_attention_heads * C
        keys = config.num_key_value_heads * C
        self.q_proj = Linear(D, queries, bias=False)
        self.k_proj = Linear(D, keys, bias=False)
        self.v_proj = Linear(D, keys, bias=False)
        self.o_proj = Linear(queries, D, bias=False)
        self.q_norm = head_norm()
        self.k_norm = head_norm()
        self.layer = layer
        self.head_dim = C
        self.scale = scale
        self.softcap = softcap
        self.window = window

    def forward(self, x, positions, cache=None):
        q = rearrange(self.q_proj(x), "b t (h c) -> b h t c", c=self.head_dim)
        k = rearrange(self.k_proj(x), "b t (g c) -> b g t c", c=self.head_dim)
        v = rearrange(self.v_proj(x), "b t (g c) -> b g t c", c=self.head_dim)

        rotary = positions.rotary if self.window is None else positions.local_rotary
        q = rotate(self.q_norm(q), rotary)
        k = rotate(self.k_norm(k), rotary)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)

        y = attention(q, k, v, self.scale, self.softcap, self.window, positions.masks)
        return self.o_proj(rearrange(y, "b h t c -> b t (h c)"))


class MLP(nn.Module):
    """down(activation(gate x) · up x): tanh-GELU in Gemma, SiLU in Llama-3."""

    def __init__(self, config, activation):
        super().__init__()
        D, inside = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, inside, bias=False)
        self.up_proj = Linear(D, inside, bias=False)
        self.down_proj = Linear(inside, D, bias=False)
        self.activation = activation

    def forward(self, x):
        gate = self.activation(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


# ---- Rotary positions ----------------------------------------------------------------------------

class Positions(NamedTuple):
    """What a block needs to know about the positions of its input."""
    rotary: tuple                       # cos and sin, [T, C] each
    local_rotary: tuple                 # the same for blocks with a window; differs in Gemma 3
    masks: dict                         # {window: FlexAttention mask}, or empty


def positions(config, start, x):
    """Positions for x [B, T, D], numbered start .. start + T - 1."""
    C, local_theta = config.head_dim, config.local_rope_theta
    rotary = local = cos_and_sin(C, config.rope_theta, config.rope_scaling, start, x)
    if local_theta is not None:
        local = cos_and_sin(C, local_theta, None, start, x)

    masks = {}
    if x.is_cuda and config.sliding_window is not None:
        for window in (None, config.sliding_window):
            masks[window] = flex_mask(x.shape[1], window, x.device)
    return Positions(rotary, local, masks)


def cos_and_sin(C, theta, scaling, start, x):
    """cos and sin of the angles at positions start .. start + T - 1 of x [B, T, D], [T, C] each.

    The frequencies are θ^(-2i/C) radians per position, in fp32: in bf16, late positions would get
    wrong angles. scaling: None, or a RopeScaling or LinearScaling (family.py).
    """
    even = torch.arange(0, C, 2, device=x.device)
    frequencies = 1.0 / theta ** (even.float() / C)
    if scaling is not None:
        frequencies = scaling.scaled(frequencies)

    numbers = torch.arange(start, start + x.shape[1], device=x.device)
    angles = numbers.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)        # both halves of C have the same angles
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x, rotary):
    """Rotary embedding of x [B, H, T, C] in Hugging Face's layout: two halves, not interleaved."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos + turned * sin


# ---- Attention -----------------------------------------------------------------------------------

def naive_attention(q, k, v, scale, softcap=None, window=None):
    """softmax(mask(cap · tanh(q kᵀ scale / cap))) v, with the softmax in fp32.

    q [B, H, T, C], k and v [B, G, S, C] -> [B, H, T, C].
    """
    k = repeat_heads(k, q)
    v = repeat_heads(v, q)
    scores = capped(q @ k.transpose(-1, -2) * scale, softcap)

    mask = causal_mask(q.shape[2], k.shape[2], window, q.device)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def causal_mask(T, S, window, device):
    """[T, S], True where query t, at position S - T + t, sees key s."""
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)
    return sees(query, key, window)


def sees(query, key, window):
    """Whether a query sees a key: never a later one; with a window, only the last `window` keys."""
    seen = key <= query
    if window is None:
        return seen
    return seen & (key > query - window)


def repeat_heads(x, q):
    """x [B, G, S, C] -> [B, H, S, C]: each key-value head once for every query head it serves."""
    served = q.shape[1] // x.shape[1]
    return x.repeat_interleave(served, dim=1)


def attention(q, k, v, scale, softcap=None, window=None, masks={}):
    """naive_attention with the fastest exact kernel. masks: see Positions.

    PyTorch's fused kernels support neither soft-caps nor windows. FlexAttention supports both, but
    only inside a compiled block: elsewhere it would store every score, and recompile for each
    length. Everything else runs blockwise.
    """
    T, S = q.shape[2], k.shape[2]
    if window is not None and S <= window:
        window = None                                           # the window cannot bind

    if softcap is None and window is None and (T == S or T == 1):
        return fused_attention(q, k, v, scale)

    if torch.compiler.is_compiling() and window in masks and T == S:
        return flex_attention(q, k, v, scale, softcap, masks[window])

    rows = 1024 if q.is_cuda else 64
    return blockwise_attention(q, k, v, scale, softcap, window, rows)


def fused_attention(q, k, v, scale):
    """naive_attention with PyTorch's fused kernels: no soft-cap, no window, T = S or T = 1."""
    # CUDA's fp32 kernels lack grouped queries: PyTorch would silently store every score instead.
    if q.is_cuda and q.dtype == torch.float32:
        k = repeat_heads(k, q)
        v = repeat_heads(v, q)

    return F.scaled_dot_product_attention(
        q, k, v, scale=scale, enable_gqa=k.shape[1] != q.shape[1],
        is_causal=q.shape[2] > 1)       # a single query is the last one and sees everything


def blockwise_attention(q, k, v, scale, softcap, window, rows):
    """naive_attention for `rows` queries at a time, in pieces that fit a CPU's cache.

    Each piece skips the keys that none of its queries sees: those after its last query, and those
    before its first query's window. Under a causal mask this saves half the work. Scores stay in
    fp32 from the product on, as in the fused kernels: rounding them to bf16 costs accuracy.
    """
    T, S = q.shape[2], k.shape[2]
    k = repeat_heads(k, q).transpose(-1, -2).float()
    v = repeat_heads(v, q)

    # The soft-cap is cap · tanh(u) = 2 cap · σ(2u) - cap. The constant cancels in the softmax, and
    # on a CPU σ takes a sixth of tanh's time.
    q = q.float() * (scale if softcap is None else 2 * scale / softcap)

    parts = []
    for start in range(0, T, rows):
        # The keys that this piece sees.
        stop = min(start + rows, T)
        first_key = 0 if window is None else max(0, S - T + start + 1 - window)
        last_key = S - T + stop

        scores = q[:, :, start:stop] @ k[..., first_key:last_key]
        if softcap is not None:
            scores = 2 * softcap * scores.sigmoid()

        # A small mask of 0 and -∞, broadcast over batch and heads.
        seen = causal_mask(stop - start, last_key - first_key, window, q.device)
        scores += torch.where(seen, 0.0, -torch.inf)

        weights = scores.softmax(dim=-1).to(v.dtype)
        parts.append(weights @ v[:, :, first_key:last_key])
    return torch.cat(parts, dim=2)


# ---- FlexAttention: soft-caps and windows in compiled blocks on CUDA -----------------------------
# Imported inside the functions, because importing it is slow.

def flex_attention(q, k, v, scale, softcap, mask):
    """naive_attention with FlexAttention: products and soft-cap in one kernel; skips masked blocks.

    kernel_options asks for the training kernel: below 128 queries, PyTorch picks the decoding one,
    which fails with two query heads per key-value head (every Gemma-2; pytorch/pytorch#185349).
    """
    from torch.nn.attention import flex_attention as flex

    def cap(score, batch, head, query, key):
        return capped(score, softcap)

    return flex.flex_attention(
        q, k, v, score_mod=cap, block_mask=mask, scale=scale, enable_gqa=True,
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True})


@lru_cache(maxsize=4)
def flex_mask(T, window, device):
    """causal_mask, and its empty 128 x 128 blocks; cached: building it takes some 30 kernels."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda batch, head, query, key: sees(query, key, window),
                             None, None, T, T, device=device)


# ---- Generating text -----------------------------------------------------------------------------

class Cache:
    """The keys and values of all positions so far, one pair per block."""

    def __init__(self):
        self.pairs = {}

    def length(self, layer=0):
        """The number of positions that this block has seen."""
        return self.pairs[layer][0].shape[2] if layer in self.pairs else 0

    def extend(self, layer, k, v):
        """Appends a block's k and v [B, G, T, C], and returns all of its k and v [B, G, S, C]."""
        if layer in self.pairs:
            k, v = [torch.cat(both, dim=2) for both in zip(self.pairs[layer], (k, v))]
        self.pairs[layer] = k, v
        return k, v
