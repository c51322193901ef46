"""The paper's models and the embedded ones: where they and their SAEs are, and how to use them.

Whatever a preset does not say has the paper's value: the default of a field of runs.config.Config.
"""
import math
from pathlib import Path
from typing import NamedTuple

TINY = Path(__file__).parents[1] / "tiny"

PAPER = {                                               # --recipe paper, for adapters
    "optimizer": "adamw", "lr": 5e-5, "lr_decay": False, "dropout": 0.1, "batch_size": 1}


class Preset(NamedTuple):
    """A model, its SAEs, and how its experiments differ from Config's defaults."""
    repo: str                       # a Hub repository, or a folder of this package
    layer: int                      # the SAE replaces the output of this block, counted from 0
    mirror: str | None = None       # the same weights without a licence to accept first

    sae: str | None = None          # where its SAEs are; None: there is no public one
    width: str | None = None        # Gemma Scope's name for the number of latents
    l0: int | None = None           # Gemma Scope's average number of active latents

    common: dict = {}               # fields of Config, for every method
    lora: dict = {}                 # for adapters; its "recipe" fills the rest
    sae_training: dict = {}         # for training an SAE
    e2e: dict = {}                  # for end-to-end training, beside that
    finetune: dict = {}             # for finetuning an SAE

    # For a dry run when the Hub is out of reach. Sizes are approximate.
    config: dict = {}               # the sizes of its config.json
    weights: int = 0                # bytes of its weights
    sae_bytes: int = 4              # of each number of its SAEs


def latents(width):
    """"16k" -> 16384, "1m" -> 1048576: Gemma Scope's widths are powers of two."""
    unit = {"k": 10**3, "m": 10**6}[width[-1]]
    return 2 ** round(math.log2(int(width[:-1]) * unit))


# ---- Embedded models -----------------------------------------------------------------------------

EMBEDDED = {"data": "stdlib", "dtype": "float32", "context": 256, "eval_tokens": 50_000}
EMBEDDED_SAE = {
    "width": 1024, "k": 8, "l0": 8, "lr": 4e-3, "batch_size": 8, "tokens": 2_000_000}


def embedded(name, layer, adapt, tokens, sae=None):
    """The Preset of a model in this package, whose adapters train on so many tokens."""
    return Preset(
        str(TINY / name), layer, sae=sae, common=EMBEDDED, sae_training=EMBEDDED_SAE,
        lora={
            "recipe": "tuned", "adapt": (adapt,), "tokens": tokens,
            "batch_size": 2, "ahead": 8},               # larger products are faster
        e2e={"lr": 3e-3, "batch_size": 2},              # larger batches do not beat reconstruction
        finetune={"lr": 1e-3, "batch_size": 4})


# ---- The paper's models --------------------------------------------------------------------------

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads")


def sizes(*values):
    """Keys of config.json, in the order of SIZES."""
    return dict(zip(SIZES, values, strict=True))


GEMMA_2 = {"model_type": "gemma2", "vocab_size": 256_000}
GEMMA_2_2B = {**GEMMA_2, **sizes(2304, 9216, 26, 8, 4)}
GEMMA_2_9B = {**GEMMA_2, **sizes(3584, 14336, 42, 16, 8)}
GEMMA_2_27B = {**GEMMA_2, **sizes(4608, 36864, 46, 32, 16), "head_dim": 128}

LLAMA_3 = {
    "model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 131_072}
LLAMA_32_1B = {**LLAMA_3, **sizes(2048, 8192, 16, 32, 8), "tie_word_embeddings": True}
LLAMA_31_8B = {**LLAMA_3, **sizes(4096, 14336, 32, 32, 8)}

GEMMA_3 = {"model_type": "gemma3_text", "vocab_size": 262_144, "sliding_window": 512,
           "max_position_embeddings": 32_768}
GEMMA_3_270M = {**GEMMA_3, **sizes(640, 2048, 18, 4, 1)}
GEMMA_3_1B = {**GEMMA_3, **sizes(1152, 6912, 26, 4, 1)}

SMOLLM2 = {"model_type": "llama", "vocab_size": 49_152, "max_position_embeddings": 8192,
           "tie_word_embeddings": True}
SMOLLM2_135M = {**SMOLLM2, **sizes(576, 1536, 30, 9, 3), "rope_theta": 100_000.0}
SMOLLM2_17B = {**SMOLLM2, **sizes(2048, 8192, 24, 32, 32), "rope_theta": 130_000.0}

PRESETS = {
    "tiny-gemma-2": embedded(
        "gemma-2", 2, "after", 700_000, sae=str(TINY / "gemma-2-sae" / "jumprelu")),
    "tiny-gemma-2-medium": embedded("gemma-2-medium", 1, "after", 300_000),     # for Figure 4
    "tiny-gemma-2-small": embedded("gemma-2-small", 1, "after", 300_000),
    "tiny-llama-3": embedded(
        "llama-3", 2, "all", 600_000, sae=str(TINY / "llama-3-sae" / "topk")),

    "gemma-2-2b": Preset(
        "google/gemma-2-2b", layer=12, mirror="unsloth/gemma-2-2b",
        sae="google/gemma-scope-2b-pt-res", width="16k", l0=82,
        lora={"adapt": ("after",), "data": "pile"},
        sae_training={"data": "redpajama-v2", "dtype": "float32"},
        config=GEMMA_2_2B, weights=2_614_341_888 * 4),
    "gemma-2-9b": Preset(
        "google/gemma-2-9b", layer=20, mirror="unsloth/gemma-2-9b",
        sae="google/gemma-scope-9b-pt-res", width="131k", l0=62,
        common={"data": "pile"}, lora={"adapt": ("after",)},
        config=GEMMA_2_9B, weights=9_241_705_984 * 4),
    "gemma-2-27b": Preset(
        "google/gemma-2-27b", layer=22, mirror="unsloth/gemma-2-27b",
        sae="google/gemma-scope-27b-pt-res", width="131k", l0=82,
        common={"data": "pile"}, lora={"adapt": ("after",)},
        config=GEMMA_2_27B, weights=27_227_128_320 * 4),
    "llama-3.2-1b": Preset(                             # its SAE is made by --method topk
        "meta-llama/Llama-3.2-1B", layer=12, mirror="unsloth/Llama-3.2-1B",
        common={"data": "redpajama-v2", "dtype": "float32"},
        lora={"adapt": ("all",), "tokens": 100_000_000}, sae_training={"tokens": 4_000_000_000},
        config=LLAMA_32_1B, weights=1_235_814_400 * 2),
    "llama-3.1-8b": Preset(                             # all blocks, as for the paper's TopK SAEs
        "meta-llama/Llama-3.1-8B", layer=16, mirror="unsloth/Llama-3.1-8B",
        sae="fnlp/Llama3_1-8B-Base-LXR-32x",
        common={"data": "redpajama-1t-sample"}, lora={"adapt": ("all",), "sae_dtype": "bfloat16"},
        config=LLAMA_31_8B, sae_bytes=2, weights=8_030_261_248 * 2),

    # Not the paper's: small and ungated, for a laptop first
    "gemma-3-270m": Preset(
        "google/gemma-3-270m", layer=12, mirror="unsloth/gemma-3-270m",
        sae="google/gemma-scope-2-270m-pt", width="16k", l0=60,
        config=GEMMA_3_270M, weights=268_098_176 * 2),
    "gemma-3-1b": Preset(
        "google/gemma-3-1b-pt", layer=13, mirror="unsloth/gemma-3-1b-pt",
        sae="google/gemma-scope-2-1b-pt", width="16k", l0=60,
        config=GEMMA_3_1B, weights=999_885_952 * 2),
    "smollm2-135m": Preset(
        "HuggingFaceTB/SmolLM2-135M", layer=12, config=SMOLLM2_135M, weights=134_515_008 * 2),
    "smollm2-135m-instruct": Preset(
        "HuggingFaceTB/SmolLM2-135M-Instruct", layer=12, config=SMOLLM2_135M,
        weights=134_515_008 * 2),
    "smollm2-1.7b": Preset(
        "HuggingFaceTB/SmolLM2-1.7B", layer=17, sae="EleutherAI/sae-SmolLM2-1.7B-layer17-32x",
        width="65k", config=SMOLLM2_17B, weights=1_711_376_384 * 2),
}


def preset(name):
    """The Preset of that name, or of that repository or its mirror; None for any other model."""
    for key, known in PRESETS.items():
        if str(name) in (key, known.repo, known.mirror):
            return known
    return None
