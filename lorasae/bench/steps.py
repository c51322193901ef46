"""Benchmarks of train.py's steps.

    python -m lorasae.bench step        the LoRA step against peers, five ranks in one pass, FLOPs
    python -m lorasae.bench headline    the step of `train.py --model gemma-2-2b`, in detail
"""
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from lorasae.bench.race import ROUNDS, Floor, matmul_peak, milliseconds, race, synchronise, timed
from lorasae.bench.workloads import REAL, TINY, cases_for, cases_of, flops_per_token, random_setting
from lorasae.io.adapters import adapter_state
from lorasae.io.console import note
from lorasae.lora import attach_lora, detach_lora
from lorasae.runs.adapting import Adapting, new_adapters
from lorasae.runs.config import Config
from lorasae.runs.training import compiled_blocks, frozen_parts


def bench_step(device, quick):
    """FLOPs, the step against its peers, and five ranks in one pass against five runs."""
    for name, case in (TINY if quick else REAL).items():
        # GFLOPs per token: the published recipe's, ours, and ours for each of five adapters in one
        # pass, which can be about `five_gain` times as fast as five runs.
        recipe = sum(flops_per_token(case, recipe=True))
        shared, own = flops_per_token(case)
        ours, of_five = shared + own, shared / 5 + own
        yield {"what": "GFLOPs per token", "model": name, "recipe": recipe / 1e9,
               "ours": ours / 1e9, "ratio": ours / recipe, "each_of_five": of_five / 1e9,
               "five_gain": ours / of_five}

    cases = cases_for(device, quick)
    for name, case in cases.items():
        peak = matmul_peak(device, case.dtype)
        tolerance = 1e-3 if case.dtype == torch.float32 else 0.05       # bf16: losses only
        build = partial(lora_contenders, case)
        for row in race(f"LoRA step, {name}", build, device, quick, tolerance):
            yield with_rates(row, case, peak)

    name, case = next(iter(cases.items()))
    yield from race(f"five ranks, {name}", partial(sweep_contenders, case), device, quick)


def bench_real(folders, quick):
    """The step of real models against its peers and its floor, its matrix products alone."""
    for folder in folders:
        for name, case in cases_of(folder).items():
            build = partial(lora_contenders, case)
            yield from race(f"LoRA step, {name}", build, "cpu", quick, 1e-3, rounds=3)


def bench_headline(device, quick):
    """The headline step: speed, memory, a warning for each wait for a GPU, launches and kernels."""
    name, case = next(iter(cases_for(device, quick).items()))
    peak = matmul_peak(device, case.dtype)
    step = Ours(case, *random_setting(case, device), (case.rank,), dropout=0.1)
    step()                                              # the first one warms up
    times = [timed(step, device) for _ in range(ROUNDS)]
    row = {"what": f"headline step, {name}", "contender": "lorasae", **milliseconds(times)}
    if device == "cuda":
        row["allocated_mb"] = torch.cuda.max_memory_allocated() / 1e6
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")

    with torch.profiler.profile() as profile:
        step()
        synchronise(device)
    yield with_rates(row, case, peak)
    print(profile.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=20),
          flush=True)


# ---- Rates and FLOPs -----------------------------------------------------------------------------

def with_rates(row, case, peak):
    """Adds tokens per second, GFLOPs per token and the share of `peak` (FLOP/s) to a row."""
    flops = sum(flops_per_token(case, recipe=not row["contender"].startswith("lorasae")))
    rate = case.ahead * case.context / (row["ms"] / 1e3)
    return {**row, "tokens_per_s": rate, "gflop_per_token": flops / 1e9,
            "utilisation": flops * rate / peak, "peak_tflops": peak / 1e12}


# ---- The contenders ------------------------------------------------------------------------------

class Ours:
    """Calling it takes `ahead / batch` steps of train.py, with adapters of all `ranks` in one pass.

    Its answer is the loss of the first step, without dropout, and its gradients.
    """

    def __init__(self, case, model, sae, tokens, ranks, dropout=0.0):
        device = tokens.device.type
        if device == "cuda":                            # TF32 for fp32 products, as in train.py
            torch.set_float32_matmul_precision("high")
        config = Config(batch_size=case.batch, context=case.context, ahead=case.ahead, rank=ranks,
                        tokens=case.ahead * case.context, device=device, dropout=dropout)
        detach_lora(model)                              # another contender's adapters
        self.batches = tokens.split(case.batch)
        self.adapters = new_adapters(model, case.blocks, config)
        for own in self.adapters:
            torch.manual_seed(1)
            for module in own.values():                 # not zero, so that they change something
                nn.init.normal_(module.lora_B.weight, std=0.1 / module.lora_B.in_features)
        self.kind = Adapting(model, {case.layer: sae}, self.adapters, config)

    def ready(self):
        """A context in which the first adapters are attached and, on a GPU, blocks compiled."""
        model = attach_lora(self.kind.model, self.adapters[0])
        return compiled_blocks(model) if self.kind.config.compile else nullcontext()

    def __call__(self):
        kind = self.kind
        kind.model.train()
        with self.ready():                              # the steps as training.train takes them
            parts = frozen_parts(kind, lambda step: self.batches[step].cpu(), 0)
            for step, part in enumerate(parts):
                kind.step(part, step)

    def answer(self):
        kind, batch = self.kind, self.batches[0]
        kind.model.eval()
        with self.ready():
            losses, _ = kind.losses(kind.frozen(batch))
        loss = losses.sum() / len(batch)
        return [loss.detach(), *torch.autograd.grad(loss, kind.tensors)]


def lora_contenders(case, device):
    """All share model, SAE, adapters, tokens. Real models add "its products", our step's floor."""
    model, sae, tokens = random_setting(case, device)
    weights = model.state_dict()
    ours = partial(Ours, case, model, sae, tokens, (case.rank,))
    plain = ours()
    contenders = {}
    try:
        from lorasae.bench.peers import Peer, attention_name
        peer = partial(Peer, case, weights, adapter_state(model), sae, tokens)
        contenders["official"] = peer(tuned=False)
        contenders[f"tuned, {attention_name(case.config, device)}"] = peer(tuned=True)
    except ModuleNotFoundError as missing:
        note(f"leaving out the peers: {missing} (pip install transformers peft)")
    if case.folder:
        contenders["its products"] = Floor(plain)
    else:
        contenders["lorasae, dropout 0.1"] = ours(dropout=0.1)
    return {**contenders, "lorasae": plain}


def sweep_contenders(case, device):
    """Adapters of five ranks. tests/test_sweep.py shows that each is trained as if alone."""
    setting, ranks = random_setting(case, device), (1, 2, 4, 8, 32)
    runs = [Ours(case, *setting, (rank,)) for rank in ranks]

    def in_turn():
        for run in runs:
            run()
        return []

    return {"five runs": in_turn, "lorasae": Ours(case, *setting, ranks)}
