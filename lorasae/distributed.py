"""Several processes, one run, on PyTorch's own engine.

    torchrun --nproc-per-node 8 train.py ...                data parallel: each process takes its share of every batch
    torchrun --nproc-per-node 8 train.py --shard ...        the frozen blocks are spread over the processes, too (FSDP2)

The gradients of the shares are summed, so N processes take the very steps of one with the same batch. Only the adapters (or
the SAE) train: their gradients travel as one buffer a step, and every process keeps its own copy of them and of the optimiser.
Process 0 writes every file and speaks. Without torchrun there is one process, and all of this does nothing.
"""
import os
import signal
import sys

import torch
import torch.distributed as dist

from lorasae.errors import InputError

LOST = "error: another process of this run ended, so this one stops: --resume RUN_DIR continues from the last checkpoint"


def join(device):
    """Joins the processes that torchrun started, if it did; returns the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(LOST))            # what torchrun sends when one of them dies
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch):
    """This process's rows of a batch [B, ...]: every world()-th."""
    if len(batch) < world():
        raise InputError(f"--batch-size {len(batch)} is less than the {world()} processes: each needs a sequence of every batch")
    return batch[rank()::world()]


def agree(value):
    """Process 0's value, on all of them."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


@torch.no_grad()
def all_reduce(tensors):
    """Sums each tensor over the processes, in place, all of them in one message."""
    if world() == 1:
        return
    tensors = list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    try:
        dist.all_reduce(flat)
    except RuntimeError as error:
        sys.exit(f"{LOST} ({str(error).splitlines()[0]})")
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view_as(tensor))


def everywhere(value):
    """The sum of a tensor over the processes; its gradient is that of this process's part, for all_reduce to complete."""
    if world() == 1:
        return value
    total = value.detach().clone()
    all_reduce([total])
    return value + (total - value).detach()
