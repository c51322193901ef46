"""Evaluate a finished run from its saved files alone, on held-out text.

    python eval.py runs/tiny-gemma-2-lora                       the table that training ended with, recomputed
    python eval.py RUN_DIR --suite fidelity,tokens              any of the evaluations; each writes RUN_DIR/eval-NAME.json
"""
import argparse
import sys
from pathlib import Path

import torch

from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.files import read_json, write_json
from lorasae.run import load_setting, print_table

SUITES = ("fidelity",)


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", metavar="RUN_DIR", help="folder that train.py wrote")
    add("--suite", default="fidelity", help=f"comma-separated, of {', '.join(SUITES)} (default: %(default)s)")
    add("--device", help="cuda or cpu (default: the run's)")
    return parser.parse_args(argv)


def open_run(folder, device=None):
    """(configuration, Setting) of a finished run, its adapter attached. Raises InputError for an incomplete one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: pass one that train.py wrote")
    config = read_json(folder / "config.json")
    config["device"] = device or config["device"]
    if not (folder / "adapter" / "adapter_config.json").exists():
        raise InputError(f"{folder} has no adapter yet: finish the run with python train.py --resume {folder}")
    return config, load_setting(config, folder / "adapter")


def main(argv=None):
    args = arguments(argv)
    try:
        suites = args.suite.split(",")
        unknown = [name for name in suites if name not in SUITES]
        if unknown:
            raise InputError(f"--suite {unknown[0]} is unknown: choose from {', '.join(SUITES)}")
        config, setting = open_run(args.run, args.device)
        for name in suites:
            numbers = run_suite(name, config, setting)
            write_json(Path(args.run) / f"eval-{name}.json", numbers)
    except InputError as error:
        sys.exit(f"error: {error}")


def run_suite(name, config, setting):
    model, saes, corpus, keep_special = setting
    held_out = corpus.validation.split(config["micro_batch"])
    results = fidelity.evaluate(model, saes, held_out, ("base", "sae", "adapted", "lora", "zero"), keep_special)
    numbers = {**fidelity.summary(results), "eval_tokens": corpus.validation.numel()}
    print_table(*fidelity.table(numbers))
    print(f"\ngap closed {numbers['gap_closed']:.1%}")
    return numbers


if __name__ == "__main__":
    main()
