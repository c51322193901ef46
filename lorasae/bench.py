"""Speed and memory beside the alternatives, every ratio from one run on one machine.

    python -m lorasae.bench topk                    top-k, the encoder and the whole SAE step (topk.py)
    python -m lorasae.bench all --json bench.json   every section, and the rows as JSON

The contenders of a race take turns, so that a busy machine slows them all; medians are given with their minimum and maximum.
Answers are compared before anything is timed: a wrong one ends the benchmark. Peak memory is what one call adds to what its
inputs take: on a CPU the resident memory of a fresh process (libraries' scratch space included, Linux only), on a GPU the
allocator's. "ours" columns say how many times the contender's median time, and what part of its memory, our code takes.
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


# ------------------------------------------------------------------------------------------------------------------ races

def race(what, build, agree, rounds, device):
    """Rows, one a contender: their answers compared, then their times, then their memory.

    build(device) -> {name: function of no argument}; the last contender is ours. agree(answer, reference) raises
    AssertionError; the reference is the first contender's answer.
    """
    contenders = build(device)
    names = list(contenders)
    reference = contenders[names[0]]()
    for name in names[1:]:
        answer = contenders[name]()
        try:
            agree(answer, reference)
        except AssertionError as error:
            raise AssertionError(f"{what}: {name} disagrees with {names[0]}: {error}") from None
    del answer, reference
    seconds = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            seconds[name].append(timed(contenders[name], device))
    del contenders
    gc.collect()
    memory = {name: peak_memory(build, name, device) for name in names}
    ours = names[-1]
    return [{"what": what, "contender": name, "ms": 1e3 * statistics.median(times), "ms_min": 1e3 * min(times),
             "ms_max": 1e3 * max(times), "peak_mb": memory[name] and memory[name] / 1e6,
             "ours_faster": statistics.median(times) / statistics.median(seconds[ours]),
             "ours_memory": memory[name] and memory[ours] / memory[name]} for name, times in seconds.items()]


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
    with multiprocessing.get_context("spawn").Pool(1) as pool:          # a fresh process: nothing was freed there before
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


# -------------------------------------------------------------------------------------------------------- topk, encoder, step

def bench_topk(device, quick):
    """Top-k alone, the encoder and the whole TopK SAE step, k 64: D 2304 is Gemma-2-2B, M 16k to 128k its Gemma Scope widths."""
    rows = []
    for N, M in [(64, 4096)] if quick else [(2048, 16384), (2048, 131072)]:
        rows += race(f"top-k, N {N} M {M}", partial(topk_contenders, N, M, 64), same_entries, 3 if quick else 15, device)
    for N, D, M in [(64, 32, 4096)] if quick else [(1024, 2304, 131072)]:
        rows += race(f"encoder, N {N} D {D} M {M}", partial(encode_contenders, N, D, M, 64), same_latents, 3, device)
    for N, D, M in [(64, 32, 4096)] if quick else [(2048, 2304, 16384), (1024, 2304, 65536)]:
        rows += race(f"SAE step, N {N} D {D} M {M}", partial(step_contenders, N, D, M, 64), same_gradients, 5, device)
    return rows


def topk_contenders(N, M, k, device):
    x = torch.randn(N, M, device=device, generator=torch.Generator(device).manual_seed(0))
    return {"torch.topk": lambda: (x, *torch.topk(x, k, sorted=False)), "lorasae": lambda: (x, *topk.topk(x, k))}


def same_entries(answer, reference):
    """Exactly the k largest, each at the place that its index names, no place twice."""
    (x, values, indices), (_, expected, _) = answer, reference
    assert torch.equal(values.sort(-1).values, expected.sort(-1).values), "other values"
    assert torch.equal(x.gather(-1, indices), values), "values that are not where the indices say"
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all(), "an index twice"


def problem(N, D, M, device):
    """x [N, D] and the four tensors of an SAE, decoder rows of unit norm, encoder tied to them as at the start of training."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, D, device=device, generator=g)
    W_dec = F.normalize(torch.randn(M, D, device=device, generator=g))
    return [x] + [t.requires_grad_() for t in (W_dec.clone(), torch.zeros(M, device=device), W_dec, torch.zeros(D, device=device))]


def encode_contenders(N, D, M, k, device):
    x, W_enc, b_enc, _, _ = (t.detach() for t in problem(N, D, M, device))
    return {"dense": lambda: topk.naive_encode(x, W_enc, b_enc, k), "lorasae": lambda: topk.encode(x, W_enc, b_enc, k)}


def same_latents(answer, reference, tolerance=1e-5):
    """The same values up to rounding; which of two nearly equal latents is the k-th may differ."""
    a, b = (values.sort(-1).values for values, _ in (answer, reference))
    assert (a - b).norm() <= tolerance * b.norm(), f"values differ by {(a - b).norm() / b.norm():.1e}"


def step_contenders(N, D, M, k, device):
    tensors = problem(N, D, M, device)

    def run(step):
        reconstruction = step(*tensors, k)[0]
        loss = (reconstruction - tensors[0]).square().sum()
        return loss.detach(), *torch.autograd.grad(loss, tensors[1:])

    return {"dense autograd": partial(run, topk.naive_step), "sparsify-style": partial(run, sparsify_step),
            "lorasae": partial(run, topk.sae_step)}


def same_gradients(answer, reference, tolerance=1e-5):
    for name, a, b in zip(["the loss", "W_enc", "b_enc", "W_dec", "b_dec"], answer, reference):
        error = (a - b).norm() / b.norm()
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def sparsify_step(x, W_enc, b_enc, W_dec, b_dec, k):
    """The published sparse way (EleutherAI/sparsify): dense pre-activations, torch.topk, and an encoder gradient of which every
    active pair is one row of an [N, k, D] tensor, added to its latent's. The decoder is embedding_bag with its own backward."""
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
        grad_x = F.embedding_bag(indices, W_enc, per_sample_weights=grad, mode="sum") if ctx.needs_input_grad[0] else None
        pairs = (grad.unsqueeze(2) * x.unsqueeze(1)).flatten(0, 1)                                # [N * k, D]
        grad_W = torch.zeros_like(W_enc).index_add_(0, indices.flatten(), pairs)
        grad_b = torch.zeros_like(b_enc).index_add_(0, indices.flatten(), grad.flatten())
        return grad_x, grad_W, grad_b, None


# -------------------------------------------------------------------------------------------------------------- the command

SECTIONS = {"topk": bench_topk}


def table(rows):
    """The rows as aligned text."""
    heads = ["what", "contender", "ms", "min", "max", "peak MB", "ours is faster", "ours takes"]
    lines = [heads] + [[row["what"], row["contender"], f"{row['ms']:.1f}", f"{row['ms_min']:.1f}", f"{row['ms_max']:.1f}",
                        "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}", f"{row['ours_faster']:.2f}x",
                        "-" if row["ours_memory"] is None else f"{row['ours_memory']:.2f} of it"] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
                     for line in lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m lorasae.bench", description="Speed and memory beside the alternatives.")
    parser.add_argument("section", choices=[*SECTIONS, "all"], help="what to measure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"],
                        help="where (default: the GPU if there is one)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, measures nothing")
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
        write_json(args.json, {"torch": torch.__version__, "device": args.device, "hardware": name, "sections": results})


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
