"""Text to shards of tokens (io/shards.py): python -m lorasae.bench data"""
import os
import tempfile
from functools import partial
from unittest.mock import patch

import numpy as np
from tokenizers import Tokenizer

from lorasae.bench.race import race, speed, timed
from lorasae.io.presets import TINY as EMBEDDED
from lorasae.io.shards import Text, chunks_of, tokens_of
from lorasae.io.text import Reader, standard_library

TOKENIZER, BOS, EOS = EMBEDDED / "gemma-2" / "tokenizer.json", 2, 1


def bench_data(device, quick):
    """The standard library through the embedded tokenizer (4,096 tokens): packing, and batches."""
    context, batch, steps, some = (32, 2, 100, 5) if quick else (1024, 8, 300, 400)
    parts = []
    for file in standard_library()[:some]:
        with Reader(file) as reader:
            parts += iter(reader.next, None)
    build = partial(pack_contenders, parts, context)
    tokens = context * len(build(device)["lorasae"]())
    title = f"packing, {some} files"
    rows = race(title, build, differing_chunks, 3, device, memory=False)

    def from_the_first():
        """With an empty cache, so that every shard is written."""
        tokenizer = Tokenizer.from_file(str(TOKENIZER))
        with (tempfile.TemporaryDirectory() as cache,
              patch.dict(os.environ, LORASAE_CACHE=cache),
              Text("stdlib", tokenizer, BOS, EOS, context=context, eval_tokens=50 * context,
                   batch_size=batch) as text):
            return [text.batch(step) for step in range(steps)]

    seconds = [timed(from_the_first, device) for _ in range(3)]
    title = f"batches of {batch} x {context}, read, packed, mixed"
    packing = [{**row, "tokens_per_s": tokens / (row["ms"] / 1e3)} for row in rows]
    return [*packing, speed(title, seconds, steps * batch * context)]


def pack_contenders(parts, context, device):
    tokenizer = Tokenizer.from_file(str(TOKENIZER))

    def one_by_one():
        stream = []
        for part in parts:
            stream += [EOS] * part.begins
            for piece in part.pieces:
                stream += tokenizer.encode(piece, add_special_tokens=False).ids
        whole = len(stream) // (context - 1) * (context - 1)
        starts = range(0, whole, context - 1)
        return [[BOS, *stream[start:start + context - 1]] for start in starts]

    def together():
        return chunks_of(tokens_of(parts, tokenizer, EOS), context, BOS)[0]

    return {"one piece at a time": one_by_one, "lorasae": together}


def differing_chunks(answer, reference):
    return None if np.array_equal(answer, reference) else "other chunks"
