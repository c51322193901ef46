"""Speed and memory beside the alternatives, every ratio from one run on one machine.

    python -m lorasae.bench topk                    top-k, the encoder and the whole SAE step (topk.py)
    python -m lorasae.bench all --json bench.json   every section, and the rows as JSON

The contenders of a race take turns, so that a busy machine slows them all; times are medians with minimum and maximum.
Answers are compared before anything is timed: a wrong one ends the benchmark. Peak memory is what one call adds to its
inputs: on a CPU the resident memory of a fresh process (scratch space of the libraries included; Linux only), on a GPU
the allocator's. ours_faster is the contender's median time over ours, ours_memory our peak over the contender's.
"""
import argparse
import gc
import multiprocessing
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from lorasae import topk
from lorasae.errors import InputError
from lorasae.files import write_json


# ---------------------------------------------------------------------------------------------------------------- races

def race(what, build, differ, rounds, device, memory=True):
    """Rows, one a contender: their answers compared, then their times, then their memory.

    build(device) -> {name: function of no argument}, the last one ours; picklable, as another process measures memory.
    differ(answer, reference) -> what is wrong with an answer, or None; the reference is the first contender's.
    """
    print(what, "...", file=sys.stderr, flush=True)
    contenders = build(device)
    names = list(contenders)
    reference = contenders[names[0]]()
    for name in names[1:]:
        complaint = differ(contenders[name](), reference)
        if complaint:
            raise RuntimeError(f"{what}: {name} disagrees with {names[0]}: {complaint}")
    del reference
    seconds = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            seconds[name].append(timed(contenders[name], device))
    del contenders
    gc.collect()
    peaks = {name: peak_memory(build, name, device) if memory else None for name in names}
    ours = names[-1]
    return [{"what": what, "contender": name, "ms": 1e3 * statistics.median(times), "ms_min": 1e3 * min(times),
             "ms_max": 1e3 * max(times), "ours_faster": statistics.median(times) / statistics.median(seconds[ours]),
             "peak_mb": peaks[name] and peaks[name] / 1e6, "ours_memory": peaks[name] and peaks[ours] / peaks[name]}
            for name, times in seconds.items()]


def timed(function, device):
    """Seconds of one call."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(build, name, device):
    """Bytes that one call of a contender adds at its peak; None where this cannot be known."""
    if device == "cuda":
        function = build(device)[name]
        function()                                                      # cuBLAS's workspace is no contender's own
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:      # a fresh process: nothing was freed there before
        return pool.apply(added_resident, (build, name, torch.get_num_threads()))


def added_resident(build, name, threads):
    torch.set_num_threads(threads)
    function = build("cpu")[name]
    small = torch.randn(64, 64)
    small @ small                                                       # loads the BLAS
    Path("/proc/self/clear_refs").write_text("5")                       # the high-water mark starts from here
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def resident(field):
    """VmRSS (now) or VmHWM (at most) of this process, in bytes."""
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


# --------------------------------------------------------------------------------------------- top-k, encoder, SAE step

def bench_topk(device, quick):
    """Top-k alone, the encoder, the whole TopK SAE step: k 64, D 2304 (Gemma-2-2B), M from 8 to 57 times D."""
    rows = []
    for N, M in [(64, 4096)] if quick else [(2048, 16384), (2048, 131072)]:
        rows += race(f"top-k, N {N} M {M}", partial(topk_contenders, N, M, 64), differing_entries,
                     3 if quick else 15, device, not quick)
    for N, D, M in [(64, 32, 4096)] if quick else [(1024, 2304, 131072)]:
        rows += race(f"encoder, N {N} D {D} M {M}", partial(encode_contenders, N, D, M, 64), differing_tensors,
                     3, device, not quick)
    for N, D, M in [(64, 32, 4096)] if quick else [(2048, 2304, 16384), (1024, 2304, 65536)]:
        rows += race(f"SAE step, N {N} D {D} M {M}", partial(step_contenders, N, D, M, 64), differing_tensors,
                     3 if quick else 5, device, not quick)
    return rows


def topk_contenders(N, M, k, device):
    x = torch.randn(N, M, device=device, generator=torch.Generator(device).manual_seed(0))
    return {"torch.topk": lambda: (x, *torch.topk(x, k, sorted=False)), "lorasae": lambda: (x, *topk.topk(x, k))}


def differing_entries(answer, reference):
    """None where they are exactly the k largest, each at the place that its index names, no place twice."""
    (x, values, indices), (_, expected, _) = answer, reference
    if not torch.equal(values.sort(-1).values, expected.sort(-1).values):
        return "these are not the k largest"
    if not torch.equal(x.gather(-1, indices), values):
        return "an index points elsewhere"
    if (indices.sort(-1).values.diff(dim=-1) == 0).any():
        return "an index comes twice"
    return None


def problem(N, D, M, device):
    """x [N, D] and the tensors of an SAE at the start of its training: unit decoder rows, the encoder equal to them."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, D, device=device, generator=g)
    W_dec = F.normalize(torch.randn(M, D, device=device, generator=g))
    tensors = W_dec.clone(), torch.zeros(M, device=device), W_dec, torch.zeros(D, device=device)
    return [x, *(t.requires_grad_() for t in tensors)]


def encode_contenders(N, D, M, k, device):
    x, W_enc, b_enc, _, _ = (t.detach() for t in problem(N, D, M, device))
    return {"dense": lambda: {"values": topk.naive_encode(x, W_enc, b_enc, k)[0].sort(-1).values},
            "lorasae": lambda: {"values": topk.encode(x, W_enc, b_enc, k)[0].sort(-1).values}}


def step_contenders(N, D, M, k, device):
    tensors = problem(N, D, M, device)

    def run(step):
        reconstruction = step(*tensors, k)[0]
        loss = (reconstruction - tensors[0]).square().sum()
        gradients = torch.autograd.grad(loss, tensors[1:])
        return {"loss": loss.detach(), **dict(zip(["W_enc", "b_enc", "W_dec", "b_dec"], gradients))}

    return {"dense autograd": partial(run, topk.naive_step), "sparsify-style": partial(run, sparsify_step),
            "lorasae": partial(run, topk.sae_step)}


def differing_tensors(answer, reference, tolerance=1e-5):
    """None where each tensor is the reference's to a relative error of `tolerance` (in norm)."""
    errors = {name: ((answer[name] - expected).norm() / expected.norm()).item() for name, expected in reference.items()}
    worst = max(errors, key=errors.get)
    return None if errors[worst] <= tolerance else f"{worst} is off by {errors[worst]:.1e}"


def sparsify_step(x, W_enc, b_enc, W_dec, b_dec, k):
    """The usual sparse way (EleutherAI/sparsify): dense pre-activations, torch.topk, embedding_bag with its backward,
    and an encoder gradient that adds up the rows of an [N, k, D] tensor."""
    values, indices = SparsifyEncoder.apply(x - b_dec, W_enc, b_enc, k)
    return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b_dec, values, indices


class SparsifyEncoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, k):
        values, indices = torch.topk(F.linear(x, W_enc, b_enc).relu(), k, sorted=False)
        ctx.save_for_backward(x, W_enc, b_enc, indices, values)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad, _):
        x, W_enc, b_enc, indices, values = ctx.saved_tensors
        grad = grad * (values > 0)
        grad_x = F.embedding_bag(indices, W_enc, per_sample_weights=grad, mode="sum")             # for b_dec
        pairs = (grad.unsqueeze(2) * x.unsqueeze(1)).flatten(0, 1)                      # [N * k, D]
        grad_W = torch.zeros_like(W_enc).index_add_(0, indices.flatten(), pairs)
        grad_b = torch.zeros_like(b_enc).index_add_(0, indices.flatten(), grad.flatten())
        return grad_x, grad_W, grad_b, None


# ---------------------------------------------------------------------------------------------------------- the command

SECTIONS = {"topk": bench_topk}


def table(rows):
    """Rows of the same keys as aligned text."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        return "-" if value is None else str(value)

    lines = [list(rows[0])] + [[cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [[f"{text:{'<' if i < 2 else '>'}{widths[i]}}" for i, text in enumerate(line)] for line in lines]
    return "\n".join("  ".join(line) for line in aligned)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m lorasae.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("section", choices=[*SECTIONS, "all"], help="what to measure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"],
                        help="where (default: the GPU if there is one)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, and no more")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device; pass --device cpu")
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {args.device}, {name}", flush=True)
    results = {}
    for section in SECTIONS if args.section == "all" else [args.section]:
        results[section] = SECTIONS[section](args.device, args.quick)
        print("\n" + table(results[section]), flush=True)
    if args.json:
        about = {"torch": torch.__version__, "device": args.device, "hardware": name}
        write_json(args.json, {**about, "sections": results})


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
