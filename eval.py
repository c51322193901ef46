"""Evaluate a finished run from its saved files alone, on held-out text.

    python eval.py runs/tiny-gemma-2-lora                       the table that training ended with
    python eval.py RUN_DIR --suite fidelity,tokens,distances    any of the evaluations
    python eval.py RUN_DIR --suite steering --latents 17 204    examples from the held-out text
    python eval.py RUN_DIR --suite probing,scr,tpp,absorption   SAEBench, base and adapted model
    python eval.py RUN_DIR --suite autointerp,latents           latents in words; a page about them
    python eval.py RUN_DIR --suite lm --limit 100               lm-eval: MMLU, HellaSwag, TruthfulQA
                                                                (embedded models: their own tasks)

Each writes RUN_DIR/eval-NAME.json and, with matplotlib, RUN_DIR/eval-NAME.png. lorasae/evals/ has
a file for each, all of one shape: evaluate(setting, options) gives a plain dict, show prints it,
draw makes a picture of it or page a page; add_options says what can be asked of it.
"""
import sys
from pathlib import Path

from lorasae.errors import InputError
from lorasae.evals import (absorption, autointerp, benchmarks, distances, fidelity, latents,
                           probing, scr, steering, tokens, tpp)
from lorasae.evals.figures import save_figure
from lorasae.io.console import Parser, one_line_errors
from lorasae.io.files import read_json, write_bytes, write_json
from lorasae.runs.setting import open_run, runs_in

SUITES = {"fidelity": fidelity, "tokens": tokens, "distances": distances, "steering": steering,
          "probing": probing, "scr": scr, "tpp": tpp, "absorption": absorption,
          "autointerp": autointerp, "latents": latents, "lm": benchmarks}


def arguments(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN_DIR", type=Path, help="folder that train.py wrote")
    add("--suite", default="fidelity",
        help=f"comma-separated, of {', '.join(SUITES)} (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 (default: the run's)")
    add("--draw", action="store_true",
        help="only draw the pictures and pages, from existing eval-NAME.json files")
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
    """Runs one suite on a run, writes its numbers, and only then shows them."""
    if setting.config.method != "lora" and name != "fidelity":
        raise InputError(f"{setting.folder} trained an SAE and has no adapter, so --suite {name} "
                         "has nothing to compare: use --suite fidelity")
    numbers = SUITES[name].evaluate(setting, args)
    path = setting.folder / f"eval-{name}.json"
    write_json(path, numbers)
    print(f"---- {name} ----")
    SUITES[name].show(numbers)
    print(path, flush=True)


def illustrate(name, folder):
    """Draws a suite's picture or writes its page, if it has one."""
    suite, path = SUITES[name], folder / f"eval-{name}.json"
    if hasattr(suite, "draw"):
        save_figure(suite.draw, read_json(path), path.with_suffix(".png"))
    if hasattr(suite, "page"):
        page = path.with_suffix(".html")
        write_bytes(page, suite.page(read_json(path)).encode())
        print(page, flush=True)


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
