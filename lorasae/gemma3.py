"""Gemma 3 (text): its configuration and its block. Module names are Hugging Face's.

It is Gemma-2's block without soft-caps, and with three things of its own: a norm on every head's
query and key before the rotary embedding, a pattern of five blocks with a sliding window to one
without, and two rotary tables (θ = 10,000 in blocks with a window; θ = 1,000,000 in the others,
where models from 4B on divide positions by 8).
"""
from dataclasses import dataclass, replace
from functools import partial

from lorasae import family, gemma2
from lorasae.attention import Attention
from lorasae.errors import InputError
from lorasae.family import LinearScaling
from lorasae.gemma2 import RMSNorm

WITH_VISION = "gemma3"                  # the model_type of a file that has a vision tower too
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Config(family.Config):
    """The defaults are those of transformers' Gemma3TextConfig."""
    model_type = "gemma3_text"

    num_key_value_heads: int = 4
    head_dim: int = 256
    query_pre_attn_scalar: float = 256.0                # 27B's is 168, not head_dim
    sliding_window: int = 4096
    layer_types: tuple                                  # SLIDING or FULL, one per block
    rope_scaling: LinearScaling | None                  # of FULL blocks, as rope_theta is
    local_rope_theta: float                             # of SLIDING blocks
    bos_token_id: int = 2
    eos_token_id: int = 1
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 131072
    with_vision: bool                                   # the file's model has a vision tower

    attn_logit_softcapping = final_logit_softcapping = None
    embed_scale = gemma2.Config.embed_scale


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
    text.update(model_type=Config.model_type, architectures=["Gemma3ForCausalLM"])
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

    values = family.common(fields, Config)
    theta, scaling, local_theta = rotary(fields)
    return Config(
        **values, layer_types=layer_types(fields, values["num_hidden_layers"]),
        rope_theta=theta, rope_scaling=scaling, local_rope_theta=local_theta, with_vision=False)


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

    Newer files hold a table for each kind in rope_parameters; rope_scaling of older ones is that of
    FULL blocks.
    """
    theta, scaling = family.rotary(fields, 1_000_000.0, FULL)
    if not isinstance(scaling, LinearScaling | None):
        raise InputError(f"{fields.where}: rotary scaling of Gemma 3 must be 'linear' or none")

    local_theta = fields.take("rope_local_base_freq", float, 10_000.0, above=0)
    tables = fields.take("rope_parameters", dict, None) or {}
    if SLIDING in tables:
        table = tables.take(SLIDING, dict)
        local_theta, stretched = family.rotary_table(fields, table, local_theta)
        if stretched is not None:
            raise InputError(f"{fields.where}: blocks with a sliding window have no rotary scaling")
    return theta, scaling, local_theta


class Block(gemma2.Block):
    """Gemma-2's, with the attention of Gemma 3."""

    def attention(self, config, layer):
        sliding = config.layer_types[layer] == SLIDING
        return Attention(
            config, layer, scale=config.query_pre_attn_scalar ** -0.5,
            window=config.sliding_window if sliding else None,
            head_norm=partial(RMSNorm, config.head_dim, config.rms_norm_eps))
