"""The page of `python -m lorasae.paper`: what the paper claims and what was found, then every part."""
import base64
import platform

import torch

from lorasae.evals import page as html
from lorasae.evals.common import cell_text

TITLE = "Low-Rank Adapting Models for Sparse Autoencoders, recomputed"
VERDICTS = {                                            # verdict: its class on the page
    "agrees, in size too": "yes",
    "agrees in direction": "yes",
    "does not agree": "no",
    "cannot be said": "quiet",
}


def page(study, parts, shown, failed, command):
    """HTML.

    parts: {name: part} to show; shown: {name: what its file of numbers holds} of those that are done;
    failed: {job: why}; command: what was called, without --only.
    """
    claims = claims_of(parts, shown)
    body = [
        html.heading(TITLE),
        *introduction(study, claims, command),
        summary(study, parts, claims),
    ]
    for name, part in parts.items():
        if name in shown:
            body.append(section(study, name, part, shown[name], command))
        else:
            body.append(left_out(name, part, failed.get(name, "not run yet")))
    body.append(limits(study))
    return html.document(TITLE, body)


# ---- The top -------------------------------------------------------------------------------------

def introduction(study, claims, command):
    """What this is, how many claims agree, and with what it was made: [paragraph]."""
    counts = dict.fromkeys(VERDICTS, 0)
    for _, claim in claims:
        if claim.of_paper:
            counts[claim.verdict] += 1
    said = ", ".join(f"{counts[verdict]} × {verdict}" for verdict in VERDICTS if counts[verdict])

    where = f"{study.model} and the models that its figures set beside it"
    if study.miniature:
        where = "embedded models of 0.4M to 2.5M parameters, trained on Python's standard library"
    what = (f"Every figure and table of the paper on {where}, beside the paper's own figures. "
            f"Of {sum(counts.values())} claims of the paper: {said}.")

    seeds = f"{len(study.seeds)} seed" + ("s" if len(study.seeds) > 1 else "")
    made_with = (f"{command} · {seeds}, where a part does not say that it has one · "
                 f"PyTorch {torch.__version__}, Python {platform.python_version()}, {study.device}")
    return [html.paragraph(what), html.paragraph(made_with, quiet=True)]


def claims_of(parts, shown):
    """[(part's name, Claim)]"""
    found = []
    for name in shown:
        found += [(name, claim) for claim in parts[name].claims(shown[name]["numbers"])]
    return found


def summary(study, parts, claims):
    """The table at the top: a claim a row, the paper's before those of others."""
    ordered = sorted(claims, key=lambda pair: not pair[1].of_paper)
    rows = [summary_row(study, name, parts[name], claim) for name, claim in ordered]
    return html.section([
        html.heading("What the paper claims, and what was found", 2),
        html.table(["claim", "paper", "ours", "verdict"], rows),
    ])


def summary_row(study, name, part, claim):
    verdict = html.marked(claim.verdict, VERDICTS[claim.verdict])
    why = reason(study, claim)
    if why:
        verdict += html.paragraph(why, quiet=True)
    return [
        html.words(claim.says) + html.small(html.link(label(part), name)),
        html.words(claim.paper),
        html.words(claim.ours),
        verdict,
    ]


def reason(study, claim):
    """Why a claim does not agree, or why it cannot be said; "" where nobody knows."""
    if study.miniature and study.recipe == "tuned":
        return claim.why or claim.why_in_miniature
    return claim.why


def label(part):
    """("fig1", "fig5", "table1") -> Fig. 1, 5 · Table 1"""
    figures = [name.removeprefix("fig") for name in part.FIGURES if name.startswith("fig")]
    tables = [name.removeprefix("table") for name in part.FIGURES if name.startswith("table")]
    named = [f"{kind} {', '.join(numbers)}" for kind, numbers in (("Fig.", figures), ("Table", tables)) if numbers]
    return " · ".join(named) or "Beyond the paper"


# ---- A part --------------------------------------------------------------------------------------

def section(study, name, part, found, command):
    """A part: definition, picture, tables, what it cost, and the command that makes it again."""
    numbers = found["numbers"]
    made = [
        html.heading(f"{label(part)}: {part.TITLE}", 2, name),
        html.paragraph(part.ABOUT),
        picture(study, name, part.TITLE),
    ]
    for table in part.tables(numbers):
        made += [html.heading(table.caption, 3), html_table(table)]
    for sentence in numbers.get("conclusions", []):
        made.append(html.paragraph(sentence))

    made.append(html.paragraph(price(found, f"{command} --only {name}"), quiet=True))
    return html.section(made)


def html_table(table):
    rows = [[html.words(cell_text(cell)) for cell in row] for row in table.rows]
    return html.table(table.headings, rows, numbers=range(1, len(table.headings)))


def left_out(name, part, reason):
    return html.section([html.heading(part.TITLE, 2, name), html.paragraph(f"Left out: {reason}")])


def picture(study, name, title):
    """The part's PNG, inside the page; a line where matplotlib was missing."""
    path = study.folder / "pictures" / f"{name}.png"
    if not path.exists():
        return html.paragraph("No picture: pip install matplotlib, and the same command draws it.", quiet=True)
    return html.image(base64.b64encode(path.read_bytes()).decode(), title)


def price(found, command):
    """Trainings, tokens and seconds, and the command."""
    trained = ""
    if found["trainings"]:
        trained = (f"{found['trainings']} trainings on {found['trained_tokens']:,} tokens in all, "
                   "some shared with other parts; ")
    return f"{trained}{found['seconds']:,.0f} seconds of one process · {command}"


# ---- The end -------------------------------------------------------------------------------------

MINIATURE = ("These models have 0.4M to 2.5M parameters and 4 to 6 blocks, their SAEs about a thousand latents, and "
             "trainings take seconds where the paper's take hours: a claim that agrees here has been seen to hold far "
             "from where it was made, and one that does not may hold there. Losses cannot be compared, since models, text "
             "and SAEs differ; directions and shares of the gap can.")
TUNED = ("Rates of the adapters are those of the tuned recipe, found on other text of the same kind, not the paper's: with "
         "so few tokens the published rate would move little.")
REAL = "Times are of this machine and comparable only among themselves."
RULE = ("Rates of the adapters are those of the tuned recipe, a rule from models of 0.4M to 2.5M parameters, not the "
        "paper's.")
SEEDS = "Figures of a single seed say nothing about how they would vary."


def limits(study):
    tuned = study.recipe == "tuned"
    if study.miniature:
        sentences = [MINIATURE, TUNED, SEEDS] if tuned else [MINIATURE, SEEDS]
    else:
        sentences = [REAL, RULE, SEEDS] if tuned else [REAL, SEEDS]
    return html.section([html.heading("Limits", 2), html.paragraph(" ".join(sentences))])
