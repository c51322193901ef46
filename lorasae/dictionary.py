"""Training an SAE: by reconstruction (TopK, paper §3.1; JumpReLU, §3.3) or end to end, on the model's loss (§3.2).

    python train.py --method topk --k 16        python train.py --method jumprelu --l0 16
    python train.py --method e2e --k 16         python train.py --sae RUN_DIR       adapts the model around the result

    train     the loop: frozen model -> activations -> one Adam step a batch, decoder rows kept at norm 1
    make      a whole run: from its configuration to RUN_DIR/sae and results.json

TopK and e2e follow the published code, JumpReLU Rajamanoharan et al. (2024). A run keeps its SAE after every tenth of
its steps: RUN_DIR/sae-10pct ... sae-90pct, and RUN_DIR/sae at the end, each in SAELens's format and with a training.json:
percent, step, tokens, and the seconds of training so far, evaluation excluded.

Shapes: B batch, T tokens, D d_model, M latents, K active latents, N = B*T.
"""
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lorasae import topk
from lorasae.adapt import compiled_blocks, in_advance, learn, teach
from lorasae.io.corpus import special_mask
from lorasae.runs.distributed import all_reduce, everywhere, rank
from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.io.disk import write_json
from lorasae.io.presets import PRESETS
from lorasae.linear import linear
from lorasae.objectives import aux_loss, fvu, jump, l0_penalty
from lorasae.runs.folder import Run, load_setting, peak_memory_bytes
from lorasae.sae import JumpReLU, TopK
from lorasae.io.sae_formats import save_sae


@dataclass(frozen=True)
class Recipe:
    """What train.py takes where an argument is left out: the paper's TopK on Gemma-2-2B (§3.1; its published code)."""
    width: int | None = None                    # latents; None: 8 d_model
    k: int = 64                                 # of TopK and e2e
    l0: float = 64                              # of JumpReLU
    lr: float | None = None                     # None: 2e-4 / √(latents / 2^14)
    batch_size: int = 1                         # sequences a step
    e2e_lr: float | None = None                 # None: lr
    e2e_batch_size: int | None = None           # None: batch_size
    tokens: int = 2_000_000_000
    data: str | None = None                     # None: the model's preset


RECIPES = {
    "gemma-2-2b": Recipe(data="redpajama-v2"),
    "llama-3.2-1b": Recipe(tokens=4_000_000_000),
    **dict.fromkeys(("tiny-gemma-2", "tiny-llama-3"), Recipe(
        width=1024, k=8, l0=8, lr=4e-3, batch_size=8, e2e_lr=3e-3, e2e_batch_size=2, tokens=2_000_000)),
}


def fill(config, defaults):
    """A configuration (train.py's arguments) without its Nones, from the Recipe and the Preset `defaults` of the model."""
    recipe = RECIPES.get(next((name for name, known in PRESETS.items() if known is defaults), None), Recipe())
    own = {**vars(recipe), "data": recipe.data or defaults.data, "layer": [defaults.layer], "context": defaults.context,
           "eval_tokens": defaults.eval_tokens, "dtype": defaults.dtype}
    if config["method"] == "e2e":
        own |= {"lr": recipe.e2e_lr or recipe.lr, "batch_size": recipe.e2e_batch_size or recipe.batch_size}
    config = {key: own.get(key) if value is None else value for key, value in config.items()}
    if config["width"] is not None:
        if not str(config["width"]).isdecimal() or int(config["width"]) < 1:
            raise InputError(f"--width {config['width']}: training an SAE needs its number of latents, such as 16384")
        config["width"] = int(config["width"])
    config["micro_batch"] = config["batch_size"] if config["micro_batch"] is None else config["micro_batch"]
    return config


WARMUP = 1000                                   # steps from 0 to the full rate; at most a tenth of the run
AUX_WEIGHT = 1 / 32                             # of AuxK beside the FVU (Gao et al. 2024)
BANDWIDTH = 0.05                                # ε of the straight-through gradients, of the activations' rms norm
L0_WEIGHT = 1.0                                 # of (L0 / target - 1)² beside the FVU
START_L0, RAMP = 4, 0.2                         # the target falls from 4 l0 to l0 over a fifth of the run, see `fit_biases`


# ---- The start -------------------------------------------------------------------------------------------------------

def new_sae(method, d_model, width, k):
    """A TopK or JumpReLU with W_enc uniform in ±1/√D and W_dec its rows at norm 1; `fit_biases` does the rest.

    The TopK learns BOS and EOS positions too, as in the paper; the JumpReLU leaves them alone, as Gemma Scope does.
    """
    sae = JumpReLU(d_model, width) if method == "jumprelu" else TopK(d_model, width, k)
    nn.init.uniform_(sae.W_enc, -d_model ** -0.5, d_model ** -0.5)
    sae.W_dec.data = F.normalize(sae.W_enc.detach(), dim=1)
    return sae


@torch.no_grad()
def fit_biases(sae, x, l0=None):
    """Fits a fresh SAE to activations x [N, D]. Returns the unit of its biases and thresholds, see `train`.

    Every latent of a JumpReLU starts out firing equally often, for an L0 of 4 l0. Where l0 is asked for at once, a third
    of the latents are below their thresholds for good before they have learned anything.
    """
    sae.b_dec.copy_(geometric_median(x))
    if isinstance(sae, TopK):
        return 1.0
    sae.b_enc.copy_(-sae.W_enc @ sae.b_dec)             # a TopK encoder reads x - b_dec, a JumpReLU reads x
    firing = round(len(x) * START_L0 * l0 / len(sae.W_enc))
    pre = x @ sae.W_enc.T + sae.b_enc
    sae.threshold.copy_(pre.topk(min(firing + 1, len(x)), dim=0).values[-1].clamp(min=0))
    return (x - sae.b_dec).square().sum(1).mean().sqrt().item()


def geometric_median(x, steps=100, tolerance=1e-6):
    """The point [D] with the smallest total distance to the rows of x [N, D], by Weiszfeld's iteration.

    Unlike the mean, it does not follow the few positions, such as BOS, whose norm is many times that of the others.
    """
    guess = x.mean(0)
    for _ in range(steps):
        weights = 1 / (x - guess).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        last, guess = guess, weights @ x / weights.sum()
        if (guess - last).norm() <= tolerance * last.norm():
            break
    return guess


# ---- The loop --------------------------------------------------------------------------------------------------------

def reconstruct(sae, x, bandwidth):
    """x [N, D] -> x̂ [N, D]; how many tokens fired each latent [M]; the sum of those (with a JumpReLU's gradient)."""
    if isinstance(sae, TopK):
        x_hat, values, latents = topk.sae_step(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.k)
        firing = (values > 0).flatten().to(values)
        fired = firing.new_zeros(len(sae.W_enc)).index_add_(0, latents.flatten(), firing)
        return x_hat, fired, firing.sum()
    z, gates = jump(linear(x, sae.W_enc, sae.b_enc), sae.threshold, bandwidth)
    return sae.decode(z), gates.detach().sum(0), gates.sum()


def train(model, sae, layer, batches, run, *, steps, lr, clip, batch_size, at_once, end_to_end=False, l0=None,
          auxk=False, dead_after=10_000_000, compiled=False):
    """Trains `sae` on the output of block `layer` for `steps` batches; resumes where the run's last checkpoint stands.

    Loss: the FVU; or end to end, KL(base ‖ with SAE) summed over a sequence (§3.2). A JumpReLU adds (L0 / target - 1)²,
    auxk adds AuxK on the latents that no token fired for `dead_after` tokens. batches(skip) yields batches from the
    skip-th on, of which the frozen model takes `at_once` sequences together: nothing of it depends on the SAE.

    JumpReLU's rates are meant for activations of rms norm 1. Adam ignores the scale of a gradient, so on raw activations
    it is enough to multiply the rates of biases and thresholds by that norm, which is their group's `unit`.
    """
    matrices, vectors = [sae.W_enc, sae.W_dec], [p for p in sae.parameters() if p.dim() == 1]
    parameters = matrices + vectors
    optimizer = torch.optim.Adam([{"params": group, "unit": 1.0} for group in (matrices, vectors)], lr=lr, fused=True)
    idle = torch.zeros(len(sae.W_enc), dtype=torch.int64, device=model.device)          # tokens since each latent fired

    @torch.no_grad()
    def frozen(tokens):
        tokens = tokens.to(model.device, non_blocking=True)
        seen = ~special_mask(tokens, model.config.bos_token_id, model.config.eos_token_id) | sae.on_special
        if end_to_end:
            return seen, *teach(model, {}, tokens, None, layer + 1)
        return seen, model.run(model.embed(tokens), 0, layer + 1)                       # and no further

    state = [*parameters, idle]
    first = run.restore(state, optimizer)
    if first == 0:
        seen, x, *_ = frozen(next(batches(0)))
        optimizer.param_groups[1]["unit"] = fit_biases(sae, x[seen].float(), l0)
    bandwidth = BANDWIDTH * optimizer.param_groups[1]["unit"]
    lessons = in_advance(batches, first, batch_size, at_once, frozen)
    for step, (seen, x, *target) in zip(run.progress(first, steps), lessons):
        rows = (x.flatten(0, 1) if sae.on_special else x[seen]).float()
        x_hat, fired, active = reconstruct(sae, rows, bandwidth)
        tokens, fired, active = everywhere(rows.new_tensor(len(rows))), everywhere(fired), everywhere(active)
        if end_to_end:
            x_hat = x_hat.view_as(x).to(x.dtype)
            loss = everywhere(learn(model, {}, x_hat, *target, None, layer + 1, compiled=compiled)) / batch_size
            values = {"kl": loss.detach() / x.shape[1]}                                 # nats a token
        else:
            loss = fvu(x_hat, rows)
            values = {"fvu": loss.detach()}
        if isinstance(sae, JumpReLU):
            target_l0 = l0 * START_L0 ** max(0, 1 - (step + 1) / (RAMP * steps))
            loss = loss + L0_WEIGHT * l0_penalty(active / tokens, target_l0)
        dead = idle >= dead_after
        if auxk:
            encoded = rows - sae.b_dec.detach() if isinstance(sae, TopK) else rows
            e_hat = topk.aux_decode(encoded, sae.W_enc, sae.b_enc, sae.W_dec, dead, rows.shape[1] // 2)
            loss = loss + AUX_WEIGHT * aux_loss(e_hat, x_hat.view_as(rows), rows)
        loss.backward()
        all_reduce([parameter.grad for parameter in parameters])
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["unit"] * schedule(step, steps)
        update(sae, optimizer)
        idle.add_(tokens.long()).masked_fill_(fired > 0, 0)
        run.log(step + 1, **values, l0=active.detach() / tokens, dead=dead.float().mean(), grad_norm=norm)
        if 10 * (step + 1) // steps > 10 * step // steps and step + 1 < steps:
            keep(run, sae, layer, step + 1, steps)
        if run.checkpoint_due(step + 1):
            run.save(step + 1, state, optimizer)


def schedule(step, steps):
    """The part of the rate that step 0, 1, ... takes: linear up in WARMUP steps, then linear down to 0 after the last."""
    warmup = min(WARMUP, -(-steps // 10))
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


@torch.no_grad()
def update(sae, optimizer):
    """An Adam step that keeps decoder rows at norm 1: a gradient along a row would only change what is then undone."""
    W, gradient = sae.W_dec, sae.W_dec.grad
    gradient -= (gradient * W).sum(1, keepdim=True) * W
    optimizer.step()
    optimizer.zero_grad()
    W.copy_(F.normalize(W, dim=1))
    if isinstance(sae, JumpReLU):
        sae.threshold.clamp_(min=0)


def keep(run, sae, layer, step, steps):
    """Saves the SAE under the tenth of the training it has had, and what that took."""
    run.flush()                                         # a loss that is not finite stops here, before it is saved
    if rank() > 0:
        return
    percent = 10 * (10 * step // steps)
    folder = run.folder / ("sae" if step == steps else f"sae-{percent}pct")
    save_sae(sae, folder, model_name=run.config["model"], layer=layer, context=run.config["context"])
    tokens = step * run.config["batch_size"] * run.config["context"]
    write_json(folder / "training.json", {"percent": percent, "step": step, "tokens": tokens, "seconds": run.seconds})


# ---- A run -----------------------------------------------------------------------------------------------------------

def make(config, folder, run=None):
    """A whole run, from its configuration (train.py's) to its results. run: the one to resume."""
    torch.manual_seed(config["seed"])
    model, _, corpus, _ = load_setting({**config, "sae": None, "layer": []})
    depth, D = len(model.layers), model.config.hidden_size
    layer, method = config["layer"][0], config["method"]
    if len(config["layer"]) > 1:
        raise InputError(f"--layer {' '.join(map(str, config['layer']))}: an SAE is trained on one layer at a time")
    if not 0 <= layer < depth:
        raise InputError(f"--layer {layer} is out of range: {config['model']} has blocks 0 to {depth - 1}")
    width = config["width"] or 8 * D
    if method == "jumprelu" and not 0 < config["l0"] < width:
        raise InputError(f"--l0 {config['l0']:g} cannot be reached: it must lie between 0 and the {width:,} latents")
    config = {**config, "width": width, "lr": config["lr"] or 2e-4 / (width / 2 ** 14) ** 0.5}
    sae = new_sae(method, D, width, config["k"]).to(model.device)
    active = f"L0 {config['l0']:g}" if method == "jumprelu" else f"k {sae.k}"
    print(f"training an SAE ({method}, {active}) of {width:,} latents on block {layer} of {config['model']}: "
          f"{config['steps']:,} steps of {config['batch_size']} x {config['context']} tokens", flush=True)
    held_out = corpus.validation.split(config["micro_batch"])
    run = run or Run.create(folder, config)             # nothing is written before everything has been read
    with compiled_blocks(model) if config["compile"] else nullcontext():
        train(model, sae, layer, lambda skip: corpus.batches(config["batch_size"], skip), run, steps=config["steps"],
              lr=config["lr"], clip=config["clip"], batch_size=config["batch_size"],
              at_once=max(config["ahead"], config["micro_batch"]), end_to_end=method == "e2e", l0=config["l0"],
              auxk=config["auxk"], dead_after=config["dead_after"], compiled=config["compile"])
    keep(run, sae, layer, config["steps"], config["steps"])
    tokens = config["steps"] * config["batch_size"] * config["context"]
    results = {**evaluate(model, sae, layer, held_out), "eval_tokens": corpus.validation.numel(),
               "train_tokens": tokens, "tokens_per_second": tokens / run.seconds, "seconds": run.seconds,
               "peak_memory_bytes": peak_memory_bytes(config["device"])}
    run.finish(results)
    return results


@torch.no_grad()
def evaluate(model, sae, layer, batches):
    """{ce_base, ce_sae, kl_sae in nats a token; fvu; l0; dead_latents: the part of them that no held-out token fires}."""
    results = fidelity.evaluate(model, {layer: sae}, batches, ("base", "sae"), keep_special=not sae.on_special)
    fired = torch.zeros(len(sae.W_enc), dtype=torch.bool, device=model.device)
    for tokens in batches:
        x = model.run(model.embed(tokens.to(model.device)), 0, layer + 1).flatten(0, 1)
        for rows in x.split(1024):
            fired |= (sae.encode(rows) > 0).any(0)
    numbers = fidelity.summary(results)
    return {"ce_base": numbers["ce_base"], "ce_sae": numbers["ce_sae"], "kl_sae": numbers["kl_sae"],
            "fvu": 1 - numbers["explained_variance_sae"][layer], "l0": numbers["l0_sae"][layer],
            "dead_latents": 1 - fired.float().mean().item()}
