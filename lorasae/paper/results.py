"""The results of a part: rows, tables, and claims whose verdicts follow one rule.

Every case of a claim is an Estimate with a 90 % interval. A case

    agrees          if its mean is beyond the claim's threshold by more than half its interval
    differs         if it is as far on the other side
    within noise    if it is nearer to the threshold
    no interval     if it has none: too few documents, equal values, or an undefined ratio

A claim gets the verdict that more than half of its cases share; otherwise it is "mixed". Nothing is
pooled over models, points or latents: each is a separate case.

Numbers are plain values that are stored as JSON, where an Estimate is a list [mean, half, over].
"""
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from lorasae.evals.common import Estimate, interval
from lorasae.evals.report import Table, with_interval

PAPER = tomllib.loads(Path(__file__).with_name("paper.toml").read_text(encoding="utf-8"))
VERDICTS = ("agrees", "differs", "within noise", "no interval")
OF_SEVERAL = {"agrees": "agree", "differs": "differ"}


class Part(NamedTuple):
    """Some figures and tables of the paper. What the paper says about them is in paper.toml."""
    name: str                           # in paper.toml, and of numbers/NAME.json
    jobs: Callable                      # study -> [Job]; the Jobs that these need are added
    measure: Callable                   # study -> numbers; {"cases": {claim: its cases}, ...}
    draw: Callable | None               # (numbers, figure); None if the paper has only tables
    own_tables: Callable                # numbers -> [Table], without the paper's

    @property
    def words(self):
        """Title, figures (for --only, such as "fig3"), about, and caption (what error bars are)."""
        return PAPER[self.name]

    def tables(self, numbers):
        """Ours, then the paper's."""
        papers = self.words.get("tables", [])
        return [*self.own_tables(numbers), *(Table(**known) for known in papers)]

    def claims(self, numbers):
        """The claims for which the study has cases."""
        cases = numbers["cases"]
        return [Claim(**known, cases=cases[name])
                for name, known in self.words["claims"].items() if cases.get(name)]


# ---- Claims --------------------------------------------------------------------------------------

@dataclass
class Claim:
    """One claim of the paper: our value is above a threshold, or below it."""
    figure: str                         # such as "Fig. 3"
    says: str
    paper: str                          # what the paper reports, as text
    cases: dict                         # {name: Estimate, or its list from JSON}
    threshold: float = 0.0
    larger: bool = True                 # False: our value is below the threshold
    paper_values: tuple = ()            # the paper's numbers, in the same unit
    form: str = "+.3f"
    unit: str = "nats"

    def __post_init__(self):
        self.cases = {name: Estimate(*found) for name, found in self.cases.items()}

    def verdict_of(self, name):
        """The verdict of one case."""
        mean, half, _ = self.cases[name]
        if half is None:
            return "no interval"
        if abs(mean - self.threshold) <= half:
            return "within noise"
        return "agrees" if (mean > self.threshold) == self.larger else "differs"

    @property
    def counts(self):
        """{verdict: number of cases}, in the order of VERDICTS."""
        found = Counter(map(self.verdict_of, self.cases))
        return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}

    @property
    def verdict(self):
        for verdict, count in self.counts.items():
            if 2 * count > len(self.cases):
                return verdict
        return "mixed"

    def said(self, name):
        """The result of one case, as text."""
        mean, _, what = found = self.cases[name]
        value = f"{cell(found, self.form)} {self.unit}".strip()
        return what if mean is None else f"{value} ({what})"

    @property
    def ours(self):
        """Our result as text: a value, or "11 of 13 agree, 2 within noise"."""
        if len(self.cases) == 1:
            return self.said(*self.cases)
        words = [f"{count} {verdict if count == 1 else OF_SEVERAL.get(verdict, verdict)}"
                 for verdict, count in self.counts.items()]
        return ", ".join(words).replace(" ", f" of {len(self.cases)} ", 1)


def by_chance(claims):
    """(cases with an interval, how many would differ by chance if all true values were thresholds).

    As many would agree by chance: a 90 % interval misses on each side one time in twenty.
    """
    tested = sum(len(claim.cases) - claim.counts.get("no interval", 0) for claim in claims)
    return tested, tested / 20


def table_of_claims(claims):
    """A Table with a row for each claim."""
    rows = [[f"{claim.figure}: {claim.says}", claim.paper, claim.ours, claim.verdict]
            for claim in claims]
    return Table("Claims and our results (± 90 %)", ["claim", "paper", "ours", "verdict"], rows)


# ---- Estimates and rows --------------------------------------------------------------------------

def over_seeds(estimates):
    """The Estimate over seeds, from one for each; the first, unchanged, if all means are equal."""
    means = [mean for mean, *_ in estimates]
    if len(set(means)) == 1:
        return Estimate(*estimates[0])
    if None in means:
        return Estimate(None, None, "not defined for every seed")
    means = torch.tensor(means, dtype=torch.float64)
    return Estimate(*interval(means), f"{len(means)} seeds")


def cell(estimate, form=".4f"):
    """An Estimate, or its list from JSON, as a table cell."""
    mean, half, what = estimate
    return what if mean is None else with_interval(mean, half, form)


def intervals(estimates):
    """Text that says what the Estimates' intervals are over, and which have none."""
    words = {f"{'no interval' if half is None else '± 90 %'} over {what}": None
             for mean, half, what in estimates if mean is not None}
    return ", ".join(words)


def group(rows, name):
    """{value: the rows that have it}, in the order of the rows."""
    found = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    return found
