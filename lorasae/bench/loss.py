"""The loss against its naive formula (objectives.py): python -m lorasae.bench kl

Shapes: N tokens, D d_model, V vocabulary.
"""
from functools import partial

import torch

from lorasae import objectives
from lorasae.bench.race import differing_tensors, race


def bench_kl(device, quick):
    """KL(base ‖ adapted) and its gradient: the vocabulary of Gemma-2, a quarter of its width, one
    sequence.
    """
    N, D, V = (64, 32, 4096) if quick else (1024, 576, 256_000)
    return race(f"KL, N {N} D {D} V {V}", partial(kl_contenders, N, D, V), differing_tensors, 3,
                device, not quick)


def kl_contenders(N, D, V, device):
    g = torch.Generator(device).manual_seed(0)
    target = torch.randn(N, D, device=device, generator=g)
    hidden = (target + 0.5 * torch.randn(N, D, device=device, generator=g)).requires_grad_()
    head = torch.randn(V, D, device=device, generator=g) * 2 / D ** 0.5

    def run(loss):
        value = loss(target, hidden, head, softcap=30.0)
        return {"loss": value.detach(), "gradient": torch.autograd.grad(value, hidden)[0]}

    return {"naive": lambda: run(objectives.naive_kl),
            "lorasae": lambda: run(partial(objectives.linear_kl, compiled=device == "cuda"))}
