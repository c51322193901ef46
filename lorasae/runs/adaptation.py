"""A whole run of --method lora: evaluate, train the adapters, save them, evaluate again.

    RUN_DIR/adapter/        the adapters, in PEFT's format; of several ranks or rates RUN_DIR/rank-R/adapter/ or
                            RUN_DIR/lr-X/adapter/, each in a folder that is a run of its own
    RUN_DIR/results.json    what splicing the SAEs in costs, and how much of it the adapters win back (evals/fidelity.py)
"""
import torch

from lorasae import adapt
from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.io.adapters import save_adapter
from lorasae.io.console import tell
from lorasae.io.disk import write_json
from lorasae.lora import add_lora, attach_lora, detach_lora, lora_parameters
from lorasae.runs import distributed, sweep
from lorasae.runs.ahead import in_advance
from lorasae.runs.folder import versions
from lorasae.runs.measure import cost, evaluate, evaluate_once, peak_memory_bytes


def adapt_model(setting, run):
    """Trains the adapters of a run from its beginning, or from its last checkpoint -> {folder: numbers of results.json}."""
    model, saes, corpus, config, _ = setting
    blocks = blocks_to_adapt(config.adapt or adapt.default_adapt(saes), saes, len(model.layers))
    students = new_students(model, blocks, config)
    if config.shard:
        distributed.shard(model, distributed.local(config.device))
    tell(f"adapting blocks {', '.join(map(str, blocks))} of {config.model} around the SAE at layer "
          f"{', '.join(map(str, saes))}: {sum(p.numel() for p in parameters_of(students)):,} trainable parameters, "
          f"{config.steps:,} steps of {config.batch_size} x {config.context} tokens")

    before = evaluate_once(run, setting, ("base", "sae"))
    train(setting, run, students)
    places = save(model, run, students)

    held_out = corpus.validation.split(config.eval_batch)
    results = {}
    for place, student in zip(places, students):
        attach_lora(model, student)
        after = evaluate(model, saes, held_out, ("adapted",))
        results[place] = {
            **fidelity.summary({**before, **after}), **cost(run, corpus),
            "trainable_parameters": sum(p.numel() for p in lora_parameters(student)),
            "peak_memory_bytes": peak_memory_bytes(config.device)}
    write_results(run, results)
    return results


def blocks_to_adapt(spec, saes, depth):
    """adapt.adapted_blocks of a model of so many blocks. Raises InputError where there are none."""
    blocks = adapt.adapted_blocks(spec, saes, depth)
    if blocks and blocks[-1] >= depth:
        raise InputError(f"--adapt {blocks[-1]} is out of range: the model has blocks 0 to {depth - 1}")
    if not blocks:
        raise InputError(f"no block comes after the SAE at layer {max(saes)}: pass --adapt all, or another --layer")
    return blocks


def new_students(model, blocks, config):
    """Fresh adapters of every rank and rate, [{module name: LoRALinear}]; the first are attached.

    Each starts from the seed, as in a run of its own.
    """
    students = []
    for student in config.students:
        torch.manual_seed(config.seed)
        add_lora(model, blocks, student.rank[0], config.alpha, config.dropout)
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
    optimizer = adapt.adamw(groups, config.students[0])                 # each group's rate is set before its every step
    start, position = run.restore(parameters, optimizer)

    first = adapt.first_differing(model, saes)
    positions = []

    def frozen(tokens):
        if model.device.type == "cuda":
            tokens = tokens.pin_memory()
        tokens = tokens.to(model.device, non_blocking=True)
        return adapt.teach(model, saes, tokens, first)

    def lessons(batches):
        at_once = max(config.ahead, config.micro_batch)
        for tensors, position in in_advance(batches, start, config.batch_size, at_once, frozen):
            positions[:] = [position]
            yield adapt.Lesson(*tensors)

    with corpus.batches(config.batch_size, position) as batches:
        how = dict(config=config, start=start, all_reduce=distributed.all_reduce, process=distributed.rank())
        if len(students) == 1:
            updates = adapt.train(model, saes, lessons(batches), optimizer, **how)
        else:
            updates = sweep.train(model, saes, lessons(batches), optimizer, students, **how)
        for step, loss, norm in run.watch(updates, start):
            run.log(step, **named(config, loss, norm))
            run.save_if_due(step, parameters, optimizer, positions[0])


def named(config, loss, norm):
    """What a step's line of metrics.jsonl holds: the KL in nats a token, and the norm of its gradient before clipping."""
    kl = loss / config.context
    if len(config.students) == 1:
        return {"kl": kl, "grad_norm": norm}
    names = student_names(config, "r", "lr")
    losses = {f"kl_{name}": value for name, value in zip(names, kl)}
    norms = {f"grad_norm_{name}": value for name, value in zip(names, norm)}
    return {**losses, **norms}


def student_names(config, rank="rank-", lr="lr-"):
    """What tells the students apart, as in the names of their folders: rank-16, lr-5e-05, rank-16-lr-5e-05; "" of a lone one."""
    names = []
    for student in config.students:
        parts = []
        if len(config.rank) > 1:
            parts.append(f"{rank}{student.rank[0]}")
        if isinstance(config.lr, tuple):
            parts.append(f"{lr}{student.lr}")
        names.append("-".join(parts))
    return names


def save(model, run, students):
    """Writes the adapters -> the folder of each: the run's, or of several students one for each in it."""
    config, places = run.config, []
    for name, student in zip(student_names(config), students):
        place = run.folder / name
        attach_lora(model, student)
        if distributed.rank() == 0:
            save_adapter(model, place / "adapter", base_model=config.model)
        places.append(place)
    return places


def write_results(run, results):
    """results.json; of several students one in each folder, beside a config.json that makes it a run of that student."""
    config = run.config
    first, *others = results.values()
    if not others:
        run.finish(first)
        return
    for student, place in zip(config.students, results):
        if distributed.rank() == 0:
            write_json(place / "config.json", {**student.to_json(), "versions": versions()})
            write_json(place / "results.json", results[place])

    shared = {name: first[name] for name in ("eval_tokens", "train_tokens", "tokens_per_second", "seconds")}
    kind = "rates" if len(config.rank) == 1 else "ranks"
    if isinstance(config.lr, tuple) and len(config.rank) > 1:
        kind = "ranks and rates"
    named = dict(zip(student_names(config, "", ""), results.values()))
    run.finish({kind: named, **shared})
