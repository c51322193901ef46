"""SAE training (dictionary.py), frozen model included: python -m lorasae.bench sae"""
import math
import time
from dataclasses import replace

from lorasae import dictionary
from lorasae.bench.race import speed, synchronise
from lorasae.bench.workloads import REAL, SMALL, TINY, precision_of_train, random_setting


class Watch:
    """Stands in for a run.Run: times a training loop in groups of `ahead` sequences, writes nothing, and ends it."""

    def __init__(self, case, groups, device):
        self.group, self.groups, self.device = case.ahead // case.batch, groups, device
        self.config, self.seconds, self.values = {"batch_size": case.batch}, [], {}

    def restore(self, parameters, optimizer):
        return 0

    def progress(self, start, steps):
        for group in range(1 + self.groups):                # the first is not counted
            synchronise(self.device)
            begun = time.perf_counter()
            yield from range(group * self.group, (group + 1) * self.group)
            synchronise(self.device)
            self.seconds.append(time.perf_counter() - begun)

    def log(self, step, **values):
        self.values = values

    def checkpoint_due(self, step):
        return False


def bench_sae(device, quick):
    """dictionary.train itself, frozen model included: a TopK, a JumpReLU and an end-to-end SAE."""
    real = replace(REAL["gemma-2-2b"], width=8 * 2304)
    case = TINY["tiny gemma"] if quick else real if device == "cuda" else SMALL["small gemma"]
    model, _, tokens = random_setting(case, device)
    D, rows = case.config.hidden_size, []
    for method in ("topk", "jumprelu", "e2e"):
        sae = dictionary.new_sae(method, D, case.width, k=64).to(device)
        watch = Watch(case, 3 if quick else 7, device)
        with precision_of_train(device):
            dictionary.train(model, sae, case.layer, lambda skip: turns(tokens, case.batch), watch, steps=10 ** 6, lr=1e-4,
                             clip=1.0, batch_size=case.batch, at_once=case.ahead, end_to_end=method == "e2e", l0=64)
        for name, value in watch.values.items():
            if not math.isfinite(value):
                raise RuntimeError(f"SAE training, {method}: {name} is {float(value)}")
        rows.append(speed(f"SAE training, {method}, D {D} M {case.width}", watch.seconds[1:], tokens.numel()))
    return rows


def turns(tokens, batch):
    """The batches of tokens, again and again."""
    while True:
        yield from tokens.split(batch)
