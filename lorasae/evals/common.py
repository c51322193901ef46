"""What the evaluations share: 90 % confidence intervals, tables, a progress bar with the time left, dropout switched off."""
import math
import sys
from contextlib import contextmanager
from functools import cache

from tqdm import tqdm

@cache
def t_quantile(df):
    """The t with 90 % of Student's distribution of df degrees of freedom within ±t, from its exact series."""
    def inside(t):                                      # P(|T| <= t), Abramowitz & Stegun 26.7.3 and 26.7.4
        theta = math.atan(t / math.sqrt(df))
        total, term = 0.0, math.cos(theta) if df % 2 else 1.0
        for power in range(df % 2, df - 1, 2):
            total += term
            term *= (power + 1) / (power + 2) * math.cos(theta) ** 2
        return (theta + math.sin(theta) * total) * 2 / math.pi if df % 2 else math.sin(theta) * total

    low, high = 1.6, 6.4                                # the quantile falls from 6.31 (df 1) to 1.645
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.9 else (low, middle)
    return low


def interval(values):
    """Independent values [n] -> (mean, half the width of its 90 % confidence interval; None where n < 2)."""
    n = len(values)
    return values.mean().item(), t_quantile(n - 1) * values.std().item() / math.sqrt(n) if n > 1 else None


def ratio(a, b):
    """interval() of mean(a) / mean(b) for paired values [n], to first order; (None, None) where mean(b) is 0."""
    if b.mean() == 0:
        return None, None
    r = a.mean() / b.mean()
    return r.item(), interval((a - r * b) / b.mean())[1]


def plus_minus(half, form=".4f"):
    return "" if half is None else f"± {half:{form}}"


def percent(part):
    return "" if part is None else f"{part:.1%}"


def progress(items, label):
    """Iterates over items behind a progress bar with the time left; on a terminal only."""
    return tqdm(items, desc=label, disable=not sys.stderr.isatty(), dynamic_ncols=True, leave=False)


@contextmanager
def evaluating(model):
    """eval() inside the `with`, and afterwards the mode that was: training that goes on keeps its dropout."""
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
    """Prints rows (sequences of cells) as aligned columns, the first to the left and the rest to the right."""
    rows = ([headings] if headings else []) + list(rows)
    cells = [[cell_text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        line = [first.ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("  ".join(line).rstrip())
