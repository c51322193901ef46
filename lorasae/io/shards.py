"""Text as shards of tokens on disk: a batch is a function of the step alone.

    text = Text("stdlib", tokenizer, bos=2, eos=1, context=256, eval_tokens=50_000, seed=42,
                batch_size=8, folder=RUN_DIR / "text")
    text.held_out, text.documents           # [196, 256] int64, and the document of each chunk
    text.batch(step)                        # [8, 256] int64; waits until its shard is there

A shard is a .npy file of int32 [chunks, context] with a .json beside it that says where the next
one begins. A background thread writes one shard ahead. The first holds 2**18 tokens, so training
starts soon, and each next one twice as many, up to 2**22. With several processes, process 0 writes
for all. Nothing about text is in a checkpoint.

Where they are. A source of up to 256 MiB of text is kept whole in ~/.cache/lorasae/text (or
$LORASAE_CACHE) and shared by all runs with the same text, tokenizer, context, seed and held-out
text. A larger one is a stream: its shards are in the run's folder, and `keep_from` deletes those
that no checkpoint needs. The held-out text is in the run's folder too, so that evaluation needs
no source.

Held-out text. Documents are held out whole, and the same ones for every seed: of the standard
library by file name; of another small source a sixteenth of the documents, or more if eval_tokens
need them; of a stream the first ones in a fixed order, each of which gives its first 65,536
characters at most. A source of a single document holds out its last sixteenth. A chunk belongs to
one document, but short documents share chunks. All chunks are mixed, and the first ones taken.
Training leaves out every document that begins like a held-out one.

Training order. The documents of a small source are permuted by the seed. Of a stream, sixteen
files are read at a time, in proportion to their sizes. The tokens eos, ids, eos, ids, ... are cut
into pieces of context - 1, each with a BOS in front, and the chunks of a shard are permuted: one
after the other, chunks of a long document would teach little that is new. When the text ends, it
is used again in another order.
"""
import json
import os
import tempfile
import threading
import time
import zlib
from contextlib import contextmanager
from hashlib import blake2b, sha256
from itertools import chain, zip_longest
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout

from lorasae.errors import InputError
from lorasae.io.console import note
from lorasae.io.files import read_json, whole, write_json
from lorasae.io.text import (PIECE, Part, Reader, documents, files, fingerprints, held_out,
                             is_plain, pieces)

ORDER = 1                   # the version of the order of the text: part of a cache's key
SMALL = 2 ** 28             # bytes of text; a larger source is a stream
FIRST, LARGEST = 2 ** 18, 2 ** 22       # tokens of a shard
AT_ONCE = 16                # files of a stream that are open at the same time
BATCH = 2 ** 18             # characters given to the tokenizer at a time
HELD_OUT_SEED = 0           # decides what is held out, whatever the run's seed
POLL = 0.02                 # seconds between two looks
PATIENCE = 1800             # seconds to wait for one shard


class HeldOut(NamedTuple):
    """What an evaluation needs of a run's text."""
    held_out: torch.Tensor              # [n, context] int64
    documents: torch.Tensor             # [n] int64: the document of each chunk
    tokenizer: object
    bos: int
    eos: int


def open_held_out(folder, tokenizer, bos, eos):
    """The held-out text of a run, from the files in its folder RUN_DIR/text alone."""
    chunks = np.load(Path(folder) / "held-out.npy", allow_pickle=False)
    record = read_json(Path(folder) / "text.json")
    return HeldOut(torch.from_numpy(chunks.astype(np.int64)), torch.tensor(record["documents"]),
                   tokenizer, bos, eos)


class Shard(NamedTuple):
    """What a shard's .json says."""
    number: int
    first: int              # the number of its first chunk, counted over all shards
    chunks: int
    checksum: int
    ends: bool              # whether the text ends with it
    epoch: int              # of the next shard: how often the text has been used up
    place: object           # where the next shard begins in the documents
    rest: list              # tokens before that place that are in no chunk yet


class Stopped(BaseException):
    """Ends the background thread."""


class Text:
    """The text of a run. folder: RUN_DIR/text; without it, a temporary folder.

    InputError if there is no such source, too little text, or no such token.
    """

    def __init__(self, source, tokenizer, bos, eos, *, context=1024, eval_tokens=1_000_000,
                 seed=42, batch_size=1, field=None, folder=None, process=0):
        check_tokens(tokenizer, bos, eos)
        if field is not None and not (isinstance(field, str) and field):
            raise InputError(f"--field {field!r}: expected the name of the JSON field with the text")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.source, self.tokenizer, self.bos, self.eos = str(source), tokenizer, bos, eos
        self.context, self.eval_tokens, self.seed = context, eval_tokens, seed
        self.batch_size, self.field, self.process = batch_size, field, process
        self.temporary = None if folder else tempfile.TemporaryDirectory()
        self.folder = Path(folder or self.temporary.name)
        resumed = (self.folder / "text.json").exists()

        # of the main thread: the shards there are, those that are open, and the order of an epoch
        self.shards, self.opened, self.total, self.turns = [], {}, None, (0, None)

        # of the background thread: the chunk that is asked for, and what it reads
        self.row = None if resumed else 0
        self.files = self.texts = self.reading = self.failure = None
        self.asked, self.stopped = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._work, name="text")
        if process == 0:
            self.thread.start()

        # a new run waits for its first shard: unsuitable text is refused at once
        try:
            self.record = self._wait(lambda: read_record(self.folder))
            held = open_held_out(self.folder, tokenizer, bos, eos)
            self.held_out, self.documents = held.held_out, held.documents
            if not resumed:
                self._wait(self._find_shards)
        except BaseException:
            self.close()
            raise

    # ---- Reading ----

    def batch(self, step):
        """The tokens [batch_size, context] int64 of a step, counted from 0."""
        chunks = []
        for row in range(step * self.batch_size, (step + 1) * self.batch_size):
            self.row = row
            chunks.append(self._wait(lambda: self._find_chunk(row)))
        return torch.from_numpy(np.stack(chunks).astype(np.int64))

    def keep_from(self, step):
        """Deletes the shards of a stream that hold nothing from this step on."""
        if self.process > 0 or self.record["key"]:
            return
        place = self._place()
        *older, newest = read_shards(place)
        kept = [shard for shard in older if shard.first + shard.chunks > step * self.batch_size]
        oldest = min(kept, default=newest).number
        for suffix in (".json", ".npy"):                # the .json first: without it there is none
            for path in place.glob(f"shard-*{suffix}"):
                if int(path.stem.removeprefix("shard-")) < oldest:
                    path.unlink()

    def close(self):
        """Stops the background thread and waits for its end."""
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join()
        self.opened = {}
        if self.temporary:
            self.temporary.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _wait(self, look):
        """What `look` finds, as soon as it finds anything."""
        end = time.monotonic() + PATIENCE
        while (found := look()) is None:
            if self.failure:
                raise self.failure
            if time.monotonic() > end:
                raise InputError(f"no text came for {PATIENCE // 60} minutes: does process 0 of "
                                 "this run still work? --resume continues from the last checkpoint")
            time.sleep(POLL)
        return found

    def _find_chunk(self, row):
        """The chunk of this number; None if its shard is not there yet."""
        row = self._used_again(row)
        for shard in self.shards:
            if shard.first <= row < shard.first + shard.chunks:
                if shard is self.shards[-1]:
                    self.asked.set()                    # it is time to write the next one
                chunks = self._open(shard)
                return None if chunks is None else chunks[row - shard.first]
        self._find_shards()

    def _find_shards(self):
        """The shards there are, None without any; asks for the next one."""
        self.shards = read_shards(self._place())
        numbers = {shard.number for shard in self.shards}
        self.opened = {number: self.opened[number] for number in numbers & set(self.opened)}
        if self.record["key"] and self.shards and self.shards[-1].ends:
            self.total = self.shards[-1].first + self.shards[-1].chunks
        self.asked.set()
        return self.shards or None

    def _used_again(self, row):
        """The number of the chunk in a small source; after its end, in another order."""
        if self.total is None or row < self.total:
            return row
        epoch, row = divmod(row, self.total)
        if self.turns[0] != epoch:
            if self.turns[0] == 0:
                self._note_end(self.total)
            self.turns = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.total)
        return self.turns[1][row]

    def _open(self, shard):
        """The chunks of a shard; a damaged one is forgotten, so that it is written again."""
        if shard.number not in self.opened:
            path = shard_path(self._place(), shard.number)
            try:
                chunks = np.load(path, mmap_mode="r", allow_pickle=False)
                damaged = zlib.crc32(np.ascontiguousarray(chunks)) != shard.checksum
            except (OSError, ValueError):
                damaged = True
            if damaged:
                path.with_suffix(".json").unlink(missing_ok=True)
                self.shards = []
                return None
            self.opened[shard.number] = chunks
        return self.opened[shard.number]

    def _place(self):
        """The folder of the shards."""
        key = self.record["key"]
        return cache_folder() / key if key else self.folder

    def _note_end(self, chunks):
        note(f"note: {self.source} has text for only {chunks:,} training chunks of {self.context:,} "
             "tokens: it is used again, each time in another order")

    # ---- Writing, in the background thread ----

    def _work(self):
        try:
            self.record = read_record(self.folder) or self._begin()
            while True:
                self._check()
                if self.asked.is_set() and self.row is not None:
                    self.asked.clear()
                    while self._write_next():
                        pass
                self.stopped.wait(POLL)
        except Stopped:
            pass
        except BaseException as error:                  # `_wait` raises it in the main thread
            self.failure = error
        finally:
            if self.reading:
                self.reading.close()

    def _check(self):
        """Ends the thread if nobody needs it any more."""
        if self.stopped.is_set() or not threading.main_thread().is_alive():
            raise Stopped

    @contextmanager
    def _locked(self, folder):
        """One process at a time writes into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        while not lock.is_locked:
            self._check()
            try:
                lock.acquire(timeout=POLL)
            except Timeout:
                pass
        try:
            yield
        finally:
            lock.release()

    def _begin(self):
        """Holds out text -> what a resumed run knows of its text."""
        self.files = files(self.source)
        lines = fingerprints(self.files)
        key = self._key(lines)
        cache = cache_folder() / key
        if not is_held_out(cache):
            self.texts = self._small_source()
            if self.texts is None:
                self._write_held_out(self.folder, lines, None)
                return read_record(self.folder)

        with self._locked(cache):
            if not is_held_out(cache):
                self._write_held_out(cache, lines, key)
            for name in ("held-out.npy", "text.json"):
                with whole(self.folder / name) as file:
                    file.write((cache / name).read_bytes())
        return read_record(self.folder)

    def _key(self, lines):
        """What the cached shards of a small source are found by: a digest of all they depend on."""
        names = [Path(line).name for line in lines]
        facts = [ORDER, self.source == "stdlib", names, self.field, self.tokenizer.to_str(),
                 self.bos, self.eos, self.context, self.eval_tokens, self.seed]
        return sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def _small_source(self):
        """[(file's name, document)] of all documents; None if they are too much text."""
        if sum(file.size for file in self.files) > SMALL:
            return None
        found, size = [], 0
        for file in self.files:
            for text in documents(file, self.field):
                self._check()
                found.append((file.name, text))
                size += len(text.encode())
                if size > SMALL:                        # the files are compressed
                    return None
        return found

    def _open_source(self):
        """Reads again what an earlier process read, if it is still the same."""
        if self.files is None:
            self.files = files(self.source)
            for before, now in zip_longest(self.record["files"], fingerprints(self.files)):
                if before != now:
                    name = (before or now).rpartition(" ")[0]
                    raise InputError(f"{self.source} has changed since the run began ({name} is "
                                     "another file now, came or went): restore the text or start "
                                     "a new run")
        if self.texts is None and self.record["key"]:
            self.texts = self._small_source()

    # ---- Held-out text ----

    def _write_held_out(self, folder, lines, key):
        """Writes held-out.npy and text.json into a folder: the first permuted pieces of documents."""
        count = -(-self.eval_tokens // self.context)
        chunks, begun = [], []

        def recorded():
            for piece in self._permuted(validation=True):
                begun.append(piece)
                yield piece

        for chunk, number in self._packed(recorded()):
            chunks.append(chunk)
            if len(chunks) == count:
                break
        if len(chunks) < count:
            raise InputError(f"{self.source} is too short: its held-out text makes {len(chunks):,} "
                             f"chunks of {self.context:,} tokens, {count:,} needed; use more text, "
                             "fewer --eval-tokens or a shorter --context")
        with whole(folder / "held-out.npy") as file:
            np.save(file, np.stack(chunks))
        write_json(folder / "text.json", {
            "source": self.source, "files": lines, "key": key, "cut": None,
            "documents": list(range(count)), "held_out": [digest(text) for text in begun[:number]]})

    def _permuted(self, validation):
        """Yields the pieces of a small source's documents, permuted by the seed."""
        found = []
        for name, text in self.texts:
            if self.source != "stdlib" or held_out(name) == validation:
                found += pieces(text)
        for i in np.random.default_rng(self.seed).permutation(len(found)):
            self._check()
            yield found[i]

    def _packed(self, texts):
        """Yields (chunk, pieces begun): groups of 2,048 pieces, without the last chunk of each."""
        stream, piece = np.empty(0, np.int32), self.context - 1
        for number, ids in enumerate(self._encoded_all(texts)):
            if number % 2048 == 0:
                stream = np.empty(0, np.int32)
            stream = np.concatenate([stream, [self.eos], ids]).astype(np.int32)
            while len(stream) > piece:
                yield np.concatenate([[self.bos], stream[:piece]]).astype(np.int32), number + 1
                stream = stream[piece:]

    def _encoded_all(self, texts):
        batch, size = [], 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= BATCH:
                yield from self._encoded(batch)
                batch, size = [], 0
        yield from self._encoded(batch)

    def _candidates(self, count):
        """(documents to hold out, in their order; how many at least; tokens of each at most; cut).

        A document is an iterator of pieces. cut: where the held-out part begins in a source of a
        single document, else None.
        """
        rng, stdlib = np.random.default_rng(HELD_OUT_SEED), self.source == "stdlib"
        if self.texts is not None:
            texts = [text for name, text in self.texts if not stdlib or held_out(name)]
            if len(self.texts) == 1:
                cut = len(texts[0]) * 15 // 16
                return self._single(iter(pieces(texts[0][cut:])), cut)
            least = len(texts) if stdlib else -(-len(texts) // 16)
            return (iter(pieces(texts[i])) for i in rng.permutation(len(texts))), least, inf, None

        if len(self.files) == 1 and is_plain(self.files[0].name):
            with Reader(self.files[0]) as reader:
                ends = [reader.byte for _ in self._parts(reader)]
            cut = ends[len(ends) * 15 // 16]
            return self._single(self._pieces_of(self.files[0], cut), cut)

        # of a stream, as many documents as together give what is needed
        if all(is_plain(file.name) for file in self.files):
            turns = rng.permutation(len(self.files))
            sharing = max(1, min(16, len(self.files) // 16))
            found = (self._pieces_of(self.files[i]) for i in turns)
        else:
            sharing = 16
            found = self._beginnings(Mix(self.files, self.field, HELD_OUT_SEED))
        return found, 1, -(-count // sharing) * self.context, None

    def _single(self, document, cut):
        note(f"note: {self.source} is a single document: its last sixteenth is held out")
        return [document], 1, inf, cut

    def _beginnings(self, mix):
        for part in self._parts(mix):
            if part.begins:
                yield iter(part.pieces)
        mix.close()

    def _pieces_of(self, file, byte=0):
        with Reader(file, place=(byte, 0)) as reader:
            for part in self._parts(reader):
                yield from part.pieces

    def _tokens_of(self, document, most):
        """EOS and the tokens of a document; of a long one, only about the first `most`."""
        found, count = [[self.eos]], 1
        for piece in document:
            encoding = self.tokenizer.encode(piece, add_special_tokens=False)
            found.append(encoding.ids)
            count += len(encoding.ids)
            if count >= most:
                break
        return np.concatenate(found)

    # ---- Shards ----

    def _write_next(self):
        """Writes the shard after the one in use, if it is not there yet -> whether it wrote one."""
        place = self._place()
        with self._locked(place):
            shards = read_shards(place)
            if shards and self.row < shards[0].first:   # it was deleted: all of it once more
                shards = []
            last = shards[-1] if shards else Shard(-1, 0, 0, 0, False, 0, None, [])
            if last.first > self.row or last.ends and self.record["key"]:
                return False
            self._write_shard(place, last)
            return True

    def _write_shard(self, folder, last):
        """Writes the shard that follows `last`."""
        number, first, epoch = last.number + 1, last.first + last.chunks, last.epoch
        if self.record["key"]:
            self._write_mix(folder, number, first)
            return
        self._go_to(epoch, last.place)

        # tokenise until it is full, or until the text ends
        wanted, ends = min(FIRST << number, LARGEST), True
        found, size = [np.array(last.rest, np.int32)], len(last.rest)
        for tokens in self._tokenised(self._parts(self.reading)):
            found.append(tokens)
            size += len(tokens)
            if size >= wanted:
                ends = False
                break
        chunks, rest = chunks_of(np.concatenate(found), self.bos, self.context)
        if ends and first + len(chunks) == 0:
            raise InputError(f"{self.source} is too short: {size:,} tokens for training beside the "
                             f"held-out text, {self.context - 1:,} needed; use more text, fewer "
                             "--eval-tokens or a shorter --context")

        # where the next one begins: at the start again, if the text has ended
        place, rest = self.reading.place, rest.tolist()
        if ends:
            place, rest = None, []
            if epoch == 0 and not self.record["key"]:
                self._note_end(first + len(chunks))

        # the .json comes last: it says that the shard is whole
        turns = np.random.default_rng([self.seed, epoch, number]).permutation(len(chunks))
        chunks = chunks[turns]
        with whole(shard_path(folder, number)) as file:
            np.save(file, chunks)
        shard = Shard(number, first, len(chunks), zlib.crc32(chunks), ends, epoch + ends, place, rest)
        write_json(shard_path(folder, number).with_suffix(".json"), shard._asdict())

    def _write_mix(self, folder, number, first):
        """Writes 4M tokens of a small source, permuted."""
        self._open_source()
        held, most = set(self.record["held_out"]), -(-LARGEST // self.context)
        if not hasattr(self, "packed"):
            texts = (text for text in self._permuted(validation=False) if digest(text) not in held)
            self.packed = [chunk for chunk, _ in self._packed(texts)]
        mix = self.packed[first:first + most]
        if not mix:
            raise InputError(f"{self.source} is too short: there is no text for training beside the "
                             "held-out text; use more text, fewer --eval-tokens or a shorter "
                             "--context")
        turns = np.random.default_rng([self.seed, 0, first]).permutation(len(mix))
        chunks = np.stack(mix)[turns]
        with whole(shard_path(folder, number)) as file:
            np.save(file, chunks)
        ends = first + len(mix) == len(self.packed)
        shard = Shard(number, first, len(mix), zlib.crc32(chunks), ends, 0, None, [])
        write_json(shard_path(folder, number).with_suffix(".json"), shard._asdict())

    def _go_to(self, epoch, place):
        """Lets self.reading stand at a place in the documents."""
        self._open_source()
        if self.reading and (self.reading.epoch, self.reading.place) == (epoch, place):
            return
        if self.reading:
            self.reading.close()
        held, cut = set(self.record["held_out"]), self.record["cut"]
        if self.record["key"]:
            texts = [text[:cut] for _, text in self.texts if digest(text[:PIECE]) not in held]
            self.reading = Permuted(texts, self.seed, place)
        else:
            self.reading = Mix(self.files, self.field, [self.seed, epoch], place, held, cut)
        self.reading.epoch = epoch

    def _parts(self, reading):
        """Yields what is read, for as long as somebody needs it."""
        while (part := reading.next()) is not None:
            self._check()
            yield part

    def _tokenised(self, parts):
        """Yields the tokens of some parts together, an EOS before each document that begins."""
        batch, size = [], 0
        for part in parts:
            batch.append(part)
            size += sum(map(len, part.pieces))
            if size >= BATCH:
                yield self._tokens(batch)
                batch, size = [], 0
        if batch:
            yield self._tokens(batch)

    def _tokens(self, parts):
        pieces = [piece for part in parts for piece in part.pieces]
        ids = self._encoded(pieces)
        found = []
        for part in parts:
            if part.begins:
                found.append([self.eos])
            found += [next(ids) for _ in part.pieces]
        return np.concatenate([[], *found]).astype(np.int32)

    def _encoded(self, pieces):
        """Yields the ids of each piece, encoded on all cores, 64 pieces at a time."""
        tokenizer = self.tokenizer
        encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
        for start in range(0, len(pieces), 64):
            for encoding in encode(pieces[start:start + 64], add_special_tokens=False):
                yield encoding.ids


# ---- Documents in their order --------------------------------------------------------------------

class Permuted:
    """The documents of a small source, permuted; `place`: how many were read."""

    def __init__(self, texts, seed, place=None):
        self.texts, self.place = texts, place or 0
        self.turns = np.random.default_rng(seed).permutation(len(texts))

    def next(self):
        if self.place == len(self.texts):
            return None
        self.place += 1
        return Part(True, pieces(self.texts[self.turns[self.place - 1]]))

    def close(self):
        pass


class Mix:
    """The documents of a stream: of sixteen files at a time, those of the one least read.

    So any stretch has the proportions of the whole, even if each file is one domain, as in
    RedPajama-1T's sample. held: digests of the documents to leave out. end: see Reader. place:
    the first of the open files, and the place in each, None at its end.
    """

    def __init__(self, files, field, seed, place=None, held=(), end=None):
        turns = np.random.default_rng(seed).permutation(len(files))
        self.files, self.field = [files[i] for i in turns], field
        self.held, self.end = held, end
        self.first, places = place or (0, None)
        self.readers = []
        self._open(places)

    @property
    def place(self):
        return [self.first, [reader and list(reader.place) for reader in self.readers]]

    def next(self):
        """The next Part; None when all files are at their end."""
        while self.first < len(self.files):
            while any(self.readers):
                reader = min(filter(None, self.readers), key=lambda reader: reader.share)
                part = reader.next()
                held = part and part.begins and digest(part.pieces[0]) in self.held
                if part is None or held and reader.plain:
                    reader.close()
                    self.readers[self.readers.index(reader)] = None
                elif not held:
                    return part
            self.first += AT_ONCE
            self._open()
        return None

    def close(self):
        for reader in filter(None, self.readers):
            reader.close()

    def _open(self, places=None):
        files = self.files[self.first:self.first + AT_ONCE]
        places = places or [(0, 0)] * len(files)
        self.readers = [place and Reader(file, self.field, tuple(place), self.end)
                        for file, place in zip(files, places)]


# ---- Tokens and files ----------------------------------------------------------------------------

def chunks_of(tokens, bos, context):
    """([n, context] int32: a BOS and context - 1 of the tokens in each; the tokens left over)."""
    piece = context - 1
    count = len(tokens) // piece
    chunks = np.full((count, context), bos, np.int32)
    chunks[:, 1:] = tokens[:count * piece].reshape(count, piece)
    return chunks, tokens[count * piece:]


def digest(start):
    """What a document is known by: a digest of its first piece."""
    return blake2b(start.encode(), digest_size=12).hexdigest()


def check_tokens(tokenizer, bos, eos):
    for name, token in (("BOS", bos), ("EOS", eos)):
        if not isinstance(token, int) or token < 0 or tokenizer.id_to_token(token) is None:
            raise InputError(f"the tokenizer has no {name} token (id {token} in the model's "
                             "configuration): is its tokenizer.json the model's own?")


def cache_folder():
    return Path(os.environ.get("LORASAE_CACHE") or Path.home() / ".cache/lorasae") / "text"


def shard_path(folder, number):
    return folder / f"shard-{number:05d}.npy"


def read_shards(folder):
    """The shards in a folder, from the first on, as far as they are whole."""
    numbers = sorted(int(path.stem.removeprefix("shard-")) for path in folder.glob("shard-*.json"))
    found = []
    for number in numbers:
        path = shard_path(folder, number)
        if found and number > found[-1].number + 1 or not path.exists():
            break
        try:
            found.append(Shard(**json.loads(path.with_suffix(".json").read_bytes())))
        except (OSError, ValueError, TypeError):        # damaged, or deleted meanwhile
            break
    return found


def read_record(folder):
    """What is known of a text whose held-out part is written in a folder; None if there is none."""
    path = folder / "text.json"
    return read_json(path) if path.exists() else None


def is_held_out(folder):
    """Whether the held-out text of a small source is whole in a folder of the cache."""
    try:
        open_held_out(folder, None, 0, 0)
        return True
    except (OSError, ValueError, KeyError):             # it is written again
        return False
