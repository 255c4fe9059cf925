"""The published table reproduced: which cells agree in which convention, and the reasons for those that do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from utils.provenance import read_csv
from zoo import manifest, table
from zoo.table import BOPS, PUBLISHED, SIZE, UNIFORM, Row


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return table.compute(manifest.read(manifest.MANIFEST).published)


def differing(rows: list[Row], quantity: str, convention: str) -> set[str]:
    return {row.entry.name for row in rows if not row.agrees(quantity, convention)}


def test_networks_are_those_of_the_reference(network: Callable[[str], Any], rows: list[Row]) -> None:
    """Layers captured on the meta device against layers counted by hooks in the published order."""
    for arch in {row.entry.arch for row in rows}:
        ours, theirs = table.read_network(arch), network(arch)
        assert ours.parameters == theirs.parameters
        assert sorted((layer.weights, layer.macs) for layer in ours.layers) == sorted(
            (layer.weights, layer.macs) for layer in theirs.layers
        )


def test_how_many_cells_agree(rows: list[Row]) -> None:
    quantized = [row for row in rows if row.bits is not None]
    assert (len(rows), len(quantized)) == (27, 22)
    assert differing(quantized, SIZE, PUBLISHED) == {"resnet50_uniform8", "resnet50_size0.25"}
    assert differing(quantized, BOPS, PUBLISHED) == {"resnet18_bops0.5", "resnet50_size0.25"}
    assert len(differing(quantized, SIZE, UNIFORM)) == 22 - 3
    assert len(differing(quantized, BOPS, UNIFORM)) == 22 - 5
    floats = [row for row in rows if row.bits is None]
    assert differing(floats, BOPS, PUBLISHED) == set()
    assert differing(floats, BOPS, UNIFORM) == {"resnet101_baseline", "resnet101b_baseline"}
    for convention in (PUBLISHED, UNIFORM):
        unknown = {"resnet50_baseline", "resnet101_baseline", "resnet101b_baseline"}
        assert differing(floats, SIZE, convention) == unknown
    assert table.summary(rows) == [
        "agree to the last printed digit, of 22 quantized ResNet rows: published convention: 20 sizes, 20 BOPS; "
        "uniform convention: 3 sizes, 5 BOPS",
        "agree to the last printed digit, of 5 float rows: published convention: 2 sizes, 5 BOPS; "
        "uniform convention: 2 sizes, 3 BOPS",
    ]


def test_a_row_has_a_reason_exactly_where_a_cell_differs(rows: list[Row]) -> None:
    for row in rows:
        differs = {q for q in (SIZE, BOPS) for c in (UNIFORM, PUBLISHED) if not row.agrees(q, c)}
        text = "; ".join(table.reasons(row))
        assert bool(text) == bool(differs), row.entry.name
        assert "\n" not in text
        if row.entry.name not in ("resnet50_size0.25", "resnet18_bops0.5"):
            assert ("size" in text) == (SIZE in differs), row.entry.name
            assert ("BOPS" in text) == (BOPS in differs), row.entry.name


def test_the_reasons_are_computed(rows: list[Row]) -> None:
    by_name = {row.entry.name: "; ".join(table.reasons(row)) for row in rows}
    assert by_name["resnet50_size0.25"].count("printed numbers belong, has 8 (then 16.01 and 168.3)") == 1
    assert "stage3.unit6.quant_convbn1 at 4 bit" in by_name["resnet50_size0.25"]
    assert "that makes 72.83, cut off instead of rounded" in by_name["resnet18_bops0.5"]
    assert "float row's 97.8, which is 24.45" in by_name["resnet50_uniform8"]
    assert "with BatchNorm's statistics it is 97.69" in by_name["resnet50_baseline"]
    assert by_name["resnet101b_baseline"] == (
        "size: 169.94 rounded to a whole number; BOPS: of PyTorchCV's 7830.48 M FLOPs, not of the 7801.41 M MACs"
    )
    assert by_name["resnet18_size0.75"] == (
        "size: 9.23 MiB of the searched layers + 0.672 fitted; "
        "BOPS: in 1.024e9, 124.9 M FLOPs outside the search at 8 bit"
    )
    assert by_name["resnet18_baseline"] == ""


def test_differing_cells_are_marked_and_lead_to_their_reason(rows: list[Row]) -> None:
    text = table.text(rows, "the source")
    cells = {line["row"]: line for line in table.cells(rows)}
    for row in rows:
        for quantity in (SIZE, BOPS):
            for convention in (UNIFORM, PUBLISHED):
                cell = cells[row.entry.name][f"{quantity} {convention}"]
                assert cell.endswith("*") != row.agrees(quantity, convention)
        number = cells[row.entry.name]["why"]
        if number != "-":
            assert f"\n{number}. {row.entry.name}: {'; '.join(table.reasons(row))}\n" in text
    numbers = [line["why"] for line in cells.values() if line["why"] != "-"]
    assert numbers == [str(i) for i in range(1, len(numbers) + 1)]
    assert cells["resnet18_size0.75"]["size printed"] == "9.9"
    assert cells["resnet18_size0.75"]["size uniform"].strip() == "9.73*"
    assert cells["resnet18_size0.75"]["BOPS published"].strip() == "102.9"
    assert "printed: the source" in text


def test_markdown(rows: list[Row]) -> None:
    text = table.text(rows, "the source", markdown=True)
    assert "| resnet18_size0.75 | 9.9 | 9.73* | 9.91 | 103 | 105.0* | 102.9 | 1 |\n" in text
    assert "\n\n1. resnet18_size0.75: " in text


def test_csv(rows: list[Row], tmp_path: Path) -> None:
    table.save(rows, tmp_path / "table.csv")
    origin, lines = read_csv(tmp_path / "table.csv")
    assert "commit" in origin
    assert [line["row"] for line in lines] == [row.entry.name for row in rows]
    (line,) = [line for line in lines if line["row"] == "resnet18_bops0.5"]
    assert (line["bops_g_printed"], line["bops_g_published"], line["bops_g_published_agrees"]) == (
        "72",
        "72.832",
        "False",
    )


def test_a_quantized_row_without_its_float_row_is_no_table() -> None:
    published = manifest.read(manifest.MANIFEST).published
    with pytest.raises(KeyError, match="resnet18"):
        table.compute(published[1:2])
