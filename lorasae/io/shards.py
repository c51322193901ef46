"""Text as shards of tokens on disk: a batch depends only on the number of its step.

    text = Text("stdlib", tokenizer, bos=2, eos=1, context=256, eval_tokens=50_000, seed=42,
                batch_size=8, folder=RUN_DIR / "text")
    text.held_out, text.documents           # [196, 256], [196] int64: the document of each chunk
    text.batch(step)                        # [8, 256] int64; waits until its shard is written

A shard is a .npy file of int32 [chunks, context]; a .json next to it says where the next shard
begins. A background thread writes one shard ahead. The first has 2**18 tokens, so that training
starts soon; each later one has twice as many, up to 2**22. With several processes, process 0 writes
for all. Checkpoints contain nothing about text: a resumed run reads up to the shard that it needs,
in the background, without tokenising what it skips.

Location. Shards of a source of up to 256 MiB stay in ~/.cache/lorasae/text (or $LORASAE_CACHE), for
all runs with the same text, tokenizer, context, seed and held-out text. A larger source is a
stream: its shards are in the run's folder, and `keep_from` deletes those that no checkpoint needs,
except the first. Held-out text is always in the run's folder: evaluation needs no source.

Held-out text. Whole documents are held out, the same ones for every seed: chosen by file name in
the standard library; in other sources a sixteenth of the documents (at most 1,000), or more if
eval_tokens needs them. A single file of plain text holds out its last sixteenth. A chunk belongs to
one document, but short ones share chunks, and each such chunk counts as a document. Every document
gives one chunk before any gives a second. Training leaves out what begins like a held-out document.

Training order. The seed permutes the files. Sixteen JSON-lines files are read at a time, in
proportion to their sizes; a file of plain text is one document and is read to its end. The tokens
eos, ids, eos, ids, ... are cut into pieces of context - 1, each with a BOS in front. The chunks of
a shard are permuted, because consecutive chunks of a long document would teach little that is new.
When the text ends, it is used again in a different order.
"""
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter, deque
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from lorasae.errors import InputError
from lorasae.io.console import note
from lorasae.io.files import damage, local, read_object, whole, write_json
from lorasae.io.text import (
    LINE, SMALL, digest, documents, files, fingerprints, held_out, is_plain)

ORDER = 5                   # the version of the order described above: part of the cache key
FIRST, LARGEST = 2 ** 18, 2 ** 22       # tokens in a shard
BATCH = 2 ** 18             # characters read before tokenising them
TEXTS = 32                  # texts tokenised at a time, to limit memory
HEADER = 128                # bytes before the numbers in a .npy file of int32 [chunks, context]
FIXED = 0                   # the seed for held-out text, whatever the run's seed
MANY = 1000                 # documents that are enough to hold out, if they have enough tokens
POLL = 0.02                 # seconds between checks for another process's file


class Shard(NamedTuple):
    """The contents of a shard's .json."""
    number: int
    first: int              # the number of its first chunk, counted over all shards
    chunks: int
    context: int
    ends: bool              # whether it is the last shard of a small source
    taken: int              # pieces of the text in it and the shards before it
    rest: list              # tokens of those pieces that are in no chunk yet

    @property
    def stop(self):
        return self.first + self.chunks


NONE = Shard(-1, 0, 0, 0, False, 0, [])              # comes before the first shard


@dataclass(eq=False)
class Text(AbstractContextManager):
    """A run's text. Raises InputError if the source or a token is missing, or the text too short.

    source, field: see text.py. process: 0 writes, the others wait for its files. Close it or use it
    in a `with`: until then, its background thread writes the next shard.
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
    folder: Path | None = None          # RUN_DIR/text; None: a temporary folder
    process: int = 0

    def __post_init__(self):
        for name, token in (("BOS", self.bos), ("EOS", self.eos)):
            if self.tokenizer.id_to_token(token) is None:
                raise InputError(f"the tokenizer has no {name} token (id {token} in the model's "
                                 "configuration): is tokenizer.json the model's own?")
        self.source = str(self.source)
        self.temporary = None if self.folder else tempfile.TemporaryDirectory()
        self.folder = Path(self.folder or self.temporary.name)
        self.files = self.reached = self.asked = None
        self.writer, self.stopped = ThreadPoolExecutor(1, "text"), Event()

        # A run that has begun already has its held-out text.
        path, held_out = self.folder / "text.json", self.folder / "held-out.npy"
        if self.process == 0 and not path.exists():
            self._hold_out()
        while not path.exists():
            time.sleep(POLL)
        self.record = read_object(path)
        with damage(held_out):
            self.held_out = torch.from_numpy(np.load(held_out)).long()
            self.documents = torch.tensor(self.record.take("documents", list), dtype=torch.long)
            if self.held_out.dim() != 2 or self.documents.shape != self.held_out.shape[:1]:
                raise ValueError("it does not fit text.json")
            check_tokens(self.held_out, self.tokenizer, held_out)
        key = self.record.take("key", str, None)
        if key is not None and not re.fullmatch("[0-9a-f]{32}", key):
            raise InputError(f"{path}: {key!r} is not the name of a cache folder: start a new run")
        self.small = key is not None
        in_cache = self.small and may_write(cache_of(key))
        self.place = cache_of(key) if in_cache else self.folder
        self.shards = read_shards(self.place)

    # ---- Reading ---------------------------------------------------------------------------------

    def batch(self, step):
        """The tokens of a step, [batch_size, context] int64. Steps count from 0."""
        return self.sequences(step * self.batch_size, (step + 1) * self.batch_size)

    def sequences(self, start, stop):
        """Training sequences start .. stop - 1, [stop - start, context] int64."""
        chunks = [self._chunk(row) for row in range(start, stop)]
        tokens = torch.from_numpy(np.stack(chunks)).long()
        check_tokens(tokens, self.tokenizer, f"a shard in {self.place}")
        return tokens

    def keep_from(self, step):
        """Deletes a stream's shards that no step from this one on needs, except the first."""
        if self.small or self.process > 0:
            return
        for shard, _ in read_shards(self.place)[1:-1]:  # the next shard needs the last one
            if shard.stop <= step * self.batch_size:
                path = shard_path(self.place, shard.number)
                path.with_suffix(".json").unlink()      # first: it marks a complete shard
                path.unlink()

    def close(self):
        """Stops the background thread and waits for it to end."""
        self.stopped.set()
        self.writer.shutdown()
        self.pieces = None                              # this closes its files
        if self.temporary:
            self.temporary.cleanup()

    def __exit__(self, *_):
        self.close()

    def _chunk(self, row):
        """The chunk with this number, once its shard is written."""
        while True:
            place = self._in_text(row)
            begun = [(shard, chunks) for shard, chunks in self.shards if shard.first <= place]
            last, chunks = begun[-1] if begun else (NONE, None)
            if place < last.stop:
                break
            if self.process == 0:
                self._write_after(last)
                self.writing.result()                   # or raises the thread's error
                self.asked = None
            else:
                time.sleep(POLL)
            self.shards = read_shards(self.place)

        newest, _ = self.shards[-1]
        if self.process == 0 and last is newest and not last.ends:
            self._write_after(last)                     # the next one, in the background
        return chunks[place - last.first]

    def _in_text(self, row):
        """A chunk's place in the text; a small source is used over and over, in new orders."""
        for shard, _ in self.shards[-1:]:
            if shard.ends and row >= shard.stop:
                note_reuse(self.source)
                epoch, place = divmod(row, shard.stop)
                return order_of(self.seed, epoch, shard.stop)[place]
        return row

    # ---- Writing ---------------------------------------------------------------------------------

    def _write_after(self, last):
        """Asks the background thread for the shard after `last`, unless it was asked already."""
        if self.asked != last.number:
            self.asked, self.writing = last.number, self.writer.submit(self._write, last)

    def _write(self, last):
        """Writes the shard after `last`, unless another run has written it."""
        number = last.number + 1
        path = shard_path(self.place, number)
        if number in [shard.number for shard, _ in read_shards(self.place)]:
            return

        # Read up to where it begins. Usually the last shard written ended there.
        if self.reached != number:
            self.pieces = self._pieces()
            deque(islice(self.pieces, last.taken), maxlen=0)
        self.reached = None                             # until the shard is written

        # Collect tokens until it is full or the text ends.
        size, batch, taken = min(FIRST << number, LARGEST), True, last.taken
        found = [np.array(last.rest, np.int32)]
        while batch and sum(map(len, found)) < size:
            batch = take(self.pieces, BATCH)
            taken += len(batch)
            found += encoded(batch, self.tokenizer, self.eos)
        chunks, rest = chunks_of(np.concatenate(found), self.context, self.bos)
        if not batch:
            self._check_length("training", last.stop + len(chunks), 1)
        self.reached = number + 1

        # The .json comes last: it marks the shard as complete.
        turns = np.random.default_rng([self.seed, 0, number]).permutation(len(chunks))
        write_array(path, chunks[turns])
        shard = Shard(number, last.stop, *chunks.shape, not batch, taken, rest.tolist())
        write_json(path.with_suffix(".json"), shard._asdict())

    def _pieces(self):
        """Yields the pieces of the training text: a small source once, a stream endlessly."""
        if self.files is None:
            self.files = files(self.source)
            known = set(map(str, self.record.take("files", list)))
            changed = known ^ set(fingerprints(self.files))
            if changed:
                name = min(changed).rpartition(" ")[0]
                raise InputError(f"{self.source} has changed since the run began ({name} is "
                                 "new, missing or different): restore the text or start a new run")

        left_out, found = set(map(str, self.record.take("held_out", list))), False
        for epoch in range(1 if self.small else sys.maxsize):
            if epoch > 0:
                note_reuse(self.source)
            for document in documents(self._files(held=False), self.field, [self.seed, epoch]):
                for i, (begins, text) in enumerate(document):
                    if self.stopped.is_set():
                        raise CancelledError
                    if i == 0 and digest(text) in left_out:
                        break
                    yield begins, text
                    found = True
            if not found:
                raise InputError(f"{self.source} leaves nothing to train on: its documents all "
                                 "begin like those held out for evaluation")

    def _files(self, held):
        """The files that supply documents for training, or for the held-out text."""
        if self.source != "stdlib":
            return self.files
        return [file for file in self.files if held_out(file.name) == held]

    def _check_length(self, purpose, chunks, needed):
        if chunks < needed:
            raise InputError(f"{self.source} is too short: its {purpose} text makes {chunks:,} "
                             f"chunks of {self.context:,} tokens, but it needs {needed:,}: use "
                             "more text, fewer --eval-tokens or a shorter --context")

    # ---- Held-out text ---------------------------------------------------------------------------

    def _hold_out(self):
        """Writes held-out.npy and text.json into the run's folder."""
        self.files = files(self.source)
        lines = fingerprints(self.files)
        chunks, record = self._choose_held_out()
        write_array(self.folder / "held-out.npy", chunks)

        # A small source's cache folder is named by a digest of everything its shards depend on.
        names = [self.source == "stdlib", *(Path(line).name for line in lines)]
        facts = [ORDER, names, self.field, self.tokenizer.to_str(), self.bos, self.eos,
                 self.context, self.eval_tokens, self.seed]
        key = sha256(json.dumps(facts).encode()).hexdigest()[:32]
        if sum(file.size for file in self.files) > SMALL:
            key = None                                  # a stream, never written whole
        write_json(self.folder / "text.json", {**record, "files": lines, "key": key})

    def _choose_held_out(self):
        """-> held-out chunks, {"documents": the document of each, "held_out": their digests}"""
        candidates = self._files(held=True)
        found = documents(candidates, self.field, FIXED)
        if len(candidates) == 1 and is_plain(candidates[0].name):
            note(f"note: {self.source} is a single document: its last sixteenth is held out")
            next(found, None)                           # skip everything before it

        # At least all of the standard library's documents, or a sixteenth of another source's.
        least = count_documents(candidates, self.field)
        if self.source != "stdlib":
            least = min(MANY, -(-least // 16))

        # Chunks of one document each, and the tokens of documents too short for a chunk.
        count = -(-self.eval_tokens // self.context)
        most = (4 * count // max(least, 1) + 1) * self.context              # tokens per document
        own, of, digests, short, spare = [], [], [], [np.empty(0, np.int32)], 0
        beginnings = (take(pieces, 8 * most) for pieces in found)       # at 8 characters per token
        for some, tokens in tokenised(filter(None, beginnings), self.tokenizer, self.eos):
            chunks, rest = chunks_of(tokens, self.context, self.bos)
            own.append(chunks)
            of += [len(digests)] * len(chunks)
            if not len(chunks):
                short.append(rest)
                spare += len(rest)
            digests.append(digest(some[0][1]))
            if len(digests) >= least and len(of) + spare // self.context >= count:
                break

        # A chunk shared by short documents counts as a separate document.
        shared, _ = chunks_of(np.concatenate(short), self.context, self.bos)
        of += range(len(digests), len(digests) + len(shared))

        # Random chunks, but one of each document before a second: intervals are over documents.
        turns = np.random.default_rng(FIXED).permutation(len(of))
        earlier, given = Counter(), []
        for i in turns:
            given.append(earlier[of[i]])
            earlier[of[i]] += 1
        turns = turns[np.argsort(given, kind="stable")][:count]
        self._check_length("held-out", len(turns), count)
        chosen = np.concatenate([*own, shared])[turns]
        if np.isin(chosen, [self.bos, self.eos]).all():
            raise InputError(f"the tokenizer makes no tokens from {self.source}: is its vocabulary "
                             "empty, or for another language?")
        return chosen, {"documents": [of[i] for i in turns], "held_out": digests}


@cache
def note_reuse(source):
    """Prints its note once per source."""
    note(f"note: all of {source} has been read: it is used again, in another order")


@lru_cache(maxsize=2)
def order_of(seed, epoch, count):
    """The order in which the chunks of a small source are used in a later epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def count_documents(files, field):
    """How many documents the files have; for large sources, a lower bound.

    It finds a bad line in a small source now, not in the middle of a run.
    """
    if all(is_plain(file.name) for file in files):
        return len(files)
    size = sum(file.size for file in files)
    if size > SMALL:
        return size // LINE + 1
    return sum(next(pieces, None) is not None for pieces in documents(files, field, FIXED))


# ---- Tokens --------------------------------------------------------------------------------------

def take(pieces, characters):
    """The next pieces, until they have this many characters or more; fewer or none at the end."""
    found, length = [], 0
    for begins, text in pieces:
        found.append((begins, text))
        length += len(text)
        if length >= characters:
            break
    return found


def tokenised(documents, tokenizer, eos):
    """Yields (pieces, tokens) of documents that are lists of pieces; several are read ahead."""
    while some := list(islice(documents, TEXTS)):
        found = encoded(sum(some, []), tokenizer, eos)
        for pieces in some:
            yield pieces, np.concatenate(list(islice(found, len(pieces))))


def encoded(pieces, tokenizer, eos):
    """Yields the tokens of each piece, with an EOS before each new document."""
    for start in range(0, len(pieces), TEXTS):
        begins, texts = zip(*pieces[start:start + TEXTS])
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)    # on all cores
        for first, encoding in zip(begins, encodings):
            yield np.array([eos] * first + encoding.ids, np.int32)


def chunks_of(tokens, context, bos):
    """-> chunks [n, context] int32, a BOS and context - 1 tokens in each; the tokens left over."""
    size = context - 1
    count = len(tokens) // size
    chunks = np.full((count, context), bos, np.int32)
    chunks[:, 1:] = tokens[:count * size].reshape(count, size)
    return chunks, tokens[count * size:]


# ---- Files ---------------------------------------------------------------------------------------

def cache_of(key):
    """The cache folder for a small source's shards."""
    return local(os.environ.get("LORASAE_CACHE") or "~/.cache/lorasae") / "text" / key


def check_tokens(tokens, tokenizer, what):
    """Raises InputError, naming `what`, if a token is not in the tokenizer's vocabulary."""
    for token in tokens.aminmax():
        if token < 0 or tokenizer.id_to_token(token.item()) is None:
            raise InputError(f"{what} is damaged or from another model: the tokenizer has no token "
                             f"{token}; remove it, or start a new run")


def may_write(folder):
    """Whether files can be written to a folder, which is created if necessary."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


def shard_path(folder, number):
    return folder / f"shard-{number:05d}.npy"


def read_shards(folder):
    """[(Shard, its chunks)] of the complete shards in a folder, in order."""
    found = []
    for path in sorted(folder.glob("shard-*.json")):
        with suppress(OSError, ValueError, TypeError, OverflowError):   # being deleted, or damaged
            shard = Shard(**read_object(path))
            # np.load parses the header with Python's ast, which two threads can crash in 3.11.
            numbers = np.memmap(path.with_suffix(".npy"), np.int32, "r", offset=HEADER)
            found.append((shard, numbers.reshape(shard.chunks, shard.context)))
    return found


def write_array(path, array):
    with whole(path) as file:
        np.save(file, array)
