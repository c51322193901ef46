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
        aligned = [word.ljust(width) if i < 2 else word.rjust(width) for i, (word, width) in enumerate(zip(line, widths))]
        text.append("  ".join(aligned).rstrip())
    return "\n".join(text)


def cell(value):
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)
