"""Small files: written whole or not at all, and read with every value checked where it is taken.

    write_json(path, value)
    fields = read_object(path)                                      a JSON object that knows its file
    depth = fields.take("num_hidden_layers", int, at_least=1)       InputError names the file and the key

Whatever is wrong with a file on the way is one InputError: a missing file, a folder in its place, a full disk.
"""
import json
import math
import os
import pickle
import reprlib
import stat
import struct
import tempfile
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lorasae.errors import InputError

REQUIRED = object()                                     # the default of a key that has none
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", dict: "an object"}


# ---- Writing ---------------------------------------------------------------------------------------------------------

@contextmanager
def whole(path):
    """Opens a temporary file beside `path` for binary writing and renames it.

    A reader sees the old file or the new, never a part.
    """
    path, temporary = Path(path), None
    check_name(path)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name[:100], suffix=".part")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)

    except (OSError, RuntimeError) as error:
        # torch.save hides what the file raised (a full disk) behind a RuntimeError of its own
        failure = error if isinstance(error, OSError) else error.__context__
        if not isinstance(failure, OSError):
            raise
        raise InputError(f"cannot write {path}: {failure.strerror or failure}") from error

    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def write_bytes(path, data):
    """Writes data to `path`, whole or not at all."""
    with whole(path) as file:
        file.write(data)


def write_json(path, value):
    """Writes value as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


# ---- Reading ---------------------------------------------------------------------------------------------------------

def read_bytes(path):
    """What a file holds; InputError where it is missing, is no plain file, or may not be read."""
    check_file(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def read_json(path):
    """The value in a JSON file, of whatever kind. Refuses what other readers would take in different ways:

    NaN and Infinity, which JSON does not have, numbers too large for a float, and a key that an object holds twice.
    """
    data = read_bytes(path)
    try:
        return json.loads(data, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_distinct)
    except RecursionError:
        raise InputError(f"{path} nests its values too deeply to be read") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})") from None


def read_object(path):
    """The object in a JSON file, as Fields."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object, but {shown(value)}")
    return Fields(value, path)


class Fields(dict):
    """A JSON object that knows where it was read, so that a wrong value is one line that names file and key."""

    def __init__(self, values, where):
        super().__init__(values)
        self.where = where

    def take(self, key, kind, default=REQUIRED, *, nullable=False,
             at_least=None, above=None, at_most=None, below=None):
        """The value of `key`, of this kind and within these bounds; `default` where the key is absent.

        kind: int, float (a whole number will do and becomes one), bool, str, dict (comes back as Fields), or a list
        of one of these: [int] is a list of whole numbers, each within the bounds. null counts as None where that is
        the default or where it is `nullable`, and is an error elsewhere.
        """
        if key not in self:
            if default is REQUIRED:
                raise InputError(f"{self.where} lacks {key}")
            return default

        value = self[key]
        if value is None and (nullable or default is None):
            return None

        bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
        if isinstance(kind, list):
            items = value if isinstance(value, list) else [None]
            taken = [_checked(item, kind[0], bounds) for item in items]
            fits = None not in taken
        else:
            taken = _checked(value, kind, bounds)
            fits = taken is not None
        if not fits:
            raise InputError(f"{self.where}: {key} is {shown(value)}, but should be {_expected(kind, bounds)}")

        return Fields(taken, f"{self.where}, {key}") if kind is dict else taken

    def only(self, **supported):
        """InputError where a key holds another value than the supported one. An absent key is fine."""
        for key, value in supported.items():
            found = self.get(key, value)
            if type(found) is not type(value) or found != value:
                raise InputError(f"{self.where}: {key} {shown(found)} is not supported, only {value!r}")

    def stated(self, **supported):
        """As `only`, but the keys must be there: where leaving one out would mean something else."""
        for key in supported:
            if key not in self:
                raise InputError(f"{self.where} lacks {key}")
        self.only(**supported)


def shown(value):
    """A value as a message shows it: on one line, and cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 60
    return short.repr(value)


def check_file(path):
    """InputError unless there is a plain file of that name: opening a pipe would wait without end."""
    check_name(path)
    path = Path(path)
    try:
        plain = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not plain:
        raise InputError(f"cannot read {path}: it is a folder or a device, but should be a file")


def check_name(path):
    """InputError for a name that no file can have."""
    if "\0" in str(path):
        raise InputError(f"{shown(str(path))} cannot be the name of a file: it holds a NUL character")


def _checked(value, kind, bounds):
    """The value as that kind, or None where it is of another or out of bounds. true is no number, though Python's 1."""
    if kind is float and type(value) in (int, float):
        try:
            value = float(value)
        except OverflowError:                           # a whole number of 400 digits
            return None
        if not math.isfinite(value):
            return None

    if type(value) is not kind and not (kind is dict and isinstance(value, dict)):
        return None

    if bounds["at least"] is not None and value < bounds["at least"]:
        return None
    if bounds["above"] is not None and value <= bounds["above"]:
        return None
    if bounds["at most"] is not None and value > bounds["at most"]:
        return None
    if bounds["below"] is not None and value >= bounds["below"]:
        return None
    return value


def _expected(kind, bounds):
    """What `take` would have accepted, in words: "a whole number, at least 1"."""
    if isinstance(kind, list):
        return f"a list, each of it {_expected(kind[0], bounds)}"
    limits = [f", {word} {bound}" for word, bound in bounds.items() if bound is not None]
    return KINDS[kind] + "".join(limits)


def _no_constant(name):
    raise ValueError(f"{name} is no JSON number")


def _finite(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _distinct(pairs):
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object holds the key {shown(twice)} twice")
    return values


# ---- Tensors -----------------------------------------------------------------------------------------

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
