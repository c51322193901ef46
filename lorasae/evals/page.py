"""Self-contained HTML pages: one file, no scripts, nothing fetched; for a browser on a screen, on a phone, or on paper.

    document("Title", [heading("Latents"), table(rows, headings), ...])

Every function takes plain text and returns HTML with that text escaped. Only what these functions return is HTML.
"""
import re
from html import escape
from math import ceil

SHADES = 9                                              # steps of an activation's shading

STYLE = """
:root { color-scheme: light dark; --text: #1c1b19; --quiet: #66635c; --page: #fbfaf7; --card: #ffffff; --line: #dedbd2;
        --hot: 240, 140, 30; --most: .85; --yes: #0b6b3a; --no: #a33a00 }
@media (prefers-color-scheme: dark) {
  :root { --text: #eceae4; --quiet: #a3a097; --page: #161513; --card: #1f1e1b; --line: #3a3832;
          --hot: 214, 110, 10; --most: .8; --yes: #6fcf97; --no: #ff9a5c }
}
* { box-sizing: border-box }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100% }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; background: var(--page); color: var(--text);
       font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 0 }
h3 { font-size: .95rem; margin: 1.1rem 0 .3rem }
p { margin: .4rem 0; max-width: 48rem }
a { color: inherit }
.quiet { color: var(--quiet); font-size: .875rem }
section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; margin: 1rem 0 }
.wide { overflow-x: auto }
img { display: block; max-width: 100%; height: auto; margin: .6rem auto; background: #fff; border-radius: .3rem }
.yes { color: var(--yes) }
.no { color: var(--no); font-weight: 600 }
table { border-collapse: collapse; width: 100%; font-size: .875rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: 600; color: var(--quiet) }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td .quiet { font-size: inherit }
td code { overflow-wrap: anywhere }
@media (max-width: 36rem) { table { font-size: .75rem } th, td { padding-right: .4rem } .number { white-space: normal } }
@media (max-width: 36rem) { section { padding: .6rem } }
@media (max-width: 36rem) { .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.2rem } }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 1.5rem }
code, .passage { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .85rem }
.tokens { margin: 0; padding: 0; list-style: none; font-size: .85rem }
.tokens li { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px dotted var(--line) }
.tokens code { overflow-wrap: anywhere; white-space: pre-wrap }
.passages { list-style: none; margin: 0; padding: 0; display: grid; gap: 0 1.5rem;
            grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)) }
.passages li { border-top: 1px solid var(--line); padding: .5rem 0; break-inside: avoid; min-width: 0 }
.passage { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; tab-size: 4 }
.newline::before { content: "↵"; color: var(--quiet) }
mark { color: inherit; background: rgba(var(--hot), calc(var(--most) * var(--a))); border-radius: .15rem }
mark { padding-bottom: .15em }
mark.peak { outline: 1px solid; outline-offset: 1px }
@media print {
  :root { color-scheme: light; --text: #000; --quiet: #555; --page: #fff; --card: #fff; --line: #ccc;
          --hot: 240, 140, 30; --most: .85; --yes: #0b6b3a; --no: #a33a00 }
  .columns { grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)) }
  .passages { grid-template-columns: 1fr 1fr }
  body { max-width: none; font-size: .8rem }
  .wide { overflow: visible }
  table { font-size: .62rem }
  th, td { padding-right: .4rem }
  .number { white-space: normal }
  section { border: 0; border-top: 2px solid; border-radius: 0; padding: .5rem 0 }
  mark { -webkit-print-color-adjust: exact; print-color-adjust: exact }
  h2, h3 { break-after: avoid }
  img, tr { break-inside: avoid }
}
"""


def document(title, parts):
    """A whole page of HTML parts. Its policy forbids scripts and anything from elsewhere, whatever the text holds."""
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<style>{STYLE}{shades()}</style>
</head>
<body>
{body}
</body>
</html>
"""


def shades():
    """The classes a1 .. a9: the share of the hottest shade."""
    return "".join(f".a{level} {{ --a: {level / SHADES:.2f} }}\n" for level in range(1, SHADES + 1))


def heading(text, level=1, name=None):
    """name: the target of a link #name."""
    target = f' id="{escape(name)}"' if name else ""
    return f"<h{level}{target}>{escape(text)}</h{level}>"


def paragraph(text, quiet=False):
    kind = ' class="quiet"' if quiet else ""
    return f"<p{kind}>{escape(text)}</p>"


def words(text):
    """Text within a cell of a table."""
    return escape(text)


def marked(text, kind):
    """Text of a class, such as yes and no."""
    return f'<span class="{kind}">{escape(text)}</span>'


def small(part):
    """HTML on a line of its own, in small print."""
    return f'<br><small class="quiet">{part}</small>'


def link(text, name):
    """To the heading of that name on the page."""
    return f'<a href="#{escape(name)}">{escape(text)}</a>'


def section(parts):
    body = "\n".join(parts)
    return f"<section>\n{body}\n</section>"


def columns(parts):
    """Side by side where there is room, else one below the other."""
    return boxes("columns", parts)


def pair(parts):
    """One below the other; side by side on a phone, where columns() cannot."""
    return boxes("pair", parts)


def boxes(kind, parts):
    body = "\n".join(f"<div>{part}</div>" for part in parts)
    return f'<div class="{kind}">\n{body}\n</div>'


def table(headings, rows, numbers=()):
    """headings: texts; rows: lists of HTML cells; numbers: the columns to set to the right."""
    head = table_row(map(escape, headings), "th", numbers)
    body = "\n".join(table_row(row, "td", numbers) for row in rows)
    return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def table_row(cells, tag, numbers):
    html = ""
    for i, cell in enumerate(cells):
        kind = ' class="number"' if i in numbers else ""
        html += f"<{tag}{kind}>{cell}</{tag}>"
    return f"<tr>{html}</tr>"


def image(png, text):
    """A PNG, as base64, inside the page; text: what it shows, for those who cannot see it."""
    return f'<img src="data:image/png;base64,{png}" alt="{escape(text)}">'


def listing(kind, tag, items):
    """A list of HTML items, such as those of passages."""
    body = "\n".join(f"<li>{item}</li>" for item in items)
    return f'<{tag} class="{kind}">\n{body}\n</{tag}>'


# ---- Tokens --------------------------------------------------------------------------------------

def token(text):
    """One token on its own, its whitespace made visible."""
    return f"<code>{escape(visible(text))}</code>"


def visible(text):
    """text with signs for whitespace and control characters: ␣ ↵ ⇥, ␣×12 for many spaces, \\x07."""
    signs = {" ": "␣", "\n": "↵", "\t": "⇥"}
    text = "".join(signs[character] if character in signs else printable(character) for character in text)
    return re.sub("␣{4,}", lambda run: f"␣×{len(run[0])}", text)


def printable(character):
    """The character, or its code where it would show nothing or turn the line around."""
    if character.isprintable():
        return character
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


def tokens(pairs):
    """A list of (text, number) with signs, such as tokens and what they gain."""
    return listing("tokens", "ul", [f'{token(text)}<span class="number">{value:+.2f}</span>' for text, value in pairs])


def passage(texts, activations, hottest, peak):
    """Text whose tokens are shaded by activation / hottest; the token at index `peak` is outlined.

    Tokens on which nothing fires stand without markup and whitespace stands as it is, so that a browser's search finds
    phrases. A token without text of its own (a part of a character) lends its activation to the next.
    """
    html, waiting = "", 0.0
    for i, (text, activation) in enumerate(zip(texts, activations)):
        activation, waiting = max(activation, waiting), 0.0
        if not text:
            waiting = activation
        elif activation > 0:
            level = max(1, min(SHADES, ceil(SHADES * activation / hottest)))
            kind = f"a{level} peak" if i == peak else f"a{level}"
            html += f'<mark class="{kind}" title="{activation:.2f}">{running(text)}</mark>'
        else:
            html += running(text)
    return f'<p class="passage">{html}</p>'


def running(text):
    """Text of a passage: a sign before each line's end, control characters as their codes, all else as it is."""
    lines = []
    for line in text.split("\n"):
        plain = "".join("\t" if character == "\t" else printable(character) for character in line)
        lines.append(escape(plain))
    return '<span class="newline"></span>\n'.join(lines)
