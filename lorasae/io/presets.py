"""The paper's models and the embedded ones: where they are, and what each experiment used."""
from dataclasses import dataclass
from pathlib import Path

TINY = Path(__file__).parents[1] / "tiny"


@dataclass(frozen=True)
class Preset:
    """A model and what the paper's experiment on it used: the defaults of train.py."""
    repo: str                       # the model: a Hub repository, or a folder of this package
    layer: int                      # the SAE replaces the output of this block, counted from 0
    adapt: str                      # adapted blocks: "after" where adapting earlier ones would move L0 (§3.4), or "all"
    data: str                       # a source of streams.py
    sae: str | None = None          # where its SAEs are; None: there is no public one
    width: str | None = None        # Gemma Scope's name for the number of latents
    l0: int | None = None           # Gemma Scope's average number of active latents
    mirror: str | None = None       # the same weights without a licence to accept first
    dtype: str = "bfloat16"         # of the frozen model
    sae_dtype: str = "float32"
    context: int = 1024             # tokens a sequence, BOS included
    tokens: int = 15_000_000        # to train on
    eval_tokens: int = 1_000_000    # held out
    batch_size: int = 1             # sequences a step
    rank: int = 64
    lr: float = 5e-5
    lr_decay: bool = False
    dropout: float = 0.1


PRESETS = {
    "tiny-gemma-2": Preset(
        str(TINY / "gemma-2"), layer=2, adapt="after", data="stdlib", sae=str(TINY / "gemma-2-sae" / "jumprelu"),
        dtype="float32", context=256, tokens=900_000, eval_tokens=50_000, batch_size=4, lr=7e-3, lr_decay=True, dropout=0.0),
    "tiny-llama-3": Preset(
        str(TINY / "llama-3"), layer=2, adapt="all", data="stdlib", sae=str(TINY / "llama-3-sae" / "topk"),
        dtype="float32", context=256, tokens=600_000, eval_tokens=50_000, batch_size=4, lr=4e-3, lr_decay=True, dropout=0.0),
    "gemma-2-2b": Preset(
        "google/gemma-2-2b", layer=12, adapt="after", data="pile", mirror="unsloth/gemma-2-2b",
        sae="google/gemma-scope-2b-pt-res", width="16k", l0=82),
    "gemma-2-9b": Preset(
        "google/gemma-2-9b", layer=20, adapt="after", data="pile", mirror="unsloth/gemma-2-9b",
        sae="google/gemma-scope-9b-pt-res", width="131k", l0=62),
    "gemma-2-27b": Preset(
        "google/gemma-2-27b", layer=22, adapt="after", data="pile", mirror="unsloth/gemma-2-27b",
        sae="google/gemma-scope-27b-pt-res", width="131k", l0=82),
    "llama-3.2-1b": Preset(                                     # around a TopK SAE of one's own, made by --method topk
        "meta-llama/Llama-3.2-1B", layer=12, adapt="all", data="redpajama-v2", mirror="unsloth/Llama-3.2-1B",
        dtype="float32", tokens=100_000_000),
    "llama-3.1-8b": Preset(
        "meta-llama/Llama-3.1-8B", layer=16, adapt="all", data="redpajama-1t-sample", mirror="unsloth/Llama-3.1-8B",
        sae="fnlp/Llama3_1-8B-Base-LXR-32x", sae_dtype="bfloat16"),
}


def preset(name):
    """The Preset of that name, or of that repository or its mirror; None for any other model."""
    return PRESETS.get(name) or next((p for p in PRESETS.values() if name in (p.repo, p.mirror)), None)
