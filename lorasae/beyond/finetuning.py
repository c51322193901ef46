"""A whole run that trains an SAE which is there already: --method finetune, or --method lora --train-sae.

    RUN_DIR/sae/            the SAE afterwards, in SAELens's format
    RUN_DIR/adapter/        of --train-sae: the adapters, in PEFT's format
    RUN_DIR/results.json    what splicing it in costs, before and after; FVU, L0, dead latents
"""
import torch

from lorasae import adapt, dictionary
from lorasae.beyond import finetune
from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.io.console import progress_line
from lorasae.lora import lora_parameters
from lorasae.runs import adapting, distributed, sae_training
from lorasae.runs.ahead import Ahead
from lorasae.runs.measure import cost, evaluate, evaluate_once, peak_memory_bytes
from lorasae.sae import JumpReLU

SAMPLE = 16                                             # training sequences that tell the scale of the activations


def finetune_sae(setting, run):
    """Finetunes the SAE of a run from its beginning, or from its last checkpoint -> the numbers of results.json."""
    model, corpus, config = setting.model, setting.text, setting.config
    layer, sae = only_sae(setting.saes)
    make_trainable(sae, config)
    progress_line(f"finetuning an SAE of {len(sae.W_enc):,} latents at layer {layer} of {config.model} on {config.objective}, "
          f"{about_l0(sae, config)}: {config.steps:,} steps of {config.batch_size} x {config.context} tokens")

    was = evaluate_once(run, setting, ("base", "sae"))
    held_out = corpus.held_out.split(config.eval_batch)
    before = sae_training.numbers_of(was, model, sae, layer, held_out)
    train(setting, run, [])
    sae_training.keep(run, sae, config.steps)

    now = evaluate(model, {layer: sae}, held_out, ("base", "sae"))
    results = {**sae_training.numbers_of(now, model, sae, layer, held_out), "before": before, "closed": closed(was, now["sae"]),
               **cost(run, corpus), "peak_memory_bytes": peak_memory_bytes(config.device)}
    run.finish(results)
    return results


def adapt_with_sae(setting, run):
    """Trains adapters and SAE of a run together -> the numbers of results.json.

    Those of fidelity.summary are of the SAE as it has become, as eval.py finds it; "before" is of the SAE as it was, and
    "closed" is what both together close of its gaps.
    """
    model, corpus, config = setting.model, setting.text, setting.config
    layer, sae = only_sae(setting.saes)
    blocks = adapt.blocks_to_adapt(config.adapt, setting.saes, len(model.layers))
    make_trainable(sae, config)
    adapters, = adapting.new_students(model, blocks, config)
    count = sum(parameter.numel() for parameter in lora_parameters(adapters))
    progress_line(f"adapting blocks {', '.join(map(str, blocks))} of {config.model} ({count:,} parameters, rate {config.lr:g}) together "
          f"with the SAE of {len(sae.W_enc):,} latents at layer {layer} (rate {config.sae_lr:g}), {about_l0(sae, config)}: "
          f"{config.steps:,} steps of {config.batch_size} x {config.context} tokens")

    was = evaluate_once(run, setting, ("base", "sae"))
    held_out = corpus.held_out.split(config.eval_batch)
    before = sae_training.numbers_of(was, model, sae, layer, held_out)  # fresh adapters change nothing
    train(setting, run, lora_parameters(adapters))
    adapting.save(model, run, [adapters])
    sae_training.keep(run, sae, config.steps)

    now = evaluate(model, {layer: sae}, held_out, ("base", "sae", "adapted", "lora"))
    results = {
        **fidelity.summary(now), "before": before, "closed": closed(was, now["adapted"]),
        "dead_latents": sae_training.dead_latents(model, sae, layer, held_out), **cost(run, corpus),
        "trainable_parameters": count + sum(p.numel() for p in sae.parameters() if p.requires_grad),
        "peak_memory_bytes": peak_memory_bytes(config.device)}
    run.finish(results)
    return results


def only_sae(saes):
    """(layer, SAE) of the one that is trained."""
    (layer, sae), = saes.items()
    return layer, sae


def make_trainable(sae, config):
    """Lets the SAE learn: all of it, or all but its thresholds."""
    if config.thresholds == "frozen" and not isinstance(sae, JumpReLU):
        raise InputError("--thresholds frozen: this SAE is a TopK, which has none; leave it out")
    for name, parameter in sae.named_parameters():
        parameter.requires_grad_(not (name == "threshold" and config.thresholds == "frozen"))


def about_l0(sae, config):
    """How the run treats the SAE's L0, in words."""
    if not isinstance(sae, JumpReLU):
        return f"L0 at most its k of {sae.k}"
    if config.thresholds == "frozen":
        return "thresholds frozen, so that L0 is free"
    return "thresholds trained, L0 held at what it was"


def closed(was, now):
    """What training has closed of the gaps of the SAE as it was, with intervals: what fidelity.closed puts in words.

    was: fidelity.measure's base and sae before; now: the setting that was trained.
    """
    numbers = fidelity.summary({**was, "adapted": now})
    names = ("gap_closed", "kl_gap_closed", "excess_sae")
    return {**{name: numbers[name] for name in names}, "ci90": {name: numbers["ci90"][name] for name in names}}


def train(setting, run, adapters):
    """Takes the run's steps, from its last checkpoint on. adapters: their parameters; none where the SAE is finetuned alone."""
    model, corpus, config = setting.model, setting.text, setting.config
    layer, sae = only_sae(setting.saes)
    held = finetune.hold(sae, sample(setting))          # of the SAE as it was: before a checkpoint is restored
    learners = finetune.Learners(layer, sae, held, adapters)
    optimizer = finetune.optimizers(learners, config, config.sae_lr if adapters else config.lr)
    parameters = finetune.trained_parameters(optimizer)
    start = run.restore(parameters, optimizer)

    first = finetune.first_trained(model, layer)

    def frozen(tokens):
        tokens = tokens.to(model.device, non_blocking=True)
        return adapt.teach(model, {}, tokens, first)    # the SAE is not frozen, so it is no part of this

    lessons = Ahead(corpus.batch, start, config, frozen)
    updates = finetune.train(model, learners, lessons, optimizer, config, start,
                             distributed.everywhere, distributed.all_reduce, distributed.process())
    for step, values in run.watch(updates, start):
        run.log(step, **values)
        run.save_if_due(step, parameters, optimizer)


@torch.no_grad()
def sample(setting):
    """Activations of some training text, at the positions that the SAE learns from [N, D]."""
    model, (layer, sae) = setting.model, only_sae(setting.saes)
    text, config = setting.text, setting.config
    steps = range(-(-SAMPLE // config.batch_size))
    tokens = torch.cat([text.batch(step) for step in steps])[:SAMPLE]
    found = []
    for part in tokens.split(setting.config.micro_batch):
        seen = dictionary.observe(model, sae, layer, part, end_to_end=False)
        found.append(seen.x[seen.learned].float())
    return torch.cat(found)
