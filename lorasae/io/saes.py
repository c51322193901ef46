"""SAE files <-> sae.py: Gemma Scope, Llama Scope, sparsify, SAELens, dictionary_learning.

    python train.py --model gemma-2-2b --sae SOURCE     a folder, or OWNER/NAME[/FOLDER] on the Hub
    sae = load_sae("google/gemma-scope-2b-pt-res", layer=12, width="16k", l0=82)

The files in a folder decide its format. A reader (sae_readers.py, with that project's formula)
finds the tensors; `build` converts them to the formulas of sae.py, where TopK reads x - b_dec and
JumpReLU reads x. It works on one matrix and a few thousand latents at a time: an SAE in bfloat16
never exists in float32.

Shapes: D d_model, M latents. W_enc and W_dec are [M, D], whichever way round the file has them.
"""
from pathlib import Path

import torch
from torch import nn

from lorasae.errors import InputError
from lorasae.io.files import as_dtype, check_finite, check_shape, write_json, write_tensors
from lorasae.io.hub import find_sae
from lorasae.io.sae_readers import READERS, ROWS
from lorasae.sae import JumpReLU, TopK


def load_sae(source, *, layer=None, width=None, l0=None, dtype=None, device="cpu",
             llama_scope="openmoss"):
    """A frozen TopK or JumpReLU from a preset, a local folder, a run, or OWNER/NAME on the Hub.

    layer, width, l0: which SAE, if the source holds several (hub.find_sae). dtype: of the weights,
    a torch dtype or its name, float32 if None; thresholds stay float32. llama_scope: see
    read_llama_scope. The SAE's `model_name` is the model that the file says it was trained on, or
    None. A file that names another layer is refused.
    """
    dtype = as_dtype("float32" if dtype is None else dtype)
    path, parts = read_parts(source, layer, width, l0, llama_scope)
    sae = build(path, parts, dtype=dtype, device=device)
    sae.model_name = parts.model_name
    return sae


def describe(source, **which):
    """(kind of SAE, latents, d_model) of what load_sae would load; no matrix is read."""
    _, parts = read_parts(source, **which)
    return kind_of(parts), len(parts.b_enc), len(parts.b_dec)


def read_parts(source, layer=None, width=None, l0=None, llama_scope="openmoss"):
    """-> (where the SAE's files are, their Parts)"""
    found = find_sae(source, layer=layer, width=width, l0=l0)
    path = found.fetch()
    own = {"variant": llama_scope} if found.kind == "llama_scope" else {}
    return path, READERS[found.kind](path, layer, **own)


def check_fits(width, d_model):
    """InputError unless an SAE that reads activations of this width fits a model of d_model."""
    if width != d_model:
        raise InputError(
            f"the SAE reads activations of width {width}, but the model's have {d_model}: it was "
            "trained on another model")


# ---- Building ------------------------------------------------------------------------------------

def build(where, parts, *, dtype, device):
    """The frozen TopK or JumpReLU of these Parts; `where` they come from, for messages."""
    W_enc = parts.W_enc.read()
    M, D = parts.shape or W_enc.shape
    check_shape(f"{where}: W_enc", W_enc, [M, D])
    check_shape(f"{where}: b_enc", parts.b_enc, [M])
    check_shape(f"{where}: b_dec", parts.b_dec, [D])
    b_enc, b_dec = parts.b_enc.float(), parts.b_dec.float()

    # the empty SAE
    own = {} if parts.k is None else {"k": parts.k}
    with torch.device("meta"):
        sae = kind_of(parts)(D, M, on_special=parts.on_special, **own)

    # TopK reads x - b_dec, JumpReLU reads x; if the file does not, b_enc takes up the difference:
    # W x + b = W (x - b_dec) + b + W b_dec
    if sae.centred != parts.centred:
        difference = encoded(b_dec, W_enc) * parts.enc
        b_enc = b_enc + difference if sae.centred else b_enc - difference

    # its tensors, one matrix at a time
    tensors = {"b_enc": b_enc.to(dtype), "b_dec": b_dec.to(dtype)}
    tensors["W_enc"] = scaled(W_enc, parts.enc, dtype, device)
    del W_enc
    W_dec = parts.W_dec.read()
    check_shape(f"{where}: W_dec", W_dec, [M, D])
    tensors["W_dec"] = scaled(W_dec, parts.dec, dtype, device)
    threshold = parts.threshold
    if threshold is not None:
        if isinstance(threshold, float):
            threshold = torch.full([M], threshold)
        check_shape(f"{where}: threshold", threshold, [M])
        tensors["threshold"] = threshold.float()

    for name, tensor in tensors.items():
        check_finite(f"{where}: {name}", tensor)
        if name == "threshold":
            tensor = tensor.clamp(min=0)                # with θ < 0, the formula is that of θ = 0
        setattr(sae, name, nn.Parameter(tensor.to(device), requires_grad=False))
    return sae


def kind_of(parts):
    """TopK or JumpReLU."""
    return JumpReLU if parts.k is None else TopK


def encoded(b_dec, W_enc):
    """W_enc b_dec, [M] in float32."""
    return torch.cat([rows.float() @ b_dec for rows in W_enc.split(ROWS)])


def scaled(weight, factor, dtype, device):
    """diag(factor) weight, contiguous, in `dtype` on `device`; float32 only for ROWS at a time."""
    factor = torch.as_tensor(factor, device=device).expand(len(weight))
    out = torch.empty(weight.shape, dtype=dtype, device=device)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        out[rows] = weight[rows].to(device).float() * factor[rows, None]
    return out


# ---- Writing -------------------------------------------------------------------------------------

def save_sae(sae, folder, *, model_name, layer, context, **metadata):
    """Writes cfg.json and sae_weights.safetensors, which SAELens 6 and load_sae read.

    layer: the block whose output it reads; context: tokens per training sequence, with BOS;
    metadata: more JSON for cfg.json.
    """
    tensors, facts = sae.saved()
    write_tensors(Path(folder) / "sae_weights.safetensors", tensors)

    M, D = sae.W_enc.shape
    write_json(Path(folder) / "cfg.json", {
        **facts,
        "d_in": D,
        "d_sae": M,
        "dtype": "float32",                             # SAELens casts to it; thresholds need it
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "sae_lens_training_version": None,
            "model_name": model_name,
            "hook_name": f"blocks.{layer}.hook_resid_post",
            "hf_hook_name": f"model.layers.{layer}",
            "prepend_bos": True,
            "context_size": context,
            "exclude_special_tokens": not sae.on_special,
            **metadata,
        }})
