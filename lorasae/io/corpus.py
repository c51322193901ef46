"""Text -> chunks [BOS + (context - 1) tokens]: the held-out ones, and training ones without end (Section 4).

    corpus = Corpus("stdlib", tokenizer, bos=2, eos=1, context=256, eval_tokens=50_000)
    corpus.held_out                                   # [196, 256] int64: from the same arguments always the same
    with corpus.batches(8) as batches:                  # made ahead in a background thread
        for tokens, position in batches: ...            # [8, 256] int64, and where the next batch begins
    corpus.batches(8, position)                         # goes on there, at once, with the very same batches

Split: the first documents in the order of order.py, as many as give `eval_tokens`, are for validation. Training takes
the others, less any with the very text of one of those. (The standard library is split by file name.)

Order: that of the documents, and of every 4M tokens in it the chunks are permuted. One after the other, the chunks of a
long document teach little that is new: with 150k tokens of the standard library's files as they come, adapters closed
16 % of the gap in cross-entropy, with chunks drawn from all of them 25 %. (The published code takes them as they come;
most documents of its data are no longer than a chunk or two.)
"""
import itertools
from collections import deque
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch

from lorasae.errors import InputError
from lorasae.io.order import Place, Segment, ordered
from lorasae.io.packing import Rest, encodings, pack
from lorasae.io.prefetch import Prefetch, check
from lorasae.io.console import note
from lorasae.io.streams import files, fingerprints, held_out

MIXED = 2 ** 22                                         # tokens whose chunks are permuted together; they wait in memory


class Position(NamedTuple):
    """Between two training chunks. `saved` is what a checkpoint keeps of it: plain numbers, strings and tensors."""
    epoch: int = 0                                      # how often the text has been used up
    chunks: int = 0                                     # of this epoch, to where a mix begins
    place: Place = Place()                              # there
    rest: Rest = Rest()                                 # there
    taken: int = 0                                      # chunks of the mix that had their turn,
    mixed: int = 0                                      # of so many; 0 before the first

    @property
    def segment(self):
        """The number of the stretch of text that the documents come from."""
        return self.place.segment.number if self.place.segment else 0

    def saved(self, text):
        segment = self.place.segment.saved if self.place.segment else {}
        return {"text": text, "epoch": self.epoch, "chunks": self.chunks, "used": self.place.used, "segment": segment,
                "begun": self.rest.begun, "rest": torch.tensor(self.rest.tokens), "taken": self.taken, "mixed": self.mixed}

    @staticmethod
    def load(saved):
        if "mixed" not in saved:
            raise InputError("the checkpoint was written by an earlier version, which took the text in another order, and "
                             "cannot be continued: start again with another --out")
        place = Place(Segment.load(saved["segment"]) if saved["segment"] else None, saved["used"])
        rest = Rest(saved["begun"], saved["rest"].numpy())
        return Position(saved["epoch"], saved["chunks"], place, rest, saved["taken"], saved["mixed"])


class Corpus:
    """The chunks of one run. The arguments alone decide them, so an evaluation finds the run's validation chunks again.

    source is what --data takes (streams.py), bos and eos are the model's token ids, context the tokens of a chunk,
    eval_tokens those held out (rounded up to chunks), field the JSON field with the text. InputError where there is no
    such source, too little text or no such token. The tokenizer's truncation and padding are switched off.

    saved: the `held` of an earlier Corpus of the same arguments, which this one then need not read again.
    """

    def __init__(self, source, tokenizer, bos, eos, *, context=1024, eval_tokens=1_000_000, seed=42, field=None,
                 saved=None):
        for name, token in (("BOS", bos), ("EOS", eos)):
            if not isinstance(token, int) or token < 0 or tokenizer.id_to_token(token) is None:
                raise InputError(f"the tokenizer has no {name} token (id {token} by the model's configuration): is its "
                                 "tokenizer.json the model's own?")
        if context < 2 or eval_tokens < 1:
            raise InputError(f"context {context} and eval-tokens {eval_tokens}: expected at least 2 and 1 tokens")
        if field is not None and not (isinstance(field, str) and field):
            raise InputError(f"--field {field!r}: expected the name of the JSON field that holds the text")

        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.source, self.tokenizer, self.bos, self.eos = str(source), tokenizer, bos, eos
        self.context, self.eval_tokens, self.seed, self.field = context, eval_tokens, seed, field

        self.training_files = self.validation_files = files(self.source)
        if self.source == "stdlib":
            self.validation_files = [file for file in self.training_files if held_out(file.name)]
            self.training_files = [file for file in self.training_files if not held_out(file.name)]
        if saved is not None:
            self.held = saved

    # ---- Validation ----

    @property
    def held_out(self):
        """[ceil(eval_tokens / context), context] int64: the held-out chunks."""
        return self.held["chunks"]

    @cached_property
    def held(self):
        """For a checkpoint: "chunks", those of validation, and "digests" [documents, 16] uint8, of what is in them."""
        count = -(-self.eval_tokens // self.context)
        chunks, documents = [], []

        def recorded():
            for text, _ in self._documents(self.validation_files, 0):
                documents.append(text)
                yield text

        for chunk, rest in self._pack(recorded()):
            chunks.append(chunk)
            if len(chunks) == count:
                digests = b"".join(map(digest, documents[:rest.begun]))
                return {"chunks": torch.from_numpy(np.stack(chunks)),
                        "digests": torch.tensor(np.frombuffer(digests, np.uint8)).view(-1, 16)}

        needed = count * (self.context - 1) + 1
        raise self._too_short(documents, f"{count:,} validation chunks (--eval-tokens)", needed)

    # ---- Training ----

    def batches(self, batch_size, position=None):
        """An endless iterator of (training tokens [batch_size, context] int64, the position after them).

        `position` is one that an earlier iterator gave: this one goes on there. It is a dict of numbers, strings, lists
        and tensors, for torch.save; the iterator's own beginning is its `start`. InputError where the text has changed.

        It reads and tokenises ahead in a background thread, until it is dropped or closed. Where the text ends it
        starts again in a new order, and says so. The first batch is made at once: too short a text fails here.
        """
        text = fingerprints(self.training_files)
        if position is None:
            position = Position().saved(text)
        self._check_unchanged(position["text"], text)
        chunks = self._training(Position.load(position))

        def batches():
            while True:
                taken = list(itertools.islice(chunks, batch_size))
                tokens = np.stack([chunk for chunk, _ in taken])
                _, after = taken[-1]
                yield torch.from_numpy(tokens), after.saved(text)

        made = batches()
        first = next(made)
        ahead = Prefetch(itertools.chain([first], made))
        ahead.start = position
        return ahead

    def _training(self, begin):
        """Yields (chunk, the Position after it), from a Position on: mix after mix, epoch after epoch."""
        while True:
            for mix in self._mixes(begin):
                yield from self._mixed(mix, begin)
                _, begin = mix[-1]

            check()                                     # the run may be over, and nothing be used again
            if begin.chunks == 0:
                raise self._too_short(self._fresh(begin, deque()), "training beside the validation text", self.context)
            if begin.epoch == 0:
                note(f"warning: {self.source} has text for only {begin.chunks:,} training chunks of {self.context:,} "
                    "tokens: it is used again, each time in a new order")
            begin = Position(begin.epoch + 1)

    def _mixes(self, begin):
        """Yields lists of (chunk, the Position after it): what is mixed, from a Position to the end of its epoch.

        All chunks of a mix come from one segment of a stream, but for the chunk between two segments, which is alone. So a
        run that goes on within a mix has all of it at hand; the next segment may be long in coming.
        """
        in_order = self._epoch(begin)
        if begin.taken:
            mix = list(itertools.islice(in_order, begin.mixed))
            yield mix
            _, begin = mix[-1]

        def segments(step):
            (_, before), (_, after) = step
            return before.segment, after.segment

        steps = itertools.pairwise(itertools.chain([(None, begin)], in_order))
        for _, of_one_segment in itertools.groupby(steps, segments):
            while mix := [found for _, found in itertools.islice(of_one_segment, -(-MIXED // self.context))]:
                yield mix

    def _mixed(self, mix, begin):
        """Yields (chunk, the Position after it) of a mix that begins there, permuted; those that had their turn are left out."""
        _, end = mix[-1]
        turns = np.random.default_rng([self.seed, begin.epoch, begin.chunks]).permutation(len(mix))
        for taken in range(begin.taken, len(mix)):
            chunk, _ = mix[turns[taken]]
            last = taken + 1 == len(mix)
            yield chunk, end if last else begin._replace(taken=taken + 1, mixed=len(mix))

    def _epoch(self, begin):
        """Yields (chunk, the Position after it) in the order of the documents, from a Position to the end of its epoch."""
        epoch, count, place, rest = begin[:4]
        begun = rest.begun
        following = deque()                             # the places after the documents that the packer was given

        for chunk, rest in self._pack(self._fresh(begin, following), rest):
            while begun < rest.begun:
                place = following.popleft()
                begun += 1
            count += 1
            check()                                     # a run may be over while its next mix is made
            yield chunk, Position(epoch, count, place, rest)

    def _fresh(self, begin, following):
        """Yields the documents from a Position on that are not held out; the Place after each goes into `following`.

        And None where a segment ends: what is there is to be packed before the next one is waited for.
        """
        held = {row.tobytes() for row in self.held["digests"].numpy()}
        for text, after in self._documents(self.training_files, begin.epoch, begin.place):
            if digest(text) not in held:
                following.append(after)
                yield text
            if after.used == len(after.segment.texts):
                yield None

    def _check_unchanged(self, then, now):
        for before, after in itertools.zip_longest(then, now):
            if before != after:
                name = (before or after).rpartition(" ")[0]
                raise InputError(f"{self.source} has changed since the run that is to be resumed: {name} is another "
                                 "file now, came or went; restore the text as it was, or start a new run")

    # ---- Both ----

    def _documents(self, sources, epoch, place=Place()):
        return ordered(sources, self.field, self.seed, epoch, place)

    def _pack(self, documents, rest=Rest()):
        return pack(documents, self.tokenizer, self.bos, self.eos, self.context, rest)

    def _too_short(self, documents, purpose, needed):
        tokens = sum(len(encoding.ids) + 1 for encoding in encodings(documents, self.tokenizer))
        return InputError(f"{self.source} is too short: {tokens:,} tokens for {purpose}, {needed:,} needed; use more "
                          "text, fewer --eval-tokens or a shorter --context")


def digest(text):
    return blake2b(text.encode(), digest_size=16).digest()
