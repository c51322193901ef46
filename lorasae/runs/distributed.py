"""Several processes, one run, on PyTorch's own engine.

    torchrun --nproc-per-node 8 train.py --batch-size 8 ...             each process takes its share of every batch
    torchrun --nproc-per-node 8 train.py --batch-size 8 --shard ...     and holds its share of the frozen blocks (FSDP2)

Only the adapters (or the SAE) train, and every process keeps all of them and of their optimiser: the gradients of the
shares are summed, in one message a step, so N processes take the very steps of one (with dropout: with other masks).
Process 0 writes every file and does the talking. Without torchrun there is one process, and all of this does nothing.
"""
import os
import signal
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from lorasae.errors import InputError

PATIENCE = timedelta(seconds=45)                        # that the processes have for each other at the start
LOST = "error: another process of this run ended, so this one stops: --resume RUN_DIR continues from the last checkpoint"


def local(device):
    """The torch.device of a name such as cpu, cuda, cuda:1, mps; of several processes each has its own GPU."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise InputError(f"--device {device} is no device that PyTorch knows: pass cpu, cuda, cuda:1 or mps") from None
    if found.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {device} is not supported: pass cpu, cuda, cuda:1 or mps")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: PyTorch sees no CUDA device; pass --device cpu")
    if found.type == "cuda" and found.index is not None and found.index >= torch.cuda.device_count():
        raise InputError(f"--device {device}: PyTorch sees {torch.cuda.device_count()} CUDA devices, counted from 0")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: PyTorch sees no Apple GPU; pass --device cpu")
    if found.type == "cuda" and dist.is_initialized():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return found


def start(device):
    """Joins the processes that torchrun started, if it did. Raises InputError where they do not all come."""
    device = local(device)
    count = environment("WORLD_SIZE", 1)
    if count == 1 or dist.is_initialized():
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(LOST))            # torchrun sends it when one of them dies
    if device.type == "cuda":
        torch.cuda.set_device(environment("LOCAL_RANK"))
    store = meet(environment("RANK"), count)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=environment("RANK"),
                            world_size=count)
    if process() > 0:
        sys.stdout = open(os.devnull, "w")


def environment(name, default=None):
    """A whole number that torchrun leaves for its processes."""
    text = os.environ.get(name, default)
    if text is None or not str(text).isdecimal():
        raise InputError(f"WORLD_SIZE is set, but {name} is {text!r}: start several processes with torchrun --nproc-per-node N "
                         "train.py ..., or unset WORLD_SIZE")
    return int(text)


def meet(number, count):
    """The store through which the processes find each other, once all of them are there."""
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
        store.set(f"here/{number}", "yes")
        store.wait([f"here/{other}" for other in range(count)], PATIENCE)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"the {count} processes of this run did not meet within {PATIENCE.seconds} s ({reason}): start all of "
                         "them with torchrun --nproc-per-node N train.py ..., or unset WORLD_SIZE") from None
    return store


def stop():
    """Leaves the others, when all is done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def process():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch):
    """This process's part of a batch [B, ...], B / world() rows in a row."""
    if len(batch) % world():
        raise InputError(f"--batch-size {len(batch)} cannot be shared by {world()} processes: make it a multiple of {world()}")
    size = len(batch) // world()
    return batch[process() * size:(process() + 1) * size]


@contextmanager
def stop_if_lost():
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:                                       # what PyTorch raises when a connection breaks
        sys.exit(f"{LOST} ({str(error).splitlines()[0]})")


@torch.no_grad()
def all_reduce(tensors):
    """Sums each tensor over the processes, in place, all of them in one message."""
    if world() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with stop_if_lost():
        dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view_as(tensor))


def everywhere(value):
    """The sum of a tensor over the processes; its gradient is that of this process's part, for all_reduce to complete."""
    if world() == 1:
        return value
    total = value.detach().clone()
    all_reduce([total])
    return value + (total - value).detach()


def portion(batches, model):
    """This process's part of what is to be evaluated; all of it where the model is sharded, for then all compute together."""
    return batches if sharded(model) else batches[process()::world()]


def merge(nest, model):
    """What was found in the portions: a dict of dicts ... of lists, each list followed by its namesakes of other processes."""
    if world() == 1 or sharded(model):
        return nest
    nests = [None] * world()
    with stop_if_lost():
        dist.all_gather_object(nests, nest)

    def join(parts):
        if isinstance(parts[0], dict):
            return {key: join([part[key] for part in parts]) for key in parts[0]}
        return sum(parts, [])
    return join(nests)


def agree(value):
    """Process 0's value."""
    box = [value]
    if world() > 1:
        with stop_if_lost():
            dist.broadcast_object_list(box)
    return box[0]


def shard(model, device):
    """Spreads a model's frozen blocks over the processes and moves the rest of it to `device`; returns the model.

    A block's weights are put together while it computes, forward and backward, and forgotten again. Adapters, embedding and
    head are whole everywhere. Modules must not be exchanged afterwards: FSDP2 knows a weight by the module that owns it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    if world() == 1:
        raise InputError("--shard spreads a model over several processes: start them with torchrun --nproc-per-node N "
                         "train.py ...")
    mesh = init_device_mesh(device.type, (world(),))
    for block in model.layers:
        trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
    return model


def sharded(model):
    """Whether `shard` has spread this model: all processes must then compute the same blocks at the same time."""
    if world() == 1:
        return False
    from torch.distributed.tensor import DTensor                        # here, for it takes a second to import
    return any(isinstance(parameter, DTensor) for parameter in model.layers.parameters())
