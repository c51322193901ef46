"""Sources of text -> documents. shards.py turns documents into tokens.

    python train.py --data notes/           a file or a folder: .txt, .py, .jsonl, .jsonl.gz, ...
    python train.py --data stdlib           the Python standard library's own source code
    python train.py --data pile             a dataset of the Hub (NAMED), read as a stream
    python train.py --data 'hf://datasets/OWNER/NAME@REVISION/data/*.jsonl'

A document is a line of a JSON-lines file or a whole file of plain text. It is read in pieces of at
most 65,536 characters, so a document of any length takes little memory. The paper's data are the
Pile and RedPajama (Section 4).
"""
import codecs
import gzip
import io
import json
import os
import sys
import sysconfig
import time
import zlib
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Callable, NamedTuple

from lorasae.errors import InputError
from lorasae.io.console import note
from lorasae.io.hub import explained

NAMED = {
    "pile": "hf://datasets/monology/pile-uncopyrighted/train/*.jsonl.zst",
    "pile-val": "hf://datasets/monology/pile-uncopyrighted/val.jsonl.zst",
    "redpajama-1t-sample": "hf://datasets/togethercomputer/RedPajama-Data-1T-Sample/*.jsonl",
    "redpajama-v2": "hf://datasets/togethercomputer/RedPajama-Data-V2/"
                    "sample/documents/**/en_*.json.gz",
}
PLAIN = tuple(".txt .md .rst .tex .py .c .h .cc .cpp .java .js .go .rs".split())
JSON = tuple(".jsonl .jsonl.gz .jsonl.zst .json.gz .json.zst".split())
KNOWN = (*PLAIN, ".txt.gz", ".txt.zst", *JSON)
EXPECTED = ".txt, .md, .py (or other source code), .jsonl, .jsonl.gz, .jsonl.zst, .json.gz"
SOURCES = f"stdlib, {', '.join(NAMED)}, or hf://datasets/OWNER/NAME/FILES"

PIECE = 65_536              # characters of a document that are read at a time
LINE = 64 * 2 ** 20         # bytes; a longer line of JSON is refused, for memory's sake
BLOCK = 2 ** 18             # bytes read from a file at a time
HUB_BLOCK = 4 * 2 ** 20     # bytes asked of the Hub at a time
WAITS = (1, 2, 4, 8)        # seconds before a bad block is asked for again
STRETCH = 2 ** 14           # bytes of a large local file, four times, by which it is recognised


class File(NamedTuple):
    name: str               # its ending decides the format
    size: int               # bytes, as stored
    open: Callable          # () -> a binary file that can seek
    content: str = None     # the Hub's own hash of it


# ---- Which files ---------------------------------------------------------------------------------

def files(source):
    """The files of a source (see the module's docstring), sorted by name."""
    if source == "stdlib":
        return standard_library()
    if source in NAMED or source.startswith("hf://"):
        return hub_files(NAMED.get(source, source))
    if not source.strip():
        raise InputError(f"--data {source!r} is empty: pass a file, a folder, {SOURCES}")
    return local_files(source)


def local_files(source):
    path, shown = Path(source), printable(source)
    if os.path.isfile(source):
        if not source.lower().endswith(KNOWN):
            raise InputError(f"{shown}: unknown kind of file; its name must end in {EXPECTED}")
        return [local_file(path)]
    if os.path.lexists(source) and not os.path.isdir(source):
        raise InputError(f"{shown} is neither a file nor a folder; is it a device, a pipe or a "
                         "broken link?")
    if not os.path.isdir(source):
        raise InputError(f"no file or folder {shown}; expected one, or {SOURCES}")

    found = files_below(path)
    known = [path for path in found if path.name.lower().endswith(KNOWN)]
    if not known:
        raise InputError(f"{shown} holds no readable text: none of its {len(found):,} files ends "
                         f"in {EXPECTED}")
    if len(known) < len(found):
        skipped = len(found) - len(known)
        note(f"note: {skipped:,} of the {len(found):,} files in {shown} are not text and are "
             "skipped")
    return sorted(map(local_file, known), key=lambda file: file.name)


def files_below(folder, without=()):
    """All files in a folder and its subfolders, less hidden ones and the subfolders `without`."""
    def refuse(error):
        raise error                     # a folder that cannot be listed is not passed over

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != "." and name not in without]
        paths = [Path(parent, name) for name in names if name[0] != "."]
        found += [path for path in paths if path.is_file()]
    return found


def local_file(path, name=None):
    name = printable(name or path.as_posix())
    return File(name, path.stat().st_size, partial(path.open, "rb"))


def printable(name):
    """A file's name that fits in a line: other characters are escaped as in Python."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def standard_library():
    """The standard library's .py files, without tests, code pages and pydoc's manual."""
    root = Path(sysconfig.get_paths()["stdlib"])
    without = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test",
               "encodings", "pydoc_data"}
    paths = {path.relative_to(root).as_posix(): path for path in files_below(root, without)}
    return [local_file(path, name) for name, path in sorted(paths.items())
            if name.endswith(".py") and is_utf8(path)]


def is_utf8(path):
    try:
        path.read_bytes().decode()
        return True
    except UnicodeDecodeError:
        return False


def held_out(name):
    """Whether a file of the standard library is held out: one in sixteen, chosen by its path."""
    return sha256(name.encode()).hexdigest()[0] == "0"


def fingerprints(files):
    """A line per file that stays the same as long as the file does: its name and its content.

    The content is given as the size with the Hub's hash, or with ours: of all bytes, or, if the
    files are more than 256 MiB in all, of four stretches in each.
    """
    lines, total = [], sum(file.size for file in files)
    for file in files:
        content = file.content
        if content is None:
            digest = sha256()
            stretch = file.size // 4 + 1 if total <= 2 ** 28 else STRETCH
            last = max(0, file.size - stretch)          # where the last stretch begins
            with file.open() as raw:
                for part in range(4):
                    raw.seek(last * part // 3)
                    digest.update(raw.read(stretch))
            content = digest.hexdigest()[:32]
        lines.append(f"{file.name} {file.size}-{content}")
    return lines


# ---- From files to documents ---------------------------------------------------------------------

class Part(NamedTuple):
    """A stretch of a document: its pieces, and whether the document begins with them."""
    begins: bool
    pieces: list


class Reader:
    """Reads one file part by part, from `place` on: (bytes of text, lines of JSON) before it.

    A part is all of a line of JSON, or one piece of plain text. field: the JSON field with the
    text; without it "text" or, as in RedPajama-V2, "raw_content". InputError names the file and,
    in JSON, the line.
    """

    def __init__(self, file, field=None, place=(0, 0)):
        self.name, self.size, self.field = file.name, file.size, field
        self.byte, self.line = place
        self.text = ""
        self.raw = file.open()
        stream, self.damage = decompressed(file.name, self.raw)
        self.stream, self.skip = io.BufferedReader(stream, BLOCK), self.byte
        if stream is self.raw:
            self.stream.seek(self.byte)
            self.skip = 0
        self.decoded = io.TextIOWrapper(self.stream, encoding="utf-8", newline="")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.raw.close()

    @property
    def place(self):
        return self.byte, self.line

    @property
    def share(self):
        """How much has been read: bytes of text per byte of the file as it is stored."""
        return self.byte / max(self.size, 1)

    def next(self):
        """The next Part; None at the end of the file."""
        try:
            if self.skip:
                return self._skipped()
            return self._next_piece() if is_plain(self.name) else self._next_line()
        except self.damage as error:
            raise InputError(f"cannot read {self.name}: {error}; is it damaged or cut short?"
                             ) from error

    def _skipped(self):
        """A compressed file can only be entered at its start: an empty part per block skipped."""
        skipped = len(self.stream.read(min(self.skip, BLOCK)))
        if not skipped:
            raise EOFError("it is shorter than it was")
        self.skip -= skipped
        return Part(False, [])

    def _next_piece(self):
        try:
            self.text += self.decoded.read(PIECE + 1 - len(self.text))
        except UnicodeDecodeError as error:
            raise InputError(f"{self.name} is not UTF-8 text ({error.reason}): convert it first"
                             ) from None
        if not self.text:
            return None
        begins, end = self.byte == 0, cut(self.text)
        piece, self.text = self.text[:end], self.text[end:]
        self.byte += len(piece.encode())
        if "\0" in piece:
            raise InputError(f"{self.name} is not text: it has a zero byte; is it a binary file?")
        return Part(begins, [piece.removeprefix("\ufeff") if begins else piece])

    def _next_line(self):
        while line := self.stream.readline(LINE + 1):
            where = f"{self.name}, line {self.line + 1:,}"
            if len(line) > LINE:
                raise InputError(f"{where}: longer than {LINE // 2 ** 20} MiB; expected a JSON "
                                 "object per line, a document in each: cut it into several")
            self.byte += len(line)
            self.line += 1
            if self.line == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.isspace():
                return Part(True, pieces(text_of(line, where, self.field)))
        return None


def decompressed(name, raw):
    """(the stream of its text, the exceptions that a damaged file raises)."""
    damage = (OSError, EOFError, zlib.error)
    if name.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=raw), damage
    if name.lower().endswith(".zst"):
        stream, error = zstd(raw, name)
        return stream, (*damage, error)
    return raw, damage


def is_plain(name):
    """Whether a file is one document; otherwise each of its lines is one."""
    return not name.lower().endswith(JSON)


def zstd(raw, name):
    """A decompressing stream and its exception: Python's from 3.14 on, else zstandard's."""
    if sys.version_info >= (3, 14):
        from compression import zstd
        options = {zstd.DecompressionParameter.window_log_max: 31}
        return zstd.ZstdFile(raw, options=options), zstd.ZstdError
    try:
        import zstandard
    except ImportError:
        raise InputError(f"reading {name} needs a package: pip install zstandard") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2 ** 31)
    return decompressor.stream_reader(raw, read_across_frames=True), zstandard.ZstdError


def text_of(line, where, field):
    """The text in a line (bytes) of a JSON-lines file."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        end = "" if line.endswith(b"\n") else "; is the file cut short?"
        raise InputError(f"{where}: not JSON that can be read ({error}){end}") from None

    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object with a text, found {str(record)[:40]!r}")
    key = field or ("text" if "text" in record else "raw_content")
    if not isinstance(record.get(key), str):
        strings = [key for key, value in record.items() if isinstance(value, str)]
        names = ascii(", ".join(strings)[:200])[1:-1] or "none"
        raise InputError(f"{where}: no field {field or 'text'!r} that is a string; such fields "
                         f"are: {names} (--field)")
    # JSON can spell half of a surrogate pair, which is no character: it becomes U+FFFD
    return record[key].encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def pieces(text):
    """A document's pieces: together they are the text."""
    found, start = [], 0
    while True:
        end = cut(text, start)
        found.append(text[start:end])
        if end == len(text):
            return found
        start = end


def cut(text, start=0):
    """The end of the piece that begins at `start`: after its last line, if it has one."""
    if len(text) - start <= PIECE:
        return len(text)
    return text.rfind("\n", start, start + PIECE) + 1 or start + PIECE


# ---- The Hub -------------------------------------------------------------------------------------

def hub_files(url):
    """The text files of hf://datasets/OWNER/NAME[@REVISION][/PATH or glob]."""
    from huggingface_hub import HfFileSystem            # slow to import; local text needs none
    parts = url.removeprefix("hf://").split("/", 3)
    if parts[0] != "datasets" or len(parts) < 3 or not all(parts[:3]):
        raise InputError(f"{url} is not a dataset: expected hf://datasets/OWNER/NAME/FILES")
    path, repo = "/".join(parts), "/".join(parts[:3])
    filesystem = HfFileSystem(skip_instance_cache=True)
    search = filesystem.glob if any(c in path for c in "*?[") else filesystem.find
    with explained(repo):
        names = search(path)
        known = sorted(name for name in names if name.lower().endswith(KNOWN))
        about = [filesystem.info(name) for name in known]       # the listing has fetched them
    if not known:
        kinds = ", ".join(sorted({Path(name).suffix for name in names} - {""})) or "no files"
        raise InputError(f"{url}: found {kinds}; expected files that end in {EXPECTED}")

    found = []
    for name, info in zip(known, about):
        # a large file's hash is that of its bytes, a small one's is Git's
        content = info["lfs"]["sha256"] if info.get("lfs") else info["blob_id"]
        opener = partial(open_on_hub, filesystem, name, repo)
        found.append(File(name, info["size"], opener, content))
    return found


def open_on_hub(filesystem, name, repo):
    """The Hub's own file object, which asks again for a block that is not whole.

    A body that was cut short, or that ignores Range, would pass for the text otherwise.
    """
    with explained(repo):
        file = filesystem.open(name, "rb", block_size=HUB_BLOCK)
    fetch = file.cache.fetcher

    def checked(start, end):
        for wait in (*WAITS, None):
            with explained(repo):
                block = fetch(start, end)               # asks again by itself if nothing comes
            if len(block) == end - start:
                return block
            if wait is None:
                raise InputError(f"{name}: {len(block):,} bytes came from byte {start:,} on, "
                                 f"instead of {end - start:,}: check the network and continue with "
                                 "--resume")
            time.sleep(wait)

    file.cache.fetcher = checked
    return file
