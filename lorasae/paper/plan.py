"""What is to be done for a study, and what it takes: parts, the trainings they share, and measuring, as jobs.

Answers are files: numbers/PART.json, and of a part whose work is shared out numbers/PART/PIECE.json.
"""
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.io.disk import read_json, write_json
from lorasae.io.presets import PRESETS
from lorasae.paper import benchmarks, by_distance, by_token, frontier, model_or_sae, one_block, recipe, saebench, scaling, several, steered
from lorasae.paper.jobs import Job, run_all
from lorasae.paper.study import adapters, new_sae, results, train
from lorasae.runs.config import Config
from lorasae.runs.defaults import SAE_TOKENS
from lorasae.runs.opening import open_run

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
        for training in part.trainings(study):
            if needed.setdefault(training.name, training) != training:
                raise ValueError(f"two trainings are called {training.name}")
    return needed


def jobs_of(study, parts):
    """The jobs that are still to be done, SAEs before adapters before what measures them."""
    jobs = []
    for name, training in trainings_of(study, parts).items():
        if not (study.folder / name / "results.json").exists():
            jobs.append(Job(name, training.needs, cost(study, training)))
    jobs.sort(key=lambda job: job.name.startswith("adapters/"))

    for name, part in parts.items():
        needs = tuple(training.name for training in part.trainings(study))
        pieces = [f"{name}/{piece}" for piece in part.pieces(study)] if hasattr(part, "pieces") else []
        takes = part.cost(study) if hasattr(part, "cost") else {}
        for piece in pieces:
            if not answer(study, piece).exists():
                jobs.append(Job(piece, needs, takes))
        if not answer(study, name).exists():
            jobs.append(Job(name, (*needs, *pieces), {} if pieces else takes))
    there = {job.name for job in jobs}
    return [job._replace(needs=tuple(need for need in job.needs if need in there)) for job in jobs]


def answer(study, name):
    """Where the numbers of a part, or of a piece of one, are kept."""
    return study.folder / "numbers" / f"{name.replace(' ', '-')}.json"


def work(study, name):
    """Does a job: a training, a piece of a part, or what a part measures."""
    parts = parts_of(study)
    training = trainings_of(study, parts).get(name)
    if training is not None:
        train(study, training)
        return

    name, _, piece = name.partition("/")
    part, started = parts[name], time.perf_counter()
    if piece:
        numbers = part.piece(study, piece)
        write_json(answer(study, f"{name}/{piece}"), {"numbers": numbers, "seconds": time.perf_counter() - started})
        return
    before = {}
    if hasattr(part, "pieces"):
        before = {piece: read_json(answer(study, f"{name}/{piece}")) for piece in part.pieces(study)}
        numbers = part.measure(study, {piece: each["numbers"] for piece, each in before.items()})
    else:
        numbers = part.measure(study)
    trained = [read_json(study.folder / training.name / "results.json") for training in part.trainings(study)]
    seconds = time.perf_counter() - started + sum(each["seconds"] for each in (*before.values(), *trained))
    write_json(answer(study, name), {"numbers": numbers, "trainings": len(trained), "seconds": seconds,
                                     "trained_tokens": sum(each["train_tokens"] for each in trained)})


# ---- What it takes -----------------------------------------------------------------------------------------------------

STARTING = 5                                            # seconds that any job takes to load what it needs


def cost(study, training):
    """{kind of work: tokens} of a training and its evaluations; several ranks share the teacher, about two fifths of a step."""
    given = training.given
    known, method = PRESETS[given["model"]], given.get("method", "lora")
    eval_tokens = given["eval_tokens"] or known.common.get("eval_tokens", Config.eval_tokens)
    if method != "lora":
        return {method: tokens_of(training), "forward": 3 * eval_tokens}
    ranks = len(given["rank"])
    kind = "all" if "all" in (given.get("adapt") or ()) else "after"
    return {kind: tokens_of(training) * (0.4 + 0.6 * ranks), "forward": (2 + ranks) * eval_tokens}


def tokens_of(training):
    """What a training trains on, as runs.defaults.configure will decide."""
    given = training.given
    known = PRESETS[given["model"]]
    if given.get("method", "lora") == "lora":
        return given["tokens"] or known.lora.get("tokens", Config.tokens)
    return given["tokens"] or known.sae_training.get("tokens", SAE_TOKENS)


def priced(jobs, rates):
    """{job's name: the seconds it is expected to take}; rates: {kind of work: tokens a second}."""
    return {job.name: STARTING + sum(tokens / rates[kind] for kind, tokens in job.work.items()) for job in jobs}


def measured_rates(study, jobs, processes):
    """{kind of work that the jobs do: tokens a second of one process}, on the main model, as many at a time as there will be."""
    kinds = sorted({kind for job in jobs for kind in job.work})
    with tempfile.TemporaryDirectory() as folder:
        timing = replace(study, folder=Path(folder), eval_tokens=2_000)
        failed = run_all([Job(kind, (), {}) for kind in kinds], time_one, timing, processes)
        if failed:
            raise InputError(next(iter(failed.values())))
        return {kind: read_json(Path(folder) / f"{kind}.json") for kind in kinds}


def time_one(study, kind):
    """Writes the tokens a second of a kind of work, by a few steps or one evaluation."""
    model = study.models.main
    if kind in ("after", "all"):
        training = adapters(study, kind, model, [], tokens=8_000, rank=(64,), adapt=(kind,))
    else:
        training = new_sae(study, "topk" if kind == "forward" else kind, model, tokens=25_000 if kind in ("topk", "jumprelu") else 8_000)
    train(study, training)
    if kind != "forward":
        write_json(study.folder / f"{kind}.json", results(study, training)["tokens_per_second"])
        return
    setting, started = open_run(study.folder / training.name), time.perf_counter()
    fidelity.measure(setting.model, setting.saes, setting.corpus.validation.split(setting.config.eval_batch), ("base", "sae"))
    write_json(study.folder / "forward.json", 2 * setting.corpus.validation.numel() / (time.perf_counter() - started))
