"""Several processes for one run, with torch.distributed.

    torchrun --nproc-per-node 8 train.py --batch-size 8 ...         each has a share of the batch
    torchrun --nproc-per-node 8 train.py --batch-size 8 --shard ... and stores a share of the
                                                                    frozen blocks (FSDP2)

Only the adapters (or the SAE) train, and every process has a full copy of them and their optimiser.
Gradients are summed over the processes in one message per step, so N processes take the same steps
as one, except for dropout masks and, with --shard on a GPU, A's initial values. Process 0 does all
the writing and printing. Without torchrun there is one process, and none of this has any effect.
"""
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist

from lorasae.adapt import ALONE, World
from lorasae.errors import InputError


def local(device):
    """The torch.device for a name such as cpu, cuda or cuda:1; each process has its own GPU."""
    found, gpus = torch.device(device), torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= gpus:
        raise InputError(f"--device {device}: PyTorch sees {gpus} GPUs, counted from 0; pass "
                         "--device cpu, or another number")
    if found.type == "cuda" and dist.is_initialized():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return found


def start(config):
    """Joins torchrun's processes. Raises InputError if some are missing or cannot share a batch."""
    device, size = local(config.device), int(os.environ.get("WORLD_SIZE") or 1)
    if size > 1 and not dist.is_initialized():
        if device.type == "cuda" and "LOCAL_RANK" not in os.environ:
            raise InputError("LOCAL_RANK is not set: start the processes with torchrun")
        try:
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"the processes of this run could not connect ({error}): start all of them with "
                "torchrun --nproc-per-node N train.py ..., or unset WORLD_SIZE") from None
        if number() > 0:
            sys.stdout = open(os.devnull, "w")
    share(range(config.batch_size), world())


def stop():
    """Waits until all processes are done, then leaves the group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def number():
    """This process's number, counted from 0."""
    return world().number


def count():
    """The number of processes."""
    return world().count


def world():
    """The World of this run."""
    if not dist.is_initialized():
        return ALONE
    return World(dist.get_rank(), dist.get_world_size(), all_reduce, differentiable_sum)


def share(batch, world):
    """This process's part of a batch [B, ...]: B / world.count consecutive rows."""
    if len(batch) % world.count:
        raise InputError(f"{world.count} processes cannot share the {len(batch)} sequences of a "
                         "step equally: change the number of processes, or --batch-size")
    size = len(batch) // world.count
    return batch[world.number * size:(world.number + 1) * size]


# ---- Messages ------------------------------------------------------------------------------------

@contextmanager
def others_may_end():
    """Exits with a one-line error if another process has ended. (With NCCL, torchrun ends all.)"""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:                       # how PyTorch reports a broken connection
        sys.exit(f"error: lost another process of this run ({str(error).splitlines()[0]}); "
                 "--resume RUN_DIR continues from the last checkpoint")


@torch.no_grad()
def all_reduce(tensors):
    """Sums each tensor over the processes, in place; one message for all tensors."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with others_may_end():
        dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, total in zip(tensors, flat.split(sizes)):
        tensor.copy_(total.view_as(tensor))


def differentiable_sum(value):
    """The sum of a tensor over the processes.

    Its gradient is that of this process's part only, because all_reduce adds up the gradients.
    """
    total = value.detach().clone()
    all_reduce([total])
    return value + (total - value).detach()


def agree(value):
    """The value that process 0 has."""
    return gather(value)[0]


def gather(value):
    """[the value of each process]"""
    if count() == 1:
        return [value]
    values = [None] * count()
    with others_may_end():
        dist.all_gather_object(values, value)
    return values


def portion(batches):
    """This process's consecutive part of the batches to evaluate; `merge` keeps their order."""
    begin, end = (len(batches) * part // count() for part in (number(), number() + 1))
    return batches[begin:end]


def merge(nest):
    """Merges the results of all portions: in nested dicts, joins each list over the processes."""
    def join(parts):
        if isinstance(parts[0], dict):
            return {key: join([part[key] for part in parts]) for key in parts[0]}
        return sum(parts, [])
    return join(gather(nest))


# ---- Models too large for one process ------------------------------------------------------------

def shard(model, device):
    """Spreads a model's frozen blocks over the processes and moves the rest to `device`.

    A block's weights are gathered for its forward and backward pass, then freed. Adapters,
    embedding and head are complete in every process. Do not replace modules afterwards: FSDP2 finds
    a weight through the module that owns it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard      # imported lazily: it takes a second
    from torch.distributed.tensor import DTensor
    if count() == 1:
        raise InputError("--shard spreads a model over several processes: start them with "
                         "torchrun --nproc-per-node N train.py ...")
    mesh = init_device_mesh(device.type, (count(),))
    for block in model.layers:
        trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
