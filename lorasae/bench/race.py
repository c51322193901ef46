"""Races: contenders that must give the same answer, timed in turns, and the memory that one call of
each adds.

Exercised by `python -m lorasae.bench`.
"""
import gc
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from lorasae.runs.training import resident


def race(what, build, differ, rounds, device, memory=True, answer=lambda contender: contender(),
         warm=0):
    """Rows, one a contender: their answers compared, then their times, then their memory.

    build(device) -> {name: function of no argument}, the last one ours; picklable, as another
    process measures memory. differ(answer, reference) -> what is wrong with an answer, or None; the
    reference is the first contender's. answer(contender): what to compare, if not what it returns.
    warm: calls of each that are not timed.
    """
    print(what, "...", file=sys.stderr, flush=True)
    torch.compiler.reset()  # graphs of earlier races would count against the limit
    contenders = build(device)
    names = list(contenders)

    # The answers.
    reference = answer(contenders[names[0]])
    for name in names[1:]:
        complaint = differ(answer(contenders[name]), reference)
        if complaint:
            raise RuntimeError(f"{what}: {name} disagrees with {names[0]}: {complaint}")
    del reference

    # The times, in turns.
    for name in names * warm:
        contenders[name]()
    seconds = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            seconds[name].append(timed(contenders[name], device))
    del contenders
    gc.collect()

    # The memory, each alone.
    peaks = {name: peak_memory(build, name, device) if memory else None for name in names}

    # One row a contender.
    ours, rows = names[-1], []
    for name, times in seconds.items():
        median = statistics.median(times)
        row = {"what": what, "contender": name,
               "ms": 1e3 * median, "ms_min": 1e3 * min(times), "ms_max": 1e3 * max(times),
               "ours_faster": median / statistics.median(seconds[ours]), "peak_mb": None,
               "ours_memory": None}
        if peaks[name]:
            row["peak_mb"], row["ours_memory"] = peaks[name] / 1e6, peaks[ours] / peaks[name]
        rows.append(row)
    return rows


def speed(what, seconds, tokens):
    """A row for something that has no contender: `tokens` in each of the measured `seconds`."""
    return {"what": what, "contender": "lorasae", "ms": 1e3 * statistics.median(seconds),
            "ms_min": 1e3 * min(seconds),
            "ms_max": 1e3 * max(seconds), "tokens_per_s": tokens / statistics.median(seconds)}


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
        function()  # cuBLAS's workspace is no contender's own
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        return None
    # a fresh process: nothing was freed there before. If it dies, this raises
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(added_resident, build, name, torch.get_num_threads()).result()


def added_resident(build, name, threads):
    torch.set_num_threads(threads)
    function = build("cpu")[name]
    small = torch.randn(64, 64)
    small @ small                                                       # loads the BLAS
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def differing_tensors(answer, reference, tolerance=None):
    """None where each tensor is the reference's to a relative error of `tolerance` (in norm).

    Left out, it is 1e-5, and 1e-4 on CUDA, whose sums over 256,000 terms run in another order than
    a CPU's.
    """
    errors = {}
    for name, expected in reference.items():
        errors[name] = ((answer[name] - expected).norm() / expected.norm()).item()
        if tolerance is None:
            tolerance = 1e-4 if expected.is_cuda else 1e-5

    worst = max(errors, key=errors.get)
    return None if errors[worst] <= tolerance else f"{worst} is off by {errors[worst]:.1e}"
