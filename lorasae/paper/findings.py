"""What a part of the paper comes to: tables, and claims of the paper held against our figures.

A part is a module with

    TITLE, FIGURES          "Figures 3 and 4: ...", and the names by which --only picks it, such as ("fig3", "fig4")
    ABOUT                   a paragraph: the definition, and what is different in miniature
    trainings(study)        [Training]: what must be trained before (study.py)
    measure(study)          numbers, a dict of plain values: what STUDY/NAME.json holds
    tables(numbers)         [Table]
    claims(numbers)         [Claim]
    draw(numbers, figure)   its picture, in the paper's own axes

and, where its work can be shared out, pieces(study) -> [name] and piece(study, name), which are done before `measure`.
"""
from typing import NamedTuple

import torch

from lorasae.evals.common import interval, print_table


class Table(NamedTuple):
    caption: str
    headings: list
    rows: list                                          # cells: text, or numbers, which print_table rounds


class Claim(NamedTuple):
    """One claim of the paper."""
    says: str
    paper: str                                          # its figure there
    ours: str
    direction: bool | None                              # whether ours points the same way; None: it cannot be said
    size: bool | None = None                            # whether it is as large; None: not comparable
    why: str = ""                                       # where it does not agree, or cannot be said
    of_paper: bool = True                               # False: of others, or of nobody yet

    @property
    def verdict(self):
        if self.direction is None:
            return "cannot be said"
        if not self.direction:
            return "does not agree"
        return "agrees, in size too" if self.size else "agrees in direction"


def over_seeds(values):
    """(mean, half of the 90 % confidence interval over seeds, or None of a single one)"""
    return interval(torch.tensor(list(values), dtype=torch.float64))


def sign(values):
    """Whether values of seeds are positive: True or False where their mean is beyond its interval; None where that cannot be said."""
    mean, half = over_seeds(values)
    return None if half is None or abs(mean) <= half else mean > 0


def with_interval(values, form=".1%"):
    """Values of seeds as text: their mean, and its interval; None is the part of a gap that there is not."""
    if None in values:
        return "no gap"
    mean, half = over_seeds(values)
    return f"{mean:{form}}" + ("" if half is None else f" ± {half:{form}}")


def show(tables):
    for table in tables:
        print(f"\n{table.caption}\n")
        print_table(table.rows, table.headings)
