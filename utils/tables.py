"""Rows of text as Markdown or as aligned plain text; no number is changed on the way."""

from collections.abc import Iterable, Mapping, Sequence

Rows = Sequence[Mapping[str, str]]


def markdown_table(rows: Rows) -> str:
    """GitHub Markdown with the keys of the first row as header; columns of numbers are aligned to the right.

    rows: at least one, all with the same keys.  A missing value is "" or "-".

    >>> print(markdown_table([{"scheme": "uniform8", "size": "32.2"}, {"scheme": "float", "size": "-"}]))
    | scheme | size |
    |---|---:|
    | uniform8 | 32.2 |
    | float | - |
    """
    header = list(rows[0])
    ruler = ["---:" if _is_numeric(rows, key) else "---" for key in header]
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(ruler)}|"]
    lines += [f"| {' | '.join(_escape(row[key]) for key in header)} |" for row in rows]
    return "\n".join(lines)


def plain_table(rows: Rows) -> str:
    """Aligned columns for a terminal, two spaces apart, a ruler below the header; ``rows`` as above.

    >>> print(plain_table([{"scheme": "uniform8", "size": "32.2"}, {"scheme": "float", "size": "130"}]))
    scheme    size
    --------------
    uniform8  32.2
    float      130
    """
    header = list(rows[0])
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in header}
    right = {key for key in header if _is_numeric(rows, key)}

    def line(cells: Iterable[tuple[str, str]]) -> str:
        padded = [text.rjust(widths[key]) if key in right else text.ljust(widths[key]) for key, text in cells]
        return "  ".join(padded).rstrip()

    lines = [line((key, key) for key in header)] + [line((key, row[key]) for key in header) for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _is_numeric(rows: Rows, key: str) -> bool:
    values = [row[key] for row in rows if row[key] not in ("", "-")]
    return bool(values) and all(_is_number(value) for value in values)


def _is_number(text: str) -> bool:
    """A number, perhaps with thousands separators and one of the units x and %."""
    try:
        float(text.rstrip("x%").replace(",", ""))
    except ValueError:
        return False
    return True


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
