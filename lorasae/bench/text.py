"""Text to packed tokens (io/corpus.py): python -m lorasae.bench data"""
from functools import partial

import numpy as np
from tokenizers import Tokenizer

from lorasae.bench.race import race, speed, timed
from lorasae.io.corpus import Corpus
from lorasae.io.order import all_documents
from lorasae.io.packing import pack
from lorasae.io.presets import TINY as EMBEDDED
from lorasae.io.streams import standard_library

TOKENIZER, BOS, EOS = EMBEDDED / "gemma-2" / "tokenizer.json", 2, 1


def bench_data(device, quick):
    """The standard library's sources through the embedded tokenizer (4,096 tokens): packing, and a run's batches."""
    context, batch, count, some = (32, 2, 100, 5) if quick else (1024, 8, 300, 400)
    documents = all_documents(standard_library(), None)[:some]
    build = partial(pack_contenders, documents, context)
    tokens = context * len(build(device)["lorasae"]())
    rows = race(f"packing, {some} documents", build, differing_chunks, 3, device, memory=False)
    corpus = Corpus("stdlib", Tokenizer.from_file(str(TOKENIZER)), BOS, EOS, context=context, eval_tokens=50 * context)

    def from_the_first():
        """At full size nearly all of the text, whose chunks are mixed before the first comes."""
        with corpus.batches(batch) as batches:
            return [next(batches) for _ in range(count)]

    seconds = [timed(from_the_first, device) for _ in range(3)]
    return [{**row, "tokens_per_s": tokens / (row["ms"] / 1e3)} for row in rows] + [
        speed(f"batches of {batch} x {context}, read, packed, mixed", seconds, count * batch * context)]


def pack_contenders(documents, context, device):
    tokenizer = Tokenizer.from_file(str(TOKENIZER))

    def one_by_one():
        encodings = (tokenizer.encode(text, add_special_tokens=False) for text in documents)
        stream = [token for encoding in encodings for token in (EOS, *encoding.ids)]
        pieces = [stream[i:i + context - 1] for i in range(0, len(stream), context - 1)]
        return [[BOS, *piece] for piece in pieces[:-1]]

    return {"one document at a time": one_by_one,
            "lorasae": lambda: [chunk for chunk, _ in pack(documents, tokenizer, BOS, EOS, context)]}


def differing_chunks(answer, reference):
    return None if np.array_equal(answer, reference) else "other chunks"
