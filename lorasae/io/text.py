"""Sources of text -> documents, in order. shards.py turns the documents into tokens.

    python train.py --data notes/           a file or a folder: .txt, .py, .jsonl, .jsonl.gz, ...
    python train.py --data stdlib           the Python standard library's own source code
    python train.py --data pile             a dataset on the Hub (NAMED), streamed
    python train.py --data 'hf://datasets/OWNER/NAME@REVISION/data/*.jsonl'

A document is a line of a JSON-lines file or a whole file of plain text. It is read in pieces of at
most 65,536 characters, so a document of any length needs little memory. Empty ones are left out.
The paper's data are the Pile and RedPajama (Section 4).
"""
import gzip
import io
import json
import os
import re
import sysconfig
from functools import partial
from hashlib import blake2b, sha256
from heapq import heappop, heappush
from itertools import count, groupby, islice
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
PIECE = 65_536              # characters of a document read at a time
LINE = 64 * 2 ** 20         # bytes; longer lines of JSON are refused, to limit memory
BLOCK = 2 ** 18             # bytes read from a file at a time
HUB_BLOCK = 4 * 2 ** 20     # bytes requested from the Hub at a time
AT_ONCE = 16                # files open at the same time


class File(NamedTuple):
    name: str               # its ending determines the format
    size: int               # bytes, as stored
    open: Callable          # () -> a seekable binary file
    content: str = None     # the Hub's hash of it


# ---- Which files ---------------------------------------------------------------------------------

def files(source):
    """The files of a source (see the module's docstring), sorted by name."""
    source = os.path.expanduser(source)
    if source == "stdlib":
        return standard_library()
    if source in NAMED or source.startswith("hf://"):
        return hub_files(NAMED.get(source, source))
    if os.path.isfile(source):
        found = [Path(source)]
    elif os.path.isdir(source):
        found = files_below(source)
    else:
        raise InputError(f"there is no file or folder {source}: expected one, or {SOURCES}")
    return sorted(map(local_file, readable(found, source)))


def readable(found, source):
    """The paths among those found that end as text files do."""
    known = [path for path in found if str(path).lower().endswith(KNOWN)]
    if not known:
        raise InputError(f"{source} contains no text: none of its {len(found):,} files ends in "
                         f"{EXPECTED}")
    if len(known) < len(found):
        note(f"note: {len(found) - len(known):,} of the {len(found):,} files in {source} are not "
             "text and are skipped")
    return known


def files_below(folder, without=()):
    """All files in a folder and its subfolders, except hidden ones and the subfolders `without`."""
    def refuse(error):
        raise error                     # do not skip folders that cannot be listed

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
    found = [path for path in files_below(root, without) if path.suffix == ".py"]
    return sorted(local_file(path, path.relative_to(root).as_posix()) for path in found)


def held_out(name):
    """Whether a file of the standard library is held out: one in sixteen, chosen by its path."""
    return sha256(name.encode()).hexdigest()[0] == "0"


def text_of(file):
    """The whole text of a File that is not compressed."""
    with file.open() as raw:
        return raw.read().decode()


def hub_files(url):
    """The text files of hf://datasets/OWNER/NAME[@REVISION][/PATH or glob]."""
    from huggingface_hub import HfFileSystem            # slow to import; only the Hub needs it
    match = re.match("hf://(datasets/[^/]+/[^/]+)", url)
    if match is None:
        raise InputError(f"{url} is not a dataset: expected hf://datasets/OWNER/NAME/FILES")
    filesystem = HfFileSystem(skip_instance_cache=True)
    search = filesystem.glob if re.search("[*?[]", url) else filesystem.find
    with explained(match[1]):
        found = search(url, detail=True)
        names = sorted(readable(found, url))
        filesystem.cat_file(names[0], 0, 1, block_size=1)       # a gated one can still be listed
    return [File(name, found[name]["size"], content=found[name]["blob_id"],
                 open=partial(filesystem.open, name, block_size=HUB_BLOCK)) for name in names]


def fingerprints(files):
    """A line per file that changes only if the file does: its name, size and a hash.

    The hash is the Hub's, or ours: of all bytes, or of only the first BLOCK bytes in large sources.
    """
    lines, total = [], sum(file.size for file in files)
    for file in files:
        content = file.content
        if content is None:
            with file.open() as raw:
                content = sha256(raw.read(BLOCK if total > SMALL else None)).hexdigest()[:32]
        lines.append(f"{file.name} {file.size}-{content}")
    return lines


# ---- From files to documents ---------------------------------------------------------------------

def documents(files, field, seed):
    """Yields the files' documents in an order given by the seed, each as an iterator of pieces.

    A piece is (whether it begins a document, text). Sixteen files are open at a time, and the next
    document comes from the one that has been read least, relative to its size. So any stretch has
    the proportions of the whole, even if each file of a stream is one domain, as in RedPajama-1T's
    sample. A single file of plain text comes in two parts: its first fifteen sixteenths and the
    rest. field: the JSON field with the text; by default "text" or, as in RedPajama-V2,
    "raw_content". An InputError names the file and, in JSON, the line.
    """
    if len(files) == 1 and is_plain(files[0].name):
        yield from halves(files[0])
        return
    turns = np.random.default_rng(seed).permutation(len(files))
    for start in range(0, len(turns), AT_ONCE):
        some = [files[i] for i in turns[start:start + AT_ONCE]]
        reading = [(0.0, i, documents_in(file, field)) for i, file in enumerate(some)]
        while reading:
            share, i, found = heappop(reading)
            for size, pieces in islice(found, 1):       # empty at the end of the file
                yield pieces
                heappush(reading, (share + size / (some[i].size or 1), i, found))


def halves(file):
    """Yields the two parts of a single document of plain text."""
    if file.name.lower().endswith((".gz", ".zst")):
        raise InputError(f"{file.name} is a single compressed document: decompress it first, so "
                         "that its last sixteenth can be held out")
    passed = 0

    def late(piece):
        nonlocal passed
        _, text = piece
        passed += len(text.encode())
        return passed > file.size * 15 / 16

    with file.open() as raw:
        most = min(PIECE, file.size // 64 + 1)          # far less than a sixteenth
        for _, pieces in groupby(pieces_of(raw, file.name, most), late):
            yield pieces


def documents_in(file, field):
    """Yields (bytes, iterator of pieces) of each document in a file."""
    name = file.name
    with damage(name), file.open() as raw:
        stream = io.BufferedReader(decompressed(raw, name.lower()), BLOCK)
        if is_plain(name):
            yield file.size, pieces_of(stream, name)
            return
        for number in count(1):
            line, where = stream.readline(LINE + 1), f"{name}, line {number:,}"
            if len(line) > LINE:
                raise InputError(f"{where} is longer than {LINE // 2 ** 20} MiB: expected one JSON "
                                 "object per line, with one document in each; split this one up")
            if not line:
                break
            if not line.isspace():
                yield len(line), pieces_in(line, where, field)


def is_plain(name):
    """Whether a file is one document; otherwise each of its lines is one."""
    return not name.lower().endswith(JSON)


def decompressed(raw, name):
    """A file's text as a stream of uncompressed bytes."""
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if name.endswith(".zst"):
        import zstandard                                # only .zst files need it
        decompressor = zstandard.ZstdDecompressor(max_window_size=2 ** 31)
        return decompressor.stream_reader(raw, read_across_frames=True)
    return raw


def pieces_in(line, where, field):
    """Yields the pieces of the text in a line of a JSON-lines file. The line is parsed lazily."""
    with damage(where):
        record = json.loads(line)
    fields = record if isinstance(record, dict) else {}
    text = fields.get(field) if field else fields.get("text", fields.get("raw_content"))
    if not isinstance(text, str):
        strings = [name for name, value in fields.items() if isinstance(value, str)]
        names = ", ".join(strings)[:200] or "none"
        raise InputError(f"{where}: expected a JSON object with a string {field or 'text'!r}; its "
                         f"strings are: {names} (--field)")
    # JSON can encode zero bytes, and half of a surrogate pair, which is not a character.
    text = text.replace("\0", "").encode("utf-8", "replace")
    yield from pieces_of(io.BytesIO(text), where)


def pieces_of(stream, where, most=None):
    """Yields a document's pieces: at most `most` characters each, and whole lines if they fit."""
    most = most or PIECE
    with damage(where):
        decoded = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        begins, text = True, ""
        while text := text + decoded.read(most + 1 - len(text)):
            if "\0" in text:
                raise ValueError("it has a zero byte")  # a binary file, or UTF-16
            end = len(text) if len(text) <= most else text.rfind("\n", 0, most) + 1 or most
            yield begins, text[:end]
            begins, text = False, text[end:]


def digest(text):
    """A document's identity: a digest of the text of its first piece."""
    return blake2b(text.encode(), digest_size=12).hexdigest()
