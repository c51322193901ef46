"""Speed and memory compared with alternatives; every ratio is from one run on one machine.

    python -m lorasae.bench headline        the step of `train.py --model gemma-2-2b`, in detail
    python -m lorasae.bench step            the LoRA step (adapt.py) against two peers (peers.py),
                                            five ranks in one pass against five runs, FLOPs
                                            against the published recipe's
    python -m lorasae.bench kl              the loss against its naive formula (objectives.py)
    python -m lorasae.bench topk            top-k, and a TopK SAE's whole step (topk.py)
    python -m lorasae.bench all             all of these
    python -m lorasae.bench gpu             the same, each in a separate process

Contenders take turns, so a busy machine slows all of them; times are medians, with minimum and
maximum. Answers are compared before anything is timed, and a wrong one ends the section. README.md
explains the columns.

Each row is printed, and added to the --json file, as soon as it is measured. Models and SAEs are
random, since speed hardly depends on values; their shapes are real on a GPU and small on a CPU.
"""
import json
import os
import subprocess
import sys

import torch
from torch.utils.collect_env import get_pretty_env_info

from lorasae.bench.kernels import bench_kl, bench_topk
from lorasae.bench.steps import bench_headline, bench_real, bench_step
from lorasae.errors import InputError
from lorasae.io.console import Parser, one_line_errors
from lorasae.io.files import local
from lorasae.runs import distributed
from lorasae.runs.machine import keep_freed_memory

LIMIT = 1800                                            # seconds for each section of `gpu`
# section(device, quick) yields rows {heading: value}
SECTIONS = {"headline": bench_headline, "step": bench_step, "kl": bench_kl, "topk": bench_topk}


def main(argv=None):
    parser = Parser(prog="python -m lorasae.bench", description=__doc__)
    add = parser.add_argument
    add("section", choices=[*SECTIONS, "all", "gpu"], help="what to measure")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        choices=["cpu", "cuda"], help="(default: the GPU if there is one)")
    add("--model", metavar="DIR", type=local, action="append", default=[],
        help="step: use this real model instead, on a CPU (repeatable)")
    add("--json", metavar="FILE", type=local, default=local(os.devnull),
        help="also add every row to this file, as a line of JSON")
    add("--quick", action="store_true", help="tiny shapes: only a check that it runs")
    args = parser.parse_args(argv)
    if args.model and args.section != "step":
        parser.error("--model is only for the section step")

    with one_line_errors():
        distributed.local(args.device)                  # refuses an unavailable device
        if args.section == "gpu":
            return run_apart(args)
        with args.json.open("a") as file:
            for section in SECTIONS if args.section == "all" else [args.section]:
                measure(section, args, file)


def run_apart(args):
    """Runs every section as a separate command, so that it survives another's failure."""
    print(get_pretty_env_info(), flush=True)            # what figures depend on besides the code
    failed = []
    for section in SECTIONS:
        command = [sys.executable, "-m", "lorasae.bench", section, "--device", args.device,
                   "--json", str(args.json), *["--quick"] * args.quick]
        try:
            subprocess.run(command, timeout=LIMIT, check=True)
        except subprocess.SubprocessError as error:     # a nonzero status, or a timeout
            failed.append(f"{section} ({error})")
    if failed:
        raise InputError(f"these sections failed: {', '.join(failed)}")


def measure(section, args, file):
    """Prints every row of a section, and adds it to a file, as soon as it is measured."""
    torch.set_float32_matmul_precision("highest")       # a section may lower it
    keep_freed_memory()
    rows = SECTIONS[section](args.device, args.quick)
    if section == "step" and args.model:
        rows = bench_real(args.model, args.quick)
    title = None
    for row in rows:
        what, *cells = row.values()
        _, *headings = row
        if what != title:                               # a new table
            print(f"\n{what}\n\n{line(headings, headings)}")
            title = what
        print(line(cells, headings), flush=True)
        print(json.dumps({"section": section, **row}), file=file, flush=True)


def line(cells, headings):
    first, *others = map(shown, cells)
    widths = [max(12, 2 + len(heading)) for heading in headings[1:]]
    return first.ljust(24) + "".join(map(str.rjust, others, widths))


def shown(value):
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    main()
