"""SAE training (dictionary.py), frozen model included: python -m lorasae.bench sae"""
import math
import time
from dataclasses import replace

from lorasae import dictionary
from lorasae.bench.race import speed, synchronise
from lorasae.bench.workloads import REAL, SMALL, TINY, precision_of_train, random_setting
from lorasae.runs.config import Config


def bench_sae(device, quick):
    """dictionary.take_step, frozen model included: a TopK, a JumpReLU and an end-to-end SAE."""
    real = replace(REAL["gemma-2-2b"], width=8 * 2304)
    case = TINY["tiny gemma"] if quick else real if device == "cuda" else SMALL["small gemma"]
    model, _, tokens = random_setting(case, device)
    D, rows = case.config.hidden_size, []
    for method in ("topk", "jumprelu", "e2e"):
        sae = dictionary.new_sae(method, D, case.width, k=64).to(device)
        with precision_of_train(device):
            seconds, values = timed_groups(model, sae, case, tokens, method, groups=3 if quick
                                           else 7)
        for name, value in values.items():
            if not math.isfinite(value):
                raise RuntimeError(f"SAE training, {method}: {name} is {float(value)}")
        rows.append(speed(f"SAE training, {method}, D {D} M {case.width}", seconds, tokens.numel()))
    return rows


def timed_groups(model, sae, case, tokens, method, groups):
    """(seconds per group of `ahead` sequences but the first, what the last step logged)."""
    end_to_end, size = method == "e2e", case.ahead // case.batch
    config = Config(method=method, lr=1e-4, l0=64, batch_size=case.batch, context=case.context,
                    tokens=(1 + groups) * tokens.numel(), device=tokens.device.type)
    seen = dictionary.observe(model, sae, case.layer, tokens[:case.batch], end_to_end=False)
    training = dictionary.begin(sae, seen, config)

    seconds, values, begun = [], {}, time.perf_counter()
    observations = repeated(model, sae, case, tokens, end_to_end)
    for step in range(config.steps):
        seen = next(observations)
        values = dictionary.take_step(model, sae, case.layer, seen, step, training, config)
        if (step + 1) % size == 0:
            synchronise(tokens.device.type)
            now = time.perf_counter()
            seconds.append(now - begun)
            begun = now
    return seconds[1:], values


def repeated(model, sae, case, tokens, end_to_end):
    """Observations of the same tokens again and again, the frozen part of all at once."""
    while True:
        seen = dictionary.observe(model, sae, case.layer, tokens, end_to_end)
        tensors = seen if end_to_end else seen[:2]
        for parts in zip(*(tensor.split(case.batch) for tensor in tensors)):
            yield dictionary.Observation(*parts)
