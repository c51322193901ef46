"""A whole run of --method lora: evaluate, train the adapters, save them, evaluate again.

    RUN_DIR/adapter/        the adapters, in PEFT's format; of several ranks or rates RUN_DIR/rank-R/adapter/ or
                            RUN_DIR/lr-X/adapter/, each in a folder that is a run of its own
    RUN_DIR/results.json    what splicing the SAEs in costs, and how much of it the adapters win back (evals/fidelity.py)
"""
import torch

from lorasae import adapt
from lorasae.beyond.muon import new_optimizer
from lorasae.evals import fidelity
from lorasae.io.adapters import save_adapter
from lorasae.io.console import progress_line
from lorasae.io.files import write_json
from lorasae.lora import add_lora, attach_lora, detach_lora, lora_parameters
from lorasae.runs import distributed, sweep
from lorasae.runs.ahead import Ahead
from lorasae.runs.folder import versions
from lorasae.runs.measure import cost, evaluate, evaluate_once, peak_memory_bytes


def adapt_model(setting, run):
    """Trains the adapters of a run from its beginning, or from its last checkpoint -> {folder: numbers of results.json}."""
    model, saes, corpus, config, _ = setting
    blocks = adapt.blocks_to_adapt(config.adapt, saes, len(model.layers))
    students = new_students(model, blocks, config)
    if config.shard:
        distributed.shard(model, distributed.local(config.device))
    progress_line(f"adapting blocks {', '.join(map(str, blocks))} of {config.model} around the SAE at layer "
          f"{', '.join(map(str, saes))}: {sum(p.numel() for p in parameters_of(students)):,} trainable parameters, "
          f"{config.steps:,} steps of {config.batch_size} x {config.context} tokens")

    before = evaluate_once(run, setting, ("base", "sae"))
    train(setting, run, students)
    folders = save(model, run, students)

    held_out = corpus.held_out.split(config.eval_batch)
    results = {}
    for folder, student in zip(folders, students):
        attach_lora(model, student)
        after = evaluate(model, saes, held_out, ("adapted",))
        results[folder] = {
            **fidelity.summary({**before, **after}), **cost(run, corpus),
            "trainable_parameters": sum(p.numel() for p in lora_parameters(student)),
            "peak_memory_bytes": peak_memory_bytes(config.device)}
    write_results(run, results)
    return results


def new_students(model, blocks, config):
    """Fresh adapters of every rank and rate, [{module name: LoRALinear}]; the first are attached.

    Each starts from the seed, as in a run of its own.
    """
    students = []
    for variant in config.variants:
        torch.manual_seed(config.seed)
        add_lora(model, blocks, variant.rank[0], config.alpha, config.dropout)
        students.append(detach_lora(model))
    attach_lora(model, students[0])
    return students


def parameters_of(students):
    """The trainable tensors of all students, in their order."""
    parameters = []
    for student in students:
        parameters += lora_parameters(student)
    return parameters


def train(setting, run, students):
    """Takes the run's steps, from its last checkpoint on: adapt.train for one student, sweep.train for several."""
    model, saes, corpus, config, _ = setting
    parameters = parameters_of(students)
    groups = [{"params": lora_parameters(student)} for student in students]
    optimizer = new_optimizer(groups, config.variants[0]) # its rate; each group's own is set before every step
    start = run.restore(parameters, optimizer)
    first = adapt.first_differing(model, saes)

    def frozen(tokens):
        if model.device.type == "cuda":
            tokens = tokens.pin_memory()
        tokens = tokens.to(model.device, non_blocking=True)
        return adapt.teach(model, saes, tokens, first)

    lessons = Ahead(corpus.batch, start, config, frozen)
    how = dict(config=config, start=start, all_reduce=distributed.all_reduce, process=distributed.process())
    if len(students) == 1:
        updates = adapt.train(model, saes, lessons, optimizer, **how)
    else:
        updates = sweep.train(model, saes, lessons, optimizer, students, **how)
    for step, loss, norm in run.watch(updates, start):
        run.log(step, **named(config, loss, norm))
        run.save_if_due(step, parameters, optimizer)


def named(config, loss, norm):
    """What a step's line of metrics.jsonl holds: the KL in nats a token, and the norm of its gradient before clipping."""
    kl = loss / config.context
    if len(config.variants) == 1:
        return {"kl": kl, "grad_norm": norm}
    names = student_names(config, "r", "lr")
    losses = {f"kl_{name}": value for name, value in zip(names, kl)}
    norms = {f"grad_norm_{name}": value for name, value in zip(names, norm)}
    return {**losses, **norms}


def student_names(config, rank="rank-", lr="lr-"):
    """What tells the students apart, as their folders do: rank-16, lr-5e-05, rank-16-lr-5e-05; "" of a lone one."""
    names = []
    for variant in config.variants:
        parts = []
        if len(config.rank) > 1:
            parts.append(f"{rank}{variant.rank[0]}")
        if isinstance(config.lr, tuple):
            parts.append(f"{lr}{variant.lr}")
        names.append("-".join(parts))
    return names


def save(model, run, students):
    """Writes the adapters -> the folder of each: the run's, or of several students one for each in it."""
    config, folders = run.config, []
    for name, student in zip(student_names(config), students):
        folder = run.folder / name
        attach_lora(model, student)
        if distributed.process() == 0:
            save_adapter(model, folder / "adapter", base_model=config.model)
        folders.append(folder)
    return folders


def write_results(run, results):
    """results.json; of several students one in each folder, beside a config.json that makes it a run of that student."""
    config = run.config
    first, *others = results.values()
    if not others:
        run.finish(first)
        return
    for variant, folder in zip(config.variants, results):
        if distributed.process() == 0:
            write_json(folder / "config.json", {**variant.to_json(), "versions": versions()})
            write_json(folder / "results.json", results[folder])

    shared = {name: first[name] for name in ("eval_tokens", "train_tokens", "tokens_per_second", "seconds")}
    kind = "rates" if len(config.rank) == 1 else "ranks"
    if isinstance(config.lr, tuple) and len(config.rank) > 1:
        kind = "ranks and rates"
    named = dict(zip(student_names(config, "", ""), results.values()))
    run.finish({kind: named, **shared})
