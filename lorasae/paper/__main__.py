"""Every figure and table of the paper, by one command: trains what they need, measures, and writes one page.

    python -m lorasae.paper                             in miniature, on the embedded models
    python -m lorasae.paper --quick                     the same with few tokens: that it runs, not what it finds
    python -m lorasae.paper --only fig3,table1          some of it; --list says what there is
    python -m lorasae.paper --dry-run                   what would be trained, and how long that takes on this machine
    python -m lorasae.paper --model gemma-2-2b          the replication at real size

OUT/index.html holds every result beside the paper's, and a summary on top. Everything is kept as it is made: interrupted, the
same command continues, and ends with the same numbers.
"""
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from lorasae.errors import InputError
from lorasae.evals.common import print_table
from lorasae.evals.figures import save_figure
from lorasae.io.console import Parser, answering, count, tell
from lorasae.io.disk import read_json, write_bytes, write_json
from lorasae.paper.findings import show
from lorasae.paper.jobs import Progress, run_all
from lorasae.paper.page import page
from lorasae.paper.plan import answer, chosen, jobs_of, measured_rates, parts_of, priced, tokens_of, work
from lorasae.paper.study import MODELS, Study
from lorasae.runs.config import RECIPES
from lorasae.runs.folder import RUNS

MINIATURE = {"sae_tokens": 400_000, "frontier_tokens": 500_000, "lora_tokens": 60_000, "long_tokens": 300_000, "eval_tokens": 12_000,
             "beyond_tokens": 20_000, "recipe_tokens": 300_000, "seeds": (0, 1, 2), "recipe": "tuned"}
QUICK = {"sae_tokens": 40_000, "frontier_tokens": 40_000, "lora_tokens": 8_000, "long_tokens": 16_000, "eval_tokens": 8_000,
         "beyond_tokens": 4_000, "recipe_tokens": 12_000, "seeds": (0,), "recipe": "tuned"}


def show_plan(study, parts, expected, processes):
    """Prints what is still to be done: parts, their trainings, tokens and times."""
    rows, counted = [], set()
    for name, part in parts.items():
        own = {training.name: training for training in part.trainings(study) if training.name in expected and training.name not in counted}
        counted |= own.keys()
        mine = [job for job in expected if job in own or job.partition("/")[0] == name]
        tokens = sum(map(tokens_of, own.values()))
        rows.append([name, ", ".join(part.FIGURES), str(len(own)), f"{tokens:,}", minutes(sum(expected[job] for job in mine) / processes)])
    print_table(rows, ["part", "shows", "trainings", "their tokens", "minutes"])
    whole = sum(expected.values()) / processes
    print(f"\nabout {minutes(whole)} minutes, {processes} jobs at a time, by a short timing of {study.models.main}; what several parts "
          "need is counted once" + ("" if study.miniature else ". Larger models take longer; train.py --dry-run tells the memory of each"))


def minutes(seconds):
    return f"{seconds / 60:,.1f}"


# ---- The command -------------------------------------------------------------------------------------------------------

def arguments(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="tiny-gemma-2", help="with the others of its study (default: %(default)s)")
    add("--only", help="parts, figures or tables, comma-separated, such as fig3,table1 (default: all)")
    add("--list", action="store_true", help="say what there is, and stop")
    add("--quick", action="store_true", help="few tokens, one seed")
    add("--dry-run", action="store_true", help="say what would be done and how long it takes, by a short timing, and stop")
    for name, what in (("sae-tokens", "of each SAE"), ("frontier-tokens", "of each SAE of Figures 1 and 5"),
                       ("lora-tokens", "of adapters"), ("long-tokens", "of the adapters that Tables 3 to 6 and Figures 7 to 11 look at"),
                       ("eval-tokens", "held out"), ("beyond-tokens", "of each arm of model_or_sae"),
                       ("recipe-tokens", "of the published recipe, in recipe")):
        small = MINIATURE[name.replace("-", "_")]
        add(f"--{name}", type=count, help=f"tokens {what} (default: {small:,}; of real models the paper's)")
    add("--seeds", type=int, help="of adapters, where a part takes several (default: 3; quick and real models: 1)")
    add("--recipe", choices=RECIPES, help="of adapters (default: tuned; of real models paper)")
    add("--jobs", type=int, help="at a time (default: one a core, at most 4; of real models 1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--out", type=Path, help=f"folder (default: {RUNS}/paper, or {RUNS}/paper-quick, {RUNS}/paper-MODEL)")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: pass at least 1")
    return args


def study_of(args):
    """The Study that the arguments ask for."""
    miniature = args.model.startswith("tiny-")
    scale = dict(QUICK if args.quick else MINIATURE) if miniature else {}
    for name in ("sae_tokens", "frontier_tokens", "lora_tokens", "long_tokens", "eval_tokens", "beyond_tokens", "recipe_tokens", "recipe"):
        if getattr(args, name) is not None:
            scale[name] = getattr(args, name)
    if args.seeds is not None:
        scale["seeds"] = tuple(range(args.seeds))
    name = "paper" if args.model == "tiny-gemma-2" else f"paper-{args.model}"
    folder = args.out or RUNS / (f"{name}-quick" if args.quick else name)
    return Study(folder, args.model, **scale, device=args.device)


def same_study(study):
    """Refuses to continue in a folder that was begun with other arguments."""
    path = study.folder / "study.json"
    asked = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(study).items() if name != "folder"}
    if not path.exists():
        write_json(path, asked)
    before = read_json(path)
    for name in asked:
        if before.get(name) != asked[name]:
            raise InputError(f"{study.folder} was begun with {name} {before.get(name)}, not {asked[name]}: pass another --out, or the "
                             "same arguments to continue")


def report(study, parts, failed, command):
    """The page with everything that has been found so far; pictures; and the tables of `parts` to the terminal."""
    shown = {name: part for name, part in parts_of(study).items() if name in parts or answer(study, name).exists()}
    found = {name: read_json(answer(study, name)) for name in shown if answer(study, name).exists()}
    for name in parts:
        if name in found:
            show(parts[name].tables(found[name]["numbers"]))
    for name, each in found.items():
        save_figure(shown[name].draw, each["numbers"], study.folder / "pictures" / f"{name}.png", command)
    write_bytes(study.folder / "index.html", page(study, shown, found, failed, command).encode())


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    args = arguments(words)
    with answering("interrupted: the same command continues"):
        study = study_of(args)
        parts = chosen(study, [name.strip() for name in (args.only or "").split(",") if name.strip()])
        if args.list:
            print_table([[name, ", ".join(part.FIGURES), part.TITLE] for name, part in parts.items()], ["part", "shows", "what"])
            return
        processes = args.jobs or (min(4, torch.get_num_threads()) if study.miniature and study.device == "cpu" else 1)
        if args.dry_run:
            jobs = jobs_of(study, parts)
            show_plan(study, parts, priced(jobs, measured_rates(study, jobs, processes)), processes)
            return

        same_study(study)
        tell(f"{study.folder}/ is where this writes; index.html there is the page")
        failed = do(study, jobs_of(study, parts), processes)
        report(study, parts, failed, shlex.join(["python", "-m", "lorasae.paper", *words]))
        print(f"\n{study.folder / 'index.html'}")
        missing = [f"{name} was left out: {failed[name]}" for name in parts if name in failed]
        if missing:
            raise InputError("; ".join(missing))


def do(study, jobs, processes):
    """Does the jobs, behind a line of progress -> {name: why it could not be done}."""
    if not jobs:
        return {}
    tell("timing this machine")
    expected = priced(jobs, measured_rates(study, jobs, processes))
    tell(f"{len(jobs)} jobs, {processes} at a time: about {minutes(sum(expected.values()) / processes)} minutes")
    return run_all(jobs, work, study, processes, Progress(expected, processes))


if __name__ == "__main__":
    main()
