"""Text to batches of tokens (io/shards.py): python -m lorasae.bench data"""
import os
import tempfile
from unittest.mock import patch

from lorasae.bench.race import speed
from lorasae.io.models import load_tokenizer
from lorasae.io.shards import Text


def bench_data(device, quick):
    """The standard library, read, tokenised (by the embedded tokenizer), packed and mixed."""
    context, batch, steps = (32, 2, 100) if quick else (1024, 8, 300)
    tokenizer = load_tokenizer("tiny-gemma-2")

    def from_the_first():
        with (tempfile.TemporaryDirectory() as empty, patch.dict(os.environ, LORASAE_CACHE=empty),
              Text("stdlib", tokenizer, bos=2, eos=1, context=context, eval_tokens=50 * context,
                   batch_size=batch) as text):
            for step in range(steps):
                text.batch(step)

    tokens = steps * batch * context
    yield [speed(f"batches of {batch} x {context}", from_the_first, "cpu", tokens)]
