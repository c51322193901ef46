"""The page of `python -m lorasae.paper`: what the paper claims and what was found, then every part with its picture and tables."""
import base64
import platform

import torch

from lorasae.evals import page as html
from lorasae.io.disk import read_json

VERDICTS = ("agrees, in size too", "agrees in direction", "does not agree", "cannot be said")


def page(study, parts, shown, failed, command):
    """HTML. shown: {part: {"numbers", "seconds"}}; failed: {job: why}; command: what was called."""
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
    counts = tally(parts, shown)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    where = "embedded models of 0.4M to 2.5M parameters, trained on Python's standard library" if study.miniature else study.model
    return [html.paragraph(f"Every figure and table of the paper on {where}, beside the paper's own figures. Of {sum(counts.values())} "
                           f"claims: {said}."),
            html.paragraph(f"{command} · {len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''} where a part says so · PyTorch "
                           f"{torch.__version__}, Python {platform.python_version()}, {study.device}", quiet=True)]


def tally(parts, shown):
    """{verdict: how many claims}"""
    counts = dict.fromkeys(VERDICTS, 0)
    for name in shown:
        for claim in parts[name].claims(shown[name]["numbers"]):
            counts[claim.verdict] += 1
    return counts


def summary(parts, shown):
    """The table at the top: a claim a row."""
    rows = []
    for name in shown:
        for claim in parts[name].claims(shown[name]["numbers"]):
            verdict = html.words(claim.verdict) + (f"<br>{html.words(claim.why)}" if claim.why else "")
            rows.append([html.link(label(parts[name]), name), html.words(claim.says), html.words(claim.paper), html.words(claim.ours),
                         f'<span class="{KINDS[claim.verdict]}">{verdict}</span>'])
    return html.section([html.heading("What the paper claims, and what was found", 2),
                         html.table(["where", "claim", "paper", "ours", "verdict"], rows)])


KINDS = {"agrees, in size too": "yes", "agrees in direction": "yes", "does not agree": "no", "cannot be said": "quiet"}


def label(part):
    """fig3, table1 -> Fig. 3, Table 1"""
    names = []
    for name in part.FIGURES:
        kind, number = ("Fig.", name[3:]) if name.startswith("fig") else ("Table", name[5:])
        names.append(f"{kind} {number}" if number.isdigit() else name)
    return ", ".join(names) or "beyond"


def section(study, name, part, found, command):
    """A part: definition, picture, tables, what it cost, and the command that makes it again."""
    numbers = found["numbers"]
    made = [html.heading(f"{label(part)}: {part.TITLE}", 2, name), html.paragraph(part.ABOUT), picture(study, name, part.TITLE)]
    for table in part.tables(numbers):
        rows = [[html.words(cell if isinstance(cell, str) else f"{cell:.4f}") for cell in row] for row in table.rows]
        made += [html.heading(table.caption, 3), html.table(table.headings, rows, numbers=range(1, len(table.headings)))]
    if "conclusions" in numbers:
        made += [html.paragraph(sentence) for sentence in numbers["conclusions"]]
    made.append(html.paragraph(price(study, part, found, f"{command} --only {name}" if "--only" not in command else command), quiet=True))
    return html.section(made)


def picture(study, name, title):
    """The part's PNG, inside the page; a line where matplotlib was missing."""
    path = study.folder / "pictures" / f"{name}.png"
    if not path.exists():
        return html.paragraph("No picture: pip install matplotlib, and the same command draws it.", quiet=True)
    return html.image(base64.b64encode(path.read_bytes()).decode(), title)


def price(study, part, found, command):
    """Tokens, seeds and seconds, and the command."""
    seconds, tokens = found["seconds"], 0
    for training in part.trainings(study):
        made = read_json(study.folder / training.name / "results.json")
        seconds, tokens = seconds + made["seconds"], tokens + made["train_tokens"]
    trainings = f"{len(part.trainings(study))} trainings (shared with other parts) of {tokens:,} tokens in all; " if tokens else ""
    held_out = f"{study.eval_tokens:,} held-out tokens; " if study.eval_tokens else ""
    return f"{trainings}{held_out}{seconds:,.0f} seconds of one process · {command}"


def limits(study):
    text = ("These models have 0.4M to 2.5M parameters and 4 to 6 blocks, their SAEs about a thousand latents, and trainings take "
            "seconds where the paper's take hours: a claim that agrees here has been seen to hold far from where it was made, "
            "and one that does not may hold there. Levels are never comparable, since models, text and SAEs differ; directions and "
            "shares of the gap are. Rates of the adapters are those of the tuned recipe, found on other text of the same kind, not "
            "the paper's: with so few tokens the published rate would move nothing. Figures of a single seed say nothing about "
            "how they would vary.") if study.miniature else (
            "One run of each setting, as in the paper. Times are of this machine and comparable only among themselves.")
    return html.section([html.heading("Limits", 2), html.paragraph(text)])
