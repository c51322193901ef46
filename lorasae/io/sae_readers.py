"""What an SAE computes, project by project, and where its files keep the tensors.

Each reader's docstring is that project's formula. It returns Parts, the same in one vocabulary, of which
sae_formats.build makes a TopK or a JumpReLU.

    Gemma Scope, Llama Scope, sparsify      what the paper uses
    SAELens                                 TopK, JumpReLU, ReLU, BatchTopK and Matryoshka
    dictionary_learning                     the same kinds

A BatchTopK SAE (Bussmann et al. 2024) keeps k latents a token on average over a training batch. Outside training there
is no such batch, and one threshold θ learnt on the way takes its place: z = ReLU(pre) · H(pre - θ), a JumpReLU whose
latents share θ. Matryoshka SAEs (Bussmann et al. 2025) are BatchTopK SAEs whose training also reconstructs from the
first latents alone: they compute nothing else afterwards.

Shapes: D d_model, M latents. W_enc and W_dec are [M, D], a row a latent, whichever way round the file has them.
"""
import math
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from lorasae.errors import InputError
from lorasae.io.files import read_object, shown
from lorasae.io.files import Tensors

ROWS = 8192                                             # latents converted at a time
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")      # SAELens's names
DICTIONARIES = ("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")


class Matrix(NamedTuple):
    """A matrix that is read when it is wanted: an SAE's two never lie in memory beside their converted copies."""
    file: Tensors
    name: str
    flipped: bool = False                               # whether the file has it as [D, M]

    def read(self):
        """-> [M, D], in the dtype of the file."""
        weight = self.file[self.name]
        if weight.dim() != 2:
            raise InputError(f"{self.file.path}: {self.name} is {list(weight.shape)}, but should be a matrix")
        return weight.T if self.flipped else weight


@dataclass
class Parts:
    """An SAE as its file has it. `threshold` is given for a JumpReLU (0 for an ordinary ReLU), `k` for a TopK."""
    W_enc: Matrix
    W_dec: Matrix
    b_enc: torch.Tensor                                 # [M]
    b_dec: torch.Tensor                                 # [D]
    centred: bool                                       # whether the encoder reads x - b_dec, or x
    on_special: bool                                    # whether it was trained on BOS and EOS
    threshold: torch.Tensor | None = None               # [M]
    k: int | None = None
    enc: torch.Tensor | float = 1.0                     # factors for the rows of W_enc, [M] or one number
    dec: torch.Tensor | float = 1.0                     # factors for the rows of W_dec
    shape: tuple | None = None                          # (M, D), where the configuration states it


# ---- Gemma Scope and Llama Scope -------------------------------------------------------------------------------------

def read_gemma_scope(path, layer=None):
    """pre = x W_enc + b_enc;  z = ReLU(pre) · H(pre - θ);  x̂ = z W_dec + b_dec, with W_enc [D, M] in the file.

    Trained without BOS. `path` is a folder with params.npz or an .npz file, which does not say the layer.
    """
    file = Tensors(path if path.is_file() else path / "params.npz")
    refuse_scaling(file, "scaling_factor")
    W = "W" if "W_enc" in file else "w"                 # both spellings are about

    return Parts(
        W_enc=Matrix(file, f"{W}_enc", flipped=True),
        W_dec=Matrix(file, f"{W}_dec"),
        b_enc=file["b_enc"],
        b_dec=file["b_dec"],
        threshold=file["threshold"],
        centred=False,
        on_special=False)


def read_llama_scope(folder, layer=None, variant="openmoss"):
    """pre = f_in W_e x + b_e;  z = pre · H(pre c/f_in - θ);  x̂ = (W_d z + b_d) / f_out, with W_d [D, M] in the file.

    f = √D / the dataset's mean activation norm (in, out); c = ‖W_d,i‖ f_in/f_out; θ one number. Trained without BOS.
    "openmoss", the authors' arithmetic: latents are pre c/f_in, so decoder rows have norm 1 and the threshold is θ.
    "sae_lens": SAELens leaves out c and f_out: z = ReLU(pre) · H(pre - θ f_in), x̂ = (W_d z + b_d) / f_in.
    "sae_lens_legacy": before its 5.10.3, hence in the paper, H(pre - θ): L0 far too high wherever f_in > 1.
    """
    if variant not in ("openmoss", "sae_lens", "sae_lens_legacy"):
        raise InputError(f"llama_scope {shown(variant)} is not one of openmoss, sae_lens, sae_lens_legacy")

    # the configuration
    cfg = read_object(folder / "hyperparams.json")
    hook = cfg.take("hook_point_in", str)
    check_layer(hook, layer, folder)
    cfg.stated(act_fn="jumprelu", norm_activation="dataset-wise", hook_point_out=hook, use_decoder_bias=True)
    cfg.only(use_glu_encoder=False, apply_decoder_bias_to_pre_encoder=False)
    D = cfg.take("d_model", int, at_least=1, at_most=10**9)
    theta = cfg.take("jump_relu_threshold", float, at_least=0)
    norms = cfg.take("dataset_average_activation_norm", dict)
    f_in = math.sqrt(D) / norms.take("in", float, above=0)
    f_out = math.sqrt(D) / norms.take("out", float, above=0)

    # the tensors
    file = Tensors(folder / "checkpoints" / "final.safetensors")
    b_enc = file["encoder.bias"].float()
    b_dec = file["decoder.bias"].float()
    parts = Parts(
        W_enc=Matrix(file, "encoder.weight"),
        W_dec=Matrix(file, "decoder.weight", flipped=True),
        b_enc=b_enc,
        b_dec=b_dec,
        centred=False,
        on_special=False,
        shape=(cfg.take("d_sae", int, at_least=1), D))

    # SAELens: f_in alone
    if variant != "openmoss":
        if variant == "sae_lens":
            theta = theta * f_in
        return replace(parts, threshold=torch.full_like(b_enc, theta), enc=f_in, dec=1 / f_in, b_dec=b_dec / f_in)

    # the authors: f_in, f_out and c
    c = torch.ones_like(b_enc)
    if cfg.take("sparsity_include_decoder_norm", bool, True):
        c = row_norms(parts.W_dec) * f_in / f_out
        check_length(folder, "b_enc", b_enc, len(c), "W_dec")
    return replace(
        parts,
        threshold=torch.full_like(b_enc, theta),
        enc=c,
        dec=f_in / f_out / c,
        b_enc=b_enc * c / f_in,
        b_dec=b_dec / f_out)


# ---- sparsify --------------------------------------------------------------------------------------------------------

def read_sparsify(folder, layer=None):
    """z = TopK(ReLU((x - b_dec) W_encᵀ + b_enc));  x̂ = z W_dec + b_dec, both matrices [M, D] in the file.

    Trained with BOS. Does not say the layer. `multi_topk` is a matter of its training loss alone.
    """
    cfg = read_object(folder / "cfg.json")
    cfg.only(activation="topk", skip_connection=False, transcode=False, signed=False)
    D = cfg.take("d_in", int, at_least=1)
    M = cfg.take("num_latents", int, 0, at_least=0)
    if M == 0:                                          # how it writes "as many as the expansion factor says"
        M = D * cfg.take("expansion_factor", int, at_least=1)

    file = Tensors(folder / "sae.safetensors")
    if "W_skip" in file:
        raise InputError(f"{folder} has a skip connection (W_skip), which is not supported")

    return Parts(
        W_enc=Matrix(file, "encoder.weight"),
        W_dec=Matrix(file, "W_dec"),
        b_enc=file["encoder.bias"],
        b_dec=file["b_dec"],
        k=cfg.take("k", int, at_least=1),
        centred=True,
        on_special=True,
        shape=(M, D))


# ---- SAELens ---------------------------------------------------------------------------------------------------------

def read_sae_lens(folder, layer=None):
    """pre = (x - a b_dec) W_enc + b_enc;  x̂ = z W_dec + b_dec; W_enc [D, M] in the file, a = apply_b_dec_to_input.

    z is ReLU(TopK(pre)), or ReLU(pre) · H(pre - θ), or ReLU(pre) ("standard": θ = 0). If rescale_acts_by_decoder_norm,
    with n those norms, n pre takes the place of pre, and x̂ = (z/n) W_dec + b_dec. Reads version 6 and the flat 5.

    BatchTopK and Matryoshka SAEs are saved for inference as jumprelu, θ a tensor [M] and n folded in. The checkpoints
    of their training keep their own architecture, the one number topk_threshold, and n to be folded; older ones of
    JumpReLU keep log_threshold.
    """
    cfg = read_object(folder / "cfg.json")
    about = cfg.take("metadata", dict, None) or cfg     # version 5 has no such part
    kind, k = _sae_lens_kind(cfg, folder)
    check_layer(about.take("hook_name", str, None) or about.take("hook_point", str, None), layer, folder)
    for place in (cfg, about):
        for key in ("normalize_activations", "reshape_activations", "hook_head_index"):
            value = place.get(key)
            if value is not None and value is not False and value != "none":
                raise InputError(f"{place.where}: {key} {shown(value)} is not supported, only 'none'")

    file = Tensors(folder / "sae_weights.safetensors")
    refuse_scaling(file, "scaling_factor", "finetuning_scaling_factor")
    parts = Parts(
        W_enc=Matrix(file, "W_enc", flipped=True),
        W_dec=Matrix(file, "W_dec"),
        b_enc=file["b_enc"],
        b_dec=file["b_dec"],
        centred=cfg.take("apply_b_dec_to_input", bool, True),
        on_special=_sae_lens_on_special(kind, about),
        shape=(cfg.take("d_sae", int, at_least=1), cfg.take("d_in", int, at_least=1)))

    # which latents are active
    zeros = torch.zeros(parts.b_enc.shape)
    if kind == "topk":
        parts.k = k
    elif kind in BATCH_TOPK:
        parts.threshold = zeros + _learnt_threshold(file, "topk_threshold")
    elif kind == "standard":
        parts.threshold = zeros
    elif "log_threshold" in file:
        parts.threshold = file["log_threshold"].float().exp()
    else:
        parts.threshold = file["threshold"]

    # the decoder's norms, where the selection goes by them
    by_norm = cfg.take("rescale_acts_by_decoder_norm", bool, kind in BATCH_TOPK)
    if by_norm and kind in ("topk", *BATCH_TOPK):
        n = row_norms(parts.W_dec)
        check_length(folder, "b_enc", parts.b_enc, len(n), "W_dec")
        parts = replace(parts, enc=n, dec=1 / n, b_enc=parts.b_enc.float() * n)
    return parts


def _sae_lens_kind(cfg, folder):
    """-> architecture, k of a TopK. Version 5 spells a TopK as a standard SAE with another activation."""
    kind = cfg.take("architecture", str) if "metadata" in cfg else cfg.take("architecture", str, "standard")
    activation = cfg.take("activation_fn_str", str, None) or cfg.take("activation_fn", str, None) or "relu"
    if kind not in ("topk", "jumprelu", "standard", *BATCH_TOPK) or activation not in ("relu", "topk"):
        raise InputError(f"{folder}: architecture {shown(kind)} with activation {shown(activation)} is not supported, "
                         "only topk, jumprelu, standard, batchtopk and matryoshka_batchtopk")

    extra = cfg.take("activation_fn_kwargs", dict, None) or cfg
    extra.only(signed=False)
    if kind != "topk" and activation != "topk":
        return kind, None
    place = extra if "k" in extra else cfg
    return "topk", place.take("k", int, at_least=1)


def _sae_lens_on_special(kind, about):
    """What the file says, else the family's habit: TopK and BatchTopK with BOS, others, as Gemma Scope, without."""
    excluded = about.get("exclude_special_tokens")
    if excluded is not None:
        several = isinstance(excluded, list)
        return not about.take("exclude_special_tokens", [int] if several else bool)
    trained_as = about.take("training_architecture", str, None) or kind
    return kind == "topk" or trained_as in BATCH_TOPK


# ---- dictionary_learning ---------------------------------------------------------------------------------------------

def read_dictionary_learning(folder, layer=None):
    """z = ReLU(pre), pre = W_e (x - b) + b_e;  x̂ = W_d z + b, and by its dict_class:

    AutoEncoder             as it is
    AutoEncoderTopK         the k largest of z
    BatchTopKSAE, MatryoshkaBatchTopKSAE        z · H(z - θ), θ one number
    JumpReluAutoEncoder     pre = W_e x + b_e and z · H(pre - θ), θ [M]: Gemma Scope's formula

    Trained with BOS unless the buffer says remove_bos.
    """
    cfg = read_object(folder / "config.json")
    trainer = cfg.take("trainer", dict)
    buffer = cfg.take("buffer", dict, None)
    kind = trainer.take("dict_class", str)
    if kind not in DICTIONARIES:
        raise InputError(f"{folder}: dict_class {shown(kind)} is not supported, only {', '.join(DICTIONARIES)}")
    at = trainer.take("layer", int, None, at_least=0)
    check_layer(None if at is None else f"blocks.{at}.hook_resid_post", layer, folder)
    submodule = trainer.take("submodule_name", str, None) or ""
    if "mlp" in submodule or "attn" in submodule:
        raise InputError(f"{folder} reads {shown(submodule)}; only a block's output is supported")

    # some classes are made of nn.Linear, some of plain matrices
    file = Tensors(folder / "ae.pt")
    if "W_enc" in file:
        W_enc = Matrix(file, "W_enc", flipped=True)
        W_dec = Matrix(file, "W_dec")
        b_enc = file["b_enc"]
    else:
        W_enc = Matrix(file, "encoder.weight")
        W_dec = Matrix(file, "decoder.weight", flipped=True)
        b_enc = file["encoder.bias"]
    parts = Parts(
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=file["bias" if kind == "AutoEncoder" else "b_dec"],
        centred=kind != "JumpReluAutoEncoder",
        on_special=not (buffer and buffer.take("remove_bos", bool, False)),
        shape=(trainer.take("dict_size", int, at_least=1), trainer.take("activation_dim", int, at_least=1)))

    # which latents are active
    zeros = torch.zeros(parts.b_enc.shape)
    if kind == "AutoEncoder":
        parts.threshold = zeros
    elif kind == "AutoEncoderTopK":
        parts.k = file.number("k", int) if "k" in file else trainer.take("k", int, at_least=1)
    elif kind == "JumpReluAutoEncoder":
        parts.threshold = file["threshold"]
    else:
        parts.threshold = zeros + _learnt_threshold(file, "threshold")
    return parts


def _learnt_threshold(file, name):
    """θ of a BatchTopK. It starts at -1 (dictionary_learning) or 0 (SAELens), where every positive latent would be active:
    no one means that.
    """
    theta = file.number(name, float)
    if theta <= 0:
        raise InputError(f"{file.path}: {name} is {theta:g}, so this BatchTopK SAE has not learnt one yet: take a "
                         "later checkpoint")
    return theta


# ---- What the readers share ------------------------------------------------------------------------------------------

def row_norms(matrix):
    """‖row‖ for each row, [M] in float32; never zero, so that a dead latent can be divided by it."""
    norms = [rows.float().norm(dim=1) for rows in matrix.read().split(ROWS)]
    return torch.cat(norms).clamp(min=torch.finfo().tiny)


def check_length(where, name, tensor, length, matrix="W_enc"):
    """InputError unless the tensor is a vector as long as the matrix implies."""
    if list(tensor.shape) != [length]:
        raise InputError(f"{where}: {name} is {list(tensor.shape)}, but {matrix} implies [{length}]")


def refuse_scaling(file, *names):
    for name in file.names.intersection(names):
        if not bool((file[name] == 1).all()):
            raise InputError(f"{file.path}: a {name} other than 1 is not supported")


def check_layer(hook, layer, where):
    """InputError unless hook, as TransformerLens or transformers name it, is a block's output, `layer`'s if given."""
    if hook is None:
        return
    match = re.fullmatch(r"blocks\.([0-9]{1,4})\.hook_resid_(post|pre)|model\.layers\.([0-9]{1,4})", hook)
    if match is None:
        raise InputError(f"{where} reads {shown(hook)}; only a block's output, blocks.N.hook_resid_post, is supported")

    at = int(match[1] or match[3])
    if match[2] == "pre":                               # the input of a block is the output of the one before
        at -= 1
    if at < 0:
        raise InputError(f"{where} reads {hook}, the embeddings; only a block's output, blocks.N.hook_resid_post, is "
                         "supported")
    if layer not in (None, at):
        raise InputError(f"{where} was trained on block {at}, not {layer}: pass --layer {at}, or another SAE")
