"""A whole run of --method topk, jumprelu or e2e: train the SAE (dictionary.py), keep it by tenths, measure it.

    RUN_DIR/sae-10pct ... sae-90pct, RUN_DIR/sae        the SAE after every tenth of its steps, in SAELens's format, each
                                                        with a training.json: percent, step, tokens, and the seconds of
                                                        training so far, evaluation excluded
    RUN_DIR/results.json                                CE and KL with the SAE spliced in, FVU, L0, dead latents
"""
from dataclasses import replace

import torch

from lorasae import dictionary
from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.io.console import progress_line
from lorasae.io.files import write_json
from lorasae.io.saes import save_sae
from lorasae.runs import distributed
from lorasae.runs.ahead import Ahead
from lorasae.runs.measure import cost, evaluate, peak_memory_bytes
from lorasae.runs.setting import check_layer


def resolved(config, model):
    """The configuration with the width and rate that depend on the model. Raises InputError for what it cannot train."""
    layer, depth, d_model = config.layer[0], len(model.layers), model.config.hidden_size
    if len(config.layer) > 1:
        raise InputError(f"--layer {' '.join(map(str, config.layer))}: an SAE is trained on one layer at a time")
    check_layer(config.model, layer, depth)
    width = config.width or 8 * d_model
    if config.method == "jumprelu" and not 0 < config.l0 < width:
        raise InputError(f"--l0 {config.l0:g} cannot be reached: it must lie between 0 and the {width:,} latents")
    lr = config.lr or 2e-4 / (width / 2 ** 14) ** 0.5           # Gao et al. (2024), as in the published code
    return replace(config, width=width, lr=lr)


def train_sae(setting, run):
    """Trains the SAE of a run from its beginning, or from its last checkpoint -> the numbers of results.json."""
    model, _, corpus, _, _ = setting
    config = run.config = resolved(setting.config, model)
    layer = config.layer[0]
    torch.manual_seed(config.seed)
    sae = dictionary.new_sae(config.method, model.config.hidden_size, config.width, config.k).to(model.device)
    active = f"L0 {config.l0:g}" if config.method == "jumprelu" else f"k {sae.k}"
    progress_line(f"training an SAE ({config.method}, {active}) of {config.width:,} latents on block {layer} of {config.model}: "
          f"{config.steps:,} steps of {config.batch_size} x {config.context} tokens")

    held_out = corpus.held_out.split(config.eval_batch)
    run.begin()                                         # nothing is written before everything has been read
    train(setting, run, sae)
    keep(run, sae, config.steps)
    results = {**measure(model, sae, layer, held_out), **cost(run, corpus),
               "peak_memory_bytes": peak_memory_bytes(config.device)}
    run.finish(results)
    return results


def train(setting, run, sae):
    """Takes the run's steps, from its last checkpoint on."""
    model, corpus, config = setting.model, setting.text, run.config
    layer, end_to_end = config.layer[0], config.method == "e2e"
    training = dictionary.begin(sae, config)
    start = run.restore(training.tensors, training.optimizer)

    def frozen(tokens):
        return dictionary.observe(model, sae, layer, tokens, end_to_end)

    if start == 0:
        dictionary.fit(sae, training, dictionary.observe(model, sae, layer, corpus.batch(0), end_to_end=False), config.l0)

    observations = Ahead(corpus.batch, start, config, frozen)
    updates = dictionary.train(model, sae, layer, observations, training, config, start,
                               everywhere=distributed.everywhere, all_reduce=distributed.all_reduce)
    for step, values in run.watch(updates, start):
        run.log(step, **values)
        if ends_a_tenth(step, config.steps) and step < config.steps:
            keep(run, sae, step)
        run.save_if_due(step, training.tensors, training.optimizer)


def ends_a_tenth(step, steps):
    return 10 * step // steps > 10 * (step - 1) // steps


def keep(run, sae, step):
    """Saves the SAE under the tenth of the training it has had, and what that took.

    In the published code the "50pct" is the end of the training, and so on (trainer.py:460).
    """
    run.flush()                                         # a loss that is not finite stops here, before it is saved
    if distributed.process() > 0:
        return
    config = run.config
    percent = 10 * (10 * step // config.steps)
    folder = run.folder / ("sae" if step == config.steps else f"sae-{percent}pct")
    save_sae(sae, folder, model_name=config.model, layer=config.layer[0], context=config.context)
    tokens = step * config.tokens_per_step
    write_json(folder / "training.json", {"percent": percent, "step": step, "tokens": tokens, "seconds": run.seconds})


@torch.no_grad()
def measure(model, sae, layer, batches):
    """{ce_base, ce_sae, kl_sae in nats a token; fvu; l0; dead_latents: those that no held-out token fires}.

    The last is their part of all latents, BOS and EOS tokens counted; fvu and l0 leave those out.
    """
    results = evaluate(model, {layer: sae}, batches, ("base", "sae"))
    return numbers_of(results, model, sae, layer, batches)


def numbers_of(results, model, sae, layer, batches):
    """What `measure` returns, of the settings base and sae of fidelity.measure."""
    numbers = fidelity.summary(results)
    return {"ce_base": numbers["ce_base"], "ce_sae": numbers["ce_sae"], "kl_sae": numbers["kl_sae"],
            "fvu": 1 - numbers["explained_variance_sae"][layer], "l0": numbers["l0_sae"][layer],
            "dead_latents": dead_latents(model, sae, layer, batches)}


@torch.no_grad()
def dead_latents(model, sae, layer, batches):
    """The part of the latents that no token of the batches fires."""
    fired = torch.zeros(len(sae.W_enc), dtype=torch.bool, device=model.device)
    for tokens in batches:
        x = model.run(model.embed(tokens.to(model.device)), 0, layer + 1).flatten(0, 1)
        for rows in x.split(1024):
            fired |= (sae.encode(rows) > 0).any(0)
    return 1 - fired.float().mean().item()
