"""Rows of figures as aligned text."""


def table(rows):
    """rows: dicts -> text, with a column for every key that one of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names]
    for row in rows:
        lines.append([cell(row.get(name)) for name in names])
    widths = [max(map(len, column)) for column in zip(*lines)]

    text = []
    for line in lines:
        names_left = [word.ljust(width) for word, width in zip(line[:2], widths)]
        figures_right = [word.rjust(width) for word, width in zip(line[2:], widths[2:])]
        text.append("  ".join(names_left + figures_right).rstrip())
    return "\n".join(text)


def cell(value):
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)
