"""Gemma-2: its configuration and its block. Module names are Hugging Face's, so weights just load.

What sets it apart from Llama-3: four norms per block that scale by (1 + w), tanh-GELU, embeddings
scaled by √D, an explicit attention scale (query_pre_attn_scalar, not head_dim), soft-caps on
attention scores and on logits, and a sliding window in every even block. Mind
`post_attention_layernorm`: here it normalises the attention's *output*; in Llama-3 the MLP's input.
"""
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
import torch.nn.functional as F

from lorasae import family
from lorasae.attention import MLP, Attention
from lorasae.errors import InputError
from lorasae.sae import splice

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Config(family.Config):
    """The defaults are those of transformers' Gemma2Config."""
    model_type = "gemma2"

    num_key_value_heads: int = 4
    head_dim: int = 256                                 # not hidden_size / heads (288 in 2B)
    query_pre_attn_scalar: float = 256.0
    sliding_window: int = 4096
    layer_types: tuple                                  # SLIDING or FULL, one per block
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    bos_token_id: int = 2
    eos_token_id: int = 1
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 8192

    def embed_scale(self, dtype):
        """√D in the model's dtype, as in training (in bf16, 27B's 67.882 becomes 68)."""
        return torch.tensor(self.hidden_size ** 0.5, dtype=dtype)


def parse(fields):
    """The Fields of config.json, which may change -> Config."""
    theta, scaling = family.rotary(fields)
    values = common(fields, Config, pattern=2)
    return Config(**values, rope_theta=theta, rope_scaling=scaling)


def common(fields, config, pattern):
    """family.common, and each block's kind: as listed, or else FULL for every pattern-th block."""
    # transformers reads hidden_activation; files have both keys, which must agree.
    gelu = "gelu_pytorch_tanh"
    fields.only(hidden_activation=gelu, hidden_act=gelu, attention_bias=False)
    if fields.take("use_bidirectional_attention", bool, None):
        raise InputError(
            f"{fields.where}: use_bidirectional_attention true is not supported: attention must be "
            "causal")

    values = family.common(fields, config)
    depth = values["num_hidden_layers"]
    kinds = [SLIDING if layer % pattern else FULL for layer in range(1, depth + 1)]
    kinds = fields.take("layer_types", list, None) or kinds
    if len(kinds) != depth or not all(kind in (SLIDING, FULL) for kind in kinds):
        raise InputError(
            f"{fields.where}: layer_types must have {SLIDING} or {FULL} for each of the {depth} "
            "blocks (num_hidden_layers)")
    return {**values, "layer_types": tuple(kinds)}


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · (1 + w), all in fp32, then cast."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        scale = 1 + self.weight.float()
        return F.rms_norm(x.float(), self.weight.shape, scale, self.eps).to(x.dtype)


class Block(nn.Module):
    """x ← x + norm(attention(norm x)),  x ← x + norm(mlp(norm x))"""

    def __init__(self, config, layer):
        super().__init__()
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = norm()
        self.self_attn = self.attention(config, layer)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = MLP(config, partial(F.gelu, approximate="tanh"))
        self.post_feedforward_layernorm = norm()

    def attention(self, config, layer, **more):
        sliding = config.layer_types[layer] == SLIDING
        return Attention(
            config, layer, scale=config.query_pre_attn_scalar ** -0.5,
            softcap=config.attn_logit_softcapping,
            window=config.sliding_window if sliding else None, **more)

    def forward(self, x, positions, cache=None, sae=None, special=None):
        """sae: the SAE on this MLP's output, if any. Gemma Scope's read it after the last norm."""
        attended = self.self_attn(self.input_layernorm(x), positions, cache)
        x = x + self.post_attention_layernorm(attended)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        after_norm = getattr(sae, "after_norm", True)
        if sae is not None and not after_norm:
            y = splice(y, sae, special)
        y = self.post_feedforward_layernorm(y)
        if sae is not None and after_norm:
            y = splice(y, sae, special)
        return x + y
