"""The page of `python -m lorasae.paper`: what the paper claims and what was found, then every part with its picture and tables."""
import base64
import platform

import torch

from lorasae.evals import page as html

VERDICTS = ("agrees, in size too", "agrees in direction", "does not agree", "cannot be said")


def page(study, parts, shown, failed, command):
    """HTML. parts: those to show; shown: {part: what its file of numbers holds}; failed: {job: why}; command: what was called."""
    body = [html.heading("Low-Rank Adapting Models for Sparse Autoencoders, recomputed"), *introduction(study, parts, shown, command)]
    body += [summary(parts, shown)]
    for name, part in parts.items():
        if name in shown:
            body.append(section(study, name, part, shown[name], command))
        else:
            reason = failed.get(name, "not run yet")
            body.append(html.section([html.heading(part.TITLE, 2, name), html.paragraph(f"Left out: {reason}")]))
    body.append(limits(study))
    return html.document("Low-Rank Adapting Models for Sparse Autoencoders, recomputed", body)


def introduction(study, parts, shown, command):
    counts = dict.fromkeys(VERDICTS, 0)
    for claim in claims_of(parts, shown):
        counts[claim.verdict] += claim.of_paper
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    where = "embedded models of 0.4M to 2.5M parameters, trained on Python's standard library" if study.miniature else study.model
    return [html.paragraph(f"Every figure and table of the paper on {where}, beside the paper's own figures. Of {sum(counts.values())} "
                           f"claims of the paper: {said}."),
            html.paragraph(f"{command} · {len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}, where a part does not say that it has "
                           f"one · PyTorch {torch.__version__}, Python {platform.python_version()}, {study.device}", quiet=True)]


def claims_of(parts, shown):
    return [claim for name in shown for claim in parts[name].claims(shown[name]["numbers"])]


def summary(parts, shown):
    """The table at the top: a claim a row, the paper's before those of others."""
    rows = []
    for of_paper in (True, False):
        for name in shown:
            for claim in parts[name].claims(shown[name]["numbers"]):
                if claim.of_paper == of_paper:
                    rows.append(summary_row(name, parts[name], claim))
    return html.section([html.heading("What the paper claims, and what was found", 2),
                         html.table(["where", "claim", "paper", "ours", "verdict"], rows)])


def summary_row(name, part, claim):
    verdict = html.marked(claim.verdict, CLASSES[claim.verdict]) + (html.paragraph(claim.why, quiet=True) if claim.why else "")
    return [html.link(label(part), name), html.words(claim.says), html.words(claim.paper), html.words(claim.ours), verdict]


CLASSES = {"agrees, in size too": "yes", "agrees in direction": "yes", "does not agree": "no", "cannot be said": "quiet"}


def label(part):
    """fig3, table1 -> Fig. 3, Table 1"""
    names = []
    for name in part.FIGURES:
        kind, number = ("Fig.", name[3:]) if name.startswith("fig") else ("Table", name[5:])
        names.append(f"{kind} {number}" if number.isdigit() else name)
    return ", ".join(names) or "Beyond the paper"


def section(study, name, part, found, command):
    """A part: definition, picture, tables, what it cost, and the command that makes it again."""
    numbers = found["numbers"]
    made = [html.heading(f"{label(part)}: {part.TITLE}", 2, name), html.paragraph(part.ABOUT), picture(study, name, part.TITLE)]
    for table in part.tables(numbers):
        rows = [[html.words(cell if isinstance(cell, str) else f"{cell:.4f}") for cell in row] for row in table.rows]
        made += [html.heading(table.caption, 3), html.table(table.headings, rows, numbers=range(1, len(table.headings)))]
    if "conclusions" in numbers:
        made += [html.paragraph(sentence) for sentence in numbers["conclusions"]]
    alone = command if "--only" in command else f"{command} --only {name}"
    made.append(html.paragraph(price(found, alone), quiet=True))
    return html.section(made)


def picture(study, name, title):
    """The part's PNG, inside the page; a line where matplotlib was missing."""
    path = study.folder / "pictures" / f"{name}.png"
    if not path.exists():
        return html.paragraph("No picture: pip install matplotlib, and the same command draws it.", quiet=True)
    return html.image(base64.b64encode(path.read_bytes()).decode(), title)


def price(found, command):
    """Trainings, tokens and seconds, and the command."""
    trained = f"{found['trainings']} trainings on {found['trained_tokens']:,} tokens in all, some shared with other parts; " if found["trainings"] else ""
    return f"{trained}{found['seconds']:,.0f} seconds of one process · {command}"


def limits(study):
    seeds = "Figures of a single seed say nothing about how they would vary."
    if study.miniature:
        recipe = ("Rates of the adapters are those of the tuned recipe, found on other text of the same kind, not the paper's: with so few tokens "
                  "the published rate would move little. ") if study.recipe == "tuned" else ""
        text = ("These models have 0.4M to 2.5M parameters and 4 to 6 blocks, their SAEs about a thousand latents, and trainings take seconds "
                "where the paper's take hours: a claim that agrees here has been seen to hold far from where it was made, and one that does not "
                "may hold there. Losses cannot be compared, since models, text and SAEs differ; directions and shares of the gap can. "
                f"{recipe}{seeds}")
    else:
        text = f"Times are of this machine and comparable only among themselves. {seeds}"
    return html.section([html.heading("Limits", 2), html.paragraph(text)])
