"""Files of named tensors: .safetensors, .npz (numpy) and .pt (torch.save), read one tensor at a time.

Nothing in a file is executed. Weights are floating-point numbers or refused: an int8 or fp8 tensor is a code that needs
its scales, and a cast would make wrong weights of it in silence.
"""
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lorasae.errors import InputError
from lorasae.io.disk import check_file, shown, write_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)

# What safetensors, numpy and torch raise over a damaged file.
DAMAGED = (OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, AttributeError, OverflowError,
           AssertionError, SafetensorError, zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError)


class Tensors:
    """The named tensors of a file, read when asked for; InputError names the file and the tensor."""

    def __init__(self, path):
        self.path = path = Path(path)
        check_file(path)
        try:
            if path.suffix == ".safetensors":
                self.file = safe_open(path, framework="pt")
                self.names = set(self.file.keys())
                self.read = self.file.get_tensor

            elif path.suffix == ".npz":
                arrays = np.load(path, allow_pickle=False)
                self.names = set(arrays.files)
                self.read = lambda name: torch.from_numpy(arrays[name])

            else:
                tensors = torch.load(path, map_location="cpu", weights_only=True)
                self.names = set(tensors.keys())
                self.read = tensors.__getitem__

        except DAMAGED as error:
            if isinstance(error, OSError) and error.errno:
                raise InputError(f"cannot read {path}: {error.strerror}") from error
            raise InputError(f"{path} is refused: not a whole file of named tensors and nothing else "
                             f"({first_line(error)}); download or save it again") from error

    def __contains__(self, name):
        return name in self.names

    def __getitem__(self, name):
        """A tensor of weights, on the CPU, in the dtype of the file."""
        tensor = self.tensor(name)

        if tensor.dtype not in FLOATS:
            raise InputError(f"{self.path}: {name} is {dtype_name(tensor)}, but only float32, bfloat16, float16 and "
                             "float64 are read: take an unquantised copy")
        return tensor

    def shape(self, name):
        """The shape of a tensor of a .safetensors file, without reading it."""
        self._check(name)
        return tuple(self.file.get_slice(name).get_shape())

    def number(self, name, kind):
        """The one number that a tensor holds, as int (from a tensor of integers) or float."""
        tensor = self.tensor(name)
        dtypes, wanted = (INTEGERS, "one whole number") if kind is int else (FLOATS, "one number")
        if tensor.numel() != 1 or tensor.dtype not in dtypes:
            found = f"{list(tensor.shape)} of {dtype_name(tensor)}"
            raise InputError(f"{self.path}: {name} is {found}, but should be {wanted}")
        return kind(tensor.item())

    def _check(self, name):
        if name not in self.names:
            has = ", ".join(sorted(map(str, self.names))) or "none"
            if len(has) > 500:
                has = f"{has[:500]} ..."
            raise InputError(f"{self.path} lacks the tensor {name}; it has {first_line(has)}")

    def tensor(self, name):
        """A plain tensor of whatever numbers, on the CPU."""
        self._check(name)
        try:
            tensor = self.read(name)
        except DAMAGED as error:
            raise InputError(f"{self.path}: cannot read {name} ({first_line(error)})") from error

        # torch.save keeps more than plain tensors: numbers, sparse ones, those of the meta device
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise InputError(f"{self.path}: {name} is no plain tensor, but {first_line(shown(tensor))}")
        return tensor.detach()


def write_tensors(path, tensors, metadata=None):
    """Writes {name: tensor} as a .safetensors file, whole or not at all."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(on_cpu, metadata))


def as_dtype(dtype):
    """A torch dtype from itself or its name."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in FLOATS:
        raise InputError(f"dtype {shown(dtype)} is not one of {', '.join(DTYPES)}")
    return found


def is_finite(tensor):
    """Whether every value is, by the smallest and the largest: NaN if one value is. Far faster than isfinite."""
    if not tensor.numel():
        return True
    smallest, largest = torch.aminmax(tensor)
    return bool(smallest.isfinite() & largest.isfinite())


def dtype_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def first_line(error):
    return str(error).strip().partition("\n")[0] or type(error).__name__
