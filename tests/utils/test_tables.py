"""Markdown and plain tables."""

from utils.tables import markdown_table, plain_table

ROWS = [{"a|b": "x", "n": "1.5", "c": "2.00x"}, {"a|b": "y|z", "n": "-", "c": "n/a"}]


def test_markdown_aligns_numbers_and_escapes_bars() -> None:
    lines = markdown_table(ROWS).splitlines()
    assert lines[0] == "| a|b | n | c |"
    assert lines[1] == "|---|---:|---|"
    assert lines[3] == "| y\\|z | - | n/a |"


def test_plain_columns_start_at_the_same_place() -> None:
    lines = plain_table(ROWS).splitlines()
    assert set(lines[1]) == {"-"}
    assert len(lines[1]) == max(map(len, lines))
    assert [line.index(text) for line, text in ((lines[0], "c"), (lines[2], "2.00x"), (lines[3], "n/a"))] == [10] * 3
    assert lines[2][5:8] == "1.5"
    assert lines[3][5:8] == "  -"
