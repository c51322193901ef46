"""Every figure and table of the paper, by one command: trains, evaluates, and writes one page.

    python -m lorasae.paper                         in miniature, on the embedded models
    python -m lorasae.paper --quick                 with few tokens: shows that it runs
    python -m lorasae.paper --only fig3,table1      some of it; --list shows the parts
    python -m lorasae.paper --dry-run               the commands that would run
    python -m lorasae.paper --model gemma-2-2b      the replication at real size

OUT/index.html shows every result beside the paper's. All of it comes from runs of train.py and
eval.py, which stay in OUT: interrupted, the same command continues, and ends with the same numbers.
"""
import argparse
import shlex
import sys
from pathlib import Path

import torch

from lorasae.errors import InputError
from lorasae.evals.report import print_table, print_tables, save_figure
from lorasae.io.console import Parser, count, note, one_line_errors, progress_line
from lorasae.io.files import read_json, write_bytes, write_json
from lorasae.paper import downstream, frontier, gap, why
from lorasae.paper.page import page
from lorasae.paper.results import table_of_claims
from lorasae.paper.study import MODELS, Study, Training, command_of, tokens_of
from lorasae.runs.commands import run_all
from lorasae.runs.folder import RUNS, begin_with

PARTS = (                                               # in the order of the paper
    frontier.FRONTIER,
    gap.SCALING,
    gap.SEVERAL,
    downstream.SAEBENCH,
    downstream.STEERING,
    downstream.BENCHMARKS,
    why.TOKENS,
    gap.ONE_BLOCK,
    why.DISTANCES,
)
TOKENS = {                              # fields of Study: in miniature, with --quick, of what
    "sae_tokens": (400_000, 20_000, "of each SAE"),
    "frontier_tokens": (2_000_000, 20_000, "of each SAE of Figures 1 and 5"),
    "lora_tokens": (60_000, 4_000, "of adapters"),
    "long_tokens": (300_000, 8_000, "of adapters for Tables 3 to 6 and Figures 7, 8, 10, 11"),
    "eval_tokens": (12_000, 4_000, "held out"),
}


def main(argv=None):
    words = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    args = arguments(words)
    with one_line_errors("interrupted: the same command continues"):
        study, parts = study_of(args), chosen(args.only)
        one_per_core = study.miniature and study.device == "cpu"
        processes = args.jobs or (min(4, torch.get_num_threads()) if one_per_core else 1)
        if args.list:
            for name, part in parts.items():
                print(f"{name:12}{', '.join(part.figures):30}{part.title}")
            return
        if args.dry_run:
            show_plan(study, parts, processes)
            return

        begin(study)
        progress_line(f"writing to {study.folder}/; index.html there is the page")
        failed = {}
        for commands, timed in stages(study, parts):
            failed |= run_all(commands, 1 if timed else processes, study.folder / "logs")
        reasons = measure_parts(study, parts, failed)
        report(study, parts, reasons, command_for_all(words))
        if reasons:
            raise InputError("; ".join(f"{name} was left out: {reason}"
                                       for name, reason in reasons.items()))


# ---- What was asked for --------------------------------------------------------------------------

def arguments(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", choices=MODELS, default="tiny-gemma-2",
        help="with the others of its study (default: %(default)s)")
    add("--only", help="parts, figures or tables, separated by commas, such as fig3,table1 "
        "(default: all)")
    add("--list", action="store_true", help="list the parts, and stop")
    add("--quick", action="store_true", help="few tokens, one seed")
    add("--dry-run", action="store_true", help="print what would run, and stop")
    for name, (miniature, _, what) in TOKENS.items():
        add(f"--{name.replace('_', '-')}", type=count, help=f"tokens {what} (default: "
            f"{miniature:,}; of real models the paper's)")
    add("--seeds", type=int, help="of adapters, in the parts that take several (default: 3; quick "
        "and real models: 1)")
    add("--recipe", choices=("paper", "tuned"), help="of adapters (default: tuned; of real models "
        "paper)")
    add("--jobs", type=int, help="commands at a time, which share the cores (default: one per "
        "core, at most 4; of real models and on a GPU 1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)")
    add("--out", type=Path, help=f"folder (default: {RUNS}/paper, or {RUNS}/paper-quick, "
        f"{RUNS}/paper-MODEL)")

    args = parser.parse_args(argv)
    for name, value in ("seeds", args.seeds), ("jobs", args.jobs):
        if value is not None and not 1 <= value <= 1000:
            parser.error(f"--{name} {value}: pass 1 to 1000")
    return args


def study_of(args):
    """The Study that was asked for."""
    real = not args.model.startswith("tiny-")
    if real and args.quick:
        raise InputError("--quick is for the embedded models: leave it out, and pass --lora-tokens "
                         "and the others for a smaller replication")
    tokens = {}
    for name, (miniature, quick, _) in TOKENS.items():
        usual = None if real else (quick if args.quick else miniature)
        tokens[name] = getattr(args, name) or usual
    seeds = args.seeds or (1 if real or args.quick else 3)
    recipe = args.recipe or (None if real else "tuned")

    name = f"paper-{args.model}" if real else "paper"
    folder = args.out or RUNS / (f"{name}-quick" if args.quick else name)
    return Study(folder.expanduser(), args.model, **tokens, seeds=tuple(range(seeds)),
                 recipe=recipe, device=args.device)


def chosen(only):
    """{name: Part} of the names that --only has; of all parts without it."""
    known = [name for part in PARTS for name in (part.name, *part.figures)]
    names = only.replace(" ", "").split(",") if only else known
    for name in names:
        if name not in known:
            raise InputError(f"--only {name}: there is no such part; choose from "
                             f"{', '.join(known)}")
    return {part.name: part for part in PARTS
            if {part.name, *part.figures}.intersection(names)}


def command_for_all(words):
    """The command without its --only: the page may show parts of earlier commands too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--only")
    _, others = parser.parse_known_args(words)
    return shlex.join(["python", "-m", "lorasae.paper", *others])


def begin(study):
    """Writes study.json. InputError if the folder was begun with other arguments."""
    begin_with(study.folder / "study.json", study.arguments, sources=study.sources)
    if study.other_code:
        note(f"note: {study.folder} was begun with other code than this; what is finished there is "
             "not made again (pass another --out to start over)")


# ---- What would run ------------------------------------------------------------------------------

def needed_by(study, part):
    """{Command: its Training or Evaluation} of a part."""
    needed = []
    for training in part.trainings(study):
        needed += [*training.saes, training]
    return {command_of(study, each): each for each in (*needed, *part.evaluations(study))}


def stages(study, parts):
    """[(Commands that do not need each other, whether they are timed)] in order."""
    stage_of = {}
    for part in parts.values():
        for command, needed in needed_by(study, part).items():
            stage_of[command] = min(needed.stage, stage_of.get(command, needed.stage))
    made = []
    for stage in sorted(set(stage_of.values())):
        _, untimed = stage
        made.append(([each for each, own in stage_of.items() if own == stage], not untimed))
    return made


def show_plan(study, parts, processes):
    """Prints what each part still needs, and the commands in the order in which they would run."""
    rows, counted = [], set()
    for name, part in parts.items():
        left = {command: needed for command, needed in needed_by(study, part).items()
                if command not in counted and not command.done.exists()}
        counted |= left.keys()
        tokens = [tokens_of(each) for each in left.values() if isinstance(each, Training)]
        rows.append([name, ", ".join(part.figures), str(len(tokens)), f"{sum(tokens):,}",
                     str(len(left) - len(tokens))])
    print_table(rows, ["part", "shows", "trainings", "their tokens", "evaluations"])

    print("\nWhat several parts need is counted once. Trainings whose time is a result run one at "
          f"a time, everything else {processes} at a time:\n")
    for commands, _ in stages(study, parts):
        for command in commands:
            if command in counted:
                print(command.line())


# ---- What was found ------------------------------------------------------------------------------

def measure_parts(study, parts, failed):
    """Writes numbers/PART.json of every part whose runs are there -> {part: why it is left out}."""
    reasons = {}
    for name, part in parts.items():
        done = [command.done for command in needed_by(study, part)]
        lacking = [path for path in done if not path.exists()]
        if lacking:
            reasons[name] = failed.get(lacking[0], f"{lacking[0]} is missing")
            continue
        try:
            numbers = part.measure(study)
        except InputError as error:
            reasons[name] = str(error)
            continue
        trained = [read_json(path) for path in done if path.name == "results.json"]
        write_json(study.folder / "numbers" / f"{name}.json", {
            "numbers": numbers,
            "trainings": len(trained),
            "trained_tokens": sum(found["train_tokens"] for found in trained),
            "seconds": sum(found["seconds"] for found in trained),
        })
    return reasons


def report(study, parts, reasons, command):
    """The page with all that was found, now or earlier; pictures; the tables of `parts`."""
    shown, on_page, claims = {}, {}, []
    for part in PARTS:
        name, path = part.name, study.folder / "numbers" / f"{part.name}.json"
        if path.exists() and name not in reasons:
            shown[name] = read_json(path)
            numbers = shown[name]["numbers"]
            save_figure(part.draw, numbers, study.folder / "pictures" / f"{name}.png", command)
            if name in parts:
                print_tables(part.tables(numbers))
                claims += part.claims(numbers)
        if name in parts or name in shown:
            on_page[name] = part
    print_tables([table_of_claims(claims)])

    path = study.folder / "index.html"
    write_bytes(path, page(study, on_page, shown, reasons, command).encode())
    print(f"\n{path}")


if __name__ == "__main__":
    main()
