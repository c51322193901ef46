"""The order of the documents, without end and with a place for every document in it.

A source of up to 256 MiB of text is one Segment: all its documents, permuted by default_rng(seed) as in the published
code. A larger one is a stream: its files in seeded order, sixteen at a time in proportion, and every 32 MiB of the
documents as they come are a Segment, permuted.

A run that resumes must not wait for what came before, and a compressed file can be entered at its beginning only. So
a stream's segment is saved whole, packed (some 12 MB), with the place of the next one in the files: the run goes on
at once, and while it learns from this segment, a background thread goes to where the next one begins.
"""
import json
import zlib
from contextlib import ExitStack
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from lorasae.io.documents import Reader
from lorasae.io.prefetch import Prefetch

IN_MEMORY = 2 ** 28                                     # bytes of text (decompressed); above, a source is a stream
MIXED = 16                                              # files of a stream that are open at the same time
SEGMENT = 2 ** 25                                       # bytes of text that are permuted together
EACH = 64                                               # bytes that a document costs beside its text, about


class Segment:
    """Documents (str) in the order of their turn.

    number: which of the epoch's segments. following: the Mix.place after it, None where it is all there is.
    """

    def __init__(self, texts, number=0, following=None):
        self.texts, self.number, self.following = texts, number, following

    @cached_property
    def saved(self):
        """What gives the segment back to a resumed run; {} where that reads all text again."""
        if self.following is None:
            return {}
        text = json.dumps(self.texts, ensure_ascii=False).encode()
        packed = np.frombuffer(zlib.compress(text, 1), np.uint8)
        return {"number": self.number, "following": self.following, "texts": torch.tensor(packed)}

    @staticmethod
    def load(saved):
        text = zlib.decompress(saved["texts"].numpy().tobytes())
        segment = Segment(json.loads(text), saved["number"], saved["following"])
        segment.saved = saved                           # need not be packed again
        return segment


class Place(NamedTuple):
    """Of a document in the order of an epoch."""
    segment: Segment = None                             # None: the first
    used: int = 0                                       # its documents that had their turn


def ordered(files, field, seed, epoch, place=Place()):
    """Yields (document, the Place after it) of an epoch, from `place` on. The next segment is read meanwhile."""
    used = place.used
    with Prefetch(segments(files, field, seed, epoch, place.segment), depth=1) as ahead:
        for segment in ahead:
            for number, text in enumerate(segment.texts[used:], used + 1):
                yield text, Place(segment, number)
            used = 0


def segments(files, field, seed, epoch, segment=None):
    """Yields the Segments of an epoch, from `segment` on where one is given."""
    rng = np.random.default_rng([seed, epoch] if epoch else seed)

    if segment is None:
        documents = all_documents(files, field)
        if documents is not None:                       # the source is small
            yield Segment([documents[i] for i in rng.permutation(len(documents))])
            return

    files = [files[i] for i in rng.permutation(len(files))]
    number, place = 0, None
    if segment is not None:
        yield segment
        if segment.following is None:                   # it is all there is
            return
        number, place = segment.number + 1, segment.following

    with Mix(files, field, MIXED, place) as mix:
        while texts := mix.take(SEGMENT):
            turns = np.random.default_rng([seed, epoch, number]).permutation(len(texts))
            yield Segment([texts[i] for i in turns], number, mix.place)
            number += 1


def all_documents(files, field):
    """All documents of the files, in the order of the files; None where they hold more than IN_MEMORY bytes of text."""
    if sum(file.size for file in files) > IN_MEMORY:
        return None

    documents, total = [], 0
    for file in files:
        with Reader(file, field) as reader:
            while found := reader.next():
                documents += found
                if total + reader.byte > IN_MEMORY:     # compressed, it was smaller
                    return None
            total += reader.byte
    return documents


class Mix:
    """The documents of `at_once` files at a time, always from the one of which the smallest part has been read.

    So any stretch has the proportions of the whole, even where each file is one domain (RedPajama-1T's sample).
    `place` is where a Mix stands, and where another can start: the first of the open files, and a Reader's place in
    each of them, [] in one that is at its end.
    """

    def __init__(self, files, field, at_once=MIXED, place=None):
        self.files, self.field, self.at_once = files, field, at_once
        self.stack = ExitStack()
        self.first, places = (place["first"], place["files"]) if place else (0, None)
        self._open(places)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stack.close()

    @property
    def place(self):
        places = [list(reader.place) if reader in self.reading else [] for reader in self.readers]
        return {"first": self.first, "files": places}

    def next(self):
        """The next documents, a list of str; None when all files are at their end."""
        while self.first < len(self.files):
            while self.reading:
                reader = min(self.reading, key=lambda reader: reader.part)
                if documents := reader.next():
                    return documents
                reader.close()
                self.reading.remove(reader)
            self.first += self.at_once
            self._open()
        return None

    def take(self, size):
        """Documents of `size` bytes together, or a little more, or what is left."""
        texts = []
        while size > 0 and (documents := self.next()):
            texts += documents
            size -= sum(len(text.encode()) + EACH for text in documents)
        return texts

    def _open(self, places=None):
        self.stack.close()
        files = self.files[self.first:self.first + self.at_once]
        places = places or [(0, 0)] * len(files)

        self.readers = []
        for file, place in zip(files, places):
            at_its_end = not place
            self.readers.append(None if at_its_end else self.stack.enter_context(Reader(file, self.field, place)))
        self.reading = [reader for reader in self.readers if reader]
