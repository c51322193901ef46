"""How results are shown: numbers as text, tables on a terminal or a page, pictures.

Every evaluation has tables(numbers) -> [Table] and, if it has a figure, draw(numbers, figure).
"""
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorasae.io.console import note
from lorasae.io.files import write_bytes

STYLE = Path(__file__).with_name("report.mplstyle")

# ---- Text --------------------------------------------------------------------------------------

def plus_minus(half, form=".4f"):
    """Half an interval's width as text; empty if there is none."""
    return "" if half is None else f"± {half:{form}}"


def with_interval(mean, half, form=".4f"):
    """0.1234 ± 0.0056; only the mean if it has no interval. A "+" in form is for the mean only."""
    if mean is None:
        return ""
    return f"{mean:{form}} {plus_minus(half, form.removeprefix('+'))}".rstrip()


def percent(part):
    """A fraction as a percentage; empty if there is none."""
    return "" if part is None else f"{part:.1%}"


# ---- Tables ------------------------------------------------------------------------------------

class Table(NamedTuple):
    """A table for the terminal and the page."""
    caption: str                        # may be empty
    headings: list
    rows: list                          # of cells: text, or numbers, shown to four decimals
    notes: tuple = ()                   # lines below it


def cell_text(cell):
    """A cell as text, numbers to four decimals."""
    return cell if isinstance(cell, str) else f"{cell:.4f}"


def table_text(rows, headings):
    """Rows of cells in columns: the first aligned to the left, the others to the right."""
    cells = [[cell_text(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *others in cells:
        line = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(line).rstrip())
    return "\n".join(lines)


def as_text(tables):
    """Each table under its caption, followed by its notes."""
    parts = []
    for table in tables:
        parts += ["", table.caption, ""] if table.caption else [""]
        parts.append(table_text(table.rows, table.headings))
        parts += ["", *table.notes] if table.notes else []
    return "\n".join(parts)


# ---- Pictures ----------------------------------------------------------------------------------

def line(axes, x, estimates, label, scale=1):
    """A line with error bars. estimates: (mean, half, ...) at each x; None (NaN) is not drawn."""
    means, halves = scale * np.array([each[:2] for each in estimates], dtype=float).T
    axes.errorbar(x, means, halves, marker="o", label=label)


def save_figure(draw, numbers, path, again):
    """Saves draw's picture as a PNG. Without matplotlib, prints how to get it and draw `again`."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        note(f"no picture: pip install matplotlib && {again}")
        return
    png = io.BytesIO()
    with rc_context(fname=STYLE):
        figure = Figure()
        draw(numbers, figure)
        figure.savefig(png)
    write_bytes(path, png.getvalue())
