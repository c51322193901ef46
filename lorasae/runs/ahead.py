"""The frozen part of several steps at once, before their turn: larger products, and the same steps to the bit.

What the prefix and the teacher compute of a batch depends on nothing that is trained, so it may run for many sequences
together. `ahead 8` lets a GPU work on eight sequences where a step, as published, has one.

Shapes: B batch, T tokens.
"""
import torch

from lorasae.runs import distributed


@torch.no_grad()
def in_advance(batches, start, batch_size, at_once, work):
    """Yields (work(tokens), position) for every batch [B, T] from the start-th on; calls `work` for `at_once` sequences.

    work(tokens) returns a tuple of tensors [B, ...] that depend on nothing that is trained. batches: an iterator of
    (tokens, position of the batch after them), which begins where the group of the start-th batch does; `.start` is its
    own position. position: where a resumed run has to begin, so that its groups hold the same batches: it repeats the
    uninterrupted run to the bit. Of several processes each works on its share of every batch.
    """
    share = len(distributed.share(range(batch_size)))           # of several processes: rows of a batch that are this one's
    group = max(1, at_once // share)                            # batches whose frozen part runs together
    late = start % group                                        # steps of the first group that are done already
    begin = batches.start

    while True:
        tokens, after = take_group(batches, group)
        if not tokens:
            return
        done = work_in_parts(torch.cat(tokens), at_once, work)
        for number in range(late, len(tokens)):
            rows = slice(number * share, (number + 1) * share)
            last = number + 1 == group
            yield tuple(tensor[rows] for tensor in done), after if last else begin
        late, begin = 0, after


def take_group(batches, size):
    """([this process's share of each of the next `size` batches], the position after them)."""
    tokens, after = [], None
    for batch, after in batches:
        tokens.append(distributed.share(batch))
        if len(tokens) == size:
            break
    return tokens, after


def work_in_parts(tokens, at_once, work):
    """work(tokens), called for `at_once` sequences at a time."""
    parts = [work(part) for part in tokens.split(at_once)]
    return tuple(torch.cat(tensors) for tensors in zip(*parts))
