"""What is to be done for a study, and what it takes: parts, the trainings they share, and measuring, as jobs.

Answers are files: numbers/PART.json, and of a part whose work is shared out numbers/PART/PIECE.json.
"""
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.io.files import read_json, write_json
from lorasae.io.presets import PRESETS
from lorasae.paper import benchmarks, by_distance, by_token, frontier, model_or_sae, one_block, recipe
from lorasae.paper import saebench, scaling, several, steered
from lorasae.paper.jobs import Job, run_all
from lorasae.paper.study import adapters, new_sae, opened, results, train
from lorasae.runs.config import SAE_TOKENS, Config

PARTS = {                                               # in the order of the paper
    "frontier": frontier,
    "scaling": scaling,
    "several": several,
    "saebench": saebench,
    "steered": steered,
    "benchmarks": benchmarks,
    "by_token": by_token,
    "one_block": one_block,
    "by_distance": by_distance,
}
BEYOND = {"model_or_sae": model_or_sae, "recipe": recipe}           # on the embedded models alone


# ---- Parts ---------------------------------------------------------------------------------------

def parts_of(study):
    return {**PARTS, **BEYOND} if study.miniature else PARTS


def chosen(study, names):
    """{name: part} of the names of parts, figures and tables; of none, all."""
    parts = parts_of(study)
    if not names:
        return parts

    picked = set()
    for name in names:
        found = [part for part in parts if name == part or name in parts[part].FIGURES]
        if not found:
            raise InputError(f"--only {name}: there is no such part; choose from {', '.join(known(parts))}")
        picked.update(found)
    return {name: part for name, part in parts.items() if name in picked}


def known(parts):
    """Every name that --only takes."""
    names = []
    for name, part in parts.items():
        names += [name, *part.FIGURES]
    return names


# ---- Jobs ----------------------------------------------------------------------------------------

def trainings_of(study, parts):
    """{name: Training} of all parts, each once."""
    needed = {}
    for part in parts.values():
        for training in part.trainings(study):
            same = needed.setdefault(training.name, training)
            if same != training:
                raise ValueError(f"two trainings are called {training.name}")
    return needed


def jobs_of(study, parts):
    """The jobs that are still to be done, SAEs before adapters before what measures them."""
    jobs = training_jobs(study, parts)
    for name, part in parts.items():
        jobs += measuring_jobs(study, name, part)

    # What is done already is waited for by nobody.
    left = {job.name for job in jobs}
    return [job._replace(needs=tuple(need for need in job.needs if need in left)) for job in jobs]


def training_jobs(study, parts):
    jobs = []
    for name, training in trainings_of(study, parts).items():
        if not (study.folder / name / "results.json").exists():
            jobs.append(Job(name, training.needs, cost(study, training)))
    return sorted(jobs, key=lambda job: job.name.startswith("adapters/"))


def measuring_jobs(study, name, part):
    """The pieces of a part, if it has any, each with the part's cost, and then the part, which then only gathers them."""
    trainings = tuple(training.name for training in part.trainings(study))
    pieces = tuple(f"{name}/{piece}" for piece in pieces_of(study, part))
    takes = part.cost(study) if hasattr(part, "cost") else {}

    jobs = [Job(piece, trainings, takes) for piece in pieces]
    jobs.append(Job(name, trainings + pieces, {} if pieces else takes))
    return [job for job in jobs if not answer(study, job.name).exists()]


def pieces_of(study, part):
    return part.pieces(study) if hasattr(part, "pieces") else []


def answer(study, name):
    """Where the numbers of a part, or of a piece of one, are kept."""
    return study.folder / "numbers" / f"{name.replace(' ', '-')}.json"


# ---- Doing them ----------------------------------------------------------------------------------

def work(study, name):
    """Does a job: a training, a piece of a part, or what a part measures."""
    parts = parts_of(study)
    part_name, _, piece = name.partition("/")
    if part_name in ("saes", "adapters"):
        train(study, training_called(study, parts, name))
    elif piece:
        measure_piece(study, name, parts[part_name], piece)
    else:
        measure_part(study, name, parts[name])


def training_called(study, parts, name):
    """The Training of that name, of the first part that needs it."""
    for part in parts.values():
        for training in part.trainings(study):
            if training.name == name:
                return training
    raise ValueError(f"no part needs a training {name}")


def measure_piece(study, name, part, piece):
    """Writes {numbers, seconds}."""
    started = time.perf_counter()
    numbers = part.piece(study, piece)
    write_json(answer(study, name), {"numbers": numbers, "seconds": time.perf_counter() - started})


def measure_part(study, name, part):
    """Writes {numbers, trainings: how many, seconds: with those of its pieces and trainings, trained_tokens}."""
    started = time.perf_counter()
    if hasattr(part, "pieces"):
        pieces = {piece: read_json(answer(study, f"{name}/{piece}")) for piece in part.pieces(study)}
        numbers = part.measure(study, {piece: found["numbers"] for piece, found in pieces.items()})
    else:
        pieces = {}
        numbers = part.measure(study)

    trained = [read_json(study.folder / training.name / "results.json") for training in part.trainings(study)]
    seconds = time.perf_counter() - started
    seconds += sum(found["seconds"] for found in (*pieces.values(), *trained))
    tokens = sum(found["train_tokens"] for found in trained)
    write_json(answer(study, name), {
        "numbers": numbers,
        "trainings": len(trained),
        "seconds": seconds,
        "trained_tokens": tokens,
    })


# ---- What it takes -------------------------------------------------------------------------------

STARTING = 5                                      # seconds that any job takes to load what it needs


def cost(study, training):
    """{kind of work: tokens} of a training and its evaluations.

    Several ranks share the base model's part, about two fifths of a step; the rest is each one's.
    """
    given, eval_tokens = training.given, study.held_out
    method = given.get("method", "lora")
    if method != "lora":
        return {method: tokens_of(training), "forward": 3 * eval_tokens}

    ranks = len(given["rank"])
    kind = "all" if "all" in (given.get("adapt") or ()) else "after"
    return {kind: tokens_of(training) * (0.4 + 0.6 * ranks), "forward": (2 + ranks) * eval_tokens}


def tokens_of(training):
    """What a training trains on, as runs.config.configure will decide."""
    given = training.given
    known = PRESETS[given["model"]]
    if given.get("method", "lora") == "lora":
        return given["tokens"] or known.lora.get("tokens", Config.tokens)
    return given["tokens"] or known.sae_training.get("tokens", SAE_TOKENS)


def priced(jobs, rates):
    """{job's name: the seconds it is expected to take}; rates: {kind of work: tokens a second}."""
    expected = {}
    for job in jobs:
        working = sum(tokens / rates[kind] for kind, tokens in job.work.items())
        expected[job.name] = STARTING + working
    return expected


def measured_rates(study, jobs, processes):
    """{kind of work that the jobs do: tokens a second of one process}, on the main model.

    As many kinds are timed at once as there will be jobs at a time.
    """
    kinds = set()
    for job in jobs:
        kinds |= job.work.keys()
    timings = [Job(kind, (), {}) for kind in sorted(kinds)]

    with tempfile.TemporaryDirectory() as folder:
        timing = replace(study, folder=Path(folder), eval_tokens=2_000)
        failed = run_all(timings, time_one, timing, processes)
        if failed:
            raise InputError(next(iter(failed.values())))
        return {job.name: read_json(Path(folder) / f"{job.name}.json") for job in timings}


def time_one(study, kind):
    """Writes the tokens a second of a kind of work, by a few steps or one evaluation."""
    training = shortest(study, kind)
    training = training._replace(given={**training.given, "compile": False})        # which would take most of the time
    train(study, training)
    if kind == "forward":
        rate = forward_rate(opened(study, training))
    else:
        rate = results(study, training)["tokens_per_second"]
    write_json(study.folder / f"{kind}.json", rate)


def shortest(study, kind):
    """A Training of the kind, of as few tokens as tell its pace; "forward" is measured with any SAE."""
    model = study.models.main
    if kind in ("after", "all"):
        return adapters(study, kind, model, [], tokens=8_000, rank=(64,), adapt=(kind,))
    if kind == "forward":
        return new_sae(study, "topk", model, tokens=8_000)
    return new_sae(study, kind, model, tokens=25_000 if kind in ("topk", "jumprelu") else 8_000)


def forward_rate(setting):
    """Tokens a second without gradient, of the model alone and with its SAE."""
    started = time.perf_counter()
    validation = setting.text.held_out
    fidelity.measure(setting.model, setting.saes, validation.split(setting.config.eval_batch), ("base", "sae"))
    return 2 * validation.numel() / (time.perf_counter() - started)
