"""Sources of text -> documents in their order. shards.py turns documents into tokens.

    python train.py --data notes/           a file or a folder: .txt, .py, .jsonl, .jsonl.gz, ...
    python train.py --data stdlib           the Python standard library's own source code
    python train.py --data pile             a dataset of the Hub (NAMED), read as a stream
    python train.py --data 'hf://datasets/OWNER/NAME@REVISION/data/*.jsonl'

A document is a line of a JSON-lines file or a whole file of plain text. It is read in pieces of at
most 65,536 characters, so a document of any length takes little memory. The paper's data are the
Pile and RedPajama (Section 4).
"""
import gzip
import io
import json
import os
import re
import sysconfig
from functools import partial
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from lorasae.errors import InputError
from lorasae.io.console import note
from lorasae.io.files import damage
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

SMALL = 2 ** 28             # bytes of files; a larger source is a stream
PIECE = 65_536              # characters of a document that are read at a time
LINE = 64 * 2 ** 20         # bytes; a longer line of JSON is refused, for memory's sake
BLOCK = 2 ** 18             # bytes read from a file at a time
HUB_BLOCK = 4 * 2 ** 20     # bytes asked of the Hub at a time
AT_ONCE = 16                # files that are open at the same time
START = [(0, 0)] * AT_ONCE  # places in files
CONTINUED = bytes(range(0x80, 0xC0))    # bytes of UTF-8 inside a character


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
    if os.path.isfile(source):
        found = [Path(source)]
    elif os.path.isdir(source):
        found = files_below(source)
    else:
        raise InputError(f"no file or folder {source}; expected one, or {SOURCES}")
    return sorted(map(local_file, readable(found, source)), key=lambda file: file.name)


def readable(found, source):
    """The paths that end as text does, of all that were found."""
    known = [path for path in found if str(path).lower().endswith(KNOWN)]
    if not known:
        raise InputError(f"{source} holds no text: none of its {len(found):,} files ends in "
                         f"{EXPECTED}")
    if len(known) < len(found):
        note(f"note: {len(found) - len(known):,} of the {len(found):,} files in {source} are not "
             "text and are skipped")
    return known


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
    return File(name or path.as_posix(), path.stat().st_size, partial(path.open, "rb"))


def standard_library():
    """The standard library's .py files, without tests, code pages and pydoc's manual."""
    root = Path(sysconfig.get_paths()["stdlib"])
    without = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test",
               "encodings", "pydoc_data"}
    paths = {path.relative_to(root).as_posix(): path for path in files_below(root, without)}
    return [local_file(path, name) for name, path in sorted(paths.items()) if name.endswith(".py")]


def held_out(name):
    """Whether a file of the standard library is held out: one in sixteen, chosen by its path."""
    return sha256(name.encode()).hexdigest()[0] == "0"


def hub_files(url):
    """The text files of hf://datasets/OWNER/NAME[@REVISION][/PATH or glob]."""
    from huggingface_hub import HfFileSystem            # slow to import; local text needs none
    match = re.match("hf://(datasets/[^/]+/[^/]+)", url)
    if match is None:
        raise InputError(f"{url} is not a dataset: expected hf://datasets/OWNER/NAME/FILES")
    filesystem = HfFileSystem(skip_instance_cache=True)
    search = filesystem.glob if re.search("[*?[]", url) else filesystem.find
    with explained(match[1]):
        found = search(url, detail=True)
        names = sorted(readable(found, url))
        filesystem.cat_file(names[0], 0, 1, block_size=1)       # a gated one is listed all the same
    return [File(name, found[name]["size"], content=found[name]["blob_id"],
                 open=partial(filesystem.open, name, block_size=HUB_BLOCK)) for name in names]


def fingerprints(files):
    """A line per file that stays the same as long as the file does: its name, size and a hash.

    The hash is the Hub's, or ours: of all bytes, or only the first ones of large sources.
    """
    lines, total = [], sum(file.size for file in files)
    for file in files:
        content = file.content
        if content is None:
            digest = sha256()
            with file.open() as raw:
                while block := raw.read(BLOCK):
                    digest.update(block)
                    if total > SMALL:
                        break
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
        with damage(self.name):
            self.raw = file.open()
            stream = decompressed(self.raw, self.name.lower())
        self.stream, self.skip = io.BufferedReader(stream, BLOCK), self.byte
        if stream is self.raw:
            self.stream.seek(self.byte)
            self.skip = 0
        self.decoded = io.TextIOWrapper(self.stream, encoding="utf-8", newline="")

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
        with damage(self.name):
            if self.skip:
                return self._skipped()
            return self._next_piece() if is_plain(self.name) else self._next_line()

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
                             ) from error
        if not self.text:
            return None
        begins, end = self.byte == 0, cut(self.text)
        piece, self.text = self.text[:end], self.text[end:]
        self.byte += len(piece.encode())
        if "\0" in piece:
            raise ValueError("it has a zero byte")      # a binary file, or UTF-16
        return Part(begins, [piece.removeprefix("\ufeff") if begins else piece])

    def _next_line(self):
        while line := self.stream.readline(LINE + 1):
            self.byte += len(line)
            self.line += 1
            where = f"{self.name}, line {self.line:,}"
            if len(line) > LINE:
                raise InputError(f"{where}: longer than {LINE // 2 ** 20} MiB; expected a JSON "
                                 "object per line, a document in each: cut it into several")
            if not line.isspace():
                return Part(True, pieces(text_of(line, where, self.field)))
        return None


def is_plain(name):
    """Whether a file is one document; otherwise each of its lines is one."""
    return not name.lower().endswith(JSON)


def decompressed(raw, name):
    """The stream of a file's text."""
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if name.endswith(".zst"):
        import zstandard                                # only the Pile needs it
        decompressor = zstandard.ZstdDecompressor(max_window_size=2 ** 31)
        return decompressor.stream_reader(raw, read_across_frames=True)
    return raw


def text_of(line, where, field):
    """The text in a line (bytes) of a JSON-lines file."""
    with damage(where):
        record = json.loads(line)
    fields = record if isinstance(record, dict) else {}
    text = fields.get(field) if field else fields.get("text", fields.get("raw_content"))
    if not isinstance(text, str):
        strings = [name for name, value in fields.items() if isinstance(value, str)]
        names = ", ".join(strings)[:200] or "none"
        raise InputError(f"{where}: expected a JSON object with a string {field or 'text'!r}; its "
                         f"strings are: {names} (--field)")
    # JSON can spell half of a surrogate pair, which is no character: it becomes U+FFFD
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def pieces(text):
    """A document's pieces: together they are the text."""
    found, start = [], 0
    while not found or start < len(text):
        end = cut(text, start)
        found.append(text[start:end])
        start = end
    return found


def cut(text, start=0):
    """The end of the piece that begins at `start`: after its last line, if it has one."""
    if len(text) - start <= PIECE:
        return len(text)
    return text.rfind("\n", start, start + PIECE) + 1 or start + PIECE


# ---- Documents in their order --------------------------------------------------------------------

class Mix:
    """The documents of the files, part by part: of sixteen files at a time, from the least read.

    So any stretch has the proportions of the whole, even if each file of a stream is one domain, as
    in RedPajama-1T's sample. A document in several parts is read to its end. held: digests of the
    documents to leave out. cut: the byte of a single document where its held-out part begins.
    place: the first of the open files, and the place in each, None at its end.
    """

    def __init__(self, files, field, seed, place=None, held=(), cut=None):
        turns = np.random.default_rng(seed).permutation(len(files))
        self.files, self.field = [files[i] for i in turns], field
        self.held, self.cut = held, cut
        self._open(*place or (0, START))

    @property
    def place(self):
        return [self.first, [reader and list(reader.place) for reader in self.readers]]

    def next(self):
        """The next Part; None when all files are at their end."""
        while reading := list(filter(None, self.readers)):
            begun = [reader for reader in reading if is_plain(reader.name) and reader.byte]
            self.current = min(begun or reading, key=lambda reader: reader.share)
            part = self.current.next()
            if part is None:
                self._end()
            elif part.begins and digest(part) in self.held:
                self.skip()
            elif self.cut is not None and self.current.byte > self.cut:
                self._end()
                kept = part.pieces[0].encode()[:self.cut - self.current.byte]
                return part._replace(pieces=[kept.decode()])
            else:
                return part
        return None

    def skip(self):
        """Leaves out the rest of the document that is being read."""
        if is_plain(self.current.name):
            self._end()

    def close(self):
        for reader in filter(None, self.readers):
            reader.close()

    def _end(self):
        """Closes the current file; after the last one of those open, the next ones are opened."""
        self.current.close()
        self.readers[self.readers.index(self.current)] = None
        if not any(self.readers) and self.first + AT_ONCE < len(self.files):
            self._open(self.first + AT_ONCE, START)

    def _open(self, first, places):
        self.first = first
        self.readers = [place and Reader(file, self.field, place)
                        for file, place in zip(self.files[first:first + AT_ONCE], places)]


def digest(part):
    """What a document is known by: a digest of its first piece."""
    return blake2b(part.pieces[0].encode(), digest_size=12).hexdigest()


def fifteen_sixteenths(file):
    """The byte where the last sixteenth of a file of plain text begins."""
    if file.name.lower().endswith((".gz", ".zst")):
        raise InputError(f"{file.name} is a single compressed document: decompress it first, so "
                         "that its last sixteenth can be held out")
    start = file.size * 15 // 16
    with file.open() as raw:
        raw.seek(start)
        after = raw.read(3)
    return start + len(after) - len(after.lstrip(CONTINUED))
