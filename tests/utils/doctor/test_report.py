"""The report of an examination: every finding is in it, with the same numbers in text and HTML."""

import re

import pytest
import torch
from torch import Tensor, nn

from tests.utils.doctor.patients import images, narrow, network
from tests.utils.doctor.test_document import Page, assert_stands_alone
from utils.api import calibrate, quantize
from utils.doctor.advice import advise
from utils.doctor.document import Document, Section
from utils.doctor.examine import ISLAND_REASONS, Examination, examine
from utils.doctor.outcomes import Images
from utils.doctor.report import report
from utils.integer_graph.float_islands import FUNCTIONS


@pytest.fixture(scope="module")
def found() -> Examination:
    latency = {"block1.0": {2: 3.0, 8: 4.0}, "block2.0": {2: 1.0, 8: 8.0}}
    torch.manual_seed(0)
    return examine(network(narrow("block2", 2)), 16, images(128), latency)


@pytest.fixture(scope="module")
def document(found: Examination) -> Document:
    return report(found, advise(found), name="small", source="patterns")


def section(document: Document, title: str) -> Section:
    return next(section for section in document.sections if section.title == title)


def test_numbers_are_the_same_in_both(document: Document) -> None:
    number = r"[+-]?\d[\d,]*\.?\d*(?:e[+-]?\d+)?"
    html = document.html()
    page = Page(html)
    assert_stands_alone(page, html)
    text = sorted(set(re.findall(number, document.text())))
    assert len(text) > 50
    assert text == sorted(set(re.findall(number, "\n".join(page.texts).replace("\u2009", " "))))


def test_damage_is_ranked_and_complete(found: Examination, document: Document) -> None:
    rows = section(document, "Layers by damage").rows
    assert rows[0]["layer"] == "block2.0"
    assert rows[0]["W"] == "2"
    assert {row["layer"] for row in rows} == {"block1.0", "block2.0", "block3.0", "output"}
    losses = [float(row["loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    facts = next(fact for fact in found.layers if fact.layer.name == "block2.0")
    assert rows[0]["SQNR dB"] == f"{facts.sqnr:.1f}"


def test_shares_add_up(document: Document) -> None:
    rows = section(document, "Layers by bit operations and size").rows
    for key in ("size %", "BOPS %"):
        assert sum(float(row[key]) for row in rows) == pytest.approx(100, abs=0.3)
    first = next(row for row in rows if row["layer"] == "block2.0")
    assert (first["weights"], first["size KiB"]) == ("864", f"{864 * 2 / 8 / 1024:.2f}")


def test_times_are_those_of_the_bits_in_use(document: Document) -> None:
    rows = section(document, "Layers by time").rows
    assert [(row["layer"], row["ms"], row["time %"]) for row in rows] == [
        ("block1.0", "4.0000", "80.0"),
        ("block2.0", "1.0000", "20.0"),
    ]
    assert "5.000 ms" in section(document, "Layers by time").note
    assert "2 layers are not in it" in section(document, "Layers by time").note


def test_no_time_without_latencies(found: Examination) -> None:
    layers = [type(fact)(**{**vars(fact), "ms": None}) for fact in found.layers]
    sections = report(Examination(**{**vars(found), "layers": layers}), [], name="n", source="s").sections
    assert "Layers by time" not in [section.title for section in sections]


def test_nothing_to_advise_is_said(found: Examination) -> None:
    text = report(found, [], name="n", source="s").text()
    assert "nothing: no change gained more than chance" in text


class Island(nn.Module):
    """Bilinear upsampling between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.output = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.output(self.second(self.up(torch.relu(self.first(x)))).mean((2, 3)))
        return result


def test_islands_are_named_with_the_reason() -> None:
    model = quantize(Island(), torch.zeros(1, 1, 4, 4), "uniform8")
    pixels = torch.randn(12, 1, 4, 4)
    calibrate(model, [pixels])
    found = examine(model, 16, Images([(pixels, torch.arange(12) % 3)], lambda x: x))
    rows = section(report(found, advise(found), name="n", source="s"), "Float islands").rows
    assert rows == [{"module": "up", "operation": "interpolate", "why": ISLAND_REASONS["interpolate"]}]


def test_every_kind_of_island_has_a_reason() -> None:
    assert set(ISLAND_REASONS) == set(FUNCTIONS)
