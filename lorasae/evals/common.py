"""What the evaluations share: 90 % confidence intervals, tables, a progress bar, dropout off.

Sequences of one document are alike, so a sequence tells less than a document of its own would.
An interval over documents sums the deviations within each document before it squares them
(a cluster-robust variance), corrects for the few documents and their unequal lengths (CR2, Bell &
McCaffrey 2002), and uses Student's t with the degrees of freedom that Imbens & Kolesár (2016)
derive from the correlation within documents. For a mean, all of this has a closed form.

    G documents; document g holds n_g of the n sequences, a share h_g = n_g / n
    mean       m = Σ x / n
    variance   Σ_g S_g² / (1 - h_g) / n²      with S_g = Σ of (x - m) over document g
    freedom    (tr B)² / tr B²                with B the covariance of the S_g / √(1 - h_g)

For sequences that are each a document of their own this is Student's interval.
"""
import math
import sys
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from tqdm import tqdm

# Effective documents, 1 / Σ h_g². From here on intervals cover 87 to 93 % in simulation, if values of
# one document correlate by at most 0.3 (tests/test_evals.py); with fewer than 5 they do not.
ENOUGH = 8


# ---- Intervals ---------------------------------------------------------------------------------

@cache
def t_quantile(df):
    """The t with 90 % of Student's distribution within ±t, for df >= 1 degrees of freedom.

    P(|T| <= t) is the integral of cos^(df - 1) up to the angle atan(t / √df), times a constant.
    It is concave in t, so Newton's steps from below the root never pass it.
    """
    nodes, weights = np.polynomial.legendre.leggauss(40)
    log_constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2)
    constant = 2 / math.sqrt(math.pi) * math.exp(log_constant)

    t = 1.6                                             # from 6.31 (df 1) it falls to 1.645
    for _ in range(20):
        angle = math.atan(t / math.sqrt(df))
        heights = np.cos(angle / 2 * (nodes + 1)) ** (df - 1)
        inside = constant * angle / 2 * (weights * heights).sum()
        density = constant / math.sqrt(df) * (1 + t * t / df) ** (-(df + 1) / 2)
        t += (0.9 - inside) / density
    return float(t)


def interval(values, clusters=None):
    """Values [n] -> (mean, half the width of its 90 % confidence interval).

    clusters: [n] int, the document of each value. None: all values are independent. The half
    width is None if there is one value, or if there are too few documents for an interval.
    """
    n = len(values)
    mean = values.mean().item()
    if clusters is None:
        if n < 2:
            return mean, None
        return mean, t_quantile(n - 1) * values.std().item() / math.sqrt(n)

    sizes, sums, correlation = by_cluster(values.double() - mean, clusters)
    if effective(sizes) < ENOUGH:
        return mean, None
    variance = (sums.square() / (1 - sizes / n)).sum().item() / n ** 2
    return mean, t_quantile(freedom(sizes, correlation)) * math.sqrt(variance)


def by_cluster(deviations, clusters):
    """Deviations from their mean [n] -> (sizes [G], their sums [G], correlation within clusters).

    The correlation is the mean product of two deviations of one cluster, in units of the
    variance; at least 0, and 0 if no cluster has two values.
    """
    names, cluster = torch.as_tensor(clusters).unique(return_inverse=True)
    sizes = torch.bincount(cluster).double()
    sums = torch.zeros_like(sizes).index_add(0, cluster, deviations)
    pairs = (sizes * (sizes - 1)).sum()
    total = deviations.square().sum()
    if pairs == 0 or total == 0:
        return sizes, sums, 0.0
    products = (sums.square().sum() - total) / pairs
    correlation = products / (total / len(deviations))
    return sizes, sums, correlation.clamp(0, 1).item()


def freedom(sizes, correlation):
    """The degrees of freedom of the variance of a mean over clusters of these sizes [G].

    If two values of one cluster have this correlation, the sum of cluster g alone has variance
    v_g = n_g (1 - correlation) + n_g² correlation. The mean is taken out of every value, so
    cov(S_g, S_h) = δ_gh v_g - h_h v_g - h_g v_h + h_g h_h Σ v.
    """
    share = sizes / sizes.sum()
    v = sizes * (1 - correlation) + sizes.square() * correlation
    mixed = v[:, None] * share
    covariance = v.diag() - mixed - mixed.T + share[:, None] * share * v.sum()
    scale = (1 - share).rsqrt()
    B = scale[:, None] * covariance * scale
    return (B.trace().square() / B.square().sum()).item()


def effective(sizes):
    """How many documents of one size say as much as documents of these sizes [G]."""
    return (sizes.sum().square() / sizes.square().sum()).item()


def ratio(a, b, clusters=None):
    """interval() of mean(a) / mean(b) for paired values [n], to first order.

    (None, None) if mean(b) is 0.
    """
    if b.mean() == 0:
        return None, None
    r = a.mean() / b.mean()
    return r.item(), interval((a - r * b) / b.mean(), clusters)[1]


def count_documents(documents):
    """How many different documents there are in [n], the document of each sequence."""
    return len(torch.as_tensor(documents).unique())


# ---- Text --------------------------------------------------------------------------------------

def without_interval(documents):
    """Why there is no interval, in words. documents: how many."""
    return f"too few documents for an interval: {documents}"


def plus_minus(half, form=".4f"):
    """Half an interval as text; nothing if there is none."""
    return "" if half is None else f"± {half:{form}}"


def percent(part):
    return "" if part is None else f"{part:.1%}"


def error_bar(half, scale=1):
    """scale times half an interval, for matplotlib: NaN, which draws no bar, if there is none."""
    return math.nan if half is None else scale * half


def progress(items, label):
    """Iterates over items behind a progress bar with the time left, on a terminal only."""
    return tqdm(items, desc=label, disable=not sys.stderr.isatty(), dynamic_ncols=True, leave=False)


@contextmanager
def evaluating(model):
    """eval() inside the `with`, and the model's own mode again afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def cell_text(cell):
    """A cell of a table: text as it is, numbers to four places."""
    return cell if isinstance(cell, str) else f"{cell:.4f}"


def print_table(rows, headings=None):
    """Prints rows of cells as aligned columns, the first to the left and the rest to the right."""
    rows = ([headings] if headings else []) + list(rows)
    cells = [[cell_text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        line = [first.ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("  ".join(line).rstrip())
