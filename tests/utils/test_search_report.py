"""What a search says about its result."""

from pathlib import Path

import pytest

from utils.provenance import read_csv, write_csv
from utils.quantization_utils.bit_width_problem import Budget, Option, Problem, SearchLayer
from utils.quantization_utils.bit_width_search import pareto, prices, solve
from utils.search_report import Search, format_search, front_rows, layer_table, reasons_of

WIDTHS = (2, 4, 8)


def layer(name: str, *damages: float, latency: tuple[float, ...] = (1, 1, 2)) -> SearchLayer:
    options = [
        Option(bits, damage, {"size": bits / 8, "bops": bits**2 / 64, "latency": ms, "mean_bits": bits / 4})
        for bits, damage, ms in zip(WIDTHS[-len(damages) :], damages, latency[-len(damages) :], strict=True)
    ]
    return SearchLayer(name, tuple(options))


LAYERS = (
    layer("features.stem.conv", 0.5),
    layer("features.a.conv", 8, 4, 0),
    layer("features.b.conv", 3, 1, 0),
    layer("features.c.conv", 16, 4, 0),
    layer("features.d.conv", 16, 4, 0),
)


def search(*budgets: Budget, fixed: bool = True) -> Search:
    problem = Problem(LAYERS, budgets, (("features.c.conv", "features.d.conv"),), {"features.stem.conv": 8})
    reasons = {"features.stem.conv": "fixed: first layer"} if fixed else {}
    return Search("net", problem, solve(problem), prices(problem), reasons, "damage by trace on 256 images")


@pytest.fixture(scope="module")
def found() -> Search:
    """4.5 of 5 MiB: only b goes to 4 bit, c and d together would cost more."""
    return search(Budget("size", 4.5), Budget("latency", 10))


def test_reasons(found: Search) -> None:
    assert found.solution.bits == dict(zip((x.name for x in LAYERS), (8, 8, 4, 8, 8), strict=True))
    assert reasons_of(found) == {
        "features.stem.conv": "fixed: first layer",
        "features.a.conv": "4 bit would add 1 x the median",  # of 4, 1 and 8
        "features.b.conv": "2 bit would add 0.5 x the median",  # 2, beside 4, 2 and 24
        "features.c.conv": "4 bit would add 2 x the median",
        "features.d.conv": "tied to c",
    }
    assert reasons_of(search(Budget("size", 9), fixed=False))["features.stem.conv"] == "has one width"


def test_reason_of_a_layer_tied_to_a_fixed_one() -> None:
    problem = Problem(LAYERS, (Budget("size", 9),), (("features.a.conv", "features.b.conv"),), {"features.b.conv": 4})
    found = Search("net", problem, solve(problem), prices(problem), {"features.b.conv": "fixed by 'b'"}, "damage")
    reasons = reasons_of(found)
    assert (reasons["features.a.conv"], reasons["features.b.conv"]) == ("tied to b", "fixed by 'b'")


def test_reason_at_the_lowest_width() -> None:
    found = search(Budget("size", 0, True))
    assert reasons_of(found)["features.b.conv"] == "2 bit adds 0.5 x the median"


def test_text(found: Search) -> None:
    text = format_search(found)
    lines = text.splitlines()
    assert lines[0] == "net: 5 layers, bits 2, 4, 8, damage by trace on 256 images"
    assert max(map(len, lines)) <= 120
    (row,) = [line.split(maxsplit=6) for line in lines if line.startswith("features.b.conv")]
    assert row == ["features.b.conv", "4", "1", "11.1", "5.9", "11.1", "2 bit would add 0.5 x the median"]
    size, latency = (line for line in lines if line.startswith(("size 4.5", "latency 10")))
    assert size.split("  ")[0] == "size 4.5 MiB"
    assert "100.0%" in size
    assert "0.5 (-66.7 %)" in size  # without the size budget b has 8 bit too
    assert latency.count("1.5 (+0.0 %)") == 2
    assert "damage 1.5, proved to be the least" in text
    assert "all layers at the highest bits: 0.5, all layers at the lowest bits: 43.5" in text
    assert "dropped" not in text


def test_dropped_widths_are_named() -> None:
    """Those of all layers shortly; those of some with the names."""
    text = format_search(search(Budget("latency", 10)))
    assert text.splitlines()[-1].startswith("dropped: 2 bit for all 4 searched layers, no cheaper than 4 bit in any")
    problem = Problem((layer("features.a.conv", 8, 4, 0, latency=(2, 2, 2)), *LAYERS[2:]), (Budget("latency", 10),))
    lines = format_search(Search("net", problem, solve(problem), prices(problem), {}, "damage")).splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith("dropped: ")]
    assert [lines[i][9:].split(" in any")[0] for i in places] == [
        "4 bit for 1 of 4 searched layers, no cheaper than 8 bit",
        "2 bit for 1 of 4 searched layers, no cheaper than 8 bit",
        "2 bit for 3 of 4 searched layers, no cheaper than 4 bit",
    ]
    assert lines[places[0] + 1] == lines[places[1] + 1] == "  features.a.conv"
    assert lines[places[2] + 1] == "  features.b.conv, features.c.conv, features.d.conv"


def test_tables(found: Search, tmp_path: Path) -> None:
    rows = layer_table(found)
    assert [row["bits"] for row in rows] == [8, 8, 4, 8, 8]
    assert {key: rows[2][key] for key in ("damage", "size_mib", "bops_g", "latency_ms", "mean_bits")} == {
        "damage": 1,
        "size_mib": 0.5,
        "bops_g": 0.25,
        "latency_ms": 1,
        "mean_bits": 1,
    }
    write_csv(tmp_path / "t.csv", rows)
    assert [row["layer"] for row in read_csv(tmp_path / "t.csv")[1]] == [x.name for x in LAYERS]
    front = front_rows({"size": pareto(found.problem, "size", 100)})
    assert [row["bits"] for row in front][:: len(front) - 1] == ["82222", "88888"]
    assert all(row["front"] == "size" and row["gap"] == 0 and row["size_mib"] <= row["limit"] + 1e-9 for row in front)
