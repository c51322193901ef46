"""What is to be done for a study, and what it takes: parts, the trainings they share, and measuring, as jobs.

Answers are files: numbers/PART.json, and of a part whose work is shared out numbers/PART/PIECE.json.
"""
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from lorasae.errors import InputError
from lorasae.io.disk import read_json, write_json
from lorasae.paper import benchmarks, by_distance, by_token, frontier, model_or_sae, one_block, recipe, saebench, scaling, several, steered
from lorasae.paper.jobs import Job, run_all
from lorasae.paper.study import adapters, new_sae, results, train

PARTS = {"frontier": frontier, "scaling": scaling, "several": several, "saebench": saebench, "steered": steered,
         "benchmarks": benchmarks, "by_token": by_token, "one_block": one_block, "by_distance": by_distance}
BEYOND = {"model_or_sae": model_or_sae, "recipe": recipe}           # on the embedded models alone


# ---- Parts -------------------------------------------------------------------------------------------------------------

def parts_of(study):
    return {**PARTS, **BEYOND} if study.miniature else PARTS


def chosen(study, names):
    """{name: part} of the names of parts, figures and tables; of none, all."""
    parts, picked = parts_of(study), {}
    for name in names:
        found = [part for part in parts if name == part or name in parts[part].FIGURES]
        if not found:
            raise InputError(f"--only {name}: there is no such part; choose from {', '.join(known(parts))}")
        picked |= {part: parts[part] for part in found}
    return {name: parts[name] for name in parts if name in picked} if names else parts


def known(parts):
    """Every name that --only takes."""
    names = []
    for name, part in parts.items():
        names += [name, *part.FIGURES]
    return names


def trainings_of(study, parts):
    """{name: Training} of all parts, each once."""
    needed = {}
    for part in parts.values():
        needed |= {training.name: training for training in part.trainings(study)}
    return needed


def jobs_of(study, parts, rates):
    """The jobs that are still to be done, SAEs before adapters before what measures them."""
    jobs = []
    for name, training in trainings_of(study, parts).items():
        if not (study.folder / name / "results.json").exists():
            jobs.append(Job(name, training.needs, seconds(cost(training), rates)))
    jobs.sort(key=lambda job: job.name.startswith("adapters/"))

    for name, part in parts.items():
        needs = tuple(training.name for training in part.trainings(study))
        pieces = [f"{name}/{piece}" for piece in part.pieces(study)] if hasattr(part, "pieces") else []
        for piece in pieces:
            if not answer(study, piece).exists():
                jobs.append(Job(piece, needs, seconds(part.cost(study), rates)))
        if not answer(study, name).exists():
            jobs.append(Job(name, (*needs, *pieces), 1.0 if pieces else seconds(part.cost(study), rates)))
    there = {job.name for job in jobs}
    return [job._replace(needs=tuple(need for need in job.needs if need in there)) for job in jobs]


def answer(study, name):
    """Where the numbers of a part, or of a piece of one, are kept."""
    return study.folder / "numbers" / f"{name.replace(' ', '-')}.json"


def work(study, name):
    """A job: a training, a piece of a part, or what a part measures."""
    parts = parts_of(study)
    training = trainings_of(study, parts).get(name)
    if training is not None:
        train(study, training)
        return
    part, _, piece = name.partition("/")
    part, started = parts[part], time.perf_counter()
    if piece:
        numbers = part.piece(study, piece)
    elif hasattr(part, "pieces"):
        found = {piece: read_json(answer(study, f"{name}/{piece}")) for piece in part.pieces(study)}
        numbers = part.measure(study, {piece: each["numbers"] for piece, each in found.items()})
        started -= sum(each["seconds"] for each in found.values())
    else:
        numbers = part.measure(study)
    write_json(answer(study, name), {"numbers": numbers, "seconds": time.perf_counter() - started})


# ---- What it takes -----------------------------------------------------------------------------------------------------

KINDS = ("topk", "jumprelu", "e2e", "after", "all", "forward")     # of work, each with a speed of its own
STARTING = 5                                            # seconds that any job takes to load what it needs


def cost(training):
    """{kind of work: tokens} of a training; several ranks share the teacher, about two fifths of a step."""
    given = training.given
    method, tokens = given.get("method", "lora"), given["tokens"] or 0
    if method != "lora":
        return {method: tokens}
    ranks = len(given.get("rank", (64,)))
    everywhere = given.get("adapt") == ("all",) or "topk" in training.name
    return {"all" if everywhere else "after": tokens * (0.4 + 0.6 * ranks)}


def seconds(work, rates):
    return STARTING + sum(tokens / rates[kind] for kind, tokens in work.items())


def measured_rates(study, processes):
    """{kind of work: tokens a second of one process}, from short trainings of the main model, as many at a time as there will be."""
    with tempfile.TemporaryDirectory() as folder:
        timing = replace(study, folder=Path(folder))
        failed = run_all([Job(kind, (), 1.0) for kind in KINDS[:-1]], time_one, timing, processes)
        if failed:
            raise InputError(next(iter(failed.values())))
        found = {kind: results(timing, timed(timing, kind))["tokens_per_second"] for kind in KINDS[:-1]}
    return {**found, "forward": 3 * found["after"]}     # no backward pass, no teacher


def timed(study, kind):
    """A training of a few steps."""
    model = study.models.main
    if kind in ("after", "all"):
        return adapters(replace(study, eval_tokens=1_000), kind, model, [], tokens=8_000, rank=(64,), adapt=(kind,))
    return new_sae(replace(study, eval_tokens=1_000), kind, model, tokens=25_000 if kind != "e2e" else 8_000)


def time_one(study, kind):
    train(study, timed(study, kind))
