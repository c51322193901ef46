"""Text as shards of tokens on disk: a batch is a function of the step alone.

    text = Text("stdlib", tokenizer, bos=2, eos=1, context=256, eval_tokens=50_000, seed=42,
                batch_size=8, folder=RUN_DIR / "text")
    text.held_out, text.documents           # [196, 256] int64, and the document of each chunk
    text.batch(step)                        # [8, 256] int64; waits until its shard is there

A shard is a .npy file of int32 [chunks, context] with a .json beside it that says where the next
one begins. A background thread writes one shard ahead. The first holds 2**18 tokens, so training
starts soon, and each next one twice as many, up to 2**22. With several processes, process 0 writes
for all. Nothing about text is in a checkpoint.

Where they are. The shards of a source of up to 256 MiB stay in ~/.cache/lorasae/text (or
$LORASAE_CACHE), for all runs with the same text, tokenizer, context, seed and held-out text. A
larger source is a stream: its shards are in the run's folder, and `keep_from` deletes those that no
checkpoint needs. The held-out text is in the run's folder too: evaluation needs no source.

Held-out text. Documents are held out whole, and the same ones for every seed: of the standard
library by file name; of other sources a sixteenth of the documents, or more if eval_tokens need
them. A single file of plain text holds out its last sixteenth. A chunk belongs to one document, but
short documents share chunks, which then count as documents. All chunks are mixed, and the first
ones taken. Training leaves out every document that begins like a held-out one.

Training order. Files are permuted by the seed. Sixteen files of documents in lines are read at a
time, in proportion to their sizes; a file of plain text is one document and is read to its end. The
tokens eos, ids, eos, ids, ... are cut into pieces of context - 1, each with a BOS in front, and the
chunks of a shard are permuted: one after the other, chunks of a long document would teach little
that is new. When the text ends, it is used again in another order.
"""
import json
import os
import tempfile
import threading
import time
from hashlib import blake2b, sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lorasae.errors import InputError
from lorasae.io.console import note
from lorasae.io.files import damage, read_object, whole, write_json
from lorasae.io.text import LINE, Reader, files, fingerprints, held_out, is_plain

ORDER = 3                   # the version of the order described above: part of a cache's key
SMALL = 2 ** 28             # bytes of files; a larger source is a stream
FIRST, LARGEST = 2 ** 18, 2 ** 22       # tokens of a shard
AT_ONCE = 16                # files that are open at the same time
BATCH = 2 ** 18             # characters read before they are tokenised
TEXTS = 32                  # texts tokenised at a time, for memory's sake
HEADER = 128                # bytes of a .npy file of int32 [chunks, context] before its numbers
FIXED = 0                   # the seed of what is held out, whatever the run's seed
MANY = 1000                 # documents that are enough to hold out, if they have the tokens
POLL = 0.02                 # seconds between two looks for a file of another process
START = [(0, 0)] * AT_ONCE  # places in files


class HeldOut(NamedTuple):
    """What an evaluation needs of a run's text."""
    held_out: torch.Tensor              # [n, context] int64
    documents: torch.Tensor             # [n] int64: the document of each chunk
    tokenizer: object
    bos: int
    eos: int


def open_held_out(folder, tokenizer, bos, eos):
    """The held-out text of a run, from the files in its folder RUN_DIR/text alone."""
    chunks, record = read_held_out(Path(folder))
    documents = torch.tensor(record.take("documents", list))
    return HeldOut(torch.from_numpy(chunks).long(), documents, tokenizer, bos, eos)


class Shard(NamedTuple):
    """What the .json of a shard says."""
    number: int
    first: int              # the number of its first chunk, counted over all shards
    chunks: int
    context: int
    ends: bool              # whether the text ends with it
    epoch: int              # of the next shard: how often the text has been used up
    place: object           # where the next shard begins in the documents
    rest: list              # tokens before that place that are in no chunk yet

    @property
    def stop(self):
        return self.first + self.chunks


NONE = Shard(-1, 0, 0, 0, False, 0, None, [])           # what the first shard follows


class Text:
    """The text of a run. folder: RUN_DIR/text; without it, a temporary folder.

    process: 0 writes, the others wait for its files. InputError if there is no such source, too
    little text, or no such token.
    """

    def __init__(self, source, tokenizer, bos, eos, *, context=1024, eval_tokens=1_000_000,
                 seed=42, batch_size=1, field=None, folder=None, process=0):
        for name, token in (("BOS", bos), ("EOS", eos)):
            if tokenizer.id_to_token(token) is None:
                raise InputError(f"the tokenizer has no {name} token (id {token} in the model's "
                                 "configuration): is its tokenizer.json the model's own?")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.source, self.field, self.tokenizer = str(source), field, tokenizer
        self.bos, self.eos, self.context, self.eval_tokens = bos, eos, context, eval_tokens
        self.seed, self.batch_size, self.process = seed, batch_size, process

        self.temporary = None if folder else tempfile.TemporaryDirectory()
        self.folder = Path(folder or self.temporary.name)
        self.files = self.reading = self.writing = None
        self.shards, self.order, self.noted = [], (0, None), False
        self.stopped = threading.Event()

        # A resumed run has its held-out text.
        path = self.folder / "text.json"
        if process == 0 and not path.exists():
            self._hold_out()
        self._wait(path.exists)
        self.record = read_object(path)
        self.held_out, self.documents, *_ = open_held_out(self.folder, tokenizer, bos, eos)
        self.place = cache_of(self.record["key"]) if self.record["key"] else self.folder

    # ---- Reading ---------------------------------------------------------------------------------

    def batch(self, step):
        """The tokens [batch_size, context] int64 of a step, counted from 0."""
        rows = range(step * self.batch_size, (step + 1) * self.batch_size)
        return torch.from_numpy(np.stack([self._chunk(row) for row in rows])).long()

    def first(self, count):
        """The first `count` training sequences [count, context]; the run's folder keeps them.

        So a resumed run need not write the first shard of a stream again.
        """
        path = self.folder / f"first-{count}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path, allow_pickle=False))
        steps = -(-count // self.batch_size)
        found = torch.cat([self.batch(step) for step in range(steps)])[:count]
        if self.process == 0:
            write_array(path, found.numpy())
        return found

    def keep_from(self, step):
        """Deletes the shards of a stream that hold nothing from this step on."""
        if self.record["key"] or self.process > 0:
            return
        shards = read_shards(self.place)
        while len(shards) > 1 and shards[0][0].stop <= step * self.batch_size:
            path = shard_path(self.place, shards.pop(0)[0].number)
            path.with_suffix(".json").unlink()          # without it a shard does not count
            path.unlink()

    def close(self):
        """Stops the background thread and waits for its end."""
        self.stopped.set()
        if self.writing:
            self.writing.join()
        if self.reading:
            self.reading.close()
        if self.temporary:
            self.temporary.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _chunk(self, row):
        """The chunk of this number, as soon as its shard is there."""
        shard, chunk = self._find(row) or self._wait(lambda: self._look_again(row))
        if self.process == 0 and shard is self.shards[-1][0]:
            self._write_to(shard.stop)                  # the next one, in the background
        return chunk

    def _find(self, row):
        """(the shard of a chunk, the chunk), or None if it is not there yet."""
        ends = [shard.stop for shard, _ in self.shards if shard.ends and shard.epoch == 1]
        if ends and row >= ends[0]:
            row = self._use_again(row, ends[0])
        for shard, chunks in self.shards:
            if shard.first <= row < shard.stop:
                return shard, chunks[row - shard.first]
        return None

    def _look_again(self, row):
        """What _find finds once the shard is written."""
        if self.process == 0:
            self._write_to(row).result()
            self.writing = None
        self.shards = read_shards(self.place)
        return self._find(row)

    def _use_again(self, row, count):
        """The number of the chunk that stands behind all `count` chunks of the text."""
        if self.process == 0 and not self.noted:
            note(f"note: {self.source} has text for only {count:,} training chunks of "
                 f"{self.context:,} tokens: it is used again, each time in another order")
        self.noted = True
        if not self.record["key"]:
            return row                                  # a stream is tokenised again
        epoch, place = divmod(row, count)
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(count)
        return self.order[1][place]

    def _wait(self, look):
        """What `look` finds, as soon as process 0 has written it."""
        while not (found := look()):
            time.sleep(POLL)
        return found

    # ---- Writing ---------------------------------------------------------------------------------

    def _write_to(self, row):
        """The background thread that writes the shards up to that of a chunk."""
        if self.writing is None or self.writing.row != row:
            if self.writing:
                self.writing.join()
            self.writing = Writer(self._write, row)
        return self.writing

    def _write(self, row):
        while not self.stopped.is_set():
            # Another run may be writing the same small source: the same shards, all of them whole.
            shards = [shard for shard, _ in read_shards(self.place)]
            last = shards[-1] if shards and shards[0].first <= row else NONE
            if last.stop > row or (last.ends and self.record["key"]):
                break
            self._write_shard(last)

    def _write_shard(self, last):
        """Writes the shard that follows `last`."""
        number, first = last.number + 1, last.stop
        self._go_to(last.epoch, last.place)

        # Tokens, until it is full or the text ends.
        size, ends = min(FIRST << number, LARGEST), True
        found = [np.array(last.rest, np.int32)]
        for parts in self._batches():
            found.append(self._tokens(parts))
            if sum(map(len, found)) >= size:
                ends = False
                break
        tokens = np.concatenate(found)
        chunks, rest = self._chunks(tokens)
        if ends and first + len(chunks) == 0:
            raise self._too_short(f"{len(tokens):,} tokens for training beside the held-out text, "
                                  f"{self.context - 1:,} needed")

        # Where the next one begins: at the start again, if the text ends.
        place, rest = (None, []) if ends else (self.reading.place, rest.tolist())

        # The .json comes last: it says that the shard is whole.
        turns = np.random.default_rng([self.seed, last.epoch, number]).permutation(len(chunks))
        write_array(shard_path(self.place, number), chunks[turns])
        shard = Shard(number, first, *chunks.shape, ends, last.epoch + ends, place, rest)
        write_json(shard_path(self.place, number).with_suffix(".json"), shard._asdict())

    def _go_to(self, epoch, place):
        """Puts `reading` at a place in the documents, where it mostly is already."""
        if self.reading and (self.epoch, self.reading.place) == (epoch, place):
            return
        if self.files is None:
            self.files = files(self.source)
            changed = set(self.record["files"]) ^ set(fingerprints(self.files))
            if changed:
                name = min(changed).rpartition(" ")[0]
                raise InputError(f"{self.source} has changed since the run began ({name} is "
                                 "new, missing or different): restore the text or start a new run")
        if self.reading:
            self.reading.close()
        self.epoch, candidates = epoch, self._files(held=False)
        self.reading = Mix(candidates, self.field, [self.seed, epoch], place,
                           set(self.record["held_out"]), self.record["cut"])

    def _files(self, held):
        """The files that training or the held-out text takes documents from."""
        if self.source != "stdlib":
            return self.files
        return [file for file in self.files if held_out(file.name) == held]

    def _batches(self):
        """Yields lists of parts, enough to tokenise at a time, as long as somebody needs them."""
        parts, characters = [], 0
        while part := self.reading.next():
            if self.stopped.is_set() or not threading.main_thread().is_alive():
                raise Stopped
            parts.append(part)
            characters += sum(map(len, part.pieces))
            if characters >= BATCH:
                yield parts
                parts, characters = [], 0
        yield parts

    def _too_short(self, what):
        return InputError(f"{self.source} is too short: {what}; use more text, fewer --eval-tokens "
                          "or a shorter --context")

    # ---- Held-out text ---------------------------------------------------------------------------

    def _hold_out(self):
        """Writes held-out.npy and text.json into the run's folder, from the cache if possible."""
        self.files = files(self.source)
        lines = fingerprints(self.files)
        small = sum(file.size for file in self.files) <= SMALL
        key = self._key(lines) if small else None
        place = cache_of(key) if small else self.folder
        facts = {"files": lines, "key": key}            # another run's files have other names
        try:
            chunks, record = read_held_out(place)
        except (OSError, InputError):                   # missing or damaged
            chunks, record = self._choose_held_out(small)
            write_held_out(place, chunks, record | facts)
        write_held_out(self.folder, chunks, record | facts)

    def _key(self, lines):
        """The name of a small source's cache: a digest of all that its shards depend on."""
        names = [self.source == "stdlib", *(Path(line).name for line in lines)]
        facts = [ORDER, names, self.field, self.tokenizer.to_str(), self.bos, self.eos,
                 self.context, self.eval_tokens, self.seed]
        return sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def _choose_held_out(self, small):
        """(the held-out chunks, {the document of each, digests of the documents, cut})"""
        candidates, cut, place = self._files(held=True), None, None
        size, least = sum(file.size for file in candidates), len(candidates)
        plain = all(is_plain(file.name) for file in candidates)

        # All of the standard library's documents, a sixteenth of others.
        if plain and len(self.files) == 1:
            cut = fifteen_sixteenths(self.files[0])
            place = [0, [[cut, 0]]]
            note(f"note: {self.source} is a single document: its last sixteenth is held out")
        elif not plain:
            everything = iter(Mix(candidates, self.field, FIXED).next, None)
            least = sum(part.begins for part in everything) if small else size // LINE + 1
        if self.source != "stdlib":
            least = min(MANY, -(-least // 16))

        # Chunks of one document each, and the tokens of those too short for a chunk.
        count = -(-self.eval_tokens // self.context)
        most = (4 * count // max(least, 1) + 1) * self.context              # tokens of a document
        mix = Mix(candidates, self.field, FIXED, place)
        own, of, digests, short, spare = [], [], [], [np.empty(0, np.int32)], 0
        for first, tokens in self._beginnings(mix, most):
            chunks, rest = self._chunks(tokens)
            own.append(chunks)
            of += [len(digests)] * len(chunks)
            if not len(chunks):
                short.append(rest)
                spare += len(rest)
            digests.append(first)
            if len(digests) >= least and len(of) + spare // self.context >= count:
                break
        mix.close()

        # A chunk that short documents share counts as a document of its own.
        shared, _ = self._chunks(np.concatenate(short))
        of += range(len(digests), len(digests) + len(shared))
        turns = np.random.default_rng(FIXED).permutation(len(of))[:count]
        if len(turns) < count:
            raise self._too_short(f"its held-out text makes {len(turns):,} chunks of "
                                  f"{self.context:,} tokens, {count:,} needed")
        record = {"documents": [of[i] for i in turns], "held_out": digests, "cut": cut}
        return np.concatenate([*own, shared])[turns], record

    def _beginnings(self, mix, most):
        """Yields the digest and the first tokens of each document: `most` or a few more."""
        part = mix.next()
        while part:
            pieces = part.pieces[:most // 8192 + 1]     # each makes 8,192 tokens or more
            first, tokens = digest(part), self._tokens([part._replace(pieces=pieces)])
            while (part := mix.next()) and not part.begins:
                if len(tokens) < most:
                    tokens = np.concatenate([tokens, self._tokens([part])])
                else:
                    mix.skip()
            yield first, tokens

    def _tokens(self, parts):
        return tokens_of(parts, self.tokenizer, self.eos)

    def _chunks(self, tokens):
        return chunks_of(tokens, self.context, self.bos)


class Stopped(Exception):
    """Nobody needs the shard any more."""


class Writer(threading.Thread):
    """A thread that runs work(row). It is no daemon: those crash if they outlive the program."""

    def __init__(self, work, row):
        super().__init__(name="text")
        self.work, self.row, self.error = work, row, None
        self.start()

    def run(self):
        try:
            self.work(self.row)
        except BaseException as error:                  # raised by `result`
            self.error = error

    def result(self):
        """Waits for its end and raises what went wrong."""
        self.join()
        if self.error:
            raise self.error


# ---- Tokens --------------------------------------------------------------------------------------

def tokens_of(parts, tokenizer, eos):
    """The tokens of some parts, with an EOS before each document that begins."""
    texts, before = [], []
    for part in parts:
        texts += part.pieces
        before += [[eos] * (part.begins and i == 0) for i in range(len(part.pieces))]

    found = [np.empty(0, np.int32)]
    for start in range(0, len(texts), TEXTS):
        some = texts[start:start + TEXTS]
        encoded = tokenizer.encode_batch_fast(some, add_special_tokens=False)       # on all cores
        for first, encoding in zip(before[start:], encoded):
            found.append(np.array(first + encoding.ids, np.int32))
    return np.concatenate(found)


def chunks_of(tokens, context, bos):
    """([n, context] int32: a BOS and context - 1 of the tokens in each; the tokens left)."""
    size = context - 1
    count = len(tokens) // size
    chunks = np.full((count, context), bos, np.int32)
    chunks[:, 1:] = tokens[:count * size].reshape(count, size)
    return chunks, tokens[count * size:]


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
        self.first, places = place or (0, START)
        self._open(places)

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
        self.current.close()
        self.readers[self.readers.index(self.current)] = None
        if not any(self.readers) and self.first + AT_ONCE < len(self.files):
            self.first += AT_ONCE
            self._open(START)

    def _open(self, places):
        files = self.files[self.first:self.first + AT_ONCE]
        self.readers = [place and Reader(file, self.field, place)
                        for file, place in zip(files, places)]


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
        while (byte := raw.read(1)) and 0x80 <= byte[0] < 0xC0:         # inside a character
            start += 1
    return start


# ---- Files ---------------------------------------------------------------------------------------

def cache_of(key):
    """The folder of a small source's shards."""
    return Path(os.environ.get("LORASAE_CACHE") or Path.home() / ".cache/lorasae") / "text" / key


def shard_path(folder, number):
    return folder / f"shard-{number:05d}.npy"


def read_shards(folder):
    """[(Shard, its chunks)] in a folder, one after the other, as far as they are whole."""
    found = []
    for path in sorted(folder.glob("shard-*.json")):
        try:
            shard = Shard(**json.loads(path.read_bytes()))
            # np.load parses the header with Python's ast, which two threads can crash in 3.11.
            numbers = np.memmap(path.with_suffix(".npy"), np.int32, "r", offset=HEADER)
            chunks = numbers.reshape(shard.chunks, shard.context)
        except FileNotFoundError:                       # keep_from is deleting it
            continue
        except (OSError, ValueError, TypeError):        # damaged: it is written again
            break
        if found and shard.number > found[-1][0].number + 1:
            break
        found.append((shard, chunks))
    return found


def write_array(path, array):
    with whole(path) as file:
        np.save(file, array)


def write_held_out(folder, chunks, record):
    write_array(folder / "held-out.npy", chunks)
    write_json(folder / "text.json", record)


def read_held_out(folder):
    path = folder / "held-out.npy"
    with damage(path):
        return np.load(path, allow_pickle=False), read_object(folder / "text.json")
