"""The page of `python -m lorasae.paper`: a forest plot of the paper's claims, then every part.

page.html has the layout and paper.toml the text; this file supplies the values.
"""
from base64 import b64encode
from collections import Counter
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lorasae.evals.report import cell_text
from lorasae.paper.results import by_chance

LEFT, RIGHT = 12, 288                                   # ends of a claim's scale, out of 300


def page(study, sections, claims, reasons, command):
    """The page as HTML.

    sections: [(Part, contents of its numbers file or None, its tables, PNG or None)]; claims:
    [(Part, Claim)]; reasons: {name of a part: why it was left out}; command: the command line.
    """
    jinja = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    jinja.filters |= {"cell_text": cell_text, "thousands": "{:,}".format,
                      "base64": lambda png: b64encode(png).decode()}
    return jinja.get_template("page.html").render(
        study=study,
        command=command,
        claims=[(part, claim, scale(claim)) for part, claim in claims],
        sections=sections,
        reasons=reasons,
        verdicts=Counter(claim.verdict for _, claim in claims),
        by_chance=by_chance(claim for _, claim in claims),
    )


def scale(claim):
    """value -> place on a claim's scale, which spans threshold, paper's values and intervals."""
    values = [claim.threshold, *claim.paper_values]
    for mean, half, _ in claim.cases.values():
        if mean is not None:
            values += mean - (half or 0), mean + (half or 0)
    lowest = min(values)
    span = max(values) - lowest or 1.0
    return lambda value: round(LEFT + (value - lowest) / span * (RIGHT - LEFT), 1)
