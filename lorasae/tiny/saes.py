"""Makes the SAEs of the embedded default, in the layouts of the real ones, with the trainer that users have (dictionary.py).

    python -m lorasae.tiny.saes --model gemma-2         (or llama-3)

    gemma-2-sae/jumprelu/layer_2/width_1k/average_l0_N/params.npz          as Gemma Scope
    gemma-2-sae/topk/{cfg.json, sae_weights.safetensors}                   SAELens
    llama-3-sae/topk/layers.2/{cfg.json, sae.safetensors}                  sparsify
    llama-3-sae/jumprelu/tiny-L2R/{hyperparams.json, checkpoints/final.safetensors}       as Llama Scope

Llama Scope's SAEs were trained as TopK and then given one threshold; so is the one here. MADE.json says how each was made and
what it costs: FVU, L0, dead latents, CE and KL, of the saved files and on held-out text.
"""
import argparse
import io
import math
import tempfile
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from lorasae.io.files import write_bytes, write_json, write_tensors
from lorasae.io.saes import load_sae, save_sae
from lorasae.runs import training
from lorasae.runs.config import configure
from lorasae.runs.folder import Run
from lorasae.runs.sae_training import numbers_of, train_sae
from lorasae.runs.setting import load_setting
from lorasae.sae import JumpReLU

HERE = Path(__file__).parent
SAMPLE = 64                                     # training sequences for a threshold and a mean norm


def settings(name, method, seed, **given):
    """The configuration of `python train.py --model tiny-NAME --method METHOD`."""
    asked = {"model": f"tiny-{name}", "method": method, "seed": seed, "checkpoint_every": 10 ** 9}
    return configure({**asked, **given}, recipes={})


@contextmanager
def loaded(config):
    """The Setting of a configuration, in a folder that is then forgotten."""
    with tempfile.TemporaryDirectory() as folder:
        setting = load_setting(config, Path(folder))
        with closing(setting.text):
            yield setting


def trained(config):
    """The SAE of a run made in a folder that is then forgotten, and the run's seconds."""
    with loaded(config) as setting, closing(Run.create(setting.folder / "run", config)) as run:
        results = train_sae(setting, run)
        return load_sae(run.folder), results["seconds"]


def save_gemma_scope(sae, folder, l0):
    """Writes a JumpReLU as Gemma Scope's params.npz; the names of its folders tell layer, width and L0."""
    file = io.BytesIO()
    np.savez(file, W_enc=sae.W_enc.T.numpy(), W_dec=sae.W_dec.numpy(), b_enc=sae.b_enc.numpy(), b_dec=sae.b_dec.numpy(),
             threshold=sae.threshold.numpy())
    write_bytes(folder / f"average_l0_{round(l0)}" / "params.npz", file.getvalue())


def save_sparsify(sae, folder):
    """Writes a TopK as sparsify's cfg.json and sae.safetensors."""
    tensors = {
        "encoder.weight": sae.W_enc,
        "encoder.bias": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    write_tensors(folder / "sae.safetensors", tensors)
    M, D = sae.W_enc.shape
    write_json(folder / "cfg.json", {
        "activation": "topk", "d_in": D, "num_latents": M, "expansion_factor": max(1, M // D),
        "k": sae.k, "normalize_decoder": True, "multi_topk": False, "skip_connection": False,
        "transcode": False})


def one_threshold(sae, x):
    """The TopK `sae` as a JumpReLU that shares one θ among its latents, with the same mean L0 on x [N, D]."""
    scope = JumpReLU(x.shape[1], len(sae.W_enc), on_special=False)
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    theta = pre.relu().flatten().topk(sae.k * len(x)).values[-1]
    for name, value in (("W_enc", sae.W_enc), ("W_dec", sae.W_dec), ("b_enc", sae.b_enc - sae.W_enc @ sae.b_dec),
                        ("b_dec", sae.b_dec), ("threshold", theta.expand(len(sae.W_enc)))):
        getattr(scope, name).data.copy_(value)
    return scope.requires_grad_(False)


def save_llama_scope(sae, folder, layer, norm, k):
    """Writes a JumpReLU with one θ and decoder rows of norm 1 as Llama Scope does: read_llama_scope's arithmetic backwards.

    norm: the mean norm of the activations that it reads, so that f = √D / norm. The file's decoder columns have the norms c of
    the encoder's rows, which the reader multiplies back: W_e = W_enc / c, b_e = f b_enc / c, W_d = c W_decᵀ, b_d = f b_dec.
    """
    M, D = sae.W_enc.shape
    f, c = math.sqrt(D) / norm, sae.W_enc.norm(dim=1)
    tensors = {"encoder.weight": sae.W_enc / c[:, None], "encoder.bias": f * sae.b_enc / c,
               "decoder.weight": (c[:, None] * sae.W_dec).T, "decoder.bias": f * sae.b_dec}
    write_bytes(folder / "checkpoints" / "final.safetensors",
                save({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}))
    hook = f"blocks.{layer}.hook_resid_post"
    write_json(folder / "hyperparams.json", {
        "hook_point_in": hook, "hook_point_out": hook, "d_model": D, "d_sae": M, "expansion_factor": M / D, "act_fn": "jumprelu",
        "jump_relu_threshold": sae.threshold[0].item(), "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm, "out": norm}, "use_decoder_bias": True, "use_glu_encoder": False,
        "apply_decoder_bias_to_pre_encoder": False, "sparsity_include_decoder_norm": True, "top_k": k})


@torch.no_grad()
def sample(config):
    """Activations of some training text without BOS and EOS [N, D]."""
    with loaded(replace(config, batch_size=SAMPLE)) as setting:
        model, tokens = setting.model, setting.text.batch(0)
    x = model.run(model.embed(tokens), 0, config.layer[0] + 1)
    return x[~model.special(tokens)].float()


def make_saes(name, folder, seed=0):
    """Trains, saves and measures both SAEs of tiny-`name`, whose model is in place, into `folder`/NAME-sae."""
    folder = folder / f"{name}-sae"
    topk, jumprelu = settings(name, "topk", seed), settings(name, "jumprelu", seed)
    layer, made = topk.layer[0], {}
    sae, seconds = trained(topk)
    if name == "gemma-2":
        save_sae(sae, folder / "topk", model_name=topk.model, layer=layer, context=topk.context)
        other, more = trained(jumprelu)
        save_gemma_scope(other, folder / "jumprelu" / f"layer_{layer}" / "width_1k", measure(jumprelu, other)["l0"])
    else:
        save_sparsify(sae, folder / "topk" / f"layers.{layer}")
        other, more = trained(replace(topk, seed=seed + 1))
        x = sample(topk)
        save_llama_scope(one_threshold(other, x), folder / "jumprelu" / f"tiny-L{layer}R", layer,
                         x.norm(dim=1).mean().item(), topk.k)
    for kind, config, took in (("topk", topk, seconds), ("jumprelu", jumprelu, more)):
        made[kind] = {"latents": config.width, "tokens": config.tokens, "lr": config.lr, "seconds": round(took),
                      **measure(config, load_sae(folder / kind, layer=layer))}
    write_json(folder / "MADE.json", made)
    return made


def measure(config, sae):
    """What the SAE costs on held-out text."""
    with loaded(config) as setting:
        results = training.evaluate(setting, {config.layer[0]: sae}, ("base", "sae"))
        return numbers_of(results, setting, sae)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("gemma-2", "llama-3"), default="gemma-2", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE, help="(default: this package)")
    args = parser.parse_args()
    for kind, numbers in make_saes(args.model, args.out, args.seed).items():
        print(kind, *(f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()))


if __name__ == "__main__":
    main()
