"""Files: written whole or not at all; JSON whose values are checked on reading; tensors.

    write_json(path, value)
    fields = read_object(path)                                      a dict that remembers its file
    depth = fields.take("num_hidden_layers", int, at_least=1)       errors name the file and the key

A missing file is an OSError, which names the file; a full disk is an InputError.
"""
import errno
import json
import operator
import os
import reprlib
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from safetensors.torch import load_file, save

from lorasae.errors import InputError

REQUIRED = object()                                     # the default for a key that must be present
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}
LARGEST = 2**53                                         # beyond this, JSON numbers are not exact
BOUNDS = {
    "at_least": operator.ge,
    "above": operator.gt,
    "below": operator.lt,
    "equal_to": operator.eq,
    "one_of": lambda value, choices: value in choices,
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATS = (*DTYPES.values(), torch.float64)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def local(path):
    """The path with ~ expanded. Raises InputError if it is empty or contains a zero byte."""
    text = str(path)
    if not text or "\0" in text:
        raise InputError(f"{text!r} is not a path: pass the name of a file or folder")
    return Path(os.path.expanduser(path))


# ---- Writing -------------------------------------------------------------------------------------

@contextmanager
def whole(path):
    """Opens a temporary file next to `path` for writing bytes, and renames it to `path` at the end.

    A reader sees the old file or the new one, never part of one. Permissions follow the umask.
    """
    path = local(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name[:40]}.{uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno in FULL:                 # otherwise the file system has no fsync
                    raise
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides the file's own error (a full disk) behind a RuntimeError.
        failure = error if isinstance(error, OSError) else error.__context__
        if not isinstance(failure, OSError):
            raise
        raise InputError(f"cannot write {path}: {failure.strerror or failure}") from error
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path, data):
    """Writes data to `path`, whole or not at all."""
    with whole(path) as file:
        file.write(data)


def write_json(path, value):
    """Writes value as indented JSON, whole or not at all."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        raise InputError(f"cannot write {path}: it would contain numbers that are not finite: "
                         "the model diverged, or its text is all the same") from error
    write_bytes(path, f"{text}\n".encode())


def write_tensors(path, tensors, metadata=None):
    """Writes {name: tensor} as a .safetensors file, whole or not at all."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, metadata))


# ---- Reading -------------------------------------------------------------------------------------

@contextmanager
def damage(what):
    """Names the file that a library cannot make sense of; few libraries name it themselves."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or getattr(error, "filename", None):
            raise                                       # it already names the file
        raise InputError(f"cannot read {what} ({first_line(error)}); if it is damaged, download or "
                         "save it again") from error


def read_json(path):
    """The value in a JSON file, of any type."""
    with damage(path):
        return json.loads(Path(path).read_bytes())


def read_object(path):
    """The object in a JSON file, as Fields."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object, but {shown(value)}")
    return Fields(value, path)


class Fields(dict):
    """A JSON object that remembers its file, so that errors can name the file and the key."""

    def __init__(self, values, where):
        super().__init__(values)
        self.where = where

    def take(self, key, kind, default=REQUIRED, **bounds):
        """The value of `key`, checked against `kind` and `bounds`; `default` if the key is absent.

        kind: int, float (whole numbers too), bool, str, list, or dict (returned as Fields).
        bounds: keys of BOUNDS. null is read as None if the default is None; else it is an error.
        """
        value = self.get(key, default)
        if value is REQUIRED:
            raise InputError(f"{self.where} lacks {key}")
        if value is default:
            return value

        # JSON's true is not a number here, although it is one in Python.
        good = type(value) is kind or (kind is float and type(value) is int)
        if good and kind in (int, float):
            good = abs(value) <= LARGEST                # False for NaN too
        if not good or not all(BOUNDS[name](value, bound) for name, bound in bounds.items()):
            limits = [f", {name.replace('_', ' ')} {bound}" for name, bound in bounds.items()]
            wanted = KINDS[kind] + "".join(limits)
            raise InputError(f"{self.where}: {key} is {shown(value)}, but should be {wanted}")
        return Fields(value, f"{self.where}, {key}") if kind is dict else kind(value)

    def only(self, **supported):
        """Raises InputError if a key has any value but the supported one. It may be absent."""
        for key, value in supported.items():
            self.take(key, type(value), value, equal_to=value)


def shown(value):
    """A value as messages show it: on one line, and shortened if it is long."""
    short = reprlib.Repr()
    short.maxstring = 60
    return first_line(short.repr(value))


def first_line(error):
    """The first line of an error or a text; the error's type if its message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


# ---- Tensors -------------------------------------------------------------------------------------

class Tensors:
    """The named tensors of a .safetensors, .npz or .pt file, read from disk when used.

    (A .pt file is read all at once.) Nothing in the file is executed.
    """

    def __init__(self, path):
        self.path = Path(path)
        with damage(path):
            if self.path.suffix == ".safetensors":
                self.stored = load_file(path)           # memory-mapped
            elif self.path.suffix == ".npz":
                self.stored = np.load(path, allow_pickle=False)
            else:
                self.stored = dict(torch.load(path, map_location="cpu", weights_only=True))

    def __iter__(self):
        return iter(self.stored)

    def __getitem__(self, name):
        """A weight tensor, on the CPU, in the file's dtype."""
        if name not in self.stored:
            raise InputError(f"{self.path} lacks the tensor {name}")
        with damage(f"{self.path}: {name}"):
            tensor = torch.as_tensor(self.stored[name]).detach()
        if tensor.dtype not in FLOATS:
            raise InputError(
                f"{self.path}: {name} is {dtype_name(tensor)}, but only float32, bfloat16, "
                "float16 and float64 are supported: use an unquantised copy")
        return tensor


def as_dtype(dtype):
    """The torch dtype, given as such or by name."""
    found = DTYPES.get(dtype, dtype)
    if found not in FLOATS:
        raise InputError(f"dtype {shown(dtype)} is not one of {', '.join(DTYPES)}")
    return found


def dtype_name(tensor):
    """The name of a tensor's dtype, such as float32."""
    return str(tensor.dtype).removeprefix("torch.")


def check_tensor(what, tensor, shape):
    """Raises an InputError beginning with `what` if the shape is wrong or a value is not finite."""
    found, expected = list(tensor.shape), list(shape)
    if found != expected:
        raise InputError(f"{what} is {found}, but should be {expected}: it belongs to another "
                         "model or rank, or is damaged")
    smallest, largest = torch.aminmax(tensor)           # NaN if any value is; faster than isfinite
    if not (smallest.isfinite() and largest.isfinite()):
        raise InputError(f"{what} contains values that are not finite: it is damaged, has "
                         "diverged, or needs a wider dtype")
