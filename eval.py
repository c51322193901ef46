"""Evaluate a finished run, by default on the text that it held out of training.

    python eval.py runs/tiny-gemma-2-lora                       the table printed after training
    python eval.py RUN_DIR --suite fidelity,tokens,distances    any of the evaluations
    python eval.py RUN_DIR --suite steering --latents 17 204    examples from the held-out text
    python eval.py RUN_DIR --suite probing,scr,tpp,absorption   SAEBench, base and adapted model
    python eval.py RUN_DIR --suite autointerp --judge URL       descriptions of latents
    python eval.py RUN_DIR --suite lm --limit 100               lm-eval: MMLU, HellaSwag, TruthfulQA
                                                                (included models: their own tasks)
    python eval.py RUN_DIR --suite tenths                       an SAE after each tenth of training
    python eval.py RUN_DIR --suite elsewhere --data FOLDER      fidelity on another kind of text

Each writes RUN_DIR/eval-NAME.json and, if the paper has a figure for it, RUN_DIR/eval-NAME.png
(with matplotlib). lorasae/evals/ has one module per evaluation, with some of these functions:
evaluate(setting, ...) returns a plain dict; its other parameters are command-line options, declared
by add_options; tables and draw show the dict.
"""
import shlex
from inspect import signature

from lorasae.errors import InputError
from lorasae.evals import (absorption, autointerp, benchmarks, distances, elsewhere, fidelity,
                           probing, scr, steering, tenths, tokens, tpp)
from lorasae.evals.report import as_text, save_figure
from lorasae.io.console import Parser, few, one_line_errors
from lorasae.io.files import damage, local, read_json, write_json
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
    "elsewhere": elsewhere,
}
WITHOUT_ADAPTERS = ("fidelity", "tenths", "elsewhere")  # suites that need no adapters


def arguments(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN_DIR", type=local, help="folder written by train.py")
    add("--suite", default="fidelity",
        help=f"comma-separated, from {', '.join(SUITES)} (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 (default: the run's)")
    add("--threads", type=few, metavar="N", help="CPU threads (default: the run's)")
    add("--draw", action="store_true",
        help="only show the tables and draw the figures, from existing eval-NAME.json files")
    for name, suite in SUITES.items():
        if hasattr(suite, "add_options"):
            suite.add_options(parser.add_argument_group(name).add_argument)

    args = parser.parse_args(argv)
    args.suite = args.suite.split(",")
    for name in args.suite:
        if name not in SUITES:
            parser.error(f"--suite {name!r} is unknown: choose from {', '.join(SUITES)}")

    # Refuse options that no chosen suite uses.
    taken = {"run", "suite", "draw"}
    if not args.draw:
        taken.update(["device", "threads"], *map(options_of, args.suite))
    for option, value in vars(args).items():
        if option not in taken and value != parser.get_default(option):
            words = f"--suite {','.join(args.suite)}{' --draw' * args.draw}"
            parser.error(f"--{option.replace('_', '-')} has no effect with {words}")
    return args


def options_of(name):
    """The options that a suite accepts."""
    _, *options = signature(SUITES[name].evaluate).parameters
    return options


def evaluate(name, setting, args):
    """Runs one suite on a run and writes its numbers."""
    if setting.config.method != "lora" and name not in WITHOUT_ADAPTERS:
        raise InputError(f"{setting.folder} trained an SAE and has no adapter, so --suite {name} "
                         "has nothing to compare: use --suite fidelity or elsewhere")
    options = {option: getattr(args, option) for option in options_of(name)}
    numbers = SUITES[name].evaluate(setting, **options)
    write_json(setting.folder / f"eval-{name}.json", numbers)


def show(name, folder):
    """Prints a suite's tables, and draws its figure if it has one."""
    suite, path = SUITES[name], folder / f"eval-{name}.json"
    with damage(path):
        numbers = read_json(path)
        tables = suite.tables(numbers)
        if not all(table.rows for table in tables):
            raise InputError(f"{path} holds no results: run --suite {name} again")
        shown = as_text(tables)
    print(shown, path, sep="\n", flush=True)
    if hasattr(suite, "draw"):
        again = shlex.join(["python", "eval.py", str(folder), "--suite", name, "--draw"])
        with damage(path):
            save_figure(suite.draw, numbers, path.with_suffix(".png"), again)


def take_suites(folder, args):
    """Runs the suites on one run."""
    setting = None if args.draw else open_run(folder, args.device, args.threads)
    for name in args.suite:
        if setting is not None:
            evaluate(name, setting, args)
        show(name, folder)


def main(argv=None):
    args = arguments(argv)
    with one_line_errors():
        for folder in runs_in(args.run):
            take_suites(folder, args)                   # one model in memory at a time


if __name__ == "__main__":
    main()
