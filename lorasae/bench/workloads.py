"""What the benchmark trains: random models of real shapes, their SAEs, and their steps' FLOPs.

Shapes: B batch, T tokens, D d_model, M latents, R rank.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorasae import dictionary
from lorasae.io.models import load_model, parse_config, text_config
from lorasae.io.presets import GEMMA_2, LLAMA_3, PRESETS, sizes
from lorasae.model import Transformer


# ---- Shapes --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    """A model with one SAE. A call trains on `ahead` sequences, `batch` of them per step."""
    raw: dict                           # the model's config.json
    layer: int
    width: int                          # the SAE's latents
    rank: int = 64
    context: int = 1024
    batch: int = 1
    ahead: int = 8
    dtype: torch.dtype = torch.bfloat16         # of the model; the SAE is fp32
    k: int = 64
    everywhere: bool = True             # with a TopK SAE, adapt all blocks
    folder: Path | None = None          # of a real model; None for random weights

    @property
    def config(self):
        return parse_config(self.raw, "the benchmark")

    @property
    def kind(self):
        """The SAE's kind."""
        return "jumprelu" if self.raw["model_type"].startswith("gemma") else "topk"

    @property
    def blocks(self):
        """The blocks to adapt: those after the SAE or, as in the paper, all for a TopK SAE."""
        everywhere = self.everywhere and self.kind == "topk"
        first = 0 if everywhere else self.layer + 1
        return list(range(first, self.config.num_hidden_layers))


def invented(name, shape, **how):
    """{name: Case} for an invented shape, entries of config.json, in both families, in fp32."""
    return {f"{name} {family['model_type']}":
            Case({**family, **shape}, ahead=2, dtype=torch.float32, **how)
            for family in (GEMMA_2, LLAMA_3)}


WIDTHS = {"gemma-2-2b": 2 ** 14, "llama-3.2-1b": 2 ** 14, "gemma-2-9b": 2 ** 17,
          "gemma-2-27b": 2 ** 17, "llama-3.1-8b": 2 ** 17}
REAL = {name: Case(PRESETS[name].config, PRESETS[name].layer, width)
        for name, width in WIDTHS.items()}
SMALL = invented("small", {**sizes(256, 1024, 10, 8, 4), "head_dim": 32, "vocab_size": 2 ** 15},
                 layer=4, width=2048, rank=16, context=256, batch=2)
TINY = invented("tiny", {**sizes(32, 64, 4, 4, 2), "head_dim": 16, "vocab_size": 512},
                layer=1, width=256, rank=4, context=16)


def cases_for(device, quick):
    """{name: Case} to run on a device, the headline's model first."""
    if device == "cpu" or quick:
        return TINY if quick else SMALL
    return {name: REAL[name] for name in ("gemma-2-2b", "llama-3.2-1b", "gemma-2-9b")}


def cases_of(folder):
    """{name: Case} for a real model with a random SAE, in two batch shapes.

    They adapt the blocks after the SAE; a TopK's further Cases adapt all. A call is one fp32 step.
    """
    raw = text_config(folder)
    depth = raw["num_hidden_layers"]
    real = Case(raw, depth // 2, 2 ** 14, dtype=torch.float32, k=32, folder=folder)
    if real.kind == "topk":
        real = replace(real, layer=2 * depth // 5, width=4608)

    cases = {}
    for everywhere in {False, real.kind == "topk"}:
        place = "all blocks" if everywhere else "blocks after"
        for batch, context in ((2, 256), (1, 1024)):
            cases[f"{folder.name}, {place}, {batch} x {context}"] = replace(
                real, everywhere=everywhere, batch=batch, ahead=batch, context=context)
    return cases


# ---- A model and its SAE -------------------------------------------------------------------------

def random_setting(case, device):
    """A frozen model, its random SAE, and tokens [ahead, T]."""
    torch.manual_seed(0)
    D = case.config.hidden_size
    model = load_model(case.folder, dtype=case.dtype) if case.folder else random_model(case, device)
    tokens = torch.randint(3, case.config.vocab_size, (case.ahead, case.context), device=device)

    # `start` sets thresholds equal to pre-activations (for four times this L0). Scale them
    # slightly, so that rounding does not decide which latents fire.
    sae = dictionary.new_sae(case.kind, D, case.width, case.k).to(device).requires_grad_(False)
    sae.on_special = True                               # so the peers need not look for BOS and EOS
    x = model.run(model.embed(tokens[:1]), 0, case.layer + 1)
    sae.start(x[0].float(), l0=16)
    if case.kind == "jumprelu":
        sae.threshold.mul_(1.0001)
    return model, sae, tokens


def random_model(case, device):
    with torch.device("meta"):
        model = Transformer(case.config).to(case.dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.normal_(std=case.config.hidden_size ** -0.5)
        else:
            p.fill_(1)
    return model


# ---- FLOPs ---------------------------------------------------------------------------------------

def flops_per_token(case, recipe=False):
    """FLOPs per token of a LoRA step -> (shared, own): of the frozen models, of an adapted model.

    Only matrix products count. A product with a matrix [n, m] takes 2 n m per token. The backward
    pass takes as much for the gradient of its input and, in an adapter, as much again for that of
    its weights. A TopK SAE decodes only k rows, which is negligible.

    recipe: whether to count the published recipe's step, which runs the blocks before the SAE for
    both models, and computes the scores that the causal mask hides.
    """
    c, T, R = case.config, case.context, case.rank
    D, inside = c.hidden_size, c.intermediate_size
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = [(D, queries), (D, keys), (D, keys), (queries, D)]
    shapes = [*attention, (D, inside), (D, inside), (inside, D)]

    # Forward, per token.
    weights = 2 * sum(n * m for n, m in shapes)
    adapter = 2 * R * sum(n + m for n, m in shapes)
    seen = T if recipe else (T + 1) / 2                 # keys per query, on average
    scores = 4 * seen * queries                         # queries with keys, weights with values
    head = 2 * D * c.vocab_size
    sae = 2 * D * case.width * (2 if case.kind == "jumprelu" else 1)

    # An adapted model's forward and backward; the first adapted block's input needs no gradient.
    adapted = len(case.blocks)
    unneeded = 2 * D * (queries + 2 * keys) + 3 * 2 * D * R
    own = adapted * (2 * weights + 3 * scores + 3 * adapter) - unneeded + 2 * head

    depth = c.num_hidden_layers
    frozen = depth + (depth - adapted if recipe else 0)
    shared = frozen * (weights + scores) + head
    if case.layer in case.blocks:
        return shared, own + sae
    return shared + sae, own
