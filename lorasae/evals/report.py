"""How results are shown: numbers as text, tables on a terminal or a page, pictures.

Every evaluation has tables(numbers) -> [Table] and draw(numbers, figure), which the terminal and
the page of the paper use.
"""
import io
import math
from typing import NamedTuple

from lorasae.io.console import note
from lorasae.io.files import write_bytes

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")    # Okabe & Ito


# ---- Text --------------------------------------------------------------------------------------

def plus_minus(half, form=".4f"):
    """Half an interval's width as text; empty if there is none."""
    return "" if half is None else f"± {half:{form}}"


def with_interval(mean, half, form=".4f"):
    """0.1234 ± 0.0056, or only the mean if there is no interval; empty if there is no mean.

    form: the format of both numbers; a "+" in it shows the sign of the mean.
    """
    if mean is None:
        return ""
    return f"{mean:{form}} {plus_minus(half, form.removeprefix('+'))}".rstrip()


def percent(part):
    """A part of 1 in percent; empty if there is none."""
    return "" if part is None else f"{part:.1%}"


# ---- Tables ------------------------------------------------------------------------------------

class Table(NamedTuple):
    """A table for the terminal and the page."""
    caption: str                        # may be empty
    headings: list
    rows: list                          # of cells: text, or numbers, shown to four places
    notes: tuple = ()                   # lines below it


def cell_text(cell):
    """A cell as text, numbers to four places."""
    return cell if isinstance(cell, str) else f"{cell:.4f}"


def print_table(rows, headings=None):
    """Prints rows of cells in columns: the first aligned to the left, the others to the right."""
    rows = ([headings] if headings else []) + list(rows)
    cells = [[cell_text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        line = [first.ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("  ".join(line).rstrip())


def print_tables(tables):
    """Prints each table under its caption, followed by its notes."""
    for table in tables:
        print(f"\n{table.caption}\n" if table.caption else "")
        print_table(table.rows, table.headings)
        if table.notes:
            print()
        for line in table.notes:
            print(line)


# ---- Pictures ----------------------------------------------------------------------------------

def error_bar(half, scale=1):
    """scale times half an interval's width; NaN, which matplotlib does not draw, if it is None."""
    return math.nan if half is None else scale * half


def lines(axes, x, series, scale=1):
    """Lines with error bars; series: {label: [(mean, half, ...) at each x]}."""
    for label, found in series.items():
        axes.errorbar(x, *columns(found, scale), marker="o", capsize=3, label=label)


def bars(axes, names, series, scale=1):
    """Grouped bars with error bars: one group per name, one bar in it per series.

    series: {label: [(mean, half, ...) for each name]}
    """
    width = 0.8 / len(series)
    for i, (label, found) in enumerate(series.items()):
        offset = width * (i - (len(series) - 1) / 2)
        places = [place + offset for place in range(len(names))]
        means, halves = columns(found, scale)
        axes.bar(places, means, width, yerr=halves, capsize=2, label=label)
    axes.set_xticks(range(len(names)), names)


def columns(found, scale=1):
    """[(mean, half, ...)] -> means and halves, as matplotlib takes them."""
    means = [error_bar(mean, scale) for mean, *_ in found]
    halves = [error_bar(half, scale) for _, half, *_ in found]
    return means, halves


def zero_line(axes):
    axes.axhline(0, color="grey", linewidth=1)


def save_figure(draw, numbers, path, again):
    """Writes what draw(numbers, figure) draws as a PNG. Without matplotlib, notes what to do.

    again: the command that draws it again.
    """
    try:
        from matplotlib import cycler, rc_context
        from matplotlib.figure import Figure
    except ImportError:
        note(f"no picture: pip install matplotlib && {again}")
        return
    style = {
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
    }
    png = io.BytesIO()
    with rc_context(style):
        figure = Figure(layout="constrained")
        draw(numbers, figure)
        figure.savefig(png, format="png", dpi=150)
    write_bytes(path, png.getvalue())
