"""Tables in the README are those in results/."""

from pathlib import Path

import pytest

from benchmarks.readme_tables import main, render
from utils.errors import UserError

CSV = "# cpu: some\nscheme,top-1\nuniform8,99.44\nuniform4,98.9\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    (tmp_path / "results/a.csv").write_text(CSV)
    return tmp_path


def test_renders_between_the_markers_only(root: Path) -> None:
    text = "before\n<!-- table results/a.csv -->\nold\n<!-- end table -->\nafter\n"
    expected = "| scheme | top-1 |\n|---|---:|\n| uniform8 | 99.44 |\n| uniform4 | 98.9 |"
    assert render(text, root) == text.replace("old", f"\n{expected}\n")


def test_rendering_twice_changes_nothing(root: Path) -> None:
    text = "".join(f"<!-- table results/a.csv{columns} -->\n<!-- end table -->\n" for columns in ("", ": top-1"))
    once = render(text, root)
    assert render(once, root) == once
    assert "| top-1 |\n|---:|\n| 99.44 |" in once


def test_refuses_unknown_columns_and_files(root: Path) -> None:
    with pytest.raises(UserError, match="no column 'top-5'; expected some of scheme, top-1"):
        render("<!-- table results/a.csv: top-5 -->\n<!-- end table -->", root)
    with pytest.raises(UserError, match="cannot read the table"):
        render("<!-- table results/b.csv -->\n<!-- end table -->", root)
    (root / "results/a.csv").write_text("scheme,top-1\n")
    with pytest.raises(UserError, match="has no rows"):
        render("<!-- table results/a.csv -->\n<!-- end table -->", root)


def test_chooses_rows(root: Path) -> None:
    text = "<!-- table results/a.csv where scheme = uniform4 and top-1 = 98.9: top-1 -->\n<!-- end table -->"
    assert "| top-1 |\n|---:|\n| 98.9 |\n\n" in render(text, root)
    with pytest.raises(UserError, match=r"a\.csv has no row where scheme = uniform2; measure again"):
        render("<!-- table results/a.csv where scheme = uniform2 -->\n<!-- end table -->", root)
    with pytest.raises(UserError, match="no column 'bits'"):
        render("<!-- table results/a.csv where bits = 2: top-1 -->\n<!-- end table -->", root)


def test_readme_is_in_sync_with_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out
