"""Speed and memory beside the alternatives, every ratio from one run on one machine.

    python -m lorasae.bench environment     what figures depend on: hardware, driver, versions
    python -m lorasae.bench peak            FLOP/s of a square matrix product
    python -m lorasae.bench headline        the step of `train.py --model gemma-2-2b`, in detail
    python -m lorasae.bench step            the LoRA step (adapt.py) beside two peers (peers.py),
                                            five ranks in one pass beside five runs, FLOPs beside
                                            the published recipe's
    python -m lorasae.bench sae             SAE training (dictionary.py)
    python -m lorasae.bench kl              the loss against its naive formula (objectives.py)
    python -m lorasae.bench topk            top-k, and a TopK SAE's whole step (topk.py)
    python -m lorasae.bench data            text to batches of tokens (io/shards.py)
    python -m lorasae.bench all             all of these
    python -m lorasae.bench gpu             a rented GPU's hour: all of these, each in a process of
                                            its own and for ten minutes at most

Contenders take turns, so a busy machine slows all of them; times are medians, with minimum and
maximum. Answers are compared before anything is timed: a wrong one ends the section. Peak memory is
what one call adds to its inputs: on a CPU the resident memory of a fresh process (scratch space of
the libraries included; Linux only), on a GPU the allocator's. ours_faster is the contender's median
time over ours, ours_memory is ours over theirs, and utilisation is FLOPs counted over those of a
matrix product that is timed in the same run.

A race is printed, and added to the file of --json, as soon as it is over. Models and SAEs are
random, as speed hardly depends on values: of real shapes on a GPU, of small ones on a CPU.
"""
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from torch.utils.collect_env import get_pretty_env_info

from lorasae.bench.kernels import bench_kl, bench_topk
from lorasae.bench.race import bench_peak
from lorasae.bench.steps import bench_headline, bench_sae, bench_step
from lorasae.bench.text import bench_data
from lorasae.errors import InputError
from lorasae.evals.report import Table, print_tables
from lorasae.io.console import Parser, note, one_line_errors

LIMIT = 600                     # seconds for each section of `gpu`


def main(argv=None):
    parser = Parser(prog="python -m lorasae.bench", description=__doc__)
    add = parser.add_argument
    add("section", choices=[*SECTIONS, "all", "gpu"], help="what to measure")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        choices=["cpu", "cuda"], help="(default: the GPU if there is one)")
    add("--json", metavar="FILE", type=Path, default=Path(os.devnull),
        help="also add every row to this file, as a line")
    add("--quick", action="store_true", help="tiny shapes: shows that it runs, and no more")
    args = parser.parse_args(argv)

    with one_line_errors(), args.json.open("a") as file:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: PyTorch sees no CUDA device; pass --device cpu")
        if args.section == "gpu":
            return run_apart(args)
        for section in SECTIONS if args.section == "all" else [args.section]:
            torch.set_float32_matmul_precision("highest")       # a section may lower it for itself
            for rows in SECTIONS[section](args.device, args.quick):
                show(rows)
                for row in rows:
                    print(json.dumps({"section": section, **row}), file=file, flush=True)


def run_apart(args):
    """Runs every section as a command of its own, so that it survives another's failure."""
    failed = []
    for section in SECTIONS:
        command = [sys.executable, "-m", "lorasae.bench", section, "--device", args.device,
                   "--json", str(args.json)] + ["--quick"] * args.quick
        note(f"---- {section}")
        try:
            subprocess.run(command, timeout=LIMIT, check=True)
        except subprocess.SubprocessError as error:             # its status, or its time was up
            note(f"{section} failed: {error}")
            failed.append(section)
    if failed:
        raise InputError(f"these sections failed, as said above: {', '.join(failed)}")


# ---- Sections ------------------------------------------------------------------------------------

def bench_environment(device, quick):
    """What figures depend on beside the code: versions, and some of PyTorch's report."""
    versions = [f"{package.name} {package.version}" for package in metadata.distributions()
                if package.name in ("torch", "transformers", "peft", "triton")]
    versions.append(f"threads {torch.get_num_threads()}")
    kept = ("OS", "Python version", "GPU", "Nvidia", "CPU(s)", "Model name")
    report = [line for line in get_pretty_env_info().splitlines() if line.startswith(kept)]
    yield [{"what": "environment", "fact": fact} for fact in versions + report]


SECTIONS = {                    # section(device, quick) yields tables: rows {heading: value}
    "environment": bench_environment, "peak": bench_peak, "headline": bench_headline,
    "step": bench_step, "sae": bench_sae, "kl": bench_kl, "topk": bench_topk, "data": bench_data}


# ---- Tables --------------------------------------------------------------------------------------

def show(rows):
    """Prints rows that have the same headings under `what` they measure."""
    what, *headings = rows[0]
    cells = [[shown(row[heading]) for heading in headings] for row in rows]
    print_tables([Table(rows[0][what], headings, cells)])
    sys.stdout.flush()


def shown(value):
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


if __name__ == "__main__":
    main()
