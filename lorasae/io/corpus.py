"""Text -> chunks [BOS + (context - 1) tokens]: the held-out ones, and training ones without end (Section 4).

    corpus = Corpus("stdlib", tokenizer, bos=2, eos=1, context=256, eval_tokens=50_000)
    corpus.validation                                   # [196, 256] int64: from the same arguments always the same
    for tokens in corpus.batches(8): ...                # [8, 256] int64, from a background thread

Order: documents of sources of up to 256 MB are permuted by default_rng(seed), as in the published code. Larger sources
are streams: their files in seeded order, sixteen at a time in proportion, through a seeded buffer of 10,000 documents.
Split: the first documents of this order, as many as give `eval_tokens`, are for validation. Training takes the others,
less any with the very text of one of those. (The standard library is split by file name instead.)
"""
import itertools
from contextlib import ExitStack
from functools import cached_property, partial
from hashlib import blake2b

import numpy as np
import torch

from lorasae.errors import InputError
from lorasae.io.prefetch import Prefetch, check
from lorasae.io.streams import files, held_out, read, say

GROUP = 2048                                            # documents packed together, as in the published code
IN_MEMORY = 2 ** 28                                     # bytes of files; above, a source is read as a stream
MIXED = 16                                              # files of a stream that are open at the same time
BUFFER = 10_000                                         # documents of a stream that await their turn
BATCH = 2 ** 20                                         # characters given to the tokenizer at a time


def special_mask(tokens, bos, eos):
    """tokens [B, T] -> bool [B, T]: the BOS and EOS positions, which an SAE trained without them must leave alone."""
    return (tokens == bos) | (tokens == eos)


# ---- Packing ---------------------------------------------------------------------------------------------------------

def pack(documents, tokenizer, bos, eos, context):
    """Yields (chunk [context] int64, number of documents begun): the published code's packing.

    For each group of 2,048 documents the stream eos, ids₁, eos, ids₂, ... is cut into pieces of context - 1 tokens with
    a BOS before each. A group's last piece is dropped, even a full one. Encoding adds no special tokens of its own.
    """
    piece, begun, stream = context - 1, 0, []
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)    # on all cores; "fast" omits offsets
    for batch in batches_of_text(documents):
        for encoding in encode(batch, add_special_tokens=False):
            if begun % GROUP == 0:
                stream = []
            begun += 1
            stream.append(eos)
            stream += encoding.ids
            whole = (len(stream) - 1) // piece          # the last piece waits: it may be the group's last
            chunks = np.full((whole, context), bos)
            chunks[:, 1:] = np.reshape(stream[:whole * piece], (whole, piece))
            del stream[:whole * piece]
            for chunk in chunks:
                yield chunk, begun


def batches_of_text(documents):
    """Lists of documents of about BATCH characters, enough to occupy the tokenizer's threads."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- Order -----------------------------------------------------------------------------------------------------------

def shuffled(sources, rng, field=None):
    """Yields every document of the files once, in an order drawn from rng (see the module's docstring)."""
    if sum(file.size for file in sources) <= IN_MEMORY:
        documents = list(mixed(sources, field, at_once=1))
        for i in rng.permutation(len(documents)):
            yield documents[i]
        return
    documents = mixed([sources[i] for i in rng.permutation(len(sources))], field, at_once=MIXED)
    buffer = list(itertools.islice(documents, BUFFER))
    for text in documents:
        i = rng.integers(len(buffer))
        text, buffer[i] = buffer[i], text
        yield text
    rng.shuffle(buffer)
    yield from buffer


def mixed(sources, field, at_once):
    """Yields the documents of `at_once` files at a time, always from the one of which the smallest part has been read.

    So any stretch has the proportions of the whole, even where each file is one domain (RedPajama-1T's sample).
    """
    for first in range(0, len(sources), at_once):
        with ExitStack() as stack:
            reading = []
            for file in sources[first:first + at_once]:
                try:
                    raw = stack.enter_context(file.open())
                except OSError as error:
                    raise InputError(f"cannot read {file.name}: {error.strerror or error}") from error
                reading.append((file, raw, read(raw, file.name, field)))
            while reading:
                chosen = min(reading, key=lambda entry: entry[1].tell() / max(entry[0].size, 1))
                check()
                text = next(chosen[2], None)
                if text is None:
                    reading.remove(chosen)
                else:
                    yield text


# ---- The corpus ------------------------------------------------------------------------------------------------------

class Corpus:
    """The chunks of one run. The arguments alone decide them, so an evaluation finds the run's validation chunks again.

    source is what --data takes (streams.py), bos and eos are the model's token ids, context the tokens of a chunk,
    eval_tokens those held out (rounded up to chunks), field the JSON field with the text. InputError where there is no
    such source, too little text or no such token. The tokenizer's truncation and padding are switched off.
    """

    def __init__(self, source, tokenizer, bos, eos, *, context=1024, eval_tokens=1_000_000, seed=42, field=None):
        for name, token in (("BOS", bos), ("EOS", eos)):
            if not isinstance(token, int) or token < 0 or tokenizer.id_to_token(token) is None:
                raise InputError(f"the tokenizer has no {name} token (id {token} by the model's configuration): is its "
                                 "tokenizer.json the model's own?")
        if context < 2 or eval_tokens < 1:
            raise InputError(f"context {context} and eval-tokens {eval_tokens}: expected at least 2 and 1 tokens")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.source, self.tokenizer, self.bos, self.eos = str(source), tokenizer, bos, eos
        self.context, self.eval_tokens, self.seed, self.field = context, eval_tokens, seed, field
        self.training_files = self.validation_files = files(self.source)
        if self.source == "stdlib":
            self.validation_files = [file for file in self.training_files if held_out(file.name)]
            self.training_files = [file for file in self.training_files if not held_out(file.name)]

    @property
    def validation(self):
        """[ceil(eval_tokens / context), context] int64: the held-out chunks."""
        return self._held_out[0]

    def batches(self, batch_size, skip=0):
        """An endless iterator of training tokens [batch_size, context] int64, from batch `skip` on.

        It reads and tokenises ahead in a background thread, until it is dropped or closed by close(); what it skips it
        tokenises too. Where the text ends it starts again in a new order, and says so. The first batch is made at once:
        too short a text fails here.
        """
        def stack(chunks):
            while True:
                yield torch.from_numpy(np.stack(list(itertools.islice(chunks, batch_size))))

        batches = stack(itertools.islice(self._training(), skip * batch_size, None))
        return Prefetch(itertools.chain([next(batches)], batches))

    @cached_property
    def _held_out(self):
        """(validation chunks, the digests of the documents in them)"""
        count, chunks, documents = -(-self.eval_tokens // self.context), [], []

        def recorded():
            for text in self._documents(self.validation_files, 0):
                documents.append(text)
                yield text

        for chunk, begun in self._pack(recorded()):
            chunks.append(chunk)
            if len(chunks) == count:
                return torch.from_numpy(np.stack(chunks)), {digest(text) for text in documents[:begun]}
        raise self._too_short(documents, f"{count:,} validation chunks (--eval-tokens)", count * (self.context - 1) + 1)

    def _training(self):
        held = self._held_out[1]
        for epoch in itertools.count():
            count = 0
            for chunk, _ in self._pack(self._new(held, epoch)):
                count += 1
                yield chunk
            if count == 0:
                raise self._too_short(self._new(held, epoch), "training beside the validation text", self.context)
            if epoch == 0:
                say(f"warning: {self.source} has text for only {count:,} training chunks of {self.context:,} tokens: "
                    "it is used again, each time in a new order")

    def _documents(self, sources, epoch):
        return shuffled(sources, np.random.default_rng([self.seed, epoch] if epoch else self.seed), self.field)

    def _new(self, held, epoch):
        return (text for text in self._documents(self.training_files, epoch) if digest(text) not in held)

    def _pack(self, documents):
        return pack(documents, self.tokenizer, self.bos, self.eos, self.context)

    def _too_short(self, documents, purpose, needed):
        encode = partial(self.tokenizer.encode_batch, add_special_tokens=False)
        tokens = sum(len(encoding.ids) + 1 for batch in batches_of_text(documents) for encoding in encode(batch))
        return InputError(f"{self.source} is too short: {tokens:,} tokens for {purpose}, {needed:,} needed; use more "
                          "text, fewer --eval-tokens or a shorter --context")


def digest(text):
    return blake2b(text.encode(), digest_size=16).digest()
