"""Gemma 3 (text): its configuration and its block. Module names are Hugging Face's.

It is Gemma-2's block without soft-caps, but with a norm on every head's query and key before the
rotary embedding, five blocks with a sliding window for each one without, and two rotary tables:
θ = 10,000 with a window; θ = 1,000,000 without, where models from 4B up divide positions by 8.
"""
from dataclasses import dataclass
from functools import partial

from lorasae import family, gemma2
from lorasae.errors import InputError
from lorasae.gemma2 import FULL, SLIDING, RMSNorm


@dataclass(frozen=True, kw_only=True)
class Config(gemma2.Config):
    """The defaults are those of transformers' Gemma3TextConfig.

    27B's query_pre_attn_scalar is 168, not head_dim. rope_theta and rope_scaling apply to FULL
    blocks, local_rope_theta to SLIDING ones.
    """
    model_type = "gemma3_text"

    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    max_position_embeddings: int = 131072


def parse(fields):
    """The Fields of config.json, which may change -> Config."""
    pattern = fields.take("sliding_window_pattern", int, 6, at_least=1)
    values = gemma2.common(fields, Config, pattern)
    if values["attn_logit_softcapping"] is not None:    # transformers would ignore it
        raise InputError(f"{fields.where}: attn_logit_softcapping must be null in Gemma 3")

    # Newer files have one rotary table per kind of block in rope_parameters; in older files,
    # rope_scaling applies to FULL blocks.
    theta, scaling = family.rotary(fields, 1_000_000.0, FULL)
    local_theta = fields.take("rope_local_base_freq", float, 10_000.0, above=0)
    tables = fields.take("rope_parameters", dict, None) or {}
    if SLIDING in tables:
        table = tables.take(SLIDING, dict)
        local_theta, stretched = family.rotary_table(fields, table, local_theta)
        if stretched is not None:
            raise InputError(f"{fields.where}: no rotary scaling is supported in blocks with "
                             "a sliding window")
    return Config(**values, rope_theta=theta, rope_scaling=scaling, local_rope_theta=local_theta)


class Block(gemma2.Block):
    """Gemma-2's block, with a norm on every query and key."""

    def attention(self, config, layer):
        head_norm = partial(RMSNorm, config.head_dim, config.rms_norm_eps)
        return super().attention(config, layer, head_norm=head_norm)
