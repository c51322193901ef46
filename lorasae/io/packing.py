"""Packing: documents -> chunks [BOS + (context - 1) tokens], as in the published code."""
from typing import NamedTuple

import numpy as np

GROUP = 2048                                            # documents packed together, as in the published code
BATCH = 2 ** 20                                         # characters given to the tokenizer at a time


class Rest(NamedTuple):
    """Where the packer stands between two chunks."""
    begun: int = 0                                      # documents begun so far
    tokens: np.ndarray = np.empty(0, np.int64)          # theirs that are in no chunk yet


def pack(documents, tokenizer, bos, eos, context, rest=Rest()):
    """Yields (chunk [context] int64, the Rest after it).

    For each group of 2,048 documents the stream eos, ids₁, eos, ids₂, ... is cut into pieces of context - 1 tokens with
    a BOS before each. A group's last piece is dropped, even a full one. Encoding adds no special tokens of its own.
    From the Rest after a chunk and the documents from its `begun` on come the chunks that would have followed.
    """
    piece = context - 1
    begun, stream = rest

    def whole_pieces():
        nonlocal stream
        while len(stream) > piece:                      # the last piece waits: it may be the group's last
            chunk = np.concatenate([[bos], stream[:piece]])
            stream = stream[piece:]
            yield chunk, Rest(begun, stream)

    yield from whole_pieces()
    for encoding in encodings(documents, tokenizer):
        if begun % GROUP == 0:
            stream = Rest().tokens
        begun += 1
        stream = np.concatenate([stream, [eos], np.array(encoding.ids, np.int64)])
        yield from whole_pieces()


def encodings(documents, tokenizer):
    """Yields each document's Encoding, without special tokens."""
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)    # on all cores; "fast" omits offsets
    for batch in batches_of_text(documents):
        yield from encode(batch, add_special_tokens=False)


def batches_of_text(documents):
    """Lists of documents: short ones at first, for those who want little, then of BATCH characters for all cores.

    None among the documents: those before it are not to wait for those behind it.
    """
    batch, size, enough = [], 0, BATCH // 16
    for text in documents:
        if text is not None:
            batch.append(text)
            size += len(text)
        if batch and (text is None or size >= enough):
            yield batch
            batch, size, enough = [], 0, min(2 * enough, BATCH)
    if batch:
        yield batch
