"""Gemma 3 (text): its configuration and its block. Module names are Hugging Face's.

It is Gemma-2's block without soft-caps, and with three things of its own: a norm on every head's
query and key before the rotary embedding, a pattern of five blocks with a sliding window to one
without, and two rotary tables (θ = 10,000 in blocks with a window; θ = 1,000,000 in the others,
where models from 4B on divide positions by 8).
"""
from dataclasses import dataclass, replace
from functools import partial

import torch

from lorasae import family, gemma2
from lorasae.attention import Attention
from lorasae.errors import InputError
from lorasae.family import LinearScaling
from lorasae.gemma2 import RMSNorm

MODEL_TYPE, ARCHITECTURE = "gemma3_text", "Gemma3ForCausalLM"  # in Hugging Face's config.json
WITH_VISION = "gemma3"                  # the model_type of a file that has a vision tower too

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    query_pre_attn_scalar: float                        # 27B's is 168, not head_dim
    sliding_window: int
    layer_types: tuple                                  # SLIDING or FULL, one per block
    rms_norm_eps: float
    rope_theta: float                                   # of FULL blocks
    rope_scaling: LinearScaling | None                  # of FULL blocks
    local_rope_theta: float                             # of SLIDING blocks
    bos_token_id: int
    eos_token_id: int
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 131072
    with_vision: bool = False                           # the file's model has a vision tower
    model_type: str = MODEL_TYPE

    attn_logit_softcapping = final_logit_softcapping = None

    def embed_scale(self, dtype):
        """√D in the model's dtype, as in training (in bf16, 270M's 25.298 becomes 25.25)."""
        return torch.tensor(self.hidden_size ** 0.5).to(dtype)


DEFAULTS = {                                            # those of transformers' Gemma3TextConfig
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256.0,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}
# The text part of a file with a vision tower leaves out what equals these.
SIZES = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
PATTERN = 6                                             # every sixth block sees everything


def text_part(fields):
    """The Fields of the text model, from those of a model with a vision tower."""
    text = fields.take("text_config", dict)
    for key in ("bos_token_id", "eos_token_id"):
        if key in fields:
            text.setdefault(key, fields[key])
    for key, value in SIZES.items():
        text.setdefault(key, value)
    text.update(model_type=MODEL_TYPE, architectures=[ARCHITECTURE])
    return text


def parse(fields):
    """Config from the Fields of config.json, which it may change."""
    if fields["model_type"] == WITH_VISION:
        return replace(parse(text_part(fields)), with_vision=True)
    gelu = "gelu_pytorch_tanh"
    fields.only(hidden_activation=gelu, hidden_act=gelu, attention_bias=False,
                use_bidirectional_attention=False)
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.take(cap, float, None) is not None:
            raise InputError(f"{fields.where}: {cap} must be null in Gemma 3")

    values = family.common(fields, DEFAULTS)
    theta, scaling, local_theta = rotary(fields)
    return Config(
        **values, layer_types=layer_types(fields, values["num_hidden_layers"]),
        rope_theta=theta, rope_scaling=scaling, local_rope_theta=local_theta)


def layer_types(fields, depth):
    """SLIDING or FULL for each block: as listed, or every PATTERN-th block is FULL."""
    listed = fields.take("layer_types", list, None)
    if listed is not None:
        if len(listed) != depth or not set(listed) <= {SLIDING, FULL}:
            raise InputError(
                f"{fields.where}: layer_types must have {SLIDING} or {FULL} for each of the "
                f"{depth} blocks (num_hidden_layers)")
        return tuple(listed)
    pattern = fields.take("sliding_window_pattern", int, PATTERN, at_least=1)
    return tuple(FULL if (layer + 1) % pattern == 0 else SLIDING for layer in range(depth))


def rotary(fields):
    """-> rope_theta and scaling of FULL blocks, rope_theta of SLIDING ones.

    Newer files hold a table for each kind in rope_parameters, which goes before rope_theta and
    rope_local_base_freq of older ones; rope_scaling is always that of FULL blocks.
    """
    fields.only(partial_rotary_factor=1.0)
    theta = fields.take("rope_theta", float, 1_000_000.0, above=0)
    local_theta = fields.take("rope_local_base_freq", float, 10_000.0, above=0)
    scaling = None

    tables = fields.take("rope_parameters", dict, None) or {}
    if FULL in tables:
        theta, scaling = family.rotary_table(fields, tables.take(FULL, dict), theta)
    if SLIDING in tables:
        table = tables.take(SLIDING, dict)
        local_theta, stretched = family.rotary_table(fields, table, local_theta)
        if stretched is not None:
            raise InputError(f"{fields.where}: blocks with a sliding window have no rotary scaling")
    older = fields.take("rope_scaling", dict, None)
    if older:
        theta, scaling = family.rotary_table(fields, older, theta)
    if not isinstance(scaling, LinearScaling | None):
        raise InputError(f"{fields.where}: rotary scaling of Gemma 3 must be 'linear' or none")
    return theta, scaling, local_theta


class Block(gemma2.Block):
    """Gemma-2's, with the attention of Gemma 3."""

    def attention(self, config, layer):
        sliding = config.layer_types[layer] == SLIDING
        return Attention(
            config, layer, scale=config.query_pre_attn_scalar ** -0.5,
            window=config.sliding_window if sliding else None,
            head_norm=partial(RMSNorm, config.head_dim, config.rms_norm_eps))
