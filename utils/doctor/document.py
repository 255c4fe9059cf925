"""A report as data, and the two forms of it: text, and one HTML file that needs nothing else.

Both show the same strings: a number is formatted once, where a row is made.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import fill

from utils.quantization_utils.scheme_report import WIDTH, shorten
from utils.tables import plain_table

NAME_WIDTH = 60  # of a cell in text; HTML shows all of it
CHART_ROWS = 20
BAR, LABEL, VALUE, LINE = 360, 380, 90, 18  # pixels
BLUE, ORANGE = "#0072B2", "#E69F00"  # as in the other pictures


@dataclass(frozen=True)
class Chart:
    """Horizontal bars of the first rows of a table.

    name, value: keys of the rows' columns; the bar is as long as the number in ``value``, whose text is beside it.
    """

    name: str
    value: str


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, items, and a table with the keys of its rows as header.

    empty: what is said in place of items and rows where there are none.
    """

    title: str
    note: str = ""
    items: Sequence[str] = ()
    rows: Sequence[Mapping[str, str]] = ()
    chart: Chart | None = None
    empty: str = "none"


@dataclass(frozen=True)
class Document:
    """A title and sections."""

    title: str
    sections: Sequence[Section]

    def text(self, limit: int | None = None) -> str:
        """Plain text, ending in a newline.  limit: rows shown of each table, the rest is counted."""
        parts = [self.title + "\n" + "=" * len(self.title)]
        parts += ["\n".join(_section_text(section, limit)) for section in self.sections]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """One HTML page: style and pictures inside, no scripts, nothing loaded from elsewhere."""
        body = "\n".join(_section_html(section) for section in self.sections)
        title = escape(self.title)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width">\n'
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
        )


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .3em; border-bottom: 1px solid #ccc; }
p { margin: .4em 0; max-width: 50em; } table { border-collapse: collapse; font-size: 13px; margin-top: .6em; }
th { text-align: left; border-bottom: 1px solid #888; } th, td { padding: 2px 10px 2px 0; white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } tr:nth-child(even) { background: #f4f4f4; }
.wide { overflow-x: auto; } svg text { font: 12px system-ui, sans-serif; fill: #222; }
"""


def _section_text(section: Section, limit: int | None) -> Iterator[str]:
    yield f"{section.title}\n{'-' * len(section.title)}"
    if section.note:
        yield fill(section.note, WIDTH)
    yield from (f"  * {item}" for item in section.items)
    if section.rows:
        shown = section.rows[:limit]
        yield ""
        yield plain_table([{key: shorten(text, NAME_WIDTH) for key, text in row.items()} for row in shown])
        if len(shown) < len(section.rows):
            yield f"... and {len(section.rows) - len(shown)} more"
    elif not section.items:
        yield section.empty


def _section_html(section: Section) -> str:
    parts = [f"<section>\n<h2>{escape(section.title)}</h2>"]
    if section.note:
        parts.append(f"<p>{escape(section.note)}</p>")
    if section.items:
        parts += ["<ul>", *(f"<li>{escape(item)}</li>" for item in section.items), "</ul>"]
    if section.rows:
        if section.chart is not None:
            parts.append(_bars(section.rows[:CHART_ROWS], section.chart))
        parts.append(_table(section.rows))
    elif not section.items:
        parts.append(f"<p>{escape(section.empty)}</p>")
    return "\n".join([*parts, "</section>"])


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    right = {key for key in rows[0] if all(_length(row[key]) is not None or row[key] in ("", "-") for row in rows)}

    def line(tag: str, cells: Mapping[str, str]) -> str:
        inner = (f"<{tag}{' class=n' * (key in right)}>{escape(text)}</{tag}>" for key, text in cells.items())
        return f"<tr>{''.join(inner)}</tr>"

    lines = [line("th", {key: key for key in rows[0]}), *(line("td", row) for row in rows)]
    return "\n".join(['<div class="wide"><table>', *lines, "</table></div>"])


def _bars(rows: Sequence[Mapping[str, str]], chart: Chart) -> str:
    """Inline SVG; values below zero are drawn in the other colour."""
    numbers = [_length(row[chart.value]) or 0.0 for row in rows]
    most = max(map(abs, numbers)) or 1.0
    width, height = LABEL + BAR + VALUE, LINE * len(rows)
    parts = [f'<svg role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}">']
    parts.append(f"<title>{escape(chart.value)}</title>")
    for place, (row, number) in enumerate(zip(rows, numbers, strict=True)):
        top, length = place * LINE, BAR * abs(number) / most
        base = top + LINE - 5
        colour = BLUE if number >= 0 else ORANGE
        label = escape(shorten(row[chart.name], NAME_WIDTH))
        parts.append(f'<text x="{LABEL - 8}" y="{base}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="{LABEL}" y="{top + 3}" width="{length:.1f}" height="{LINE - 6}" fill="{colour}"/>')
        parts.append(f'<text x="{LABEL + length + 6:.1f}" y="{base}">{escape(row[chart.value])}</text>')
    return "\n".join([*parts, "</svg>"])


def _length(text: str) -> float | None:
    """The number a cell shows, None where it is none.

    >>> _length("+1,234.5"), _length("12 %"), _length("conv")
    (1234.5, 12.0, None)
    """
    try:
        return float(text.removesuffix("%").replace(",", ""))
    except ValueError:
        return None
