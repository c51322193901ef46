"""The page of `python -m lorasae.paper`: a forest plot of the paper's claims, then every part.

page.html has the words and the layout; here is what it shows.
"""
import base64
import platform
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lorasae.evals.report import cell_text
from lorasae.paper.results import VERDICTS, by_chance, cell

LEFT, RIGHT = 12, 288                                   # ends of a claim's scale, of 300


def page(study, parts, shown, failed, command):
    """The page as HTML.

    parts: {name: Part} to show; shown: {name: its file of numbers} of those that are done;
    failed: {name: why it was left out}; command: what was called, without --only.
    """
    # What the template shows: a line for each claim, a section for each part
    claims, sections = [], []
    for name, part in parts.items():
        found, tables = shown.get(name), []
        if found:
            tables = part.tables(found["numbers"])
            claims += [(name, claim, strip(claim)) for claim in part.claims(found["numbers"])]
        png = study.folder / "pictures" / f"{name}.png"
        picture = base64.b64encode(png.read_bytes()).decode() if png.exists() else ""
        sections.append((part, found, tables, picture, failed.get(name, "not run yet")))

    jinja = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    jinja.filters["cell_text"] = cell_text
    return jinja.get_template("page.html").render(
        study=study,
        command=command,
        claims=claims,
        sections=sections,
        order=VERDICTS,
        verdicts=[claim.verdict for _, claim, _ in claims],
        by_chance=by_chance(claim for _, claim, _ in claims),
        torch=torch.__version__,
        python=platform.python_version(),
    )


def strip(claim):
    """Where a claim's threshold, the paper's values and its cases lie from left to right, in words
    too.

    {"threshold": x, "label": of it, "paper": [x], "cases": [(text, low, x, high)], "between": the
    lowest and the highest}; without an interval low and high are x: no whisker is drawn.
    """
    found, between = [], ""
    values = [claim.threshold, *claim.paper_values]
    for name, case in claim.cases.items():
        mean, half, over = case
        if mean is None:
            continue
        ends = (mean, mean) if half is None else (mean - half, mean + half)
        found.append((f"{name}: {cell(case, claim.form)} {claim.unit} ({over})", mean, ends))
        values += ends

    if len(found) > 1:
        means = [mean for _, mean, _ in found]
        between = f": {min(means):{claim.form}} to {max(means):{claim.form}} {claim.unit}"

    lowest = min(values)
    span = max(values) - lowest or 1.0

    def x(value):
        return round(LEFT + (value - lowest) / span * (RIGHT - LEFT), 1)

    return {
        "threshold": x(claim.threshold),
        "label": f"{claim.threshold:{claim.form.lstrip('+')}}" if claim.threshold else "0",
        "paper": [x(value) for value in claim.paper_values],
        "cases": [(text, x(low), x(mean), x(high)) for text, mean, (low, high) in found],
        "between": between,
    }
