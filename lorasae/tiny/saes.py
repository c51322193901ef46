"""Makes the included models' SAEs: trained as by train.py, saved in the layouts of real ones.

    python -m lorasae.tiny.saes --model gemma-2         (or llama-3)

    gemma-2-sae/jumprelu/layer_2/width_1k/average_l0_N/params.npz       Gemma Scope
    gemma-2-sae/topk/{cfg.json, sae_weights.safetensors}                SAELens
    llama-3-sae/topk/layers.2/{cfg.json, sae.safetensors}               sparsify
    llama-3-sae/jumprelu/tiny-L2R/{hyperparams.json, checkpoints/final.safetensors}     Llama Scope

Llama Scope's SAEs were trained as TopK and then given one threshold; ours is made the same way.
MADE.json says how each SAE was made and what it costs: FVU, L0, dead latents, CE and KL, measured
with the saved files on held-out text.
"""
import io
import math
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lorasae.evals import fidelity
from lorasae.io.console import Parser
from lorasae.io.files import write_bytes, write_json, write_tensors
from lorasae.io.saes import load_sae, save_sae
from lorasae.runs import training
from lorasae.runs.config import configure
from lorasae.runs.folder import Run
from lorasae.runs.sae_training import numbers_of, train_sae
from lorasae.runs.setting import load_setting
from lorasae.sae import JumpReLU

HERE = Path(__file__).parent
SAMPLE = 64                             # training sequences for a threshold and a mean norm


# ---- Formats -------------------------------------------------------------------------------------

def save_gemma_scope(sae, folder, l0):
    """Writes a JumpReLU as Gemma Scope's params.npz, in a folder that names its L0."""
    tensors = {name: p.numpy() for name, p in sae.named_parameters()}
    file = io.BytesIO()
    np.savez(file, **{**tensors, "W_enc": tensors["W_enc"].T})
    write_bytes(folder / f"average_l0_{round(l0)}" / "params.npz", file.getvalue())


def save_sparsify(sae, folder):
    """Writes a TopK as sparsify's cfg.json and sae.safetensors."""
    tensors = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc,
               "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    write_tensors(folder / "sae.safetensors", tensors)
    M, D = sae.W_enc.shape
    write_json(folder / "cfg.json", {
        "activation": "topk", "d_in": D, "num_latents": M, "expansion_factor": max(1, M // D),
        "k": sae.k, "normalize_decoder": True, "multi_topk": False, "skip_connection": False,
        "transcode": False})


def one_threshold(sae, x):
    """The TopK as a JumpReLU with one θ for all latents and the same mean L0 on x [N, D]."""
    scope = JumpReLU(x.shape[1], len(sae.W_enc), on_special=False).requires_grad_(False)
    scope.load_state_dict(sae.state_dict(), strict=False)
    scope.b_enc -= sae.W_enc @ sae.b_dec                # as JumpReLU does not subtract b_dec
    pre = x @ scope.W_enc.T + scope.b_enc
    scope.threshold.fill_(pre.relu().flatten().topk(sae.k * len(x)).values[-1])
    return scope


def save_llama_scope(sae, folder, layer, norm, k):
    """Writes a JumpReLU with one θ and decoder rows of norm 1 in Llama Scope's format.

    This inverts read_llama_scope. norm: the mean norm of the activations that the SAE reads, so f =
    √D / norm. The file's decoder columns have the norms c of the encoder's rows, which the reader
    multiplies back in: W_e = W_enc / c, b_e = f b_enc / c, W_d = c W_decᵀ, b_d = f b_dec.
    """
    M, D = sae.W_enc.shape
    f, c = math.sqrt(D) / norm, sae.W_enc.norm(dim=1)
    tensors = {
        "encoder.weight": sae.W_enc / c[:, None],
        "encoder.bias": f * sae.b_enc / c,
        "decoder.weight": (c[:, None] * sae.W_dec).T,
        "decoder.bias": f * sae.b_dec,
    }
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    write_tensors(folder / "checkpoints" / "final.safetensors", tensors)
    hook = f"blocks.{layer}.hook_resid_post"
    write_json(folder / "hyperparams.json", {
        "hook_point_in": hook, "hook_point_out": hook, "d_model": D, "d_sae": M,
        "expansion_factor": M / D, "act_fn": "jumprelu",
        "jump_relu_threshold": sae.threshold[0].item(), "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm, "out": norm}, "use_decoder_bias": True,
        "use_glu_encoder": False, "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True, "top_k": k})


# ---- Training and measuring ----------------------------------------------------------------------

def settings(name, method):
    """The configuration of `python train.py --model tiny-NAME --method METHOD --seed 0`."""
    return configure({"model": f"tiny-{name}", "method": method, "seed": 0}, recipes={})


def trained(setting, config):
    """Trains an SAE as a run does, and loads it."""
    folder = setting.folder / f"{config.method}-{config.seed}"
    with closing(Run.create(folder, config)) as run:
        train_sae(setting._replace(config=config), run)
    return load_sae(folder)


def make_saes(name, temporary):
    """Trains, saves and measures both SAEs of an included model."""
    folder = HERE / f"{name}-sae"
    topk = settings(name, "topk")
    jumprelu = replace(topk, seed=1) if name == "llama-3" else settings(name, "jumprelu")
    layer = topk.layer[0]

    def measured(sae):
        found = training.evaluate(setting, {layer: sae}, ("base", "sae"))
        return {**fidelity.summary(found, setting.text.documents),
                **numbers_of(found, setting, sae)}

    setting = load_setting(topk, Path(temporary))
    with closing(setting.text):
        sae, other = trained(setting, topk), trained(setting, jumprelu)
        if name == "llama-3":
            save_sparsify(sae, folder / "topk" / f"layers.{layer}")
            tokens = setting.text.sequences(0, SAMPLE)
            x = setting.model.read(tokens, other, layer)
            x = x[~setting.model.special(tokens)]       # without BOS and EOS
            save_llama_scope(one_threshold(other, x), folder / "jumprelu" / f"tiny-L{layer}R",
                             layer, x.norm(dim=1).mean().item(), topk.k)
        else:
            save_sae(sae, folder / "topk", model_name=topk.model, layer=layer, context=topk.context)
            save_gemma_scope(other, folder / "jumprelu" / f"layer_{layer}" / "width_1k",
                             measured(other)["l0"])

        made = {}
        for kind, config in (("topk", topk), ("jumprelu", jumprelu)):
            made[kind] = {"latents": config.width, "tokens": config.tokens, "lr": config.lr,
                          **measured(load_sae(folder / kind, layer=layer))}
    write_json(folder / "MADE.json", made)
    print(made)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--model", choices=("gemma-2", "llama-3"), default="gemma-2",
                        help="(default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        make_saes(args.model, temporary)


if __name__ == "__main__":
    main()
