"""The frozen part of several steps at once, before their turn: larger products, and the same steps to the bit.

What the prefix and the teacher compute of a batch depends on nothing that is trained, so it may run for many sequences
together. `--ahead 8` lets a GPU work on eight sequences where a step, as published, has one.

Shapes: B batch, T tokens.
"""
import torch

from lorasae.runs import distributed


class Ahead:
    """Iterates over work(tokens) of every step from `start` on, which it calls for several steps at once.

    work(tokens) returns a NamedTuple of tensors [B, ...] (or None) that depend on nothing that is trained. batch(step) gives
    the tokens of a step. Of several processes each works on its share of every batch.
    """

    def __init__(self, batch, start, config, work):
        self.batch, self.start, self.work, self.steps = batch, start, work, config.steps
        self.at_once = max(config.ahead, config.micro_batch)
        self.share = len(distributed.share(range(config.batch_size)))      # rows of a batch that are this process's
        self.group = max(1, self.at_once // self.share)                    # batches that are worked on together

    def __iter__(self):
        for begin in range(self.start - self.start % self.group, self.steps, self.group):
            steps = range(begin, min(begin + self.group, self.steps))
            tokens = torch.cat([distributed.share(self.batch(step)) for step in steps])
            found = self.work_on(tokens)
            for step in range(max(begin, self.start), steps.stop):
                yield self.rows_of(found, step - begin)

    @torch.no_grad()
    def work_on(self, tokens):
        """work(tokens), called for `at_once` sequences at a time."""
        parts = [self.work(part) for part in tokens.split(self.at_once)]
        fields = [None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*parts)]
        return type(parts[0])(*fields)

    def rows_of(self, found, number):
        """What was found of one batch of the group."""
        rows = slice(number * self.share, (number + 1) * self.share)
        return type(found)(*(None if tensor is None else tensor[rows] for tensor in found))
