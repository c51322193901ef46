"""One writer a folder: a lock that the system lets go of when its process ends, however it does."""
import os
import socket
from contextlib import suppress
from pathlib import Path

from lorasae.errors import InputError

try:
    import fcntl
except ImportError:                                     # Windows has no such locks: there, nobody watches
    fcntl = None

NAME = ".lock"                                          # in the folder; it says who writes
RUNS = Path("runs")                                     # where runs go that name no folder


class Lock:
    """This process as the only one that writes to `folder`, which is made. InputError says who has it instead."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]        # innermost first
        self.file = self._open()

    def _open(self):
        path = self.folder / NAME
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = open(path, "a+", encoding="utf-8")
            except OSError as error:
                raise InputError(f"cannot write {self.folder}: {error.strerror}") from error
            self._take(file)
            if is_there(file, path):                    # else another process removed the file before we had it
                break
            file.close()

        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file

    def _take(self, file):
        if fcntl is None:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise InputError(f"{self.folder} is being written by {holder}: wait for it to end, or pass another --out") from None

    def release(self):
        """Lets go. A folder in which nothing was written goes too, with those that were made for it."""
        (self.folder / NAME).unlink(missing_ok=True)
        parents = [RUNS] if self.folder.parent == RUNS else []
        with suppress(OSError):                         # something is in it
            for folder in dict.fromkeys([self.folder, *self.made, *parents]):
                folder.rmdir()
        self.file.close()


def is_there(file, path):
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def check_free(folder):
    """Refuses an output folder that holds anything: asked before the long work starts."""
    folder = Path(folder)
    try:
        free = not folder.exists() or folder.is_dir() and not holdings(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot use {folder} as --out: {getattr(error, 'strerror', None) or error}") from error
    if free:
        return
    if (folder / "config.json").exists() and not (folder / "results.json").exists():
        raise InputError(f"{folder} already holds a run: pass another --out, or --resume {folder} alone to continue that run")
    raise InputError(f"{folder} already holds files: pass another --out")


def holdings(folder):
    """What is in a folder, but for a lock and what a killed process was writing."""
    return [path for path in folder.iterdir() if path.name != NAME and path.suffix != ".part"]


def new_folder(model, method):
    """Makes runs/MODEL-METHOD, or the first of -2, -3, ... that is free -> its path. Two runs started together get two."""
    name, number = f"{Path(model).name}-{method}", 1
    while True:
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror}; pass another --out") from error
