"""SAE files <-> sae.py: Gemma Scope, Llama Scope, sparsify, SAELens, dictionary_learning.

    python train.py --model gemma-2-2b --sae SOURCE     a folder, or OWNER/NAME[/FOLDER] on the Hub
    sae = load_sae("google/gemma-scope-2b-pt-res", layer=12, width="16k", l0=82)

A folder's files determine its format. A reader (sae_readers.py) finds the tensors, and load_sae
converts them to the formulas of sae.py, where TopK reads x - b_dec and JumpReLU reads x: a few
thousand latents at a time, so an SAE in bfloat16 is never in memory as float32.

Shapes: D d_model, M latents. W_enc and W_dec are [M, D], whichever way round the file stores them.
"""
from pathlib import Path

import torch

from lorasae.errors import InputError
from lorasae.io.files import (
    Tensors, as_dtype, check_tensor, read_object, write_json, write_tensors)
from lorasae.io.hub import find_sae
from lorasae.io.sae_readers import FORMATS, ROWS, check_layer
from lorasae.sae import JumpReLU, TopK


def load_sae(source, *, layer=None, width=None, l0=None, site="resid", dtype=None, device="cpu"):
    """A frozen TopK or JumpReLU from a preset, a local folder, a run, or OWNER/NAME on the Hub.

    layer, width, l0: which SAE, if the source has several (hub.find_sae). site: "resid", a block's
    output, or "mlp", its MLP's output. dtype: the weights' torch dtype or its name, float32 if
    None; thresholds stay float32. SAEs of another site are refused, and so are files that name
    another layer. The SAE's `model_name` is the model it was trained on; None if unstated.
    """
    dtype = as_dtype(dtype or "float32")
    parts = read_parts(source, layer=layer, width=width, l0=l0, site=site)
    b_enc, b_dec = parts.b_enc.float(), parts.b_dec.float()
    M = len(b_enc)
    if parts.k is not None and parts.k > M:
        raise InputError(f"{parts.file.path} has {M:,} latents, fewer than its k, {parts.k:,}")
    sae = empty(parts)

    # TopK reads x - b_dec, JumpReLU reads x. If the file's SAE differs, b_enc makes up for it:
    # W x + b = W (x - b_dec) + b + W b_dec
    W_enc = parts.matrix(parts.W_enc)
    if sae.centred != parts.centred:
        difference = torch.cat([rows.float() @ b_dec for rows in W_enc.split(ROWS)]) * parts.enc
        b_enc = b_enc + difference if sae.centred else b_enc - difference

    # Convert the tensors, one matrix at a time.
    tensors = {"b_enc": b_enc.to(dtype), "b_dec": b_dec.to(dtype)}
    tensors["W_enc"] = scaled(W_enc, parts.enc, dtype)
    del W_enc
    tensors["W_dec"] = scaled(parts.matrix(parts.W_dec), parts.dec, dtype)
    threshold = parts.threshold
    if threshold is not None:
        if isinstance(threshold, float):
            threshold = torch.full([M], threshold)
        tensors["threshold"] = threshold.float().clamp(min=0)           # negative acts as 0

    for name, parameter in sae.named_parameters():
        check_tensor(f"{parts.file.path}: {name}", tensors[name], parameter.shape)
    sae.load_state_dict(tensors, assign=True)
    sae.model_name, sae.max_norm = parts.model_name, parts.max_norm
    sae.site, sae.after_norm = site, parts.after_norm
    return sae.requires_grad_(False).to(device)


def describe(source, **which):
    """The SAE that load_sae would load, on the meta device, without reading its matrices."""
    return empty(read_parts(source, **which))


def read_parts(source, layer=None, site="resid", **which):
    """Finds and reads an SAE -> Parts."""
    found = find_sae(source, layer=layer, site=site, **which)
    folder, (read, names) = found.fetch(), FORMATS[found.kind]
    weights, *config = (folder / name for name in names)
    parts = read(Tensors(weights), *map(read_object, config))
    check_layer(parts.hook, layer, folder, site)
    return parts


def empty(parts):
    """A TopK or JumpReLU for these Parts, on the meta device."""
    kind = JumpReLU if parts.k is None else TopK
    with torch.device("meta"):
        return kind(len(parts.b_dec), len(parts.b_enc), parts.k, on_special=parts.on_special)


def scaled(weight, factor, dtype):
    """diag(factor) weight, contiguous, in `dtype`. Only ROWS rows at a time are in float32."""
    factor = torch.as_tensor(factor).expand(len(weight))
    out = torch.empty(weight.shape, dtype=dtype)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        out[rows] = weight[rows].float() * factor[rows, None]
    return out


# ---- Writing -------------------------------------------------------------------------------------

def save_sae(sae, folder, *, model_name, layer, context):
    """Writes cfg.json and sae_weights.safetensors, which SAELens 6 and load_sae can read.

    layer: the SAE's block. context: tokens per training sequence, with BOS.
    """
    hook, hf_hook = f"blocks.{layer}.hook_resid_post", f"model.layers.{layer}"
    if sae.site == "mlp":
        hook = f"blocks.{layer}.hook_mlp_out"
        hf_hook += ".post_feedforward_layernorm" if sae.after_norm else ".mlp"
    tensors, facts = sae.saved()
    write_tensors(Path(folder) / "sae_weights.safetensors", tensors)

    M, D = sae.W_enc.shape
    write_json(Path(folder) / "cfg.json", {
        **facts,
        "d_in": D,
        "d_sae": M,
        "dtype": "float32",                             # SAELens casts to this; thresholds need it
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "sae_lens_training_version": None,
            "model_name": model_name,
            "hook_name": hook,
            "hf_hook_name": hf_hook,
            "prepend_bos": True,
            "context_size": context,
            "exclude_special_tokens": not sae.on_special,
            "max_norm": sae.max_norm,
        }})
