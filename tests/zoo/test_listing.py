"""``python -m zoo list``: what is shown, and that nobody takes published figures for measured ones."""

from typing import Any

import pytest

from utils.errors import UserError
from zoo import listing, manifest
from zoo.manifest import Own, Published


@pytest.fixture
def entries(own_entry: Own) -> list[Any]:
    return [*manifest.read(manifest.MANIFEST).published, own_entry]


def test_selection_by_architecture_size_and_kind(entries: list[Any], own_entry: Own) -> None:
    assert listing.select(entries) == entries
    assert listing.select(entries, kind=Own) == [own_entry]
    assert {entry.arch for entry in listing.select(entries, arch="resnet50")} == {"resnet50"}
    small = listing.select(entries, arch="resnet18", max_size=6.1, kind=Published)
    assert [entry.name for entry in small] == ["resnet18_bops0.25", "resnet18_latency0.25", "resnet18_uniform4"]


def test_an_empty_selection_says_what_there_is(entries: list[Any]) -> None:
    with pytest.raises(UserError, match=r"no such entry of vgg; architectures there: digits, inceptionv3, resnet101"):
        listing.select(entries, arch="vgg")
    with pytest.raises(UserError, match=r"at most 5 MiB; the smallest is resnet18_uniform4, 5\.8 MiB"):
        listing.select(entries, arch="resnet18", max_size=5)
    with pytest.raises(UserError, match=r"no such entry of this kind; architectures there: there are none yet"):
        listing.select(entries[:1], kind=Own)


def test_every_line_says_whether_its_figures_are_published_or_measured(entries: list[Any]) -> None:
    notes = manifest.read(manifest.MANIFEST).notes
    lines = listing.listing(entries, notes).splitlines()
    table = lines[2 : lines.index("")]
    assert len(table) == len(entries)
    assert sum(line.endswith("  published") for line in table) == 27
    (own,) = [line for line in table if not line.endswith("  published")]
    assert " ".join(own.split()) == "own_net digits uniform8 0.250 0.500 97.50 98.00 - measured on 360 images"
    (row,) = [line for line in table if line.startswith("resnet50_bops0.5 ")]
    assert " ".join(row.split()) == "resnet50_bops0.5 resnet50 bops_0.5 18.7 154 75.39 - 3.81x published"


def test_the_origin_of_figures_is_below_the_table(entries: list[Any], own_entry: Own) -> None:
    notes = manifest.read(manifest.MANIFEST).notes
    both = listing.listing(entries, notes)
    for text in (notes.source, notes.licence, "not measured here", "a CPU, 1 thread; torch 2.11.0; commit abc1234"):
        assert text in both
    assert "digits of scikit-learn" in both
    only_own = listing.listing([own_entry], notes)
    assert "published" not in only_own
    assert "measured" not in listing.listing(entries[:2], notes).replace("not measured here", "")
