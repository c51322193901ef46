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
checkpoint needs, but for the first. The held-out text is in the run's folder too: evaluation needs
no source.

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
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from lorasae.errors import InputError
from lorasae.io.console import note
from lorasae.io.files import damage, read_object, whole, write_json
from lorasae.io.text import (
    LINE, SMALL, Mix, digest, fifteen_sixteenths, files, fingerprints, held_out, is_plain)

ORDER = 3                   # the version of the order described above: part of a cache's key
FIRST, LARGEST = 2 ** 18, 2 ** 22       # tokens of a shard
BATCH = 2 ** 18             # characters read before they are tokenised
TEXTS = 32                  # texts tokenised at a time, for memory's sake
HEADER = 128                # bytes of a .npy file of int32 [chunks, context] before its numbers
FIXED = 0                   # the seed of what is held out, whatever the run's seed
MANY = 1000                 # documents that are enough to hold out, if they have the tokens
POLL = 0.02                 # seconds between two looks for a file of another process


class HeldOut(NamedTuple):
    """What an evaluation needs of a run's text."""
    held_out: torch.Tensor              # [n, context] int64
    documents: torch.Tensor             # [n] int64: the document of each chunk
    tokenizer: Tokenizer
    bos: int
    eos: int


def open_held_out(folder, tokenizer, bos, eos):
    """The held-out text of a run, from the files in its folder RUN_DIR/text alone."""
    path = Path(folder) / "held-out.npy"
    with damage(path):
        chunks = torch.from_numpy(np.load(path, allow_pickle=False)).long()
    documents = torch.tensor(read_object(path.with_name("text.json")).take("documents", list))
    return HeldOut(chunks, documents, tokenizer, bos, eos)


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


@dataclass(eq=False)
class Text:
    """The text of a run. InputError if there is no such source, too little text, or no such token.

    source, field: see text.py. process: 0 writes, the others wait for its files. Close it, or use
    it in a `with`: until then, its background thread writes the next shard.
    """
    source: str
    tokenizer: Tokenizer
    bos: int
    eos: int
    context: int = 1024
    eval_tokens: int = 1_000_000
    seed: int = 42
    batch_size: int = 1
    field: str | None = None
    folder: Path | None = None          # RUN_DIR/text; without it, a temporary folder
    process: int = 0

    def __post_init__(self):
        for name, token in (("BOS", self.bos), ("EOS", self.eos)):
            if self.tokenizer.id_to_token(token) is None:
                raise InputError(f"the tokenizer has no {name} token (id {token} in the model's "
                                 "configuration): is its tokenizer.json the model's own?")
        self.source = str(self.source)
        self.temporary = None if self.folder else tempfile.TemporaryDirectory()
        self.folder = Path(self.folder or self.temporary.name)
        self.files = self.reading = self.target = None
        self.noted = False
        self.shards, self.writer, self.stopped = [], ThreadPoolExecutor(1, "text"), Event()

        # A resumed run has its held-out text.
        path = self.folder / "text.json"
        if self.process == 0 and not path.exists():
            self._hold_out()
        while not path.exists():
            time.sleep(POLL)
        self.record = read_object(path)
        self.held_out, self.documents, *_ = open_held_out(self.folder, self.tokenizer, self.bos,
                                                          self.eos)
        self.place = cache_of(self.record["key"]) if self.record["key"] else self.folder

    # ---- Reading ---------------------------------------------------------------------------------

    def batch(self, step):
        """The tokens [batch_size, context] int64 of a step, counted from 0."""
        return self._sequences(step * self.batch_size, (step + 1) * self.batch_size)

    def first(self, count):
        """The first `count` training sequences [count, context], which stay with the run."""
        return self._sequences(0, count)

    def keep_from(self, step):
        """Deletes the shards of a stream, but the first, that hold nothing from this step on."""
        if self.record["key"] or self.process > 0:
            return
        for shard, _ in read_shards(self.place)[1:-1]:  # the next shard follows the last one
            if shard.stop <= step * self.batch_size:
                path = shard_path(self.place, shard.number)
                path.with_suffix(".json").unlink()      # without it a shard does not count
                path.unlink()

    def close(self):
        """Stops the background thread and waits for its end."""
        self.stopped.set()
        self.writer.shutdown()
        if self.reading:
            self.reading.close()
        if self.temporary:
            self.temporary.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _sequences(self, start, stop):
        chunks = [self._chunk(row) for row in range(start, stop)]
        return torch.from_numpy(np.stack(chunks)).long()

    def _chunk(self, row):
        """The chunk of this number, as soon as its shard is there."""
        while (chunk := self._find(row)) is None:
            if self.process == 0:
                self._write_to(row)
                self.writing.result()                   # or the error that it met
                self.target = None
            else:
                time.sleep(POLL)
            self.shards = read_shards(self.place)

        newest, _ = self.shards[-1]
        if self.process == 0 and row >= newest.first:
            self._write_to(newest.stop)                 # the next one, in the background
        return chunk

    def _find(self, row):
        """The chunk of this number; None if it is not there yet."""
        ends = [shard.stop for shard, _ in self.shards if shard.ends and shard.epoch == 1]
        if ends and row >= ends[0]:
            row = self._use_again(row, ends[0])
        for shard, chunks in self.shards:
            if shard.first <= row < shard.stop:
                return chunks[row - shard.first]
        return None

    def _use_again(self, row, count):
        """The number of the chunk that stands behind all `count` chunks of the text."""
        if self.process == 0 and not self.noted:
            self.noted = True
            note(f"note: {self.source} has text for only {count:,} training chunks of "
                 f"{self.context:,} tokens: it is used again, each time in another order")
        if not self.record["key"]:
            return row                                  # a stream is tokenised again
        epoch, place = divmod(row, count)
        return order_of(self.seed, epoch, count)[place]

    # ---- Writing ---------------------------------------------------------------------------------

    def _write_to(self, row):
        """Has the background thread write the shards up to that of a chunk."""
        if self.target != row:
            self.target, self.writing = row, self.writer.submit(self._write, row)

    def _write(self, row):
        while not self.stopped.is_set():
            # Another run may be writing the same small source: the same shards, all of them whole.
            before = [shard for shard, _ in read_shards(self.place) if shard.first <= row]
            last = before[-1] if before else NONE
            if row < last.stop or (last.ends and self.record["key"]):
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
            found.append(tokens_of(parts, self.tokenizer, self.eos))
            if sum(map(len, found)) >= size:
                ends = False
                break
        chunks, rest = chunks_of(np.concatenate(found), self.context, self.bos)
        if ends:
            self._check_length("training", first + len(chunks), 1)

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
        self.epoch = epoch
        self.reading = Mix(self._files(held=False), self.field, [self.seed, epoch], place,
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
            if self.stopped.is_set():
                raise Stopped
            parts.append(part)
            characters += sum(map(len, part.pieces))
            if characters >= BATCH:
                yield parts
                parts, characters = [], 0
        yield parts

    def _check_length(self, purpose, chunks, needed):
        if chunks < needed:
            raise InputError(f"{self.source} is too short: its {purpose} text makes {chunks:,} "
                             f"chunks of {self.context:,} tokens, {needed:,} needed; use more "
                             "text, fewer --eval-tokens or a shorter --context")

    # ---- Held-out text ---------------------------------------------------------------------------

    def _hold_out(self):
        """Writes held-out.npy and text.json into the run's folder."""
        self.files = files(self.source)
        small = sum(file.size for file in self.files) <= SMALL
        lines = fingerprints(self.files)
        chunks, record = self._choose_held_out()
        write_array(self.folder / "held-out.npy", chunks)
        key = self._key(lines) if small else None
        write_json(self.folder / "text.json", {**record, "files": lines, "key": key})

    def _key(self, lines):
        """The name of a small source's cache: a digest of all that its shards depend on."""
        names = [self.source == "stdlib", *(Path(line).name for line in lines)]
        facts = [ORDER, names, self.field, self.tokenizer.to_str(), self.bos, self.eos,
                 self.context, self.eval_tokens, self.seed]
        return sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def _choose_held_out(self):
        """(the held-out chunks, {the document of each, digests of the documents, cut})"""
        candidates, cut, place = self._files(held=True), None, None
        if len(self.files) == 1 and is_plain(self.files[0].name):
            cut = fifteen_sixteenths(self.files[0])
            place = [0, [[cut, 0]]]
            note(f"note: {self.source} is a single document: its last sixteenth is held out")

        # All of the standard library's documents, a sixteenth of others.
        least = count_documents(candidates, self.field)
        if self.source != "stdlib":
            least = min(MANY, -(-least // 16))

        # Chunks of one document each, and the tokens of those too short for a chunk.
        count = -(-self.eval_tokens // self.context)
        most = (4 * count // max(least, 1) + 1) * self.context              # tokens of a document
        mix = Mix(candidates, self.field, FIXED, place)
        own, of, digests, short, spare = [], [], [], [np.empty(0, np.int32)], 0
        for first, tokens in self._beginnings(mix, most):
            chunks, rest = chunks_of(tokens, self.context, self.bos)
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
        shared, _ = chunks_of(np.concatenate(short), self.context, self.bos)
        of += range(len(digests), len(digests) + len(shared))
        turns = np.random.default_rng(FIXED).permutation(len(of))[:count]
        self._check_length("held-out", len(turns), count)
        record = {"documents": [of[i] for i in turns], "held_out": digests, "cut": cut}
        return np.concatenate([*own, shared])[turns], record

    def _beginnings(self, mix, most):
        """Yields the digest and the first tokens of each document: `most` or a few more."""
        part = mix.next()
        while part:
            first, pieces = digest(part), part.pieces[:most // 8192 + 1]    # 8,192 tokens or more
            tokens = tokens_of([part._replace(pieces=pieces)], self.tokenizer, self.eos)
            while (part := mix.next()) and not part.begins:
                if len(tokens) < most:
                    more = tokens_of([part], self.tokenizer, self.eos)
                    tokens = np.concatenate([tokens, more])
                else:
                    mix.skip()
            yield first, tokens


class Stopped(Exception):
    """Nobody needs the shard any more."""


@lru_cache(maxsize=2)
def order_of(seed, epoch, count):
    """The order in which the chunks of a small source are used in a later epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def count_documents(files, field):
    """How many documents the files hold; of many bytes, how many at least."""
    if all(is_plain(file.name) for file in files):
        return len(files)
    size = sum(file.size for file in files)
    if size > SMALL:
        return size // LINE + 1
    return sum(part.begins for part in iter(Mix(files, field, FIXED).next, None))


# ---- Tokens --------------------------------------------------------------------------------------

def tokens_of(parts, tokenizer, eos):
    """The tokens of some parts, with an EOS before each document that begins."""
    texts, begins = [], []
    for part in parts:
        texts += part.pieces
        begins += [part.begins and i == 0 for i in range(len(part.pieces))]

    found = [np.empty(0, np.int32)]
    for start in range(0, len(texts), TEXTS):
        some = texts[start:start + TEXTS]
        encoded = tokenizer.encode_batch_fast(some, add_special_tokens=False)       # on all cores
        for first, encoding in zip(begins[start:], encoded):
            found.append(np.array([eos] * first + encoding.ids, np.int32))
    return np.concatenate(found)


def chunks_of(tokens, context, bos):
    """([n, context] int32: a BOS and context - 1 of the tokens in each; the tokens left)."""
    size = context - 1
    count = len(tokens) // size
    chunks = np.full((count, context), bos, np.int32)
    chunks[:, 1:] = tokens[:count * size].reshape(count, size)
    return chunks, tokens[count * size:]


# ---- Files ---------------------------------------------------------------------------------------

def cache_of(key):
    """The folder of a small source's shards."""
    return Path(os.environ.get("LORASAE_CACHE") or Path.home() / ".cache/lorasae") / "text" / key


def shard_path(folder, number):
    return folder / f"shard-{number:05d}.npy"


def read_shards(folder):
    """[(Shard, its chunks)] of the shards in a folder that are whole, by their numbers."""
    found = []
    for path in sorted(folder.glob("shard-*.json")):
        with suppress(OSError, ValueError, TypeError):  # being deleted, or damaged
            shard = Shard(**json.loads(path.read_bytes()))
            # np.load parses the header with Python's ast, which two threads can crash in 3.11.
            numbers = np.memmap(path.with_suffix(".npy"), np.int32, "r", offset=HEADER)
            found.append((shard, numbers.reshape(shard.chunks, shard.context)))
    return found


def write_array(path, array):
    with whole(path) as file:
        np.save(file, array)
