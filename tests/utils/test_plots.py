"""The picture is a PNG and shows what it was given."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from utils.plots import (
    AFTER,
    BEFORE,
    Front,
    LatencyBar,
    SchemePoint,
    draw_accuracy,
    draw_bits,
    draw_front,
    draw_latency,
    plot_fronts,
    plot_latency,
    plot_schemes,
)

POINTS = [SchemePoint("uniform8", 99.0, 100.0, 32.2, 90.9), SchemePoint("uniform2", 30.0, 90.0, 8.6, 6.8)]
BITS = {"uniform8": {"features.a.conv": (8, 8), "b": (8, 8)}, "uniform2": {"features.a.conv": (2, 4), "b": (8, 8)}}


def test_writes_a_png(tmp_path: Path) -> None:
    path = tmp_path / "new" / "p.png"
    plot_schemes(path, POINTS, BITS, float_top1=99.5, images=360, title="t")
    with Image.open(path) as image:
        image.verify()
        assert image.format == "PNG"
        assert min(image.size) >= 400
    assert path.stat().st_size < 100_000
    assert [p.name for p in path.parent.iterdir()] == ["p.png"]


def test_same_input_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_schemes(tmp_path / name, POINTS, BITS, float_top1=99.5, images=360, title="t")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_points_stand_at_their_cost_and_on_their_accuracy() -> None:
    axes = Figure().add_subplot()
    draw_accuracy(axes, POINTS, [p.size for p in POINTS], 99.5, images=360)
    trained = next(line for line in axes.lines if line.get_color() == AFTER)
    x, y = trained.get_data()
    assert list(x) == [32.2, 8.6]
    label = axes.yaxis.get_major_formatter()
    assert label(y[1], 0) == "90"
    assert float(label(y[0], 0)) == pytest.approx(100 - 50 / 360, rel=1e-4)  # no error: drawn at half an error
    assert {text.get_text() for text in axes.texts} >= {"uniform8", "uniform2"}


def test_bits_are_written_in_their_cells() -> None:
    axes = Figure().add_subplot()
    draw_bits(axes, BITS)
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0.5, 0.5): "8", (1.5, 0.5): "8", (0.5, 1.5): "2/4", (1.5, 1.5): "8"}
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b"]


def test_latency_bars_reach_the_minimum_from_the_top_down(tmp_path: Path) -> None:
    bars = [LatencyBar("ours", 2.0, 2.5, 4.0, ours=True), LatencyBar("theirs", 3.0, 3.5, 5.0)]
    axes = Figure().add_subplot()
    draw_latency(axes, bars)
    assert [patch.get_width() for patch in axes.patches] == [2.0, 3.0]
    assert axes.patches[0].get_facecolor() != axes.patches[1].get_facecolor()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ours", "theirs"]
    assert axes.yaxis_inverted()
    plot_latency(tmp_path / "p.png", {"one image": bars, "eight images": bars[:1]})
    with Image.open(tmp_path / "p.png") as image:
        image.verify()


def test_fronts_have_a_panel_each_and_the_choice_marked(tmp_path: Path) -> None:
    front = Front("size, MiB", [(1.0, 9.0), (2.0, 0.5)], (1.5, 4.0))
    axes = Figure().add_subplot()
    draw_front(axes, front)
    line, mark = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata()), line.get_color()) == ([1.0, 2.0], [9.0, 0.5], AFTER)
    assert (list(mark.get_xdata()), list(mark.get_ydata()), mark.get_color()) == ([1.5], [4.0], BEFORE)
    assert (axes.get_yscale(), axes.get_xlabel()) == ("log", "size, MiB")
    axes = Figure().add_subplot()
    draw_front(axes, Front("size, MiB", [(1.0, 9.0), (2.0, -0.5)], (1.5, 4.0)))
    assert axes.get_yscale() == "linear"
    plot_fronts(tmp_path / "p.png", [front, front], "title")
    with Image.open(tmp_path / "p.png") as image:
        assert image.size == (950, 400)
