"""Gemma-2: its configuration and its block. Module names are Hugging Face's, so weights load with no mapping table.

What sets it apart from Llama-3: four norms a block that scale by (1 + w), tanh-GELU, embeddings scaled by √D, an explicit
attention scale (query_pre_attn_scalar, not head_dim), soft-caps on attention scores and on logits, and a sliding window in
every even block. Mind `post_attention_layernorm`: here it normalises the attention's *output*; in Llama-3 the MLP's input.
"""
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
import torch.nn.functional as F

from lorasae.attention import MLP, Attention


@dataclass(frozen=True)
class Gemma2Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int                                       # explicit: 27B's is not hidden_size / num_attention_heads
    query_pre_attn_scalar: float
    sliding_window: int
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    rms_norm_eps: float
    rope_theta: float
    bos_token_id: int
    eos_token_id: int
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 8192
    model_type: str = "gemma2"

    rope_scaling = None

    def embed_scale(self, dtype):
        """√D rounded to the model's dtype, as the weights were trained with (bf16: 67.882 becomes 68 in 27B)."""
        return torch.tensor(self.hidden_size ** 0.5).to(dtype)


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · (1 + w), all of it in fp32, then cast."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class Block(nn.Module):
    """x ← x + norm(attention(norm x)),  x ← x + norm(mlp(norm x))"""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        window = config.sliding_window if layer % 2 == 0 else None     # even blocks slide, odd ones see all
        self.self_attn = Attention(config, layer, scale=config.query_pre_attn_scalar ** -0.5,
                                   softcap=config.attn_logit_softcapping, window=window)
        self.post_attention_layernorm = RMSNorm(config)
        self.pre_feedforward_layernorm = RMSNorm(config)
        self.mlp = MLP(config, partial(F.gelu, approximate="tanh"))
        self.post_feedforward_layernorm = RMSNorm(config)

    def forward(self, x, positions, cache=None):
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), positions, cache))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
