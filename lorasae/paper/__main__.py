"""Every figure and table of the paper from one command, which trains, evaluates and writes a page.

    python -m lorasae.paper                         in miniature, on the included models
    python -m lorasae.paper --quick                 on few tokens: only a check that it runs
    python -m lorasae.paper --only fig3,table1      only these parts
    python -m lorasae.paper --dry-run               lists the parts and the commands that would run
    python -m lorasae.paper --model gemma-2-2b      the replication at full size
    python -m lorasae.paper --model DIR/smollm2-135m-instruct       on a laptop; also gemma-3-270m
    python -m lorasae.paper --redraw                redraws the page from OUT/numbers/ only

OUT/index.html shows every result next to the paper's. All results come from runs of train.py and
eval.py, which are kept in OUT. After an interruption, the same command continues where it stopped
and ends with the same numbers.
"""
import shlex
import sys
from pathlib import Path

import torch

from lorasae.errors import InputError
from lorasae.evals.report import as_text, save_figure
from lorasae.io.console import Parser, count, few, one_line_errors, progress_line
from lorasae.io.files import damage, local, read_object, write_bytes, write_json
from lorasae.paper import beyond, control, downstream, frontier, gap
from lorasae.paper.page import page
from lorasae.paper.results import table_of_claims
from lorasae.paper.study import PLANS, QUICK, Study, all_jobs, budget
from lorasae.runs import distributed
from lorasae.runs.commands import run_all
from lorasae.runs.config import Config, full_path
from lorasae.runs.folder import RUNS

PARTS = (                               # in the paper's order, with ours at the two ends
    control.CONTROL,
    frontier.FRONTIER,
    gap.SCALING,
    gap.SEVERAL,
    downstream.SAEBENCH,
    downstream.STEERING,
    downstream.BENCHMARKS,
    downstream.TOKENS,
    gap.ONE_BLOCK,
    downstream.DISTANCES,
    beyond.MODEL_OR_SAE,
    beyond.RECIPE,
)
ON_REQUEST = ("model_or_sae", "recipe")                 # only if --only names them
TOKENS = {                              # fields of Study: the end of their help texts
    "sae_tokens": "to train each SAE",
    "frontier_tokens": "to train the long SAE and those of Figures 1 and 5",
    "lora_tokens": "to train adapters",
    "long_tokens": "to train adapters around the long SAE, and those of Tables 3 to 6 and Figures "
                   "7, 8, 10, 11",
    "eval_tokens": "held out",
}


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    args = arguments(words)
    with one_line_errors("interrupted: run the same command to continue"):
        study = study_of(args)
        parts = chosen(study, args.only)
        again = shlex.join(["python", "-m", "lorasae.paper", *words])
        if args.redraw:
            if not (study.folder / "numbers").is_dir():
                raise InputError(f"{study.folder} has no numbers/ to redraw: pass a study's --out")
            return report(study, parts, {}, again)

        # List the jobs.
        jobs = all_jobs(job for part in parts for job in part.jobs(study))
        if args.dry_run:
            return show_plan(study, parts)

        # Run them. On included models up to four share the cores; otherwise each gets all of them.
        begin(study)
        progress_line(f"writing to {study.folder}/; the page will be its index.html")
        one_per_core = (study.plan.size, study.device) == ("miniature", "cpu")
        processes = min(4, torch.get_num_threads()) if one_per_core else 1
        failed = {}
        for (_, shared), commands in stages(jobs):
            failed |= run_all(commands, processes if shared else 1, study.folder / "logs")

        # Measure, and write the page.
        reasons = measure(study, parts, failed)
        report(study, parts, reasons, again)
        if reasons:
            raise InputError("; ".join(f"{name} was left out: {reason}"
                                       for name, reason in reasons.items()))


# ---- Arguments -----------------------------------------------------------------------------------

def arguments(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", type=full_path, default="tiny-gemma-2",
        help=f"{', '.join(PLANS)}, or a folder with such a name (default: %(default)s)")
    add("--only", help="parts, figures or tables, separated by commas, such as fig6,table1; "
        f"fig3 and fig4 are one part (default: all but {', '.join(ON_REQUEST)})")
    add("--quick", action="store_true", help="few tokens, one seed")
    add("--dry-run", action="store_true", help="print what would run and stop")
    add("--redraw", action="store_true", help="redraw the page from OUT/numbers/ and stop")
    add("--data", type=full_path, help="text to train on; part of it is held out (default: the "
        "preset's)")
    add("--other-data", type=full_path, help="another kind of text, which is never trained on")
    for name, what in TOKENS.items():
        add(f"--{name.replace('_', '-')}", type=count, help=f"tokens {what}")
    add("--seeds", type=few, help="seeds for adapters, in the parts that use several (default: 3; "
        "with --quick or a real model: 1)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)")
    add("--out", type=local, help=f"folder (default: {RUNS}/paper-MODEL, or "
        f"{RUNS}/paper-MODEL-quick)")
    return parser.parse_args(argv)


def study_of(args):
    """The Study that the arguments describe."""
    distributed.local(Config(device=args.device).device)        # refuses an unavailable device
    name = Path(args.model).name
    if name not in PLANS:
        raise InputError(f"--model {args.model}: expected {', '.join(PLANS)}, or a folder with "
                         "such a name")
    plan = PLANS[name]
    usual = QUICK if args.quick else plan.tokens
    tokens = {each: getattr(args, each) or usual.get(each) for each in TOKENS}
    seeds = args.seeds or (1 if args.quick else plan.seeds)

    folder = args.out or RUNS / f"paper-{name}{'-quick' if args.quick else ''}"
    return Study(folder, args.model, **tokens, seeds=list(range(seeds)),
                 device=args.device, data=args.data, other_data=args.other_data)


def chosen(study, only):
    """The Parts that --only names; all of them without --only."""
    offered = [part for part in PARTS if part.name not in study.plan.without]
    known = [name for part in offered for name in (part.name, *part.words["figures"])]
    usual = [name for name in known if name not in ON_REQUEST]
    names = only.replace(" ", "").split(",") if only else usual
    for name in names:
        if name not in known:
            raise InputError(f"--only {name}: there is no such part; choose from "
                             f"{', '.join(known)}")
    return [part for part in offered if {part.name, *part.words["figures"]}.intersection(names)]


def begin(study):
    """Writes study.json. Raises InputError if the folder was begun with other arguments."""
    asked = dict(vars(study))
    path = asked.pop("folder") / "study.json"
    if not path.exists():
        write_json(path, asked)
    begun = read_object(path)
    for name, value in asked.items():
        if begun.get(name) != value:
            raise InputError(f"{path.parent} was begun with {name} {begun.get(name)}, not {value}: "
                             "pass another --out, or the same arguments to continue")


# ---- What would run ------------------------------------------------------------------------------

def stages(jobs):
    """[((depth, whether they share the cores), Commands independent of each other)], in order."""
    found = {}
    for job in jobs.values():
        found.setdefault(job.stage, []).append(job.command)
    return sorted(found.items())


def show_plan(study, parts):
    """Prints the commands that each part still needs and that no earlier part has listed."""
    shown = set()
    for part in parts:
        own = {done: job for done, job in all_jobs(part.jobs(study)).items()
               if done not in shown and not done.exists()}
        shown |= own.keys()
        tokens = [job.options["tokens"] for job in own.values() if job.suite is None]
        figures = f" ({', '.join(part.words['figures'])})" if part.words["figures"] else ""
        print(f"\n{part.name}{figures}: {len(tokens)} training runs on {sum(tokens):,} tokens, "
              f"{len(own) - len(tokens)} evaluations\n")
        for job in own.values():
            print(job.command.line())


# ---- Results -------------------------------------------------------------------------------------

def measure(study, parts, failed):
    """Writes numbers/PART.json for each part whose runs are done -> {part: why it is left out}."""
    reasons = {}
    for part in parts:
        done = list(all_jobs(part.jobs(study)))
        try:
            for path in done:
                if not path.exists():
                    raise InputError(failed.get(path, f"{path} is missing"))
            with damage(f"the results of {part.name} in {study.folder}"):
                numbers = part.measure(study)
        except InputError as error:
            reasons[part.name] = str(error)
            continue
        trained = [read_object(path) for path in done if path.name == "results.json"]
        write_json(study.folder / "numbers" / f"{part.name}.json", {
            "numbers": numbers,
            "budget": budget(study, part),
            "trainings": len(trained),
            "trained_tokens": sum(found.take("train_tokens", int) for found in trained),
            "seconds": sum(found.take("seconds", float) for found in trained),
        })
    return reasons


def report(study, parts, reasons, command):
    """Writes the page and pictures of all results, new and old; prints the tables of `parts`."""
    sections, claims = [], []
    for part in PARTS:
        path, found, tables = study.folder / "numbers" / f"{part.name}.json", None, []
        png = study.folder / "pictures" / f"{part.name}.png"
        if path.exists() and part.name not in reasons:
            found = read_object(path)
            with damage(path):
                numbers = found["numbers"]
                tables = part.tables(numbers)
                claims += [(part, claim) for claim in part.claims(numbers)]
                if part.draw:
                    save_figure(part.draw, numbers, png, command)
        if part in parts and tables:
            print(as_text(tables))
        if part in parts or found:
            sections.append((part, found, tables, png.read_bytes() if png.exists() else None))
    print(as_text([table_of_claims(claim for part, claim in claims if part in parts)]))

    path = study.folder / "index.html"
    with damage(study.folder / "numbers"):
        html = page(study, sections, claims, reasons, command)
    write_bytes(path, html.encode())
    print(f"\n{path}")


if __name__ == "__main__":
    main()
