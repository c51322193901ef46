"""A run's machine settings: threads, and the library for matrix products on a CPU.

    config = settled(config)        chooses what the Config leaves open, and applies it all

Both can change the last bits of a result, so a run records them, and a resumed run reuses them.
"""
import ctypes
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from lorasae.linear import linear
from lorasae.runs import distributed

CLEARLY = 1.3           # MKL must be this many times faster, so that noise decides nothing
LOOK = 0.2              # seconds spent watching other work on the cores
SIZE, ROUNDS = 1024, 5  # of the matrix products that are timed: 0.1 s in all


def settled(config, threads=None):
    """The Config with `threads` (or those given) and `products` chosen, and PyTorch set to them."""
    keep_freed_memory()
    threads = threads or config.threads or free_cores()
    products = config.products
    if products is None and config.device == "cpu":
        products = distributed.agree(faster_library())
    torch.backends.mkldnn.enabled = products != "mkl"
    torch.set_num_threads(min(threads, len(cores())))
    return replace(config, threads=threads, products=products)


def keep_freed_memory():
    """Makes glibc keep freed memory: fresh pages for large tensors cost 4 to 6 % of a CPU step."""
    if sys.platform == "linux":
        with suppress(AttributeError):                  # other C libraries lack mallopt
            for parameter in (-1, -3):                  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                ctypes.CDLL(None).mallopt(parameter, 2 ** 30)


# ---- Threads -------------------------------------------------------------------------------------

def free_cores():
    """OMP_NUM_THREADS, or else how many of this process's cores are idle now, at least 1."""
    if "OMP_NUM_THREADS" in os.environ or sys.platform != "linux":
        return torch.get_num_threads()
    before = idle_seconds()
    time.sleep(LOOK)
    idle = (idle_seconds() - before) / LOOK
    return max(1, min(round(idle), len(cores())))


def cores():
    """The numbers of the cores that this process may use."""
    if sys.platform != "linux":
        return range(os.cpu_count())
    return os.sched_getaffinity(0)


def idle_seconds():
    """The total idle time of those cores."""
    names, ticks = {f"cpu{core}" for core in cores()}, 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *times = line.split()
        if name in names:
            ticks += int(times[3])
    return ticks / os.sysconf("SC_CLK_TCK")


# ---- Matrix products -----------------------------------------------------------------------------

@cache
def faster_library():
    """onednn, or mkl if that is clearly faster on one core for a product of a model's size."""
    torch.set_num_threads(1)
    x, weight = torch.ones(256, SIZE), torch.ones(SIZE, SIZE)
    best = dict.fromkeys(("onednn", "mkl"), float("inf"))
    for _ in range(ROUNDS):
        for name in best:
            torch.backends.mkldnn.enabled = name == "onednn"
            start = time.process_time()                 # other processes do not count
            linear(x, weight)
            best[name] = min(best[name], time.process_time() - start)
    return "mkl" if CLEARLY * best["mkl"] < best["onednn"] else "onednn"
