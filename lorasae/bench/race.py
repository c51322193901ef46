"""Races between contenders that must give the same answer: the time of each, measured in turns,
and the memory that one call of each adds.
"""
import gc
import math
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorasae.io.console import note
from lorasae.linear import linear
from lorasae.runs.machine import keep_freed_memory
from lorasae.runs.training import resident

ROUNDS = 5


def race(what, build, device, quick, tolerance=None, rounds=ROUNDS):
    """Yields each contender's row, ours first: compares answers, times all, then measures memory.

    build(device) -> {name: contender}, the last one ours; `build` is pickled, since another process
    measures memory. A contender is a function. Its answer, a list of tensors, is what it returns
    or, if it has a method `answer`, what that returns. tolerance: see compare_answers.
    """
    torch.compiler.reset()                  # graphs of earlier races would count against the limit
    contenders = build(device)
    compare_answers(what, contenders, tolerance)
    names = list(contenders)
    floors = [name for name in names if isinstance(contenders[name], Floor)]

    # Time them in turns, so that a busy machine slows all of them. The first round warms up.
    seconds = {name: [] for name in names}
    for number in range(1 + rounds):
        for name in names:
            seconds[name].append(timed(contenders[name], device))
            note(f"{what}, round {number} of {rounds}: {name} {seconds[name][-1]:.3g} s")
    del contenders
    gc.collect()

    # Make a row for each. Measuring memory takes too long for --quick.
    ours = None
    for name in reversed(names):
        row = {"what": what, "contender": name, **milliseconds(seconds[name][1:])}
        ours = ours or row
        row["ours_faster"] = row["ms"] / ours["ms"]
        if not quick and name not in floors and (device == "cuda" or sys.platform == "linux"):
            row["peak_mb"] = peak_memory(build, name, device) / 1e6
            row["ours_memory"] = ours["peak_mb"] / row["peak_mb"]
        yield row


def compare_answers(what, contenders, tolerance):
    """Raises RuntimeError if a tensor is off by more than `tolerance` relative to the first's norm.

    The default is 1e-5, or 1e-4 on CUDA, which adds 256,000 terms in a different order than a CPU.
    """
    answers = ((name, getattr(contender, "answer", contender)())
               for name, contender in contenders.items())
    first, reference = next(answers)
    if tolerance is None:
        tolerance = 1e-4 if any(expected.is_cuda for expected in reference) else 1e-5
    for name, answer in answers:
        for number, (found, expected) in enumerate(zip(answer, reference)):
            error = ((found - expected).norm() / expected.norm()).item()
            if not error <= tolerance:                  # it may be NaN
                raise RuntimeError(f"{what}: {name} disagrees with {first}: tensor {number} is off "
                                   f"by {error:.1e}")


# ---- Time ----------------------------------------------------------------------------------------

def milliseconds(times):
    """Times in seconds -> their median, minimum and maximum in milliseconds."""
    return {"ms": 1e3 * statistics.median(times), "ms_min": 1e3 * min(times),
            "ms_max": 1e3 * max(times)}


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


def matmul_peak(device, dtype):
    """FLOP/s of a square matrix product, the best of ten."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    linear(a, b)
    return 2 * size ** 3 / min(timed(lambda: linear(a, b), device) for _ in range(10))


# ---- The floor -----------------------------------------------------------------------------------

class Counting(TorchDispatchMode):
    """Counts the matrix products of a call: {(B, n, m, p): number} of [B, n, m] with [B, m, p].

    A fused attention has two products, and five in its backward pass; the causal mask halves each.
    """

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        name = operation.name()
        shapes = [tensor.shape for tensor in given if isinstance(tensor, torch.Tensor)]
        if name == "mkldnn::_linear_pointwise":
            (*rows, m), (p, _) = shapes[:2]
            self.counts[1, math.prod(rows), m, p] += 1
        elif name in ("aten::mm", "aten::bmm", "aten::addmm"):
            (*batch, n, m), (*_, p) = shapes[-2:]       # addmm's first tensor is the bias
            self.counts[math.prod(batch), n, m, p] += 1
        elif "scaled_dot_product" in name:
            backward = name.endswith("backward")
            B, H, T, C = shapes[backward]
            for sides in ((T, C, T), (T, T, C)):
                self.counts[B * H, *sides] += 1.25 if backward else 0.5
        return operation(*given, **(named or {}))


class Floor:
    """A contender that does only another's matrix products, on a CPU; the first call finds them."""

    def __init__(self, function):
        self.function, self.products = function, None

    def __call__(self):
        if self.products is None:
            with Counting() as counting:
                counting.counts = Counter()
                self.function()
            self.products = [product(*each) for each in counting.counts.items()]
        for multiply, number in self.products:
            for _ in range(number):
                multiply()

    def answer(self):
        return []                                       # nothing to compare


def product(shape, number):
    """A function that multiplies [B, n, m] with [B, m, p], and how often to call it."""
    B, n, m, p = shape
    a, b = torch.ones(B, n, m), torch.ones(B, p, m)
    multiply = partial(linear, a[0], b[0]) if B == 1 else partial(torch.bmm, a, b.mT)
    return multiply, round(number)


# ---- Memory --------------------------------------------------------------------------------------

def peak_memory(build, name, device):
    """Bytes that one call of a contender adds at its peak, on a GPU or on Linux."""
    if device == "cuda":
        function = build(device)[name]
        function()                                      # cuBLAS's workspace does not count
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    # In a fresh process nothing has been freed yet. If that process dies, this raises.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(added_resident, build, name, torch.get_num_threads()).result()


def added_resident(build, name, threads):
    torch.set_num_threads(threads)
    function = build("cpu")[name]
    keep_freed_memory()                                 # from here on, as in a run
    small = torch.randn(64, 64)
    small @ small                                       # loads the BLAS
    Path("/proc/self/clear_refs").write_text("5")       # resets the high-water mark
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before
