"""The table of network families: complete, and honest about what fails."""

import pytest

from benchmarks import families
from benchmarks.families import COLUMNS, TORCHVISION, check, everything, main, representatives, summary
from utils.models import model_families, model_names


def test_every_family_has_a_known_network():
    chosen = representatives()
    pytorchcv = {family for family in model_families() if family.startswith("pytorchcv/")}
    assert {family for family, _ in chosen if family.startswith("pytorchcv/")} == pytorchcv
    assert len(pytorchcv) + len(TORCHVISION) == 134
    known = {*model_names(), *(name for names in model_families().values() for name in names)}
    assert {name for _, name in chosen} <= known
    assert {name for _, name in everything()} >= {name for _, name in chosen}


def test_a_row_of_a_small_network():
    row = check("pytorchcv/resnet_cifar", "resnet20_cifar10", "uniform4")
    assert tuple(row) == COLUMNS
    assert row["outcome"] == "integers"
    assert row["equal"] is True
    assert row["different"] == 0
    assert float(row["float_error"]) < 1e-4
    assert row["parameters_m"] == 0.272


def test_refusals_and_crashes_are_rows(monkeypatch):
    assert check("none", "resnet21", "uniform8")["reason"].startswith("unknown architecture 'resnet21'")

    def broken(name):
        raise KeyError("lost")

    monkeypatch.setattr(families, "create_model", broken)
    row = check("none", "resnet20_cifar10", "uniform8")
    assert (row["outcome"], row["reason"]) == ("crashed", "KeyError: 'lost'")


def test_summary_counts_the_worst_network_of_a_family():
    rows = [
        {"family": "p/a", "name": "a1", "outcome": "integers", "reason": ""},
        {"family": "p/a", "name": "a2", "outcome": "islands", "reason": ""},
        {"family": "p/b", "name": "b", "outcome": "refused", "reason": "because"},
    ]
    lines = summary(rows).splitlines()
    assert lines[0] == "2 families, 3 networks"
    assert [line.split() for line in lines[1:4]] == [
        ["integers", "0"],
        ["islands", "1:", "p/a"],
        ["refused", "1:", "p/b"],
    ]
    assert lines[-1] == "b: because"


def test_unknown_family(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["families.py", "--families", "nonet"])
    assert main() == 2
    assert capsys.readouterr().err == "error: no family is called nonet; see model_families\n"


@pytest.mark.parametrize("name", ["resnet_cifar", "pytorchcv/resnet_cifar"])
def test_kept_rows(name, monkeypatch, tmp_path, capsys):
    path = tmp_path / "families.csv"
    rows = []

    def fake(cases, scheme):
        rows.append(cases)
        yield {**dict.fromkeys(COLUMNS, ""), "family": cases[0][0], "name": cases[0][1], "outcome": "integers"}

    monkeypatch.setattr(families, "rows_of", fake)
    for family in ("seresnet_cifar", name, name):
        monkeypatch.setattr("sys.argv", ["families.py", "--families", family, "--keep", "--output", str(path)])
        assert main() == 0
    assert "2 families, 2 networks" in capsys.readouterr().out
    assert [case for cases in rows for case in cases][-1] == ("pytorchcv/resnet_cifar", "resnet20_cifar10")
