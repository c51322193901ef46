"""How much memory a run will need, estimated from configurations alone: nothing is loaded, nothing is computed.

    parts = estimate(config, method="lora", blocks=range(13, 26), ranks=[64], latents=[16384], ...)
    parts.total                 bytes at the peak: what is always there, and the largest of three phases

The phases take turns, so only the largest counts: the frozen part of several sequences that runs ahead of their steps;
a step; and the evaluation. Everything is counted in elements a token and multiplied by tokens and bytes. The process
itself (Python, PyTorch's libraries: some 0.5 GB) is left out.

Shapes: T context, D d_model, I width of the MLP, H query heads, G key-value heads, C head_dim, V vocabulary, M latents,
R rank.
"""
from typing import NamedTuple

import torch

from lorasae.model import Transformer
from lorasae.objectives import CACHED_ELEMENTS, CHUNK_ELEMENTS
from lorasae.topk import CHUNK

FP32 = 4
HELD_BACK = {"cpu": 0.2, "cuda": 0.0}                   # measured on a CPU: 0 to 0.35; nobody has seen CUDA's
MASTER = 4 * FP32                                       # a trained number, its gradient, and Adam's two averages


class Memory(NamedTuple):
    """Bytes. The first three are there throughout; of the next three only the largest is, at the peak."""
    model: int
    saes: int                                           # frozen ones; of a JumpReLU that is finetuned its encoder as it came
    training: int                                       # what is trained, its gradients and optimiser states
    ahead: int                                          # the frozen part, run for several sequences at once
    step: int                                           # activations that backward needs, gradients, logits
    evaluation: int
    activations: int                                    # the part of `step` that backward keeps
    logits: int                                         # the part of `step` that are logits
    held_back: int                                      # freed, and kept by the allocator

    @property
    def total(self):
        return self.model + self.saes + self.training + self.largest_phase + self.held_back

    @property
    def largest_phase(self):
        return max(self.ahead, self.step, self.evaluation)


def estimate(config, *, method, blocks=(), ranks=(), latents=(), kinds="jumprelu", micro_batch, context, ahead, dtype,
             sae_dtype=torch.float32, device="cpu", compiled=False, dropout=0.1):
    """The Memory of a run.

    config: the model's. method: lora, finetune, topk, jumprelu or e2e. latents: those of each SAE (of the one that is
    trained). kinds: "topk" or "jumprelu", what the SAEs around which a model is adapted are. blocks, ranks: of the
    adapters. micro_batch, ahead: sequences of `context` tokens that pass at once through a step, and through the frozen
    part before it.
    """
    size = torch.empty((), dtype=dtype).element_size()
    sae_size = torch.empty((), dtype=sae_dtype).element_size()
    D, T = config.hidden_size, context
    at_once = max(ahead, micro_batch)
    trains_sae = method in ("topk", "jumprelu", "e2e")
    kind = kinds if not trains_sae else "jumprelu" if method == "jumprelu" else "topk"

    # Always there.
    model = size * model_parameters(config)
    sae_parameters = sum(2 * M * D + 2 * M + D for M in latents)
    if method == "finetune":
        saes = FP32 * D * sum(latents) if kind == "jumprelu" else 0                     # finetune.Held
    else:
        saes = 0 if trains_sae else sae_size * sae_parameters
    trained = adapter_parameters(config, blocks, ranks)
    if trains_sae or method == "finetune":
        trained += sae_parameters
    training = MASTER * trained

    # Passing through: a block, or the widest SAE, of which the larger counts.
    block = passing_block(config, T, size, device)
    sae = max((passing_sae(kind, M, D, FP32 if trains_sae else sae_size) for M in latents), default=0)

    # The frozen part, ahead: its outputs (the student's input and the teacher's state), beside those of the group
    # before.
    kept_lesson = at_once * T * 2 * D * size
    frozen_phase = 2 * kept_lesson + at_once * T * max(block, 0 if trains_sae else sae)

    # A step.
    students = max(1, len(ranks))
    rows = micro_batch * T
    logits = logits_bytes(config, rows, device, size, students)
    if method in ("topk", "jumprelu"):
        activations = rows * trained_sae_activations(kind, latents[0], D)
        step_logits = 0
    else:
        width = kept_by_block(config, T, size, device, compiled, dropout if blocks else None)
        count = len(blocks) or config.num_hidden_layers // 2
        activations = students * rows * count * width
        if trains_sae or method == "finetune":
            activations += rows * trained_sae_activations(kind, latents[0], D)
        step_logits = logits
    gradients = students * rows * (block + 4 * D * size)
    decoder = 2 * FP32 * latents[0] * D if trains_sae or method == "finetune" else 0       # rows brought back to norm 1
    step = kept_lesson + activations + max(step_logits, gradients, decoder)

    # An evaluation, of as many sequences at once: hidden states of base, SAE and adapted model; then their logits.
    rows = at_once * T
    states = rows * 4 * D * size
    logits_of_a_chunk = logits_bytes(config, rows, device, size, students)
    if device == "cuda":                                # where the elementwise work is of the whole chunk, not of pieces
        logits_of_a_chunk *= 3
    latents_of_a_slice = 2 * FP32 * 1024 * max(latents, default=0)
    evaluation = states + max(rows * max(block, sae), logits_of_a_chunk, latents_of_a_slice)

    needed = model + saes + training + max(frozen_phase, step, evaluation)
    held_back = HELD_BACK[device] * needed
    parts = model, saes, training, frozen_phase, step, evaluation, activations, logits, held_back
    return Memory(*map(round, parts))


# ---- Parameters ------------------------------------------------------------------------------------------------------

def model_parameters(config):
    with torch.device("meta"):
        model = Transformer(config)
    return sum(parameter.numel() for parameter in model.parameters())


def adapter_parameters(config, blocks, ranks):
    """A [R, in] and B [out, R] on the seven projections of each block."""
    D, I = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    widths = (D + q) + 2 * (D + kv) + (q + D) + 2 * (D + I) + (I + D)
    return len(blocks) * sum(ranks) * widths


# ---- Bytes a token ---------------------------------------------------------------------------------------------------

def attention_scores(config, T, size, device):
    """Scores that a blockwise attention keeps for backward: sigmoid and softmax in fp32 (and cast), half masked."""
    if device == "cuda" or config.attn_logit_softcapping is None:
        return 0                                        # fused kernels make them again
    visible = min(T / 2 + 32, config.sliding_window or T)
    copies = 2 * FP32 + (size if size < FP32 else 0)
    return config.num_attention_heads * visible * copies


def kept_by_block(config, T, size, device, compiled, dropout):
    """What backward needs of a block. dropout: of its adapters; None: it has none, and only passes the gradient on."""
    D, I = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim

    norms = 4 if config.model_type == "gemma2" else 2
    states = norms * D * FP32                           # their inputs, in fp32
    products = (4 * heads + 3 * I) * size               # q, k, v (heads repeated) and output; gate, its activation, up
    inputs = (2 * D + heads + I) * size                 # of the adapters: after two norms, of o_proj, of down_proj
    if dropout is None:
        inputs = 0
    elif dropout > 0 and not compiled:
        inputs = 2 * (5 * D + heads + I) * size         # each projection's own, with the mask
    return states + products + inputs + attention_scores(config, T, size, device)


def passing_block(config, T, size, device):
    """What is alive at once inside of a block without gradients: the MLP's three widths, or attention's, beside x."""
    D, I = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    mlp = (3 * I + 2 * D) * size
    attention = (6 * heads + 2 * D) * size
    return 2 * D * size + max(mlp, attention)


def passing_sae(kind, M, D, size):
    """Encoding and decoding: a JumpReLU holds pre-activations, gates, latents; a TopK some of its latents at a time."""
    if kind == "topk":
        return 2 * FP32 * min(M, CHUNK) + 2 * D * size
    return M * (2 * size + 1) + 2 * D * size


def trained_sae_activations(kind, M, D):
    """x, its reconstruction, their gradients; a JumpReLU's pre-activations, gates, latents, the gradients of all."""
    tokens = 6 * D * FP32
    if kind == "topk":
        return tokens + FP32 * min(M, CHUNK)
    return tokens + 8 * M * FP32


def logits_bytes(config, tokens, device, size, students):
    """Base's and student's logits of a chunk, p of several students; in bf16 their gradient is cast."""
    V = config.vocab_size
    copies = 2 * FP32
    if device == "cuda":
        rows = max(128, CHUNK_ELEMENTS["cuda"] // V // 128 * 128)
        return min(rows, tokens) * V * (copies + (size if size < FP32 else 0))

    rows = max(64, CHUNK_ELEMENTS["cpu"] // V)
    if students > 1:
        copies += FP32
    if size < FP32:
        copies += FP32 + size                           # slices of the product, to be joined; the cast gradient
    rows = min(rows, tokens)
    piece = min(rows * V, max(CACHED_ELEMENTS, V))      # the elementwise work, some eight tensors at once
    return rows * V * copies + 8 * FP32 * piece
