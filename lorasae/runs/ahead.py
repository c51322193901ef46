"""The frozen part of several steps at once, before their turn: larger products, and the same steps to the bit.

What the prefix and the teacher compute of a batch depends on nothing that is trained, so it may run for many sequences
together. `--ahead 8` lets a GPU work on eight sequences where a step, as published, has one.

Shapes: B batch, T tokens.
"""
import torch

from lorasae.runs import distributed


class Ahead:
    """Iterates over work(tokens) of every batch [B, T] from the start-th on, which it calls for several batches at once.

    work(tokens) returns a NamedTuple of tensors [B, ...] (or None) that depend on nothing that is trained. batches: an
    iterator of (tokens, position of the batch after them); `.start` is its own position. Of several processes each works
    on its share of every batch.

    `position`: where a run that is resumed after the last step has to begin. Its groups must hold the same batches, so
    within a group that is the group's beginning, and the batches that were done already are worked on again and skipped.
    """

    def __init__(self, batches, start, config, work):
        self.batches, self.work = batches, work
        self.at_once = max(config.ahead, config.micro_batch)
        self.share = len(distributed.share(range(config.batch_size)))      # rows of a batch that are this process's
        self.group = max(1, self.at_once // self.share)                    # batches that are worked on together
        self.done = start % self.group
        self.position = batches.start

    def __iter__(self):
        begin = self.batches.start
        while True:
            tokens, after = self.take_group()
            if not tokens:
                return
            found = self.work_on(torch.cat(tokens))
            for number in range(self.done, len(tokens)):
                last = number + 1 == self.group
                self.position = after if last else begin
                yield self.rows_of(found, number)
            self.done, begin = 0, after

    def take_group(self):
        """([this process's share of each of the next batches], the position after them)."""
        tokens, after = [], None
        for batch, after in self.batches:
            tokens.append(distributed.share(batch))
            if len(tokens) == self.group:
                break
        return tokens, after

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
