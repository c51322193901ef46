"""Shared by all model families: the fields of a configuration, and how config.json is read.

`fields` is the file's Fields (io/files.py), whose `take` returns a checked value. Sizes are
required; other keys default to transformers' values. Models that need other arithmetic are refused.
"""
import math
from dataclasses import MISSING, dataclass, fields as fields_of
from typing import get_args

from lorasae.errors import InputError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of the rotary frequencies.

    Frequencies that make fewer than `low_freq_factor` turns in the original context are divided by
    `factor`, those that make more than `high_freq_factor` are kept, and those in between are
    interpolated. This applies at every length, even to short prompts.
    """
    factor: float                                       # 32 in Llama-3.2-1B, 8 in Llama-3.1-8B
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scaled(self, frequencies):
        """frequencies [C/2] -> scaled frequencies [C/2], both in radians per position."""
        low, high = self.low_freq_factor, self.high_freq_factor
        wavelengths = 2 * math.pi / frequencies
        turns = self.original_max_position_embeddings / wavelengths
        kept = ((turns - low) / (high - low)).clamp(0, 1)       # 0: divided by `factor`
        return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclass(frozen=True)
class LinearScaling:
    """Positions are divided by `factor` (8 in Gemma 3 from 4B up)."""
    factor: float

    def scaled(self, frequencies):
        return frequencies / self.factor


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The fields of every family, named as in config.json; None for what a family does not have.

    A family adds its own fields, and gives transformers' default to those that a file may omit.
    """
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None              # None: one per query head
    head_dim: int | None = None                         # None: hidden_size / query heads
    rms_norm_eps: float = 1e-6
    rope_theta: float
    rope_scaling: RopeScaling | LinearScaling | None = None
    local_rope_theta: float | None = None               # for blocks with a window, if different
    with_vision: bool = False                           # the file's model has a vision tower
    bos_token_id: int
    eos_token_id: int
    tie_word_embeddings: bool
    max_position_embeddings: int

    sliding_window = attn_logit_softcapping = final_logit_softcapping = None

    def embed_scale(self, dtype):
        return 1


MADE = ("rope_scaling", "local_rope_theta", "with_vision")      # not copied from the file


def common(fields, config):
    """{key: value} for the sizes, and for the keys that have a default in a family's Config."""
    fields.take("num_hidden_layers", int, below=1001)
    values = {key: fields.take(key, int, at_least=1, below=2**24) for key in SIZES}
    for known in fields_of(config):
        key = known.name
        if known.default is MISSING or key in MADE:
            continue
        kind, *others = get_args(known.type) or (known.type,)    # int | None -> int, [NoneType]
        bounds = {} if kind is bool else {"above": 0}
        if key.endswith("token_id"):
            bounds = {"at_least": 0, "below": values["vocab_size"]}
            if isinstance(fields.get(key), list) and fields[key]:
                fields[key] = fields[key][0]            # the first (chat models have two EOS)
        may_be_null = others and key in fields          # null is None; absent, the default
        default = None if may_be_null else known.default
        values[key] = fields.take(key, kind, default, **bounds)

    # The heads.
    queries = values["num_attention_heads"]
    pairs = values["num_key_value_heads"] or queries
    if queries % pairs:
        raise InputError(
            f"{fields.where}: num_attention_heads {queries} is not a multiple of "
            f"num_key_value_heads {pairs}")
    width = values["head_dim"] or values["hidden_size"] / queries
    if width % 2:
        raise InputError(
            f"{fields.where}: head_dim is {width}, but rotary embeddings need an even one")
    return {**values, "num_key_value_heads": pairs, "head_dim": int(width)}


def rotary(fields, default=10_000.0, kind=None):
    """-> rope_theta, and its scaling or None. Newer files put both into rope_parameters.

    default: for rope_theta. kind: which blocks, if rope_parameters has a table per kind of block.
    """
    fields.only(partial_rotary_factor=1.0)
    theta = fields.take("rope_theta", float, default, above=0)
    older = fields.take("rope_scaling", dict, None)
    newer = fields.take("rope_parameters", dict, None)
    if newer and kind is not None:
        newer = newer.take(kind, dict, None)
    rope = older or newer                               # the same order as transformers
    return rotary_table(fields, rope, theta) if rope else (theta, None)


def rotary_table(fields, rope, theta):
    """rope: the Fields of one table -> rope_theta, and its scaling or None."""
    rope.only(partial_rotary_factor=1.0)
    theta = rope.take("rope_theta", float, None, above=0) or theta

    # Unscaled, linear, or Llama 3's.
    kind = rope.get("rope_type") or rope.get("type")
    if kind == "default" or set(rope) <= {"rope_theta"}:
        return theta, None
    if kind == "linear":
        return theta, LinearScaling(rope.take("factor", float, above=0))
    if kind != "llama3":
        raise InputError(
            f"{rope.where}: rotary scaling {str(kind)[:40]!r} is not supported, only 'llama3', "
            "'linear' or none")
    low = rope.take("low_freq_factor", float, above=0)
    positions = fields.get("max_position_embeddings", 2048)
    return theta, RopeScaling(
        factor=rope.take("factor", float, above=0),
        low_freq_factor=low,
        high_freq_factor=rope.take("high_freq_factor", float, above=low),
        original_max_position_embeddings=rope.take(
            "original_max_position_embeddings", int, positions, at_least=1))
