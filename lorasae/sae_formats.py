"""The SAE files of other projects <-> sae.py: Gemma Scope, Llama Scope, sparsify, SAELens, dictionary_learning.

    python train.py --model gemma-2-2b --sae PATH           PATH: a file, a folder, or OWNER/NAME[/FOLDER] on the Hub
    lorasae.load_sae("google/gemma-scope-2b-pt-res", layer=12, width="16k", l0=82)

What is in a folder decides its format. Each reader's docstring is the formula of that project, x̂ as a function of x; `build`
writes it in the terms of sae.py, where TopK reads x - b_dec and JumpReLU reads x, and in no other dtype than asked for: one
tensor at a time, so that an SAE of 131,072 x 4,096 in bfloat16 (2.1 GB) needs about 2 GB more while it loads.

Shapes: D d_model, M latents, K active latents; here W_enc and W_dec are [M, D], a row a latent, whatever the file has.
"""
import math
import pickle
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from lorasae.checkpoint import DTYPES, open_weights
from lorasae.errors import InputError
from lorasae.files import read_json, write_bytes, write_json
from lorasae.hub import SAE_FILES, sae_files
from lorasae.sae import JumpReLU, TopK

ROWS = 4096                                                     # latents converted at a time


def load_sae(source, *, layer=None, width=None, l0=None, dtype=None, device="cpu", llama_scope="openmoss"):
    """A frozen TopK or JumpReLU from a local file or folder, a run's folder, or OWNER/NAME[/FOLDER] on the Hub.

    layer, width, l0: which one, where the source holds several (hub.sae_files). dtype: of the weights, a torch dtype or its
    name, float32 if None; thresholds are float32 always. llama_scope: how to read Llama Scope files (read_llama_scope).
    `on_special` is False for Gemma Scope and Llama Scope, which were trained without BOS, and True for sparsify; SAELens and
    dictionary_learning files say it, or else see their readers. Raises InputError for anything wrong with the files.
    """
    dtype = DTYPES.get(dtype, torch.float32 if dtype is None else dtype)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    path = sae_files(source, layer=layer, width=width, l0=l0)
    if path.is_file():
        return build(path, **read_gemma_scope(path), dtype=dtype, device=device)
    known = [name for name, files in SAE_FILES.items() if all((path / file).is_file() for file in files)]
    if known == ["llama_scope"]:
        parts = read_llama_scope(path, layer, llama_scope)
    elif known == ["gemma_scope"]:
        parts = read_gemma_scope(path / "params.npz")
    elif len(known) == 1:
        parts = {"sae_lens": read_sae_lens, "sparsify": read_sparsify,
                 "dictionary_learning": read_dictionary_learning}[known[0]](path, layer)
    else:
        raise InputError(f"{path} holds SAEs of several formats ({', '.join(known)}): keep one of them in a folder")
    return build(path, **parts, dtype=dtype, device=device)


def check_fits(sae, d_model, name="the SAE"):
    """Raises InputError unless `sae` reads and writes activations [..., d_model]."""
    if sae.W_enc.shape[1] != d_model:
        raise InputError(f"{name} reads activations of width {sae.W_enc.shape[1]}, but the model's have width {d_model}: "
                         "it was trained on another model")


# ---- Readers: a file's formula, and its tensors as the keywords of `build` ---------------------------------------------------

def read_gemma_scope(path):
    """pre = x W_enc + b_enc;  z = ReLU(pre) · [pre > θ];  x̂ = z W_dec + b_dec.     (.npz; W_enc [D, M], W_dec [M, D])"""
    load = npz_tensors(path)
    if "scaling_factor" in load and not bool((load["scaling_factor"]() == 1).all()):
        raise InputError(f"{path}: a scaling_factor other than 1 is not supported")
    return {"W_enc": lambda: load["W_enc"]().T, "b_enc": load["b_enc"](), "W_dec": load["W_dec"], "b_dec": load["b_dec"](),
            "threshold": load["threshold"]().clamp(min=0), "centred": False, "on_special": False}


def read_llama_scope(folder, layer=None, variant="openmoss"):
    """With f = √D / the dataset's mean norm (in, out), c = ||W_d,i|| f_in/f_out and the scalar θ of hyperparams.json:

    pre = f_in W_e x + b_e;  z = pre · [pre c / f_in > θ];  x̂ = (W_d z + b_d) / f_out.               (W_e [M, D], W_d [D, M])

    "openmoss" (the authors' own) holds that as latents pre c / f_in with decoder rows of norm 1, so the threshold is θ itself.
    "sae_lens" is what SAELens computes: z = ReLU(pre) · [pre > θ f_in], f_in for f_out. "sae_lens_legacy", before its 5.10.3,
    which is what the paper could use: [pre > θ], an L0 far too high where f_in > 1.
    """
    if variant not in ("openmoss", "sae_lens", "sae_lens_legacy"):
        raise InputError(f"llama_scope is {variant!r}, expected openmoss, sae_lens or sae_lens_legacy")
    cfg = read_json(folder / "hyperparams.json")
    hook = field(cfg, "hook_point_in", folder)
    check_layer(hook, layer, folder)
    for key, only in (("act_fn", "jumprelu"), ("norm_activation", "dataset-wise"), ("hook_point_out", hook),
                      ("use_glu_encoder", False), ("apply_decoder_bias_to_pre_encoder", False)):
        if cfg.get(key, only) != only:
            raise InputError(f"{folder}: {key} {cfg[key]!r} is not supported, only {only!r}")
    theta, norms = field(cfg, "jump_relu_threshold", folder), field(cfg, "dataset_average_activation_norm", folder)
    f_in, f_out = (math.sqrt(field(cfg, "d_model", folder)) / field(norms, side, folder) for side in ("in", "out"))
    load = safe_tensors(folder / "checkpoints" / "final.safetensors")
    b_enc, b_dec = load["encoder.bias"]().float(), load["decoder.bias"]().float()
    parts = {"W_enc": load["encoder.weight"], "W_dec": lambda: load["decoder.weight"]().T, "centred": False,
             "on_special": False}
    if variant == "openmoss":
        W_dec = parts["W_dec"]()
        norm = torch.cat([rows.float().norm(dim=1) for rows in W_dec.split(ROWS)])
        if not cfg.get("sparsity_include_decoder_norm", True):
            norm = torch.ones_like(norm)
        c = norm * f_in / f_out
        return parts | {"enc": c, "b_enc": b_enc * c / f_in, "dec": 1 / norm if ... else None}
    theta = theta * f_in if variant == "sae_lens" else theta
    return parts
