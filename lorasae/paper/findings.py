"""What a part of the paper comes to: tables, and claims of the paper held against our figures.

A part is a module with

    TITLE, FIGURES          "Figures 3 and 4: ...", and the names by which --only picks it, such as ("fig3", "fig4")
    ABOUT                   a paragraph: the definition, and what is different in miniature
    trainings(study)        [Training]: what must be trained before (study.py)
    measure(study)          numbers, a dict of plain values: kept in STUDY/numbers/NAME.json
    tables(numbers)         [Table]
    claims(numbers)         [Claim]
    draw(numbers, figure)   its picture, in the paper's own axes

and, where they are needed,

    cost(study)             {kind of work: tokens} of measuring, or of a piece of it, from which its time follows; kinds
                            are "forward", a pass without gradient, "after" and "all", training adapters on the blocks
                            after the SAE or on all, and "topk", "jumprelu" and "e2e", training an SAE
    pieces(study)           [name] of what can be shared out, which is done before `measure`
    piece(study, name)      its numbers; `measure` is then called as measure(study, {name: numbers})
"""
from itertools import pairwise
from typing import NamedTuple

import torch

from lorasae.evals.common import interval, print_table


class Table(NamedTuple):
    """A table of the terminal and of the page."""
    caption: str
    headings: list
    rows: list                                   # cells: text, or numbers, which print_table rounds


class Claim(NamedTuple):
    """One claim of the paper."""
    says: str
    paper: str                                          # its figure there
    ours: str
    direction: bool | None               # whether ours points the same way; None: it cannot be said
    size: bool | None = None                          # whether it is as large; None: not comparable
    why: str = ""                                       # where it does not agree, or cannot be said
    why_in_miniature: str = ""        # the same, of the embedded models with the tuned recipe alone
    of_paper: bool = True                               # False: of others, or of nobody yet

    @property
    def verdict(self):
        if self.direction is None:
            return "cannot be said"
        if not self.direction:
            return "does not agree"
        return "agrees, in size too" if self.size else "agrees in direction"


# ---- Values of seeds -----------------------------------------------------------------------------

def over_seeds(values):
    """(mean, half of the 90 % confidence interval over seeds, or None of a single one)"""
    return interval(torch.tensor(list(values), dtype=torch.float64))


def with_interval(values, form=".1%"):
    """Values of seeds as text: their mean, and its interval; None is the part of a gap that there is not."""
    if None in values:
        return "no gap"
    return written(*over_seeds(values), form)


def written(mean, half, form):
    """A mean as text, with half of its interval, or without where there is none (None)."""
    if half is None:
        return f"{mean:{form}}"
    without_sign = form.removeprefix("+")
    return f"{mean:{form}} ± {half:{without_sign}}"


# ---- Directions: True, False, or None where it cannot be said ------------------------------------

def sign(values):
    """Whether values of seeds are positive in the mean; None where it is within its interval, or of a single seed."""
    mean, half = over_seeds(values)
    if half is None or abs(mean) <= half:
        return None
    return mean > 0


def opposite(direction):
    """What does not grow shrinks, where anything can be said."""
    return None if direction is None else not direction


def unless_said(direction):
    """The reason of a difference of which nothing can be said; "" where something can."""
    return "the difference is within its interval" if direction is None else ""


def rising(values):
    """Whether every value is larger than the one before."""
    return all(after > before for before, after in pairwise(values))


# ---- The terminal --------------------------------------------------------------------------------

def show(tables):
    for table in tables:
        print(f"\n{table.caption}\n")
        print_table(table.rows, table.headings)
