"""Llama-3: its configuration and its block. Module names are Hugging Face's, so weights just load.

A plain pre-norm block: RMSNorm, grouped-query attention, SwiGLU. Its one peculiarity is the rotary
scaling (family.py), which lowers the low frequencies at every length. Mind
`post_attention_layernorm`: here it normalises the MLP's *input*.
"""
from dataclasses import dataclass

import torch
from torch import nn
import torch.nn.functional as F

from lorasae import family
from lorasae.attention import MLP, Attention
from lorasae.sae import splice


@dataclass(frozen=True, kw_only=True)
class Config(family.Config):
    """The defaults are those of transformers' LlamaConfig."""
    model_type = "llama"

    bos_token_id: int = 1
    eos_token_id: int = 2
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048


def parse(fields, config=Config):
    """The Fields of config.json, which may change -> Config, or a subclass of it."""
    fields.only(hidden_act="silu", attention_bias=False, mlp_bias=False)
    theta, scaling = family.rotary(fields)
    values = family.common(fields, config)
    return config(**values, rope_theta=theta, rope_scaling=scaling)


class RMSNorm(nn.Module):
    """w · (x / √(mean x² + ε)): in fp32, but cast *before* the weight, unlike Gemma-2's."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


class Block(nn.Module):
    """x ← x + attention(norm x),  x ← x + mlp(norm x)"""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer, scale=config.head_dim ** -0.5)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, F.silu)

    def forward(self, x, positions, cache=None, sae=None, special=None):
        """sae: the SAE on this MLP's output, if any."""
        x = x + self.self_attn(self.input_layernorm(x), positions, cache)
        y = self.mlp(self.post_attention_layernorm(x))
        if sae is not None:
            y = splice(y, sae, special)
        return x + y
