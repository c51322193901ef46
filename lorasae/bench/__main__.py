"""Speed and memory beside the alternatives, every ratio from one run on one machine.

    python -m lorasae.bench kl      the loss against its naive formula (objectives.py)
    python -m lorasae.bench topk    top-k, the encoder and the whole SAE step (topk.py)
    python -m lorasae.bench step    the LoRA step (adapt.py) beside two peers (peers.py), five ranks
                                    in one pass beside five runs, FLOPs beside the published
                                    recipe's
    python -m lorasae.bench sae     SAE training (dictionary.py)
    python -m lorasae.bench data    text to chunks of tokens (io/shards.py)
    python -m lorasae.bench all --json bench.json   every section, and the rows as JSON
    python -m lorasae.bench gpu --json gpu.json     a rented GPU's hour: what it is and can do, the
                                    headline step, its peers, and the sections above (gpu.py)

The contenders of a race take turns, so that a busy machine slows them all; times are medians with
minimum and maximum. Answers are compared before anything is timed: a wrong one ends the benchmark.
Peak memory is what one call adds to its inputs: on a CPU the resident memory of a fresh process
(scratch space of the libraries included; Linux only), on a GPU the allocator's. ours_faster is the
contender's median time over ours, ours_memory and ours_flops ours over theirs. s_15M is what the
paper's 15M tokens would take; utilisation is FLOPs counted over those of a matrix product timed
here.

Models and SAEs are random, as speed hardly depends on values: of real shapes on a GPU, of small
ones on a CPU.
"""
import argparse
import sys

import torch

from lorasae.bench.gpu import PARTS, about, bench_gpu
from lorasae.bench.loss import bench_kl
from lorasae.bench.sparse import bench_topk
from lorasae.bench.step import bench_step
from lorasae.bench.table import table
from lorasae.bench.text import bench_data
from lorasae.bench.training import bench_sae
from lorasae.errors import InputError
from lorasae.io.files import write_json

SECTIONS = {"kl": bench_kl, "topk": bench_topk, "step": bench_step, "sae": bench_sae,
            "data": bench_data}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m lorasae.bench",
                                     description=__doc__.partition("\n")[0])
    parser.add_argument("section", choices=[*SECTIONS, "all", "gpu"], help="what to measure")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), metavar="PART",
                        help=f"gpu: some of its parts ({', '.join(PARTS)}), in this process "
                             "(default: all, each in its own)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        choices=["cpu", "cuda"],
                        help="where (default: the GPU if there is one)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--quick", action="store_true",
                        help="tiny shapes: shows that it runs, and no more")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device; pass --device cpu")
    if args.part and args.section != "gpu":
        raise InputError(f"--part chooses among the parts of gpu: leave it out with {args.section}")
    if args.section == "gpu" and args.device == "cpu" and not args.quick:
        raise InputError("gpu measures a GPU: pass --quick to see it run on a CPU, in tiny shapes")

    setting = about(args.device)
    print(", ".join(f"{name} {value}" for name, value in setting.items() if value), flush=True)
    results = {}

    def keep(section, rows):
        """Shows a section as soon as it is done, and writes all there are: what comes later may
        fail.
        """
        results[section] = rows
        print(f"\n{table(rows)}", flush=True)
        if args.json:
            write_json(args.json, {**setting, "sections": results})

    if args.section == "gpu":
        failed = bench_gpu(args.device, args.quick, args.part, keep)
        if failed:
            raise InputError(f"these parts failed, as said above: {', '.join(failed)}")
        return
    for section in SECTIONS if args.section == "all" else [args.section]:
        keep(section, SECTIONS[section](args.device, args.quick))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
