"""From a file to documents: a line of a JSON-lines file, or plain text, of either at most 65,536 characters a document.

    with Reader(file) as reader:
        while documents := reader.next(): ...           # mostly one; a long line gives several

A reader can start where an earlier one stood (`place`). It keeps a block and a line in memory, whatever a file holds.
"""
import codecs
import gzip
import io
import json
import sys
import zlib

from lorasae.errors import InputError
from lorasae.io.prefetch import check

PLAIN = tuple(".txt .md .rst .tex .py .c .h .cc .cpp .java .js .go .rs".split())
KNOWN = PLAIN + tuple(".txt.gz .txt.zst .jsonl .jsonl.gz .jsonl.zst .json.gz .json.zst".split())
EXPECTED = ".txt, .md, .py (or other source code), .jsonl, .jsonl.gz, .jsonl.zst, .json.gz"

DOCUMENT = 65_536                                       # characters: where a text is cut, after a line where it has one
LINE = 64 * 2 ** 20                                     # bytes: a longer line of JSON is refused, for memory's sake
BLOCK = 2 ** 18                                         # bytes taken from a file at a time


def read(file, field=None):
    """Yields the documents (str) of a file, all of them."""
    with Reader(file, field) as reader:
        while documents := reader.next():
            yield from documents


class Reader:
    """The documents of one file in their order, from `place` on.

    place: (bytes of text, decompressed; lines of JSON) before the next document. field: the JSON field of the text, or
    else "text" or, as in RedPajama-V2, "raw_content". InputError names the file and the place.
    """

    def __init__(self, file, field=None, place=(0, 0)):
        self.name, self.size, self.field = file.name, file.size, field
        self.byte, self.line = place
        self.text, self.decoder, self.ended = "", codecs.getincrementaldecoder("utf-8")(), False
        self.damage = (OSError, EOFError, zlib.error)

        self.raw = opened(file)
        try:
            self.stem, stream = self._decompressed()
            self.stream = io.BufferedReader(stream, BLOCK)
            self._read(self._go_to, self.byte, seekable=stream is self.raw)
        except BaseException:
            self.raw.close()
            raise

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
    def part(self):
        """How much has been read: bytes of text for each byte of the file as it is stored."""
        return self.byte / max(self.size, 1)

    def next(self):
        """The next documents, a list of str; None at the end."""
        check()
        return self._read(self._plain_text if self.stem.endswith(PLAIN) else self._json_line)

    def _read(self, work, *arguments, **more):
        try:
            return work(*arguments, **more)
        except self.damage as error:
            raise InputError(f"cannot read {self.name}: {error}; is it damaged or cut short?") from error

    def _decompressed(self):
        """The name without .gz or .zst, and the stream of text."""
        stem = self.name.lower()
        if stem.endswith(".gz"):
            return stem[:-3], gzip.GzipFile(fileobj=self.raw)
        if stem.endswith(".zst"):
            stream, error = zstd(self.raw, self.name)
            self.damage += (error,)
            return stem[:-4], stream
        return stem, self.raw

    def _go_to(self, byte, seekable):
        """A compressed file has no way but through all that comes before; no line of it is looked at."""
        if seekable:
            if byte:
                self.stream.seek(byte)
            return
        while byte:
            check()
            skipped = len(self.stream.read(min(byte, BLOCK)))
            if skipped == 0:
                raise EOFError("it is shorter than it was")
            byte -= skipped

    # ---- Plain text ----

    def _plain_text(self):
        while len(self.text) <= DOCUMENT and not self.ended:
            self.text += self._decoded_block()
        if not self.text:
            return None

        end = cut(self.text)
        document, self.text = self.text[:end], self.text[end:]
        self.byte += len(document.encode())
        return [document]

    def _decoded_block(self):
        ahead = len(self.text.encode())                             # bytes decoded that are in no document yet
        block = self.stream.read(BLOCK)
        self.ended = not block
        try:
            text = self.decoder.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            at = self.byte + ahead + error.start
            raise InputError(f"{self.name} is not UTF-8 text: byte {at:,} ({error.reason}); convert it first") from None

        if "\0" in text:
            at = self.byte + ahead + len(text[:text.index("\0")].encode())
            raise InputError(f"{self.name} is not text: byte {at:,} is zero; is it a binary file?")
        return text

    # ---- JSON lines ----

    def _json_line(self):
        while True:
            line = self.stream.readline(LINE + 1)
            if not line:
                return None
            start, where = self.byte, f"{self.name}, line {self.line + 1:,}"
            if len(line) > LINE:
                raise InputError(f"{where}: longer than {LINE // 2 ** 20} MiB; expected a JSON object a line, a "
                                 "document in each: cut it into several")

            self.byte += len(line)
            self.line += 1
            if not line.isspace():
                return pieces(text_of(line, where, start, self.field))


def opened(file):
    try:
        return file.open()
    except OSError as error:
        raise InputError(f"cannot read {file.name}: {error.strerror or error}") from error


def text_of(line, where, start, field):
    """The text in a line (bytes) of a JSON-lines file; `start` is the line's first byte."""
    try:
        record = json.loads(line.removeprefix(codecs.BOM_UTF8 if start == 0 else b"").decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text: byte {start + error.start:,} ({error.reason})") from None
    except json.JSONDecodeError as error:
        end = "" if line.endswith(b"\n") else "; is the file cut short?"
        raise InputError(f"{where}: not JSON ({error.msg}, column {error.colno}){end}") from None
    except RecursionError:
        raise InputError(f"{where}: not JSON that can be read: nested too deeply") from None
    except ValueError:
        raise InputError(f"{where}: not JSON that can be read: it has a number of thousands of digits") from None

    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object with a text in it, found {str(record)[:40]!r}")
    key = field or ("text" if "text" in record else "raw_content")
    if not isinstance(record.get(key), str):
        strings = [key for key, value in record.items() if isinstance(value, str)]
        names = ascii(", ".join(strings)[:200])[1:-1] or "none"
        raise InputError(f"{where}: no field {field or 'text'!r} that is a string; such are: {names} (--field)")
    return record[key]


def pieces(text):
    """The documents that a text is: their concatenation, each of at most DOCUMENT characters."""
    documents, start, end = [], 0, None
    while end != len(text):
        end = cut(text, start)
        # JSON can spell half of a surrogate pair, which is no character: it becomes U+FFFD
        documents.append(text[start:end].encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
        start = end
    return documents


def cut(text, start=0):
    """Where the document that begins at `start` ends: with the text, or after its last line that is not too far."""
    if len(text) - start <= DOCUMENT:
        return len(text)
    return text.rfind("\n", start, start + DOCUMENT) + 1 or start + DOCUMENT


def zstd(raw, name):
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
