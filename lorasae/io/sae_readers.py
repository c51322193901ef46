"""What the SAEs of other projects compute, and where their files keep the tensors.

Each reader states that project's formula and returns Parts, from which load_sae builds an SAE.

    Gemma Scope, Llama Scope, sparsify      the ones that the paper uses
    SAELens                                 TopK, JumpReLU, ReLU, BatchTopK and Matryoshka
    dictionary_learning                     the same kinds

A BatchTopK SAE (Bussmann et al. 2024) keeps k latents per token on average over a training batch.
After training, a threshold θ learnt during it replaces the batch: z = ReLU(pre) · H(pre - θ), a
JumpReLU whose latents share θ. (Until θ is learnt it is 0 or -1, which is refused: every positive
latent would be active.) Matryoshka SAEs (Bussmann et al. 2025) are BatchTopK SAEs that are also
trained to reconstruct from the first latents alone; after training they compute the same.

Shapes: D d_model, M latents. W_enc and W_dec are [M, D], whichever way round the file stores them.
"""
import math
import re
from dataclasses import dataclass, replace

import torch

from lorasae.errors import InputError
from lorasae.io.files import Fields, Tensors, check_tensor, read_object, shown

ROWS = 8192                                             # latents converted at a time
PLAIN = ("W_enc.T", "W_dec", "b_enc", "b_dec")          # names; ".T": stored as [D, M]
DICTIONARIES = {                                        # dictionary_learning's name: SAELens's
    "AutoEncoder": "standard", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "batchtopk", "JumpReluAutoEncoder": "jumprelu"}
SITES = {"resid": "a block's output", "mlp": "the output of an MLP"}
# The folders of Gemma Scope 2
NAMED = re.compile(r"/(resid_post|mlp_out)(?:_all)?/layer_(\d+)_width_[^/]*$")
# Hook names in TransformerLens and transformers. A block's input is the output of the one before.
HOOKS = {
    "resid": re.compile(r"blocks\.(\d{1,4})\.hook_resid_(post|pre)"
                        r"|model\.layers\.(\d{1,4})(?:\.output)?"),
    "mlp": re.compile(r"blocks\.(\d{1,4})\.hook_(mlp_out)"
                      r"|model\.layers\.(\d{1,4})\.(?:mlp|post_feedforward_layernorm)"
                      r"(?:\.output)?"),
}


@dataclass
class Parts:
    """An SAE as its file has it: a JumpReLU if it has `threshold` (0 for ReLU), a TopK if `k`."""
    file: Tensors
    W_enc: str                                          # names in the file, for `matrix`
    W_dec: str
    b_enc: torch.Tensor                                 # [M]
    b_dec: torch.Tensor                                 # [D]
    centred: bool                                       # whether the encoder reads x - b_dec
    on_special: bool                                    # whether it was trained on BOS and EOS
    max_norm: float | None = None                       # the largest norm that it was trained on
    after_norm: bool = True                             # for an MLP on Gemma: see sae.SAE
    threshold: torch.Tensor | float | None = None       # [M], or one number for all latents
    k: int | None = None
    enc: torch.Tensor | float = 1.0                     # factors for the rows of W_enc
    dec: torch.Tensor | float = 1.0                     # factors for the rows of W_dec
    model_name: str | None = None                       # the model it was trained on, if stated
    hook: str | None = None                             # what it reads, as in HOOKS, if stated

    def matrix(self, name):
        """W_enc or W_dec, [M, D] in the file's dtype. Read when used, so that memory holds one."""
        weight = self.file[name.removesuffix(".T")]
        weight = weight.transpose(0, -1) if name.endswith(".T") else weight
        check_tensor(f"{self.file.path}: {name}", weight, [len(self.b_enc), len(self.b_dec)])
        return weight

    def decoder_norms(self):
        """Row norms of W_dec, [M] in float32; never zero, so it is safe to divide by them."""
        norms = [rows.float().norm(dim=1) for rows in self.matrix(self.W_dec).split(ROWS)]
        return torch.cat(norms).clamp(min=torch.finfo().tiny)


def parts_of(file, names, kind, cfg=None, **about):
    """The Parts of a file with these names for W_enc, W_dec, b_enc and b_dec.

    kind: "topk" (k is in cfg), "jumprelu" or "batchtopk" (thresholds in the file), or "standard".
    """
    for name in {"scaling_factor", "finetuning_scaling_factor"}.intersection(file):
        if not (file[name] == 1).all():
            raise InputError(f"{file.path}: a {name} other than 1 is not supported")
    W_enc, W_dec, b_enc, b_dec = names
    for name in (b_enc, b_dec):
        if file[name].dim() != 1 or not file[name].numel():
            raise InputError(f"{file.path}: {name} is {list(file[name].shape)}, but should be a "
                             "vector")
    parts = Parts(file, W_enc, W_dec, file[b_enc], file[b_dec], **about)

    if kind == "topk":
        parts.k = cfg.take("k", int, at_least=1)
    elif kind == "standard":
        parts.threshold = 0.0
    elif kind == "jumprelu":
        parts.threshold = file["threshold"]
    elif kind == "batchtopk":
        threshold = file["threshold"]
        if threshold.numel() != 1 or not threshold > 0:
            raise InputError(f"{file.path}: threshold is {shown(threshold)}, but should be above "
                             "0: it has not been learnt yet")
        parts.threshold = threshold.item()
    return parts


# ---- Gemma Scope and Llama Scope -----------------------------------------------------------------

def read_gemma_scope(file):
    """pre = x W_enc + b_enc;  z = ReLU(pre) · H(pre - θ);  x̂ = z W_dec + b_dec

    The file stores W_enc as [D, M] and does not state the layer. Trained without BOS.
    """
    return parts_of(file, PLAIN, "jumprelu", centred=False, on_special=False)


def read_gemma_scope_2(file):
    """Gemma Scope's formula, in params.safetensors; config.json or folder name gives the hook.

    The other kinds in Gemma Scope 2 are refused: transcoders, crosscoders, cross-layer transcoders.
    """
    folder, cfg = file.path.parent, {}
    named = NAMED.search(folder.absolute().as_posix())
    if (folder / "config.json").exists():
        cfg = read_object(folder / "config.json")
        cfg.only(architecture="jump_relu", type="sae", affine_connection=False)
        hook = cfg.take("hf_hook_point_in", str)
        cfg.only(hf_hook_point_out=hook)
    elif named:
        hook = f"blocks.{named[2]}.hook_{named[1]}"
    else:
        raise InputError(f"{folder} has no config.json, and its name does not give site and layer: "
                         "keep its name on the Hub, such as "
                         "resid_post/layer_12_width_16k_l0_medium")

    # Some files say gemma-v3-270m-pt; the repository is gemma-3-270m.
    name = str(cfg.get("model_name") or "").replace("-v3", "-3").replace("270m-pt", "270m")
    return parts_of(
        file, ("w_enc.T", "w_dec", "b_enc", "b_dec"), "jumprelu", centred=False, on_special=False,
        model_name=name or None, hook=hook)


def read_llama_scope(file, cfg):
    """pre = f_in W_e x + b_e;  z = pre · H(pre c/f_in - θ);  x̂ = (W_d z + b_d) / f_out

    f = √D / the dataset's mean activation norm (in, out); c = ‖W_d,i‖ f_in/f_out; θ is one number.
    The file stores W_d as [D, M]. Trained without BOS. Latents here are pre c/f_in, so that decoder
    rows have norm 1 and the threshold is θ. (SAELens leaves out c and f_out.)
    """
    hook = cfg.take("hook_point_in", str)
    cfg.only(
        act_fn="jumprelu", norm_activation="dataset-wise", hook_point_out=hook,
        use_decoder_bias=True, use_glu_encoder=False, apply_decoder_bias_to_pre_encoder=False)
    norms = cfg.take("dataset_average_activation_norm", dict)

    names = ("encoder.weight", "decoder.weight.T", "encoder.bias", "decoder.bias")
    parts = parts_of(
        file, names, None, centred=False, on_special=False, after_norm=False, hook=hook)
    D = len(parts.b_dec)
    f_in = math.sqrt(D) / norms.take("in", float, above=0)
    f_out = math.sqrt(D) / norms.take("out", float, above=0)
    c = 1.0
    if cfg.take("sparsity_include_decoder_norm", bool, True):
        c = parts.decoder_norms() * f_in / f_out
    return replace(
        parts,
        threshold=cfg.take("jump_relu_threshold", float, at_least=0),
        enc=c,
        dec=f_in / f_out / c,
        b_enc=parts.b_enc.float() * c / f_in,
        b_dec=parts.b_dec.float() / f_out)


# ---- sparsify ------------------------------------------------------------------------------------

def read_sparsify(file, cfg):
    """z = TopK(ReLU((x - b_dec) W_encᵀ + b_enc));  x̂ = z W_dec + b_dec

    The file stores both matrices as [M, D] and does not state the layer. Trained with BOS.
    `multi_topk` only changes the training loss.
    """
    cfg.only(activation="topk", skip_connection=False, transcode=False, signed=False)
    names = ("encoder.weight", "W_dec", "encoder.bias", "b_dec")
    return parts_of(file, names, "topk", cfg, centred=True, on_special=True, after_norm=False)


# ---- SAELens -------------------------------------------------------------------------------------

def read_sae_lens(file, cfg):
    """pre = (x - a b_dec) W_enc + b_enc;  x̂ = z W_dec + b_dec, with a = apply_b_dec_to_input

    z is ReLU(TopK(pre)), or ReLU(pre) · H(pre - θ), or ReLU(pre) ("standard": θ = 0). With
    rescale_acts_by_decoder_norm and decoder norms n, n pre replaces pre, and x̂ = (z/n) W_dec +
    b_dec. The file stores W_enc as [D, M]. Reads version 6 and the flat version 5.

    BatchTopK and Matryoshka SAEs are saved for inference as jumprelu, with n folded in; their
    training checkpoints are not supported.
    """
    # Versions 5 and 6 nest different keys in inner objects: flatten them all.
    for key in ("metadata", "activation_fn_kwargs"):
        cfg = Fields({**(cfg.take(key, dict, None) or {}), **cfg}, cfg.where)
    kind = sae_lens_kind(cfg)
    parts = parts_of(
        file, PLAIN, kind, cfg,
        centred=cfg.take("apply_b_dec_to_input", bool, True),
        on_special=sae_lens_on_special(kind, cfg),
        max_norm=cfg.take("max_norm", float, None, above=0),
        after_norm=not str(cfg.get("hf_hook_name") or cfg.get("hook_name")).endswith(
            (".mlp", ".mlp.output")),
        model_name=cfg.take("model_name", str, None),
        hook=cfg.get("hook_name"))

    # Fold in the decoder's norms if TopK selects by rescaled latents.
    if cfg.take("rescale_acts_by_decoder_norm", bool, False) and kind == "topk":
        n = parts.decoder_norms()
        parts = replace(parts, enc=n, dec=1 / n, b_enc=parts.b_enc.float() * n)
    return parts


def sae_lens_kind(cfg):
    """The architecture. In version 5, a TopK is a standard SAE with topk as its activation."""
    kind = cfg.take("architecture", str, one_of=("topk", "jumprelu", "standard"))
    activation = cfg.take("activation_fn_str", str, None, one_of=("relu", "topk"))
    cfg.only(signed=False)
    for key in ("normalize_activations", "reshape_activations", "hook_head_index"):
        if str(cfg.get(key)).lower() not in ("none", "false"):
            raise InputError(f"{cfg.where}: {key} {shown(cfg[key])} is not supported, only 'none'")
    return "topk" if activation == "topk" else kind


def sae_lens_on_special(kind, cfg):
    """What the file says, or else by kind: TopK and BatchTopK with BOS, others without."""
    if not cfg.take("prepend_bos", bool, True):         # trained without BOS at position 0
        return False
    excluded = cfg.get("exclude_special_tokens")        # true, or a list of tokens
    if excluded is not None:
        return not excluded
    return str(cfg.get("training_architecture") or kind).endswith("topk")


# ---- dictionary_learning -------------------------------------------------------------------------

def read_dictionary_learning(file, cfg):
    """z = ReLU(pre), pre = W_e (x - b) + b_e;  x̂ = W_d z + b, and depending on dict_class:

    AutoEncoder             as above
    AutoEncoderTopK         the k largest of z
    BatchTopKSAE, MatryoshkaBatchTopKSAE        z · H(z - θ), θ one number
    JumpReluAutoEncoder     pre = W_e x + b_e and z · H(pre - θ), θ [M]: Gemma Scope's formula

    Trained with BOS unless the buffer says remove_bos.
    """
    trainer = cfg.take("trainer", dict)
    buffer = cfg.take("buffer", dict, None) or cfg
    kind = DICTIONARIES[trainer.take("dict_class", str, one_of=[*DICTIONARIES])]
    at = trainer.take("layer", int, None, at_least=0)
    submodule = trainer.take("submodule_name", str, None) or ""
    part = ".mlp" if "mlp" in submodule else ".attn" if "attn" in submodule else ""
    unknown = at is None and not part

    # Some classes use plain matrices, others nn.Linear.
    b_dec = "bias" if kind == "standard" else "b_dec"
    linear = ("encoder.weight", "decoder.weight.T", "encoder.bias", b_dec)
    return parts_of(
        file, PLAIN if "W_enc" in file else linear, kind, trainer,
        centred=kind != "jumprelu",
        on_special=not buffer.take("remove_bos", bool, False),
        after_norm=False,                               # transformers' mlp ends before the norm
        model_name=trainer.take("lm_name", str, None),
        hook=None if unknown else f"model.layers.{at}{part}")


FORMATS = {                             # {name: (reader, files)}; the first file has the tensors
    "gemma_scope": (read_gemma_scope, ("params.npz",)),
    "gemma_scope_2": (read_gemma_scope_2, ("params.safetensors",)),
    "llama_scope": (read_llama_scope, ("checkpoints/final.safetensors", "hyperparams.json")),
    "sae_lens": (read_sae_lens, ("sae_weights.safetensors", "cfg.json")),
    "sparsify": (read_sparsify, ("sae.safetensors", "cfg.json")),
    "dictionary_learning": (read_dictionary_learning, ("ae.pt", "config.json")),
}


# ---- What the readers share ----------------------------------------------------------------------

def check_layer(hook, layer, where, site):
    """Raises InputError unless `hook` (see HOOKS) is at this site and, if given, in `layer`."""
    if hook is None:
        return
    match = HOOKS[site].fullmatch(str(hook))
    at = int(match[1] or match[3]) - (match[2] == "pre") if match else -1
    if at < 0:
        instead = "; --site mlp reads the outputs of MLPs" if site == "resid" else ""
        raise InputError(f"{where} reads {shown(hook)}, which is not {SITES[site]}{instead}")
    if layer not in (None, at):
        raise InputError(
            f"{where} was trained on block {at}, not {layer}: pass --layer {at}, or another SAE")
