"""Renders results/*.csv as tables between markers in README.md and docs/*.md: no number there is typed by hand.

    python -m benchmarks.readme_tables [--check]

A marker names a file and, if not all are wanted, its rows (by the values of some columns) and its columns:

    <!-- table results/demo.csv where how = QAT and scheme = mixed: scheme, size KiB -->
    <!-- end table -->

What stands between the two lines is replaced.
"""

import argparse
import re
import sys
from pathlib import Path

from utils.atomic_file import write_text
from utils.errors import UserError, command_line
from utils.provenance import read_csv
from utils.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))
MARKER = re.compile(
    r"^(?P<begin><!-- table (?P<file>[^\s:]+)(?: where (?P<where>[^:\n]+?))?(?:: (?P<columns>[^\n]+?))? -->)\n"
    r"(?P<old>(?:(?!<!-- table ).*\n)*?)(?P<end><!-- end table -->)$",
    re.MULTILINE,
)


def render(text: str, root: Path) -> str:
    """``text`` with every marked table made from its file.  root: the folder that file names start from.

    Raises UserError for a file that cannot be read or has no rows, and for a column that it does not have.
    """
    return MARKER.sub(lambda match: _block(match, root), text)


def _block(match: re.Match[str], root: Path) -> str:
    _, rows = read_csv(root / match["file"])
    if not rows:
        raise UserError(f"the table {match['file']} has no rows; measure again or remove its marker")
    conditions = [condition.split(" = ") for condition in (match["where"] or "").split(" and ") if condition]
    columns = match["columns"].split(", ") if match["columns"] else list(rows[0])
    for column in [*columns, *(condition[0] for condition in conditions)]:
        if column not in rows[0]:
            raise UserError(f"{match['file']} has no column {column!r}; expected some of {', '.join(rows[0])}")
    rows = [row for row in rows if all(row[column] == value for column, value in conditions)]
    if not rows:
        raise UserError(f"{match['file']} has no row where {match['where']}; measure again or change its marker")
    table = markdown_table([{column: row[column] for column in columns} for row in rows])
    return f"{match['begin']}\n\n{table}\n\n{match['end']}"


@command_line()
def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 where --check finds a page out of date; 2 for files that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a page is out of date")
    args = parser.parse_args(argv)
    status = 0
    for page in PAGES:
        old = (ROOT / page).read_text(encoding="utf-8")
        new = render(old, ROOT)
        if not args.check:
            write_text(ROOT / page, new)
        elif new != old:
            print(f"{page} is out of date: run python -m benchmarks.readme_tables")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
