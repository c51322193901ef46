"""The LoRA step beside two peers (peers.py), ranks in one pass, FLOPs.

    python -m lorasae.bench step
"""
import sys
from dataclasses import replace
from functools import partial

import torch

from lorasae.bench.race import differing_tensors, race, timed
from lorasae.bench.workloads import (
    REAL, SMALL, TINY, InTurn, Ours, flops_per_token, random_adapter, random_setting)
from lorasae.io.adapters import adapter_state
from lorasae.linear import linear
from lorasae.lora import attach_lora

PAPER_TOKENS = 15_000_000


def bench_step(device, quick):
    """The step beside its peers, five ranks in one pass beside five runs, and FLOPs at the real
    models' shapes.
    """
    real = {name: REAL[name] for name in ("gemma-2-2b", "llama-3.2-1b", "gemma-2-9b")}
    cases = TINY if quick else SMALL if device == "cpu" else real
    ranks = (1, 2, 3, 4, 5) if quick else (1, 2, 4, 8, 32) if device == "cpu" else (1, 4, 16, 64,
                                                                                    256)
    if cases is real:
        cases["gemma-2-2b, 8 sequences a step"] = replace(REAL["gemma-2-2b"], batch=8)
    peers, rounds, rows = load_peers(), 3 if quick else 7, []
    measure = partial(race, rounds=rounds, device=device, memory=not quick,
                      answer=lambda each: each.answer(), warm=2)
    for name, case in cases.items():
        peak = matmul_peak(device, case.dtype, 256 if quick else 1024 if device == "cpu" else 8192)
        build = partial(lora_contenders, case, peers)
        found = measure(f"LoRA step, {name}", build, partial(differing_steps, case))
        rows += [with_rates(row, case, peak) for row in found]
    name, case = next(iter(cases.items()))
    rows += measure(f"ranks {' '.join(map(str, ranks))}, {name}",
                    partial(sweep_contenders, case, ranks),
                    partial(differing_steps, case))
    return rows + flops_rows(TINY if quick else REAL)


def with_rates(row, case, peak):
    """A race's row with tokens a second, seconds for the paper's 15M tokens, and its part of the
    `peak` FLOP/s.
    """
    flops = flops_per_token(case, recipe=not row["contender"].startswith("lorasae"))
    rate = case.ahead * case.context / (row["ms"] / 1e3)
    return {**row, "tokens_per_s": rate, "s_15M": PAPER_TOKENS / rate,
            "gflop_per_token": flops / 1e9,
            "utilisation": flops * rate / peak}


def flops_rows(cases):
    """A step's FLOPs per token: the published recipe's, ours, and ours for each of five adapters.

    ours_flops: ours over the contender's. For five side by side it is how many times fewer FLOPs
    they need than five runs, and so about the most that one pass can gain in time.
    """
    rows = []
    for name, case in cases.items():
        one, two = flops_per_token(case), flops_per_token(case, side_by_side=2)
        own = two - one                                 # what each set adds to what all share
        flops = {
            "published recipe": flops_per_token(case, recipe=True),
            "lorasae": one,
            "lorasae, each of five": (one + 4 * own) / 5,
        }
        rows += [{"what": f"FLOPs, {name}", "contender": who, "gflop_per_token": count / 1e9,
                  "ours_flops": flops["lorasae"] / count} for who, count in flops.items()]
    return rows


def load_peers():
    """Whether the peers can run; prints a line if not."""
    try:
        from lorasae.bench import peers  # noqa: F401 - asks whether it can be imported
    except ModuleNotFoundError as missing:
        if missing.name not in ("peft", "transformers"):
            raise
        print(f"without the peers, as {missing.name} is not installed: "
              "pip install transformers peft", file=sys.stderr)
        return False
    return True


def lora_contenders(case, peers, device):
    """The same model, SAE, adapters and tokens for all. peers: whether they can run."""
    model, sae, tokens = random_setting(case, device)
    weights = model.state_dict()                            # before there are adapters in it
    adapters = random_adapter(model, case.blocks, case.rank)
    contenders = {}
    if peers:
        from lorasae.bench.peers import Peer, attention_name
        adapter = adapter_state(attach_lora(model, adapters))
        keep = None if sae.on_special else model.special(tokens)
        peer = partial(Peer, case, weights, adapter, sae, tokens, keep)
        contenders["official"] = peer(tuned=False)
        contenders[f"tuned, {attention_name(case.config, tokens.is_cuda)}"] = peer(tuned=True)
    contenders["lorasae, dropout 0.1"] = Ours(case, model, sae, tokens, [adapters], dropout=0.1)
    contenders["lorasae"] = Ours(case, model, sae, tokens, [adapters])
    return contenders


def sweep_contenders(case, ranks, device):
    model, sae, tokens = random_setting(case, device)
    several = [random_adapter(model, case.blocks, rank) for rank in ranks]
    runs = [Ours(case, model, sae, tokens, [adapters]) for adapters in several]
    return {f"{len(ranks)} runs": InTurn(runs),
            "lorasae": Ours(case, model, sae, tokens, several)}


def differing_steps(case, answer, reference):
    """In fp32 the loss and every gradient; in bf16 only the loss, as bf16 logits give the peers
    other gradients.
    """
    if case.dtype == torch.float32:
        return differing_tensors(answer, reference, 1e-3)
    return differing_tensors(answer, {"loss": reference["loss"]}, 0.05)


def matmul_peak(device, dtype, size):
    """FLOP/s of a square matrix product, the best of ten."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    linear(a, b)
    return 2 * size ** 3 / min(timed(lambda: linear(a, b), device) for _ in range(10))
