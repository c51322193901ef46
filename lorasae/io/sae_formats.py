"""SAE files of other projects <-> sae.py: Gemma Scope, Llama Scope, sparsify, SAELens, dictionary_learning.

    python train.py --model gemma-2-2b --sae SOURCE         a file, a folder, or OWNER/NAME[/FOLDER] on the Hub
    sae = load_sae("google/gemma-scope-2b-pt-res", layer=12, width="16k", l0=82)

The files in a folder decide its format. Each reader's docstring is what that project computes; `build` writes it in the
terms of sae.py, where TopK reads x - b_dec and JumpReLU reads x. Weights are read and converted one tensor and a few
thousand latents at a time: an SAE in bfloat16 never exists in float32.

Shapes: D d_model, M latents. W_enc and W_dec are [M, D] below, a row a latent, whichever way round the file has them.
"""
import math
import pickle
import re
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from lorasae.io.checkpoint import DTYPES, open_weights
from lorasae.errors import InputError
from lorasae.io.disk import read_json, write_bytes, write_json
from lorasae.io.hub import SAE_FILES, sae_files
from lorasae.sae import JumpReLU, TopK

ROWS = 8192                                                     # latents converted at a time
DAMAGED = (OSError, EOFError, KeyError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error,
           pickle.UnpicklingError)                              # what numpy and torch raise over a damaged file


def load_sae(source, *, layer=None, width=None, l0=None, dtype=None, device="cpu", llama_scope="openmoss"):
    """A frozen TopK or JumpReLU from a local file or folder, the folder of a run, or OWNER/NAME[/FOLDER] on the Hub.

    layer, width, l0: which SAE, where the source holds several (hub.sae_files). dtype: of the weights, a torch dtype or
    its name, float32 if None; thresholds stay float32. llama_scope: see read_llama_scope. Raises InputError for what is
    wrong with the files, also if they say that the SAE belongs to another layer.
    """
    dtype = DTYPES.get(dtype, torch.float32 if dtype is None else dtype)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    path = sae_files(source, layer=layer, width=width, l0=l0)
    readers = {"gemma_scope": read_gemma_scope, "sae_lens": read_sae_lens, "sparsify": read_sparsify,
               "llama_scope": partial(read_llama_scope, variant=llama_scope),
               "dictionary_learning": read_dictionary_learning}
    known = [name for name in readers if all((path / file).is_file() for file in SAE_FILES[name])]
    if len(known) > 1:
        raise InputError(f"{path} holds SAEs of several formats ({', '.join(known)}): keep each in a folder of its own")
    return build(path, **readers[known[0] if known else "gemma_scope"](path, layer), dtype=dtype, device=device)


def check_fits(sae, d_model, name="the SAE"):
    """Raises InputError unless the SAE reads activations of width d_model."""
    if sae.W_enc.shape[1] != d_model:
        raise InputError(f"{name} reads activations of width {sae.W_enc.shape[1]}, but the model's have {d_model}: it "
                         "was trained on another model")


# ---- Reading: what each project computes, and its tensors as keywords of `build` -------------------------------------

def read_gemma_scope(path, layer=None):
    """pre = x W_enc + b_enc;  z = ReLU(pre) · H(pre - θ);  x̂ = z W_dec + b_dec, with W_enc [D, M] in the file.

    Trained without BOS. `path` is a folder with params.npz or an .npz file, which does not say the layer.
    """
    file = Tensors(path if path.is_file() else path / "params.npz")
    refuse_scaling(file, "scaling_factor")
    W_enc, W_dec = ("W_enc", "W_dec") if "W_enc" in file else ("w_enc", "w_dec")
    return {"W_enc": lambda: file[W_enc].T, "W_dec": lambda: file[W_dec], "b_enc": file["b_enc"],
            "b_dec": file["b_dec"], "threshold": file["threshold"].clamp(min=0), "centred": False, "on_special": False}


def read_llama_scope(folder, layer=None, variant="openmoss"):
    """pre = f_in W_e x + b_e;  z = pre · H(pre c/f_in - θ);  x̂ = (W_d z + b_d) / f_out, with W_d [D, M] in the file.

    f = √D / the dataset's mean activation norm (in, out); c = ‖W_d,i‖ f_in/f_out; θ one number. Trained without BOS.
    "openmoss", the authors' arithmetic: latents are pre c/f_in, so decoder rows have norm 1 and the threshold is θ.
    "sae_lens": SAELens leaves out c and f_out: z = ReLU(pre) · H(pre - θ f_in), x̂ = (W_d z + b_d) / f_in.
    "sae_lens_legacy": before its 5.10.3, hence in the paper, H(pre - θ): L0 far too high wherever f_in > 1.
    """
    cfg = config(folder / "hyperparams.json")
    hook = need(cfg, "hook_point_in", folder, str)
    check_layer(hook, layer, folder)
    only(folder, cfg, act_fn="jumprelu", norm_activation="dataset-wise", hook_point_out=hook, use_glu_encoder=False,
         apply_decoder_bias_to_pre_encoder=False, use_decoder_bias=True)
    D, norms = need(cfg, "d_model", folder), need(cfg, "dataset_average_activation_norm", folder, dict)
    f_in, f_out = (math.sqrt(D) / need(norms, side, folder) for side in ("in", "out"))
    theta = need(cfg, "jump_relu_threshold", folder)
    file = Tensors(folder / "checkpoints" / "final.safetensors")
    W_dec, b_enc, b_dec = file["decoder.weight"].T, file["encoder.bias"].float(), file["decoder.bias"].float()
    if variant == "openmoss":
        include = cfg.get("sparsity_include_decoder_norm", True)
        c = row_norms(W_dec) * f_in / f_out if include else torch.ones_like(b_enc)
        folded = {"enc": c, "dec": f_in / f_out / c, "b_enc": b_enc * c / f_in, "b_dec": b_dec / f_out}
    elif variant in ("sae_lens", "sae_lens_legacy"):
        theta = theta * f_in if variant == "sae_lens" else theta
        folded = {"enc": f_in, "dec": 1 / f_in, "b_enc": b_enc, "b_dec": b_dec / f_in}
    else:
        raise InputError(f"llama_scope {variant!r} is not one of openmoss, sae_lens, sae_lens_legacy")
    return {"W_enc": lambda: file["encoder.weight"], "W_dec": lambda: W_dec, "threshold": torch.full_like(b_enc, theta),
            "centred": False, "on_special": False, "shape": (need(cfg, "d_sae", folder), D), **folded}


def read_sparsify(folder, layer=None):
    """z = TopK(ReLU((x - b_dec) W_encᵀ + b_enc));  x̂ = z W_dec + b_dec, both matrices [M, D] in the file.

    Trained with BOS. Does not say the layer. `multi_topk` is a matter of its training loss alone.
    """
    cfg = config(folder / "cfg.json")
    only(folder, cfg, activation="topk", skip_connection=False, transcode=False, signed=False)
    D = need(cfg, "d_in", folder)
    M = cfg.get("num_latents") or D * need(cfg, "expansion_factor", folder)
    file = Tensors(folder / "sae.safetensors")
    if "W_skip" in file:
        raise InputError(f"{folder} has a skip connection (W_skip), which is not supported")
    return {"W_enc": lambda: file["encoder.weight"], "W_dec": lambda: file["W_dec"], "b_enc": file["encoder.bias"],
            "b_dec": file["b_dec"], "k": need(cfg, "k", folder, int), "centred": True, "on_special": True,
            "shape": (M, D)}


def read_sae_lens(folder, layer=None):
    """pre = (x - a b_dec) W_enc + b_enc;  x̂ = z W_dec + b_dec; W_enc [D, M] in the file, a = apply_b_dec_to_input.

    z is ReLU(TopK(pre)), or ReLU(pre) · H(pre - θ), or ReLU(pre) ("standard": θ = 0). If rescale_acts_by_decoder_norm,
    with n those norms, z = ReLU(TopK(n pre)) and x̂ = (z/n) W_dec + b_dec. Reads version 6 and the flat version 5.
    Trained without BOS if exclude_special_tokens; where absent, TopK with it and the others, as Gemma Scope, without.
    """
    cfg = config(folder / "cfg.json")
    about = cfg.get("metadata") or cfg
    excluded = about.get("exclude_special_tokens")
    kind, k, extra = cfg.get("architecture", "standard"), cfg.get("k"), cfg.get("activation_fn_kwargs") or {}
    activation = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    if activation == "topk":
        kind, k = "topk", extra.get("k", k)
    if kind not in ("topk", "jumprelu", "standard") or activation not in ("relu", "topk"):
        raise InputError(f"{folder}: architecture {kind!r} with activation {activation!r} is not supported, only topk, "
                         "jumprelu and standard")
    only(folder, extra, signed=False)
    only(folder, {key: value or "none" for key, value in cfg.items()}, normalize_activations="none",
         reshape_activations="none", hook_head_index="none")
    check_layer(about.get("hook_name") or about.get("hook_point"), layer, folder)
    file = Tensors(folder / "sae_weights.safetensors")
    refuse_scaling(file, "scaling_factor", "finetuning_scaling_factor")
    parts = {"W_enc": lambda: file["W_enc"].T, "W_dec": lambda: file["W_dec"], "b_enc": file["b_enc"].float(),
             "b_dec": file["b_dec"], "centred": bool(cfg.get("apply_b_dec_to_input", True)),
             "on_special": kind == "topk" if excluded is None else not excluded,
             "shape": (need(cfg, "d_sae", folder), need(cfg, "d_in", folder))}
    if kind == "topk" and cfg.get("rescale_acts_by_decoder_norm"):
        n = row_norms(file["W_dec"])
        parts |= {"enc": n, "dec": 1 / n, "b_enc": parts["b_enc"] * n}
    if kind == "topk":
        return parts | {"k": need({"k": k}, "k", folder, int)}
    theta = file["threshold"].clamp(min=0) if kind == "jumprelu" else torch.zeros_like(parts["b_enc"])
    return parts | {"threshold": theta}


def read_dictionary_learning(folder, layer=None):
    """AutoEncoder: z = ReLU(W_e (x - b) + b_e), x̂ = W_d z + b.  AutoEncoderTopK: TopK of that, and b is b_dec.

    JumpReluAutoEncoder: Gemma Scope's formula and names. Trained with BOS unless the buffer says remove_bos.
    """
    cfg = config(folder / "config.json")
    trainer, buffer = need(cfg, "trainer", folder, dict), cfg.get("buffer") or {}
    kind, at = need(trainer, "dict_class", folder, str), trainer.get("layer")
    check_layer(None if at is None else f"blocks.{at}.hook_resid_post", layer, folder)
    file = Tensors(folder / "ae.pt")
    parts = {"on_special": not buffer.get("remove_bos", False), "centred": kind != "JumpReluAutoEncoder",
             "shape": (need(trainer, "dict_size", folder), need(trainer, "activation_dim", folder))}
    if kind == "JumpReluAutoEncoder":
        return parts | {"W_enc": lambda: file["W_enc"].T, "W_dec": lambda: file["W_dec"], "b_enc": file["b_enc"],
                        "b_dec": file["b_dec"], "threshold": file["threshold"].clamp(min=0)}
    parts |= {"W_enc": lambda: file["encoder.weight"], "W_dec": lambda: file["decoder.weight"].T,
              "b_enc": file["encoder.bias"]}
    if kind == "AutoEncoder":
        return parts | {"b_dec": file["bias"], "threshold": torch.zeros_like(parts["b_enc"])}
    if kind == "AutoEncoderTopK":
        return parts | {"b_dec": file["b_dec"], "k": int(file["k"]) if "k" in file else need(trainer, "k", folder, int)}
    raise InputError(f"{folder}: dict_class {kind!r} is not supported, only AutoEncoder, AutoEncoderTopK and "
                     "JumpReluAutoEncoder")


# ---- Building --------------------------------------------------------------------------------------------------------

def build(where, *, W_enc, b_enc, W_dec, b_dec, centred, on_special, dtype, device, threshold=None, k=None, enc=1.0,
          dec=1.0, shape=None):
    """The TopK (k given) or JumpReLU (threshold given) of these tensors.

    W_enc, W_dec: functions that return [M, D]; enc, dec: factors of their rows, [M] or a number. centred: whether the
    encoder reads x - b_dec; where sae.py's class does the other, b_enc takes up W_enc b_dec. shape: (M, D) if known.
    """
    weight = W_enc()
    if weight.dim() != 2 or shape not in (None, tuple(weight.shape)):
        raise InputError(f"{where}: W_enc is {list(weight.shape)} as [M, D], expected {list(shape or 'MD')}")
    M, D = weight.shape
    with torch.device("meta"):
        sae = JumpReLU(D, M, on_special=on_special) if k is None else TopK(D, M, k, on_special=on_special)
    b_enc, b_dec = b_enc.float(), b_dec.float()
    for name, tensor, expected in (("b_enc", b_enc, [M]), ("b_dec", b_dec, [D]), ("threshold", threshold, [M])):
        if tensor is not None and list(tensor.shape) != expected:
            raise InputError(f"{where}: {name} is {list(tensor.shape)}, but W_enc implies {expected}")
    if centred != (k is not None):
        b_enc = b_enc + (-1 if centred else 1) * torch.cat([rows.float() @ b_dec for rows in weight.split(ROWS)]) * enc
    tensors = {"W_enc": scaled(weight, enc, dtype, device), "b_enc": b_enc.to(dtype), "b_dec": b_dec.to(dtype)}
    del weight                                                          # before the next one is read
    weight = W_dec()
    if list(weight.shape) != [M, D]:
        raise InputError(f"{where}: W_dec is {list(weight.shape)} as [M, D], but W_enc implies {[M, D]}")
    tensors["W_dec"] = scaled(weight, dec, dtype, device)
    if k is None:
        tensors["threshold"] = threshold.float()
    for name, tensor in tensors.items():
        if not all(bool(rows.isfinite().all()) for rows in tensor.split(ROWS)):
            raise InputError(f"{where}: {name} holds values that are not finite: the file is damaged")
        setattr(sae, name, nn.Parameter(tensor.to(device), requires_grad=False))
    return sae


def scaled(weight, factor, dtype, device):
    """diag(factor) weight, contiguous, in `dtype` on `device`; computed there in float32, ROWS at a time."""
    factor = torch.as_tensor(factor, device=device).expand(len(weight))
    out = torch.empty(weight.shape, dtype=dtype, device=device)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        out[rows] = weight[rows].to(device).float() * factor[rows, None]
    return out


def row_norms(weight):
    """‖row‖ for each row, [M] in float32; never zero, so that a dead latent can be divided by it."""
    return torch.cat([rows.float().norm(dim=1) for rows in weight.split(ROWS)]).clamp(min=torch.finfo().tiny)


def config(path):
    """The object in a JSON file."""
    cfg = read_json(path)
    if not isinstance(cfg, dict):
        raise InputError(f"{path} is not a JSON object")
    return cfg


def need(cfg, key, where, kind=(int, float)):
    """cfg[key]; InputError where it is missing or of another kind."""
    if not isinstance(cfg.get(key), kind):
        raise InputError(f"{where}: its configuration has {key} {cfg.get(key)!r}, which is not as it should be")
    return cfg[key]


def only(where, cfg, **supported):
    """InputError where the configuration holds another value than the supported one; what it does not hold is fine."""
    for key, value in supported.items():
        if cfg.get(key, value) != value:
            raise InputError(f"{where}: {key} {cfg[key]!r} is not supported, only {value!r}")


def refuse_scaling(file, *names):
    for name in file.names.intersection(names):
        if not bool((file[name] == 1).all()):
            raise InputError(f"{file.path}: a {name} other than 1 is not supported")


def check_layer(hook, layer, where):
    """InputError unless hook, as TransformerLens or transformers name it, is a block's output, `layer`'s if given."""
    if hook is None:
        return
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)|model\.layers\.(\d+)", hook)
    if match is None:
        raise InputError(f"{where} reads {hook}; only a block's output, blocks.N.hook_resid_post, is supported")
    at = int(match[1] or match[3]) - (match[2] == "pre")
    if layer not in (None, at):
        raise InputError(f"{where} was trained on block {at}, not {layer}: pass --layer {at}, or another SAE")


class Tensors:
    """The named tensors of an .npz, .pt or .safetensors file, read when asked for. Nothing in the file is executed."""

    def __init__(self, path):
        self.path = path
        if path.suffix == ".safetensors":
            file = open_weights(path)
            self.names, self.read = set(file.keys()), file.get_tensor
            return
        try:
            if path.suffix == ".npz":
                file = np.load(path, allow_pickle=False)
                self.names, self.read = set(file.files), lambda name: torch.from_numpy(file[name])
            else:
                file = torch.load(path, map_location="cpu", weights_only=True)
                self.names, self.read = set(file.keys()), file.__getitem__
        except (*DAMAGED, AttributeError) as error:                     # AttributeError: a lone array or tensor
            raise InputError(f"{path} is refused: not a whole file of named tensors and nothing else "
                             f"({first_line(error)})") from error

    def __contains__(self, name):
        return name in self.names

    def __getitem__(self, name):
        if name not in self.names:
            raise InputError(f"{self.path} lacks the tensor {name}; it has {', '.join(sorted(self.names)) or 'none'}")
        try:
            return self.read(name)
        except DAMAGED as error:
            raise InputError(f"{self.path}: cannot read {name} ({first_line(error)})") from error


def first_line(error):
    return str(error).strip().partition("\n")[0] or type(error).__name__


# ---- Writing ---------------------------------------------------------------------------------------------------------

def save_sae(sae, folder, *, model_name, layer, context, **metadata):
    """Writes SAELens 6's cfg.json and sae_weights.safetensors, which sae_lens.SAE.load_from_disk and load_sae read.

    layer: whose output it reads; context: tokens a training sequence, BOS included; metadata: more JSON for cfg.json.
    """
    topk = isinstance(sae, TopK)
    tensors = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    tensors |= {} if topk else {"threshold": sae.threshold}
    write_tensors(folder, "sae_weights.safetensors", tensors)
    M, D = sae.W_enc.shape
    write_json(Path(folder) / "cfg.json", {
        "architecture": "topk" if topk else "jumprelu", "d_in": D, "d_sae": M,
        "dtype": "float32",                                     # what SAELens casts to; thresholds need it
        "device": "cpu", "apply_b_dec_to_input": topk, "normalize_activations": "none", "reshape_activations": "none",
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if topk else {}),
        "metadata": {"sae_lens_version": "6.0.0", "sae_lens_training_version": None, "model_name": model_name,
                     "hook_name": f"blocks.{layer}.hook_resid_post", "hf_hook_name": f"model.layers.{layer}",
                     "prepend_bos": True, "context_size": context, "exclude_special_tokens": not sae.on_special,
                     **metadata}})


def save_sparsify(sae, folder):
    """Writes sparsify's cfg.json and sae.safetensors, which sparsify.SparseCoder.load_from_disk and load_sae read."""
    if not isinstance(sae, TopK):
        raise InputError("sparsify's format holds TopK SAEs only: use save_sae for a JumpReLU")
    write_tensors(folder, "sae.safetensors", {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc,
                                              "W_dec": sae.W_dec, "b_dec": sae.b_dec})
    M, D = sae.W_enc.shape
    write_json(Path(folder) / "cfg.json", {
        "activation": "topk", "d_in": D, "num_latents": M, "expansion_factor": max(1, M // D), "k": sae.k,
        "normalize_decoder": True, "multi_topk": False, "skip_connection": False, "transcode": False})


def write_tensors(folder, name, tensors):
    write_bytes(Path(folder) / name, save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}))
