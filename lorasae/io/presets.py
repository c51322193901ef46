"""The paper's models and the included ones: where they and their SAEs are, and how to use them.

What a preset leaves out takes the paper's value, which is the default in runs.config.Config.
"""
import math
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

from lorasae.io.files import read_object

TINY = Path(__file__).parents[1] / "tiny"

PAPER = {                                               # --recipe paper, for adapters
    "optimizer": "adamw", "lr": 5e-5, "lr_decay": False, "dropout": 0.1, "batch_size": 1}


class Preset(NamedTuple):
    """A model, its SAEs, and how its experiments differ from Config's defaults."""
    repo: str                       # a Hub repository, or a folder of this package
    layer: int                      # the SAE replaces the output of this block, counted from 0
    mirror: str | None = None       # the same weights, with no licence to accept first
    licence: str = "mit"            # as the Hub calls it

    sae: str | None = None          # where its default SAEs are; None if it has none
    width: str | None = None        # Gemma Scope's name for the number of latents
    l0: int | None = None           # Gemma Scope's average number of active latents
    saes: str = ""                  # for --list: blocks that have SAEs, widths, L0s

    common: dict = {}               # fields of Config, for every method
    lora: dict = {}                 # for adapters; its "recipe" fills in the rest
    sae_training: dict = {}         # for training an SAE
    e2e: dict = {}                  # for end-to-end training, on top of that
    finetune: dict = {}             # for finetuning an SAE

    # For a dry run when the Hub is out of reach. Sizes are approximate.
    config: dict = {}               # the sizes of its config.json
    parameters: int = 0
    weight_bytes: int = 2           # per parameter in its files
    sae_bytes: int = 4              # per number in its SAEs

    @property
    def weights(self):
        """The size of its weights in bytes."""
        return self.parameters * self.weight_bytes

    def sae_size(self, width=None):
        """(latents, bytes) of one of its SAEs; by default one of the preset's width."""
        M = latents(width or self.width)
        return M, 2 * M * self.config["hidden_size"] * self.sae_bytes


def latents(width):
    """The number of latents in a width: 16384 for "16384" or, as Gemma Scope writes it, "16k"."""
    name = str(width).lower()
    if name.endswith(("k", "m")):
        unit = 10**6 if name.endswith("m") else 10**3
        return 2 ** round(math.log2(int(name[:-1]) * unit))
    return int(name)


# ---- For a laptop --------------------------------------------------------------------------------

SMALL = {"data": "stdlib", "dtype": "float32", "context": 256, "eval_tokens": 50_000}
LAPTOP = {                                              # for real models
    "common": SMALL,
    "lora": {"recipe": "tuned", "tokens": 100_000, "batch_size": 2},
    "sae_training": {"k": 32, "lr": 1e-3, "batch_size": 4, "tokens": 600_000},
}
INCLUDED_SAE = {"width": 1024, "k": 8, "l0": 8, "lr": 4e-3, "batch_size": 8, "tokens": 2_000_000}


def included(name, layer, tokens, sae=None):
    """The Preset of a model in this package; `tokens`: how many its adapters train on."""
    return Preset(
        str(TINY / name), layer, sae=sae, common=SMALL, sae_training=INCLUDED_SAE,
        saes="2: 1k, L0 8" if sae else "",
        lora={"recipe": "tuned", "tokens": tokens, "batch_size": 2,
              "ahead": 8},                              # larger matrix products are faster
        e2e={"lr": 3e-3, "batch_size": 2},              # with larger ones, no better than topk
        finetune={"lr": 1e-3, "batch_size": 4})


# ---- The paper's models --------------------------------------------------------------------------

SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads")


def sizes(*values):
    """Entries of config.json, from values in the order of SIZES."""
    return dict(zip(SIZES, values, strict=True))


GEMMA_2 = {"model_type": "gemma2", "vocab_size": 256_000}
GEMMA_2_2B = {**GEMMA_2, **sizes(2304, 9216, 26, 8, 4)}
GEMMA_2_9B = {**GEMMA_2, **sizes(3584, 14336, 42, 16, 8)}
GEMMA_2_27B = {**GEMMA_2, **sizes(4608, 36864, 46, 32, 16), "head_dim": 128}

LLAMA_3 = {"model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 131_072}
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
    "tiny-gemma-2": included("gemma-2", 2, 700_000, sae=str(TINY / "gemma-2-sae" / "jumprelu")),
    "tiny-gemma-2-medium": included("gemma-2-medium", 1, 300_000),              # for Figure 4
    "tiny-gemma-2-small": included("gemma-2-small", 1, 300_000),
    "tiny-llama-3": included("llama-3", 2, 600_000, sae=str(TINY / "llama-3-sae" / "topk")),

    "gemma-2-2b": Preset(
        "google/gemma-2-2b", layer=12, mirror="unsloth/gemma-2-2b",
        sae="google/gemma-scope-2b-pt-res", width="16k", l0=82,
        sae_training={"data": "redpajama-v2", "dtype": "float32"},
        saes="12: 16k-1m, L0 22 41 82 176 445; all: 16k 65k", licence="gemma",
        config=GEMMA_2_2B, parameters=2_614_341_888, weight_bytes=4),
    "gemma-2-9b": Preset(
        "google/gemma-2-9b", layer=20, mirror="unsloth/gemma-2-9b",
        sae="google/gemma-scope-9b-pt-res", width="131k", l0=62,
        saes="20: 16k-1m, L0 11-276; all: 16k 131k", licence="gemma",
        config=GEMMA_2_9B, parameters=9_241_705_984, weight_bytes=4),
    "gemma-2-27b": Preset(
        "google/gemma-2-27b", layer=22, mirror="unsloth/gemma-2-27b",
        sae="google/gemma-scope-27b-pt-res", width="131k", l0=82,
        saes="10 22 34: 131k, L0 20-290", licence="gemma",
        config=GEMMA_2_27B, parameters=27_227_128_320, weight_bytes=4),
    "llama-3.2-1b": Preset(                             # --method topk trains its SAE
        "meta-llama/Llama-3.2-1B", layer=12, mirror="unsloth/Llama-3.2-1B",
        common={"data": "redpajama-v2", "dtype": "float32"},
        lora={"tokens": 100_000_000}, sae_training={"tokens": 4_000_000_000},
        licence="llama3.2", config=LLAMA_32_1B, parameters=1_235_814_400),
    "llama-3.1-8b": Preset(                             # all blocks, as for the paper's TopK SAEs
        "meta-llama/Llama-3.1-8B", layer=16, mirror="unsloth/Llama-3.1-8B",
        sae="fnlp/Llama3_1-8B-Base-LXR-32x", width="131k",
        common={"data": "redpajama-1t-sample"}, lora={"adapt": ("all",), "sae_dtype": "bfloat16"},
        saes="all: 131k, L0 about 50", licence="llama3.1",
        config=LLAMA_31_8B, sae_bytes=2, parameters=8_030_261_248),

    # Not the paper's: small; Gemma is gated.
    "gemma-3-270m": Preset(
        "google/gemma-3-270m", layer=12, mirror="unsloth/gemma-3-270m",
        sae="google/gemma-scope-2-270m-pt", width="16k", l0=60, **LAPTOP,
        saes="5 9 12 15: 16k-1m, L0 20 60 150; all: 16k 262k", licence="gemma",
        config=GEMMA_3_270M, parameters=268_098_176),
    "gemma-3-1b": Preset(
        "google/gemma-3-1b-pt", layer=13, mirror="unsloth/gemma-3-1b-pt",
        sae="google/gemma-scope-2-1b-pt", width="16k", l0=60,
        saes="7 13 17 22: 16k-1m, L0 20 60 150; all: 16k 262k", licence="gemma",
        config=GEMMA_3_1B, parameters=999_885_952),
    "smollm2-135m": Preset(
        "HuggingFaceTB/SmolLM2-135M", layer=12, **LAPTOP,
        config=SMOLLM2_135M, parameters=134_515_008, licence="apache-2.0"),
    "smollm2-135m-instruct": Preset(
        "HuggingFaceTB/SmolLM2-135M-Instruct", layer=12,
        sae=str(TINY / "smollm2-135m-instruct-sae"), width="4608", sae_bytes=2,
        saes="12: 4608, L0 32",
        common=SMALL, sae_training=LAPTOP["sae_training"],
        lora={**LAPTOP["lora"], "adapt": ("after",)},
        config=SMOLLM2_135M, parameters=134_515_008, licence="apache-2.0"),
    "smollm2-1.7b": Preset(
        "HuggingFaceTB/SmolLM2-1.7B", layer=17, sae="EleutherAI/sae-SmolLM2-1.7B-layer17-32x",
        width="65k", lora={"adapt": ("all",)},          # its SAE is a TopK
        saes="17: 65k, L0 32", licence="apache-2.0",
        config=SMOLLM2_17B, parameters=1_711_376_384),
}


def preset(name):
    """The Preset with that name, repository or mirror, or of a local folder with such a name.

    The sizes in a folder's config.json must match the preset's. None for any other model.
    """
    file = Path(name) / "config.json"
    found = read_object(file) if isfile(file) else {}
    its_sizes = {key: found.get(key) for key in SIZES}
    for key, known in PRESETS.items():
        names = [key, known.repo, known.mirror or key]
        is_copy = Path(name).name in [Path(each).name for each in names]
        if str(name) in names or (is_copy and its_sizes.items() <= known.config.items()):
            return known
    return None
