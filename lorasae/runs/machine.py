"""What the machine gives a run: threads, memory, and the library that multiplies on a CPU."""
import ctypes
import os
import sys
from contextlib import suppress
from dataclasses import replace

import torch


def settled(config):
    """The Config with its threads; from here on PyTorch works so.

    They and `products` can change the last bits of a result, so a run records them.
    """
    keep_freed_memory()
    threads = config.threads or torch.get_num_threads()
    torch.set_num_threads(min(threads, os.cpu_count()))
    torch.backends.mkldnn.enabled = config.products == "onednn"
    return replace(config, threads=threads)


def keep_freed_memory():
    """Tells glibc to keep what is freed.

    Otherwise large tensors get fresh pages each time, which is 4 to 6 % of a step on a CPU.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):                  # another C library has no mallopt
            for parameter in (-1, -3):                  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                ctypes.CDLL(None).mallopt(parameter, 2 ** 30)
