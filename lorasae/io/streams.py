"""Where text comes from: local files, the standard library's sources, and datasets of the Hub read as streams.

    python train.py --data notes/           a folder or a file: .txt, .py, .jsonl, .jsonl.gz, .jsonl.zst
    python train.py --data stdlib           the Python standard library's own sources
    python train.py --data pile             a stream (NAMED below): read as it comes, nothing is stored on disk
    python train.py --data 'hf://datasets/OWNER/NAME@REVISION/data/*.jsonl'     any dataset of these formats

`files` finds the files; `read` turns one into documents: a line of a JSON-lines file, or at most 65,536 characters of
plain text. data.py shuffles, splits and packs them. The paper's data are the Pile and RedPajama (Section 4).
"""
import codecs
import gzip
import io
import json
import sys
import sysconfig
import zlib
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Callable, NamedTuple

from lorasae.errors import InputError
from lorasae.io.prefetch import check, pause

NAMED = {
    "pile": "hf://datasets/monology/pile-uncopyrighted/train/*.jsonl.zst",
    "pile-val": "hf://datasets/monology/pile-uncopyrighted/val.jsonl.zst",
    "redpajama-1t-sample": "hf://datasets/togethercomputer/RedPajama-Data-1T-Sample/*.jsonl",
    "redpajama-v2": "hf://datasets/togethercomputer/RedPajama-Data-V2/sample/documents/**/en_*.json.gz",
}
PLAIN = tuple(".txt .md .rst .tex .py .c .h .cc .cpp .java .js .go .rs".split())
KNOWN = PLAIN + tuple(".txt.gz .txt.zst .jsonl .jsonl.gz .jsonl.zst .json.gz .json.zst".split())
EXPECTED = ".txt, .md, .py (or other source code), .jsonl, .jsonl.gz, .jsonl.zst, .json.gz"

DOCUMENT = 65_536                                       # characters: where plain text is cut, at a line's end
BLOCK = 4 * 2 ** 20                                     # bytes asked of the Hub at a time: some 3M tokens of the Pile
WAITS = (1, 2, 4, 8, 16)                                # seconds before a failed block is asked for again


class File(NamedTuple):
    name: str                                           # its suffix decides the format
    size: int                                           # bytes, as stored
    open: Callable                                      # () -> binary file, read once from start to end


def say(line):
    print(line, file=sys.stderr, flush=True)


# ---- Which files -----------------------------------------------------------------------------------------------------

def files(source):
    """The files of a source (see the module's docstring), in the order of their names."""
    if source == "stdlib":
        return standard_library()
    if source in NAMED or source.startswith("hf://"):
        return hub_files(NAMED.get(source, source))
    try:
        return local_files(source, Path(source))
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror}") from error


def local_files(source, path):
    if path.is_file():
        if not source.lower().endswith(KNOWN):
            raise InputError(f"{source}: unknown kind of file; its name should end in {EXPECTED}")
        return [local(path)]
    if not path.is_dir():
        raise InputError(f"no file or folder {source}; expected one, or stdlib, {', '.join(NAMED)}, or "
                         "hf://datasets/OWNER/NAME/FILES")
    found = [p for p in path.rglob("*") if p.is_file() and "/." not in f"/{p.relative_to(path).as_posix()}"]   # hidden
    known = [p for p in found if p.name.lower().endswith(KNOWN)]
    if not known:
        raise InputError(f"{source} holds no readable text: none of its {len(found):,} files ends in {EXPECTED}")
    if len(known) < len(found):
        say(f"note: {len(found) - len(known):,} of the {len(found):,} files in {source} are not text and are skipped")
    return sorted((local(p) for p in known), key=lambda file: file.name)


def local(path, name=None):
    return File(name or path.as_posix(), path.stat().st_size, partial(path.open, "rb"))


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


# ---- From a file to documents ----------------------------------------------------------------------------------------

def read(raw, name, field=None):
    """Yields the documents (str) of a binary file, by its name's suffix. InputError names the file and the place."""
    damage = (OSError, EOFError, zlib.error)
    stem, stream = name.lower(), raw
    if stem.endswith(".gz"):
        stem, stream = stem[:-3], gzip.GzipFile(fileobj=raw)
    elif stem.endswith(".zst"):
        stream, zstd_error = _zstd(raw, name)
        stem, damage = stem[:-4], damage + (zstd_error,)
    try:
        yield from plain_text(stream, name) if stem.endswith(PLAIN) else json_lines(stream, name, field)
    except damage as error:
        raise InputError(f"cannot read {name}: {error}; is it damaged or cut short?") from error


def _zstd(raw, name):
    """A decompressing reader and the exception it raises: Python's own from 3.14, else the zstandard package's."""
    if sys.version_info >= (3, 14):
        from compression import zstd
        return zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: 31}), zstd.ZstdError
    try:
        import zstandard
    except ImportError:
        raise InputError(f"reading {name} needs a package: pip install zstandard") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2 ** 31)
    return decompressor.stream_reader(raw, read_across_frames=True), zstandard.ZstdError


def plain_text(stream, name):
    """Yields plain text in pieces of at most DOCUMENT characters, cut after a line where there is one."""
    decoder, offset, text = codecs.getincrementaldecoder("utf-8")(), 0, ""
    while True:
        block = stream.read(2 ** 20)
        pending = len(decoder.getstate()[0])            # bytes of an unfinished character, from the block before
        try:
            text += decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            at = offset - pending + error.start
            raise InputError(f"{name} is not UTF-8 text: byte {at:,} ({error.reason}); convert it first") from None
        offset += len(block)
        start = 0
        while len(text) - start > DOCUMENT:
            end = text.rfind("\n", start, start + DOCUMENT) + 1 or start + DOCUMENT
            yield text[start:end]
            start = end
        text = text[start:]
        if not block:
            break
    if text:
        yield text


def json_lines(stream, name, field=None):
    """Yields a string of each line's JSON object: `field`, or else "text" or, as in RedPajama-V2, "raw_content"."""
    offset = 0
    for number, line in enumerate(io.BufferedReader(stream, 2 ** 17), 1):
        where, start = f"{name}, line {number:,}", offset
        offset += len(line)
        if line.isspace():
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 text: byte {start + error.start:,} ({error.reason})") from None
        except json.JSONDecodeError as error:
            cut = "" if line.endswith(b"\n") else "; is the file cut short?"
            raise InputError(f"{where}: not JSON ({error.msg}, column {error.colno}){cut}") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected a JSON object with a text in it, found {str(record)[:40]!r}")
        key = field or ("text" if "text" in record else "raw_content")
        if not isinstance(record.get(key), str):
            strings = ", ".join(key for key, value in record.items() if isinstance(value, str)) or "none"
            raise InputError(f"{where}: no field {field or 'text'!r} that is a string; such are: {strings} (--field)")
        # JSON can spell half of a surrogate pair, which is no character: it becomes U+FFFD
        yield record[key].encode("utf-8", "surrogatepass").decode("utf-8", "replace")


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
        sizes = [filesystem.info(name)["size"] for name in known]           # the listing above already fetched them
    except _hub_errors() as error:
        found = [] if isinstance(error, FileNotFoundError) else _cached(parts)
        if not found:
            raise _refusal(error, path) from error
        say(f"note: cannot reach {url} ({_first_line(error)}); reading its {len(found):,} files in the Hub's cache")
        return found
    if not known:
        kinds = ", ".join(sorted({Path(name).suffix for name in names} - {""})) or "no files"
        raise InputError(f"{url}: found {kinds}; expected files that end in {EXPECTED}")
    return [File(name, size, partial(HubFile, filesystem, name, size)) for name, size in zip(known, sizes)]


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
    return [local(p) for p in sorted(chosen) if p.is_file() and p.name.lower().endswith(KNOWN)]


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
    """A file of the Hub read once from its start to its end, in blocks of BLOCK bytes that are a Range request each.

    No connection stays open while a GPU works for minutes on a block, and a dropped one costs a block at most: it is
    asked for again from its first byte. A block of the wrong length (a cut body, a server without Range) is not used.
    """

    def __init__(self, filesystem, name, size):
        self.filesystem, self.name, self.size = filesystem, name, size
        self.position, self.block = 0, memoryview(b"")

    def readable(self):
        return True

    def tell(self):
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
            say(f"note: {self.name}, byte {self.position:,}: {problem}; asking again in {wait} s")
            pause(wait)
