"""Evaluate a finished run on its held-out text, using only the files in its folder.

    python eval.py runs/tiny-gemma-2-lora                       the table that training ended with
    python eval.py RUN_DIR --suite fidelity,tokens,distances    any of the evaluations
    python eval.py RUN_DIR --suite steering --latents 17 204    examples from the held-out text
    python eval.py RUN_DIR --suite probing,scr,tpp,absorption   SAEBench, base and adapted model
    python eval.py RUN_DIR --suite autointerp                   latents in words
    python eval.py RUN_DIR --suite lm --limit 100               lm-eval: MMLU, HellaSwag, TruthfulQA
                                                                (embedded models: their own tasks)
    python eval.py RUN_DIR --suite tenths                       an SAE after each tenth of its steps

Each writes RUN_DIR/eval-NAME.json and, with matplotlib, RUN_DIR/eval-NAME.png. lorasae/evals/ has
one module per evaluation, all with the same functions: evaluate(setting, ...) returns a plain dict,
and its other parameters are options, which add_options declares; tables and draw show the dict.
"""
import sys
from inspect import signature
from pathlib import Path

from lorasae.errors import InputError
from lorasae.evals import (absorption, autointerp, benchmarks, distances, fidelity, probing, scr,
                           steering, tenths, tokens, tpp)
from lorasae.evals.report import print_tables, save_figure
from lorasae.io.console import Parser, one_line_errors
from lorasae.io.files import read_json, write_json
from lorasae.runs.setting import open_run, runs_in

SUITES = {
    "fidelity": fidelity,
    "tokens": tokens,
    "distances": distances,
    "steering": steering,
    "probing": probing,
    "scr": scr,
    "tpp": tpp,
    "absorption": absorption,
    "autointerp": autointerp,
    "lm": benchmarks,
    "tenths": tenths,
}
WITHOUT_ADAPTERS = ("fidelity", "tenths")               # suites for runs that trained only an SAE


def arguments(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN_DIR", type=Path, help="folder that train.py wrote")
    add("--suite", default="fidelity",
        help=f"comma-separated, of {', '.join(SUITES)} (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 (default: the run's)")
    add("--draw", action="store_true",
        help="only draw the pictures, from existing eval-NAME.json files")
    for name, suite in SUITES.items():
        if hasattr(suite, "add_options"):
            suite.add_options(parser.add_argument_group(name).add_argument)

    args = parser.parse_args(argv)
    args.suite = args.suite.split(",")
    for name in args.suite:
        if name not in SUITES:
            parser.error(f"--suite {name!r} is unknown: choose from {', '.join(SUITES)}")
    return args


def evaluate(name, setting, args):
    """Runs one suite on a run, writes its numbers, and then shows them."""
    suite = SUITES[name]
    if setting.config.method != "lora" and name not in WITHOUT_ADAPTERS:
        raise InputError(f"{setting.folder} trained an SAE and has no adapter, so --suite {name} "
                         f"has nothing to compare: use --suite {' or '.join(WITHOUT_ADAPTERS)}")
    _, *options = signature(suite.evaluate).parameters
    numbers = suite.evaluate(setting, **{option: getattr(args, option) for option in options})

    path = setting.folder / f"eval-{name}.json"
    write_json(path, numbers)
    print_tables(suite.tables(numbers))
    print(path, flush=True)


def illustrate(name, folder):
    """Draws a suite's picture."""
    path = folder / f"eval-{name}.json"
    again = f"python eval.py {folder} --suite {name} --draw"
    save_figure(SUITES[name].draw, read_json(path), path.with_suffix(".png"), again)


def take_suites(folder, args):
    """Runs the suites on one run."""
    setting = None if args.draw else open_run(folder, args.device)
    for name in args.suite:
        if setting is not None:
            evaluate(name, setting, args)
        illustrate(name, folder)


def main(argv=None):
    args = arguments(sys.argv[1:] if argv is None else argv)
    with one_line_errors():
        for folder in runs_in(args.run.expanduser()):
            take_suites(folder, args)                   # one model in memory at a time


if __name__ == "__main__":
    main()
