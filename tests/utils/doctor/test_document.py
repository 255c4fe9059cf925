"""Text and HTML show the same strings; the HTML stands alone and is well formed."""

import re
from html.parser import HTMLParser

import pytest

from utils.doctor.document import CHART_ROWS, Chart, Document, Section

VOID = ("meta", "br", "hr", "img", "link", "input")
ROWS = [{"layer": f"a<b>.{i}", "loss": f"{i - 2:+.3f}", "note": "-"} for i in range(30)]
SECTIONS = [
    Section("First & last", "A note.", ["one: +1.5", "two & three"]),
    Section("Table", rows=ROWS, chart=Chart("layer", "loss")),
    Section("Nothing"),
    Section("Nothing else", empty="all is well"),
]
DOCUMENT = Document("Report <1>", SECTIONS)


class Page(HTMLParser):
    """Checks that tags nest, and collects texts, cells, attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and data.strip():
            self.texts.append(data)


def assert_stands_alone(page: Page, html: str) -> None:
    """Nothing is loaded: no script, no link, no address."""
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    assert not {"src", "href", "srcset", "data", "action"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|url\(|@import|//[a-z]", html)


def test_html_is_well_formed_and_stands_alone() -> None:
    html = DOCUMENT.html()
    page = Page(html)
    assert_stands_alone(page, html)
    assert page.tags.count("table") == 1
    assert page.tags.count("svg") == 1
    assert page.tags.count("rect") == CHART_ROWS
    assert "a<b>.0" in page.texts
    assert "Report <1>" in page.texts


def test_every_string_is_in_both() -> None:
    text, page = DOCUMENT.text(), Page(DOCUMENT.html())
    for section in SECTIONS:
        strings = [section.title, *section.items, *(cell for row in section.rows for cell in row.values())]
        strings += [section.note] * bool(section.note)
        for string in strings:
            assert string in text
            assert string in page.texts
    for word in ("none", "all is well"):
        assert word in text
        assert word in page.texts


def test_limit_counts_what_is_left_out() -> None:
    text = DOCUMENT.text(10)
    assert "a<b>.9" in text
    assert "a<b>.10" not in text
    assert "... and 20 more" in text
    assert "more" not in DOCUMENT.text()


def test_bars_are_proportional_and_signed() -> None:
    rows = [{"n": "a", "v": "+2.0"}, {"n": "b", "v": "-1.0"}, {"n": "c", "v": "0"}]
    html = Document("t", [Section("s", rows=rows, chart=Chart("n", "v"))]).html()
    bars = re.findall(r'<rect [^>]*width="([\d.]+)"[^>]*fill="(#\w+)"', html)
    widths = [float(width) for width, _ in bars]
    assert widths[0] == pytest.approx(2 * widths[1])
    assert widths[2] == 0
    assert bars[0][1] != bars[1][1]


def test_chart_of_zeros_has_no_bars() -> None:
    html = Document("t", [Section("s", rows=[{"n": "a", "v": "0.0"}], chart=Chart("n", "v"))]).html()
    assert 'width="0.0"' in html
    Page(html)
