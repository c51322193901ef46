"""Every figure and table of the paper, by one command: trains what they need, measures, and writes one page.

    python -m lorasae.paper                             in miniature, on the embedded models
    python -m lorasae.paper --quick                     the same with few tokens: that it runs, not what it finds
    python -m lorasae.paper --only fig3,table1          some of it; --list says what there is
    python -m lorasae.paper --dry-run                   what would be trained, and how long that takes on this machine
    python -m lorasae.paper --model gemma-2-2b          the replication at real size

OUT/index.html holds every result beside the paper's, and a summary on top. Everything is kept as it is made: interrupted,
the same command continues, and ends with the same numbers.
"""
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from lorasae.errors import InputError
from lorasae.evals.common import print_table
from lorasae.evals.figures import save_figure
from lorasae.io.console import Parser, one_line_errors, count, progress_line
from lorasae.io.files import read_json, write_bytes
from lorasae.paper.arms import same_plan
from lorasae.paper.findings import show
from lorasae.paper.jobs import Progress, run_all
from lorasae.paper.page import page
from lorasae.paper.plan import answer, chosen, jobs_of, measured_rates, parts_of, priced, tokens_of, work
from lorasae.paper.study import MODELS, Study
from lorasae.runs.folder import RUNS

TOKENS = {                                              # fields of Study, each an option: of what
    "sae_tokens": "of each SAE",
    "frontier_tokens": "of each SAE of Figures 1 and 5",
    "lora_tokens": "of adapters",
    "long_tokens": "of the adapters that Tables 3 to 6 and Figures 7 to 11 look at",
    "eval_tokens": "held out",
    "beyond_tokens": "of each arm of model_or_sae",
    "recipe_tokens": "of the published recipe, in recipe",
}
MINIATURE = {
    "sae_tokens": 400_000,
    "frontier_tokens": 500_000,
    "lora_tokens": 60_000,
    "long_tokens": 300_000,
    "eval_tokens": 12_000,
    "beyond_tokens": 20_000,
    "recipe_tokens": 100_000,
    "seeds": (0, 1, 2),
    "recipe": "tuned",
}
QUICK = {
    "sae_tokens": 20_000,
    "frontier_tokens": 20_000,
    "lora_tokens": 4_000,
    "long_tokens": 8_000,
    "eval_tokens": 4_000,
    "beyond_tokens": 2_000,
    "recipe_tokens": 6_000,
    "seeds": (0,),
    "recipe": "tuned",
}


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    args = arguments(words)
    with one_line_errors("interrupted: the same command continues"):
        study = study_of(args)
        parts = chosen(study, names_in(args.only))
        processes = args.jobs or processes_for(study)

        if args.list:
            show_parts(parts)
        elif args.dry_run:
            jobs = jobs_of(study, parts)
            show_plan(study, parts, seconds_of(study, jobs, processes), processes)
        else:
            same_study(study)
            progress_line(f"{study.folder}/ is where this writes; index.html there is the page")
            failed = do(study, jobs_of(study, parts), processes)
            report(study, parts, failed, command_for_all(words, args.only))
            refuse_missing(parts, failed)


# ---- What is asked -------------------------------------------------------------------------------

def arguments(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="tiny-gemma-2", help="with the others of its study (default: %(default)s)")
    add("--only", help="parts, figures or tables, comma-separated, such as fig3,table1 (default: all)")
    add("--list", action="store_true", help="say what there is, and stop")
    add("--quick", action="store_true", help="few tokens, one seed")
    add("--dry-run", action="store_true", help="say what would be done and how long it takes, by a short timing (of real "
        "models it fetches the main one), and stop")
    for name, what in TOKENS.items():
        option = "--" + name.replace("_", "-")
        add(option, type=count, help=f"tokens {what} (default: {MINIATURE[name]:,}; of real models the paper's)")
    add("--seeds", type=int, help="of adapters, where a part takes several (default: 3; quick and real models: 1)")
    add("--recipe", choices=("paper", "tuned"), help="of adapters (default: tuned; of real models paper)")
    add("--jobs", type=int, help="at a time (default: one a core, at most 4; of real models 1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--out", type=Path, help=f"folder (default: {RUNS}/paper, or {RUNS}/paper-quick, {RUNS}/paper-MODEL)")

    args = parser.parse_args(argv)
    for name, value in ("seeds", args.seeds), ("jobs", args.jobs):
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: pass at least 1")
    return args


def study_of(args):
    """The Study that the arguments ask for: what they do not say is the miniature's, or of real models None."""
    scale = {}
    if args.model.startswith("tiny-"):
        scale |= QUICK if args.quick else MINIATURE
    elif args.quick or args.beyond_tokens or args.recipe_tokens:
        raise InputError("--quick, --beyond-tokens and --recipe-tokens are of the embedded models: leave them out, and pass "
                         "--lora-tokens and the others for a smaller replication")
    for name in (*TOKENS, "recipe"):
        given = getattr(args, name)
        if given is not None:
            scale[name] = given
    if args.seeds is not None:
        scale["seeds"] = tuple(range(args.seeds))

    folder = args.out
    if folder is None:
        name = "paper" if args.model == "tiny-gemma-2" else f"paper-{args.model}"
        folder = RUNS / (f"{name}-quick" if args.quick else name)
    return Study(folder, args.model, **scale, device=args.device)


def names_in(only):
    """What --only names: "fig3, table1" -> ["fig3", "table1"]."""
    names = [name.strip() for name in (only or "").split(",")]
    return [name for name in names if name]


def command_for_all(words, only):
    """The command without its --only: the page may show parts of earlier ones too."""
    kept = [str(word) for word in words if str(word) not in ("--only", only, f"--only={only}")]
    return shlex.join(["python", "-m", "lorasae.paper", *kept])


def processes_for(study):
    """How many jobs at a time: one a core, at most 4; of real models, and on a GPU, one."""
    if study.miniature and study.device == "cpu":
        return min(4, torch.get_num_threads())
    return 1


def same_study(study):
    """Refuses to continue in a folder that was begun with other arguments."""
    asked = asdict(study)
    del asked["folder"]
    asked["seeds"] = list(study.seeds)                  # as JSON has it

    same_plan(study.folder, asked, "study.json")


# ---- What there is, and what it takes ------------------------------------------------------------

def show_parts(parts):
    rows = [[name, ", ".join(part.FIGURES), part.TITLE] for name, part in parts.items()]
    print_table(rows, ["part", "shows", "what"])


def show_plan(study, parts, expected, processes):
    """Prints what is still to be done: parts, their trainings, tokens and times; expected: {job's name: seconds}."""
    rows, counted = [], set()
    for name, part in parts.items():
        own = {}                                        # trainings that no part before needs
        for training in part.trainings(study):
            if training.name in expected and training.name not in counted:
                own[training.name] = training
        counted |= own.keys()

        tokens = sum(tokens_of(training) for training in own.values())
        mine = [job for job in expected if job in own or job.partition("/")[0] == name]
        seconds = sum(expected[job] for job in mine) / processes
        rows.append([name, ", ".join(part.FIGURES), str(len(own)), f"{tokens:,}", minutes(seconds)])
    print_table(rows, ["part", "shows", "trainings", "their tokens", "minutes"])

    whole = sum(expected.values()) / processes
    larger = "" if study.miniature else ". Larger models take longer; train.py --dry-run tells the memory of each"
    print(f"\nabout {minutes(whole)} minutes, {processes} jobs at a time, by a short timing of {study.models.main}; "
          f"what several parts need is counted once{larger}")


def seconds_of(study, jobs, processes):
    """{job's name: the seconds it is expected to take}, by a short timing of this machine."""
    return priced(jobs, measured_rates(study, jobs, processes))


def minutes(seconds):
    return f"{seconds / 60:,.1f}"


# ---- Doing it ------------------------------------------------------------------------------------

def do(study, jobs, processes):
    """Does the jobs, behind a line of progress -> {name: why it could not be done}."""
    if not jobs:
        return {}
    progress_line("timing this machine")
    expected = seconds_of(study, jobs, processes)
    whole = sum(expected.values()) / processes
    progress_line(f"{len(jobs)} jobs, {processes} at a time: about {minutes(whole)} minutes")
    return run_all(jobs, work, study, processes, Progress(expected, processes))


def report(study, parts, failed, command):
    """The page with everything that has been found so far; pictures; and the tables of `parts` to the terminal."""
    shown, found = {}, {}                               # of this command or of an earlier one
    for name, part in parts_of(study).items():
        path = answer(study, name)
        if path.exists():
            found[name] = read_json(path)
        if name in parts or name in found:
            shown[name] = part

    for name, part in parts.items():
        if name in found:
            show(part.tables(found[name]["numbers"]))
    for name, each in found.items():
        picture = study.folder / "pictures" / f"{name}.png"
        save_figure(shown[name].draw, each["numbers"], picture, command)

    path = study.folder / "index.html"
    write_bytes(path, page(study, shown, found, failed, command).encode())
    print(f"\n{path}")


def refuse_missing(parts, failed):
    """Ends the command with an error where something that was asked for is not there."""
    missing = [f"{name} was left out: {failed[name]}" for name in parts if name in failed]
    if missing:
        raise InputError("; ".join(missing))


if __name__ == "__main__":
    main()
