"""SAE files of other projects <-> sae.py: Gemma Scope, Llama Scope, sparsify, SAELens, dictionary_learning.

    python train.py --model gemma-2-2b --sae SOURCE         a file, a folder, or OWNER/NAME[/FOLDER] on the Hub
    sae = load_sae("google/gemma-scope-2b-pt-res", layer=12, width="16k", l0=82)

The files in a folder decide its format. A reader (sae_readers.py, with that project's formula) finds the tensors;
`build` writes them in the terms of sae.py, where TopK reads x - b_dec and JumpReLU reads x. Weights are read and
converted one tensor and a few thousand latents at a time: an SAE in bfloat16 never exists in float32.

Shapes: D d_model, M latents. W_enc and W_dec are [M, D] below, a row a latent, whichever way round the file has them.
"""
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lorasae.errors import InputError
from lorasae.io.files import write_json
from lorasae.io.hub import SAE_FILES, sae_files
from lorasae.io.sae_readers import (ROWS, check_length, read_dictionary_learning, read_gemma_scope, read_llama_scope,
                                    read_sae_lens, read_sparsify)
from lorasae.io.files import as_dtype, dtype_name, is_finite, write_tensors
from lorasae.sae import JumpReLU, TopK


def load_sae(source, *, layer=None, width=None, l0=None, dtype=None, device="cpu", llama_scope="openmoss"):
    """A frozen TopK or JumpReLU from a local file or folder, the folder of a run, or OWNER/NAME[/FOLDER] on the Hub.

    layer, width, l0: which SAE, where the source holds several (hub.sae_files). dtype: of the weights, a torch dtype or
    its name, float32 if None; thresholds stay float32. llama_scope: see read_llama_scope. Raises InputError for what is
    wrong with the files, also if they say that the SAE belongs to another layer.
    """
    dtype = as_dtype("float32" if dtype is None else dtype)
    path = sae_files(source, layer=layer, width=width, l0=l0)
    readers = {"gemma_scope": read_gemma_scope, "sae_lens": read_sae_lens, "sparsify": read_sparsify,
               "llama_scope": partial(read_llama_scope, variant=llama_scope),
               "dictionary_learning": read_dictionary_learning}

    known = [name for name in readers if all((path / file).is_file() for file in SAE_FILES[name])]
    if len(known) > 1:
        raise InputError(f"{path} holds SAEs of several formats ({', '.join(known)}): keep each in a folder of its own")
    kind = known[0] if known else "gemma_scope"                     # an .npz file by itself

    parts = readers[kind](path, layer)
    return build(path, parts, dtype=dtype, device=device)


def check_fits(sae, d_model, name="the SAE"):
    """Raises InputError unless the SAE reads activations of width d_model."""
    if sae.W_enc.shape[1] != d_model:
        raise InputError(f"{name} reads activations of width {sae.W_enc.shape[1]}, but the model's have {d_model}: it "
                         "was trained on another model")


# ---- Building --------------------------------------------------------------------------------------------------------

def build(where, parts, *, dtype, device):
    """The TopK or JumpReLU of these Parts, frozen; `where` they come from, for messages."""
    W_enc = parts.W_enc.read()
    if 0 in W_enc.shape or parts.shape not in (None, tuple(W_enc.shape)):
        expected = list(parts.shape or ("M", "D"))
        raise InputError(f"{where}: W_enc is {list(W_enc.shape)} as [M, D], but should be {expected}, neither one 0")
    M, D = W_enc.shape

    check_length(where, "b_enc", parts.b_enc, M)
    check_length(where, "b_dec", parts.b_dec, D)
    b_enc, b_dec = parts.b_enc.float(), parts.b_dec.float()

    # the empty SAE
    topk = parts.k is not None
    if topk and not 1 <= parts.k <= M:
        raise InputError(f"{where}: k is {parts.k}, but a TopK SAE of {M} latents needs 1 <= k <= {M}")
    with torch.device("meta"):
        if topk:
            sae = TopK(D, M, parts.k, on_special=parts.on_special)
        else:
            sae = JumpReLU(D, M, on_special=parts.on_special)

    # TopK reads x - b_dec, JumpReLU reads x: where the file has it the other way, b_enc takes up the difference
    if topk and not parts.centred:
        b_enc = b_enc + encoded(b_dec, W_enc) * parts.enc           # W x + b = W (x - b_dec) + (b + W b_dec)
    if not topk and parts.centred:
        b_enc = b_enc - encoded(b_dec, W_enc) * parts.enc           # W (x - b_dec) + b = W x + (b - W b_dec)

    # its tensors, one matrix at a time
    tensors = {"b_enc": b_enc.to(dtype), "b_dec": b_dec.to(dtype)}
    tensors["W_enc"] = scaled(W_enc, parts.enc, dtype, device)
    del W_enc
    W_dec = parts.W_dec.read()
    if list(W_dec.shape) != [M, D]:
        raise InputError(f"{where}: W_dec is {list(W_dec.shape)} as [M, D], but W_enc implies {[M, D]}")
    tensors["W_dec"] = scaled(W_dec, parts.dec, dtype, device)
    if not topk:
        check_length(where, "threshold", parts.threshold, M)
        tensors["threshold"] = parts.threshold.float()

    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise InputError(f"{where}: {name} holds values that are not finite as {dtype_name(tensor)}: the file is "
                             "damaged, or needs another --sae-dtype")
        if name == "threshold":
            tensor = tensor.clamp(min=0)                            # ReLU(pre) · H(pre - θ) with θ < 0 is ReLU(pre)
        setattr(sae, name, nn.Parameter(tensor.to(device), requires_grad=False))
    return sae


def encoded(b_dec, W_enc):
    """W_enc b_dec, [M] in float32."""
    return torch.cat([rows.float() @ b_dec for rows in W_enc.split(ROWS)])


def scaled(weight, factor, dtype, device):
    """diag(factor) weight, contiguous, in `dtype` on `device`; computed there in float32, ROWS at a time."""
    factor = torch.as_tensor(factor, device=device).expand(len(weight))
    out = torch.empty(weight.shape, dtype=dtype, device=device)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        out[rows] = weight[rows].to(device).float() * factor[rows, None]
    return out


# ---- Writing ---------------------------------------------------------------------------------------------------------

def save_sae(sae, folder, *, model_name, layer, context, **metadata):
    """Writes SAELens 6's cfg.json and sae_weights.safetensors, which sae_lens.SAE.load_from_disk and load_sae read.

    layer: whose output it reads; context: tokens a training sequence, BOS included; metadata: more JSON for cfg.json.
    """
    tensors = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    if isinstance(sae, TopK):
        kind = {"architecture": "topk", "k": sae.k, "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False}
    else:
        kind = {"architecture": "jumprelu", "apply_b_dec_to_input": False}
        tensors["threshold"] = sae.threshold
    write_tensors(Path(folder) / "sae_weights.safetensors", tensors)

    M, D = sae.W_enc.shape
    write_json(Path(folder) / "cfg.json", {
        **kind, "d_in": D, "d_sae": M,
        "dtype": "float32",                                         # what SAELens casts to; thresholds need it
        "device": "cpu", "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0", "sae_lens_training_version": None, "model_name": model_name,
            "hook_name": f"blocks.{layer}.hook_resid_post", "hf_hook_name": f"model.layers.{layer}",
            "prepend_bos": True, "context_size": context, "exclude_special_tokens": not sae.on_special, **metadata}})


def save_sparsify(sae, folder):
    """Writes sparsify's cfg.json and sae.safetensors, which sparsify.SparseCoder.load_from_disk and load_sae read."""
    if not isinstance(sae, TopK):
        raise InputError("sparsify's format holds TopK SAEs only: use save_sae for a JumpReLU")
    write_tensors(Path(folder) / "sae.safetensors", {
        "encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec})

    M, D = sae.W_enc.shape
    write_json(Path(folder) / "cfg.json", {
        "activation": "topk", "d_in": D, "num_latents": M, "expansion_factor": max(1, M // D), "k": sae.k,
        "normalize_decoder": True, "multi_topk": False, "skip_connection": False, "transcode": False})
