"""Where text comes from: local files, the standard library's sources, and datasets of the Hub read as streams.

    python train.py --data notes/           a folder or a file: .txt, .py, .jsonl, .jsonl.gz, .jsonl.zst
    python train.py --data stdlib           the Python standard library's own sources
    python train.py --data pile             a stream (NAMED below): read as it comes, nothing is stored on disk
    python train.py --data 'hf://datasets/OWNER/NAME@REVISION/data/*.jsonl'     any dataset of these formats

`files` finds the files; documents.py turns one into documents, corpus.py shuffles, splits and packs them. The paper's
data are the Pile and RedPajama (Section 4).
"""
import io
import os
import sysconfig
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Callable, NamedTuple

from lorasae.errors import InputError
from lorasae.io.console import note
from lorasae.io.documents import EXPECTED, KNOWN, opened
from lorasae.io.prefetch import check, pause

NAMED = {
    "pile": "hf://datasets/monology/pile-uncopyrighted/train/*.jsonl.zst",
    "pile-val": "hf://datasets/monology/pile-uncopyrighted/val.jsonl.zst",
    "redpajama-1t-sample": "hf://datasets/togethercomputer/RedPajama-Data-1T-Sample/*.jsonl",
    "redpajama-v2": "hf://datasets/togethercomputer/RedPajama-Data-V2/sample/documents/**/en_*.json.gz",
}
BLOCK = 4 * 2 ** 20                                     # bytes asked of the Hub at a time: some 3M tokens of the Pile
SAMPLE = 2 ** 16                                        # bytes of a local file that are looked at to know it again
WAITS = (1, 2, 4, 8, 16)                                # seconds before a failed block is asked for again


class File(NamedTuple):
    name: str                                           # its suffix decides the format
    size: int                                           # bytes, as stored
    open: Callable                                      # () -> binary file that can seek
    content: str = None                                 # what the Hub knows its content by


# ---- Which files -----------------------------------------------------------------------------------------------------

def files(source):
    """The files of a source (see the module's docstring), in the order of their names."""
    if source == "stdlib":
        return standard_library()
    if source in NAMED or source.startswith("hf://"):
        return hub_files(NAMED.get(source, source))
    if not source.strip():
        raise InputError(f"--data {source!r} names no text; expected a file or folder, stdlib, {', '.join(NAMED)}, or "
                         "hf://datasets/OWNER/NAME/FILES")
    try:
        return local_files(source, Path(source))
    except OSError as error:
        raise InputError(f"cannot read {printable(str(error.filename or source))}: {error.strerror}") from error


def local_files(source, path):
    if path.is_file():
        if not source.lower().endswith(KNOWN):
            raise InputError(f"{printable(source)}: unknown kind of file; its name should end in {EXPECTED}")
        return [local(path)]
    if not path.is_dir():
        fault = f"no file or folder {printable(source)}"
        if os.path.lexists(source):
            fault = f"{source} is neither a file nor a folder (a device, a pipe, or a link that leads nowhere?)"
        raise InputError(f"{fault}; expected one, or stdlib, {', '.join(NAMED)}, or hf://datasets/OWNER/NAME/FILES")

    found = files_below(path)
    known = [path for path in found if path.name.lower().endswith(KNOWN)]
    if not known:
        raise InputError(f"{source} holds no readable text: none of its {len(found):,} files ends in {EXPECTED}")
    if len(known) < len(found):
        note(f"note: {len(found) - len(known):,} of the {len(found):,} files in {source} are not text and are skipped")
    return sorted((local(path) for path in known), key=lambda file: file.name)


def files_below(folder):
    """Every file in a folder and its subfolders, but for hidden ones. A folder that cannot be listed is an OSError."""
    def refuse(error):
        raise error

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.is_file()]
    return found


def local(path, name=None, content=None):
    return File(printable(name or path.as_posix()), path.stat().st_size, partial(path.open, "rb"), content)


def printable(name):
    """A name that fits in a line: what is no character in it, or ends the line, is written as in Python."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def standard_library():
    """Its .py files, named relative to it, without tests and without what is not code: code pages, pydoc's manual."""
    root = Path(sysconfig.get_paths()["stdlib"])
    without = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    return [local(root / name, name) for name in names if not without & set(name.split("/")) and _is_utf8(root / name)]


def _is_utf8(path):
    try:
        path.read_bytes().decode()
        return True
    except UnicodeDecodeError:
        return False


def held_out(name):
    """Whether a standard library file is for validation: one in sixteen, by its path, so on every Python the same."""
    return sha256(name.encode()).hexdigest()[0] == "0"


# ---- Whether they are still the same ---------------------------------------------------------------------------------

def fingerprints(files):
    """A line for each file, its name before the last space: the same as long as the file is the same."""
    return [f"{file.name} {content(file)}" for file in files]


def content(file):
    """What tells a file's content from another: its size with the Hub's own hash, or with that of four stretches of it.

    So a file of up to SAMPLE bytes is known by all of them, and a long one without being read.
    """
    if file.content is not None:
        return f"{file.size}-{file.content}"
    digest, stretch = sha256(), SAMPLE // 4
    last = max(file.size, SAMPLE) - stretch             # where the last stretch begins
    with opened(file) as raw:
        for part in range(4):
            raw.seek(last * part // 3)
            digest.update(raw.read(stretch))
    return f"{file.size}-{digest.hexdigest()[:32]}"


# ---- The Hub ---------------------------------------------------------------------------------------------------------

def hub_files(url):
    """The text files of hf://datasets/OWNER/NAME[@REVISION][/PATH or glob]; without a network those in the cache."""
    from huggingface_hub import HfFileSystem            # here, for it takes a while and local text does without
    parts = url.removeprefix("hf://").split("/", 3)
    if parts[0] != "datasets" or len(parts) < 3 or not all(parts[:3]):
        raise InputError(f"{url} is no dataset: expected hf://datasets/OWNER/NAME/FILES")
    path = "/".join(parts)
    filesystem = HfFileSystem(skip_instance_cache=True)
    try:
        names = (filesystem.glob if any(c in path for c in "*?[") else filesystem.find)(path)
        known = sorted(name for name in names if name.lower().endswith(KNOWN))
        about = [filesystem.info(name) for name in known]           # the listing above already fetched them
    except _hub_errors() as error:
        found = [] if isinstance(error, FileNotFoundError) else _cached(parts)
        if not found:
            raise _refusal(error, path) from error
        note(f"note: cannot reach {url} ({_first_line(error)}); reading its {len(found):,} files in the Hub's cache")
        return found
    if not known:
        kinds = ", ".join(sorted({Path(name).suffix for name in names} - {""})) or "no files"
        raise InputError(f"{url}: found {kinds}; expected files that end in {EXPECTED}")
    return [_on_hub(filesystem, name, info) for name, info in zip(known, about)]


def _on_hub(filesystem, name, info):
    """A large file's hash is of its bytes; a small one's is Git's own."""
    content = info["lfs"]["sha256"] if info.get("lfs") else info["blob_id"]
    return File(name, info["size"], partial(HubFile, filesystem, name, info["size"]), content)


def _cached(parts):
    """The same files, as far as an earlier download left them in the Hub's cache."""
    from huggingface_hub import snapshot_download
    name, _, revision = "/".join(parts[1:3]).partition("@")
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision or None, local_files_only=True))
    except _hub_errors():
        return []
    pattern = parts[3] if len(parts) == 4 else "."
    chosen = (folder / pattern).rglob("*") if (folder / pattern).is_dir() else folder.glob(pattern)
    paths = [path for path in sorted(chosen) if path.is_file() and path.name.lower().endswith(KNOWN)]

    found = []
    for path in paths:                                  # named as on the Hub, so that a run may go on from either
        name = "/".join([*parts[:3], path.relative_to(folder).as_posix()])
        content = path.resolve().name                   # the cache links to a file that is named by the Hub's hash
        found.append(local(path, name, content))
    return found


def _hub_errors():
    """What huggingface_hub raises when the network or the Hub says no, whichever HTTP client it uses."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    return OSError, EntryNotFoundError, *HfHubHTTPError.__bases__


def _refusal(error, path):
    """The InputError that tells what a failed request to the Hub means."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    dataset = "/".join(path.split("/")[1:3])
    if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
        return InputError(f"dataset {dataset} is gated: accept its terms at https://huggingface.co/datasets/{dataset}, "
                          "then run: hf auth login")
    if isinstance(error, (FileNotFoundError, RepositoryNotFoundError)):
        return InputError(f"{path} is not on the Hub: check the name (a private dataset needs: hf auth login)")
    if constants.HF_HUB_OFFLINE:
        return InputError(f"{path} is not in the Hub's cache and HF_HUB_OFFLINE is set: unset it, or use a local file")
    return InputError(f"cannot reach the Hub for {path} ({_first_line(error)}) and the cache lacks it: check the "
                      "network and try again, or use a local file")


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class HubFile(io.RawIOBase):
    """A file of the Hub, read in blocks of BLOCK bytes that are a Range request each.

    No connection stays open while a GPU works for minutes on a block, and a dropped one costs a block at most: it is
    asked for again from its first byte. A block of the wrong length (a cut body, a server without Range) is not used.
    """

    def __init__(self, filesystem, name, size):
        self.filesystem, self.name, self.size = filesystem, name, size
        self.position, self.block = 0, memoryview(b"")

    def readable(self):
        return True

    def seekable(self):
        return True

    def progress_line(self):
        return self.position

    def seek(self, offset, whence=io.SEEK_SET):
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position, self.block = start + offset, memoryview(b"")
        return self.position

    def readinto(self, buffer):
        if not self.block and self.position < self.size:
            self.block = memoryview(self._fetch(min(BLOCK, self.size - self.position)))
        count = min(len(buffer), len(self.block))
        buffer[:count] = self.block[:count]
        self.block = self.block[count:]
        self.position += count
        return count

    def _fetch(self, length):
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
        for wait in (*WAITS, None):
            check()
            try:
                with self.filesystem.open(self.name, "rb", block_size=BLOCK, cache_type="none") as remote:
                    remote.seek(self.position)
                    block = remote.read(length)         # with this cache_type exactly one request for these bytes
                if len(block) == length:
                    return block
                problem = f"{len(block):,} bytes came where {length:,} were asked for"
            except (FileNotFoundError, GatedRepoError, RepositoryNotFoundError) as error:
                raise _refusal(error, self.name) from error
            except _hub_errors() as error:
                problem = _first_line(error)
            if wait is None:
                raise InputError(f"{self.name}: nothing after byte {self.position:,} of {self.size:,} ({problem}): "
                                 "check the network and run again, with --resume to continue")
            note(f"note: {self.name}, byte {self.position:,}: {problem}; asking again in {wait} s")
            pause(wait)
