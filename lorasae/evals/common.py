"""What the evaluations share: 90 % confidence intervals, a progress bar.

Sequences from one document are alike, so they give less information than the same number from
different documents. An interval over documents sums the deviations within each document before it
squares them (a cluster-robust variance), corrects for few documents of unequal length (CR2, Bell &
McCaffrey 2002), and uses Student's t with the degrees of freedom that Imbens & Kolesár (2016)
derive from the correlation within documents. For a mean, all of this has a closed form.

    G documents; document g has n_g of the n sequences, a share h_g = n_g / n
    mean       m = Σ x / n
    variance   Σ_g S_g² / (1 - h_g) / n²      with S_g = Σ of (x - m) over document g
    freedom    (tr B)² / tr B²                with B the covariance of the S_g / √(1 - h_g)

If each document is one sequence, this is Student's interval.
"""
import math
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from lorasae.errors import InputError
from lorasae.lora import base

# An interval needs this many effective documents, 1 / Σ h_g². In simulation, intervals over 8 or
# more cover 87 to 93 % if the correlation in a document is at most 0.3 (tests/test_evals.py).
ENOUGH = 8


# ---- Intervals ---------------------------------------------------------------------------------

@cache
def t_quantile(df):
    """The t with 90 % of Student's distribution within ±t, for df >= 1 degrees of freedom.

    P(|T| <= t) is the integral of cos^(df - 1) from 0 to atan(t / √df), times a constant.
    """
    angles = np.linspace(0, min(math.pi / 2, 12 / math.sqrt(df)), 20_001)
    middles = (angles[1:] + angles[:-1]) / 2
    mass = np.cumsum(np.cos(middles) ** (df - 1))
    angle = np.interp(0.9 * mass[-1], mass, angles[1:])
    return math.sqrt(df) * math.tan(angle)


def interval(values, clusters=None):
    """Values [n] -> (mean, half the width of its 90 % confidence interval).

    clusters: [n] int, the document of each value. None: the values are independent. The half
    width is None if all values are equal, or if there are too few documents for an interval.
    """
    n = len(values)
    mean = values.mean().item()
    if n < 2 or (values == values[0]).all():            # no spread to estimate
        return mean, None
    if clusters is None:
        return mean, t_quantile(n - 1) * values.std().item() / math.sqrt(n)

    sizes, sums, correlation = by_cluster(values.double() - mean, clusters)
    if n ** 2 / sizes.square().sum() < ENOUGH:
        return mean, None
    variance = (sums.square() / (1 - sizes / n)).sum().item() / n ** 2
    return mean, t_quantile(freedom(sizes, correlation)) * math.sqrt(variance)


def by_cluster(deviations, clusters):
    """Deviations from their mean [n] -> (sizes [G], sums [G], correlation within clusters).

    The correlation is the mean product of two deviations in one cluster, divided by the variance;
    at least 0, and 0 if no cluster has two values.
    """
    _, cluster = clusters.unique(return_inverse=True)
    sizes = cluster.bincount().double()
    sums = cluster.bincount(deviations)
    pairs = (sizes * (sizes - 1)).sum()
    total = deviations.square().sum()
    products = (sums.square().sum() - total) / pairs.clamp(min=1)
    correlation = products / (total / len(deviations))
    return sizes, sums, correlation.clamp(0, 1).item()


def freedom(sizes, correlation):
    """The degrees of freedom of the variance of a mean over clusters of these sizes [G].

    The sum over cluster g has the variance v_g = n_g (1 - correlation) + n_g² correlation. With the
    mean subtracted, cov(S) = diag(v) - v hᵀ - h vᵀ + Σv h hᵀ. So B, which is cov(S) divided by
    √(1 - h) from both sides, is diag(d) + U M Uᵀ with U [G, 2]; no [G, G] matrix is needed.
    """
    share = sizes / sizes.sum()
    v = sizes * (1 - correlation) + sizes.square() * correlation
    d = v / (1 - share)
    U = torch.stack((v, share), dim=1) / (1 - share).sqrt()[:, None]
    M = v.new_tensor([[0, -1], [-1, v.sum()]])

    within = M @ U.T @ U
    trace = d.sum() + within.trace()
    mixed = M @ (U.T * d) @ U
    of_square = d.square().sum() + 2 * mixed.trace() + (within @ within).trace()
    return (trace.square() / of_square).item()


def ratio(a, b, clusters=None):
    """interval() of mean(a) / mean(b), paired [n], to first order; (None, None) if mean(b) is 0."""
    if b.mean() == 0:
        return None, None
    return interval(linearised(a, b), clusters)


def linearised(a, b):
    """Values [n] whose mean is mean(a) / mean(b), and whose interval is the ratio's to first order.

    Compares two ratios in pairs: interval(linearised(a, b) - linearised(c, d), documents).
    """
    a, b = a.double(), b.double()
    r = a.mean() / b.mean()
    return r + (a - r * b) / b.mean()


# ---- Estimates ---------------------------------------------------------------------------------

def with_ci90(found):
    """{name: (mean, half)} -> {name: mean, ..., "ci90": {name: half}}, as in the JSON files."""
    means = {name: mean for name, (mean, _) in found.items()}
    return {**means, "ci90": {name: half for name, (_, half) in found.items()}}


class Estimate(NamedTuple):
    """A number, its interval, and what the interval is over."""
    mean: float
    half: float | None                  # half the width of its 90 % interval, if it has one
    over: str                           # such as "3 seeds" or "29 documents"


def over_documents(values, documents):
    """The Estimate of a mean over sequences; values [n], documents [n] int."""
    return Estimate(*interval(values, documents), f"{len(documents.unique())} documents")


def without_interval(documents):
    """The line that explains a missing interval. documents: how many there are."""
    return f"too few documents for an interval: {documents}"


# ---- What every evaluation needs ---------------------------------------------------------------

def batches(setting):
    """The held-out text of a run, in batches of tokens [B, T]."""
    return setting.text.held_out.split(setting.config.eval_batch)


def progress(items, label):
    """Iterates over items with a progress bar, on a terminal only."""
    return tqdm(items, desc=label, disable=None, dynamic_ncols=True, leave=False)


def check_latents(latents, count):
    """InputError if --latents names any that an SAE with `count` latents does not have."""
    if not 0 <= min(latents) <= max(latents) < count:
        raise InputError(f"--latents: the SAE has latents 0 to {count - 1}")


def as_model(model, name):
    """A context in which the adapters are on ("lora" and "adapted") or off (all other names)."""
    return nullcontext() if name in ("lora", "adapted") else base(model)
