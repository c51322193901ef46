"""Reading and writing small files: whole or not at all."""
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from lorasae.errors import InputError


@contextmanager
def whole(path):
    """Opens a temporary file beside `path` for binary writing and renames it: a reader sees the old file or the new, never a part."""
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
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


def read_json(path):
    """The object in a JSON file; InputError where the file is missing or is not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}") from None
    except (ValueError, NotADirectoryError) as error:
        raise InputError(f"{path} is not JSON ({error})") from None
