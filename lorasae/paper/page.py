"""The page of `python -m lorasae.paper`: a forest plot of the paper's claims, then every part.

page.html has the layout and paper.toml the words; here is what it shows.
"""
import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lorasae.evals.report import cell_text
from lorasae.paper.results import VERDICTS, by_chance, cell

LEFT, RIGHT = 12, 288                                   # ends of a claim's scale, of 300


def page(study, parts, shown, reasons, command):
    """The page as HTML.

    parts: [Part] to show; shown: {name: its file of numbers} of those that are done; reasons:
    {name: why it was left out}; command: what was called.
    """
    # What the template shows: a line for each claim, a section for each part.
    claims, sections = [], []
    for part in parts:
        name, found, tables = part.name, shown.get(part.name), []
        if found:
            tables = part.tables(found["numbers"])
            claims += [(name, claim, strip(claim)) for claim in part.claims(found["numbers"])]
        png = study.folder / "pictures" / f"{name}.png"
        picture = base64.b64encode(png.read_bytes()).decode() if png.exists() else ""
        sections.append((part, found, tables, picture, reasons.get(name, "not run yet")))

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
    )


def strip(claim):
    """Where a claim's threshold, the paper's values and its cases lie from left to right, in words
    too.

    {"threshold": x, "label": of it, "paper": [x], "cases": [(text, low, x, high)], "between": the
    lowest and the highest}; without an interval low and high are x: no whisker is drawn.
    """
    found, values = [], [claim.threshold, *claim.paper_values]
    for name, case in claim.cases.items():
        mean, half, over = case
        if mean is not None:
            text = f"{name}: {cell(case, claim.form)} {claim.unit} ({over})"
            ends = mean - (half or 0), mean, mean + (half or 0)
            found.append((text, *ends))
            values += ends

    lowest = min(values)
    span = max(values) - lowest or 1.0

    def x(value):
        return round(LEFT + (value - lowest) / span * (RIGHT - LEFT), 1)

    between = ""
    if len(found) > 1:
        means = [mean for _, _, mean, _ in found]
        between = f": {min(means):{claim.form}} to {max(means):{claim.form}} {claim.unit}"
    return {
        "threshold": x(claim.threshold),
        "label": f"{claim.threshold:{claim.form.lstrip('+')}}" if claim.threshold else "0",
        "paper": [x(value) for value in claim.paper_values],
        "cases": [(text, *map(x, ends)) for text, *ends in found],
        "between": between,
    }
