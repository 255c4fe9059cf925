"""Pictures of results: accuracy against cost, every layer's bits and noise, latencies side by side."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from utils.atomic_file import write_atomically

# Two hues that people with any colour vision tell apart (Okabe and Ito, 2008), and a marker each besides.
BEFORE, AFTER, GREY = "#E69F00", "#0072B2", "#5A5A5A"
ACCURACIES = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9)
MIN_ARROW = 0.15  # decades of the error; a shorter arrow would be hidden by its ends
MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class SchemePoint:
    """One scheme: top-1 (percent) of the integer graph after calibration alone and after training, and its cost.

    size: weights, in any unit; bops: bit operations of one image, in any unit; the axes' labels name the units.
    """

    scheme: str
    calibrated: float
    trained: float
    size: float
    bops: float


def plot_schemes(
    path: Path,
    points: Sequence[SchemePoint],
    bits: Mapping[str, Mapping[str, tuple[int, int]]],
    *,
    float_top1: float,
    images: int,
    title: str,
    size_label: str = "weights, KiB",
    bops_label: str = "bit operations per image, millions",
) -> None:
    """Write one PNG with three panels: accuracy against size, against BOPS, and bits per layer.

    points: one per scheme.  bits: scheme -> layer -> (weight bits, activation bits), the same layers in each.
    float_top1: percent, a horizontal line.  images: their number; a scheme without a single error is drawn at half an
    error, as the axis of accuracies is logarithmic in the share of errors.  The file is replaced atomically.
    Raises UserError where it cannot be written.
    """
    heights = (3.4, 0.3 * len(bits) + 0.3)  # inches, roughly
    figure = Figure(figsize=(10, sum(heights) + 0.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=heights)
    left = figure.add_subplot(grid[0, 0])
    right = figure.add_subplot(grid[0, 1], sharey=left)
    for axes, costs, label in (
        (left, [p.size for p in points], size_label),
        (right, [p.bops for p in points], bops_label),
    ):
        draw_accuracy(axes, points, costs, float_top1, images)
        axes.set_xlabel(label)
    left.set_ylabel("top-1 of the integer graph, %")
    right.legend(loc="lower right", frameon=False)
    draw_bits(figure.add_subplot(grid[1, :]), bits)
    figure.suptitle(title, fontsize=12)
    save_png(figure, path)


def draw_accuracy(
    axes: Axes, points: Sequence[SchemePoint], costs: Sequence[float], float_top1: float, images: int
) -> None:
    """Top-1 before and after training over cost, an arrow from one to the other; higher and further left is better."""

    def height(top1: float) -> float:
        return -math.log10(max(100 - top1, 50 / images))

    axes.axhline(height(float_top1), color=GREY, linestyle="--", linewidth=1.2, label=f"float, {float_top1:.2f} %")
    before, after = [height(p.calibrated) for p in points], [height(p.trained) for p in points]
    arrow = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.0, "shrinkA": 6, "shrinkB": 6}
    for cost, low, high in zip(costs, before, after, strict=True):
        if abs(high - low) > MIN_ARROW:
            axes.annotate("", (cost, high), (cost, low), arrowprops=arrow)
    axes.plot(
        costs, before, "D", color=BEFORE, markersize=8, markerfacecolor="white", markeredgewidth=2, label="calibrated"
    )
    axes.plot(costs, after, "o", color=AFTER, markersize=9, label="trained (QAT)")
    for point, cost, low, high in zip(points, costs, before, after, strict=True):
        axes.annotate(
            point.scheme,
            (cost, min(low, high)),
            (0, -11),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=9,
        )
    _style_accuracy_axis(axes, [*before, *after, height(float_top1)], costs)


def _style_accuracy_axis(axes: Axes, heights: Sequence[float], costs: Sequence[float]) -> None:
    room = max(max(heights) - min(heights), 0.3)
    axes.set_ylim(min(heights) - 0.22 * room, max(heights) + 0.1 * room)
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 1.3, max(costs) * 1.3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(FixedLocator([-math.log10(100 - accuracy) for accuracy in ACCURACIES]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 - 10**-y:.4g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_bits(axes: Axes, bits: Mapping[str, Mapping[str, tuple[int, int]]]) -> None:
    """A row per scheme, a column per layer; darker is more weight bits, the number tells them (W/A if they differ)."""
    schemes = list(bits)
    layers = list(bits[schemes[0]])
    for row, scheme in enumerate(schemes):
        for column, layer in enumerate(layers):
            weight, activation = bits[scheme][layer]
            shade = 0.12 + 0.75 * (weight - MIN_BITS) / (MAX_BITS - MIN_BITS)
            axes.add_patch(
                Rectangle((column + 0.03, row + 0.06), 0.94, 0.88, facecolor=AFTER, alpha=shade, linewidth=0)
            )
            text = f"{weight}" if weight == activation else f"{weight}/{activation}"
            axes.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", color="white" if shade > 0.5 else "black"
            )
    axes.set_xlim(0, len(layers))
    axes.set_ylim(len(schemes), 0)
    axes.set_xticks([i + 0.5 for i in range(len(layers))], [_short(layer) for layer in layers], fontsize=9)
    axes.set_yticks([i + 0.5 for i in range(len(schemes))], schemes)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("bits of each layer's weights and input", fontsize=10)


def _short(layer: str) -> str:
    """A layer's name without the parts that repeat in every name.

    >>> _short("features.unit.conv1.conv")
    'unit.conv1'
    """
    return layer.removeprefix("features.").removesuffix(".conv")


@dataclass(frozen=True)
class LatencyBar:
    """One engine: milliseconds of its fastest, its median and its 95th percentile run.  ours: drawn in our colour."""

    engine: str
    min_ms: float
    median_ms: float
    p95_ms: float
    ours: bool = False


def plot_latency(path: Path, panels: Mapping[str, Sequence[LatencyBar]]) -> None:
    """Write one PNG with a panel per title: a bar up to each engine's minimum, its median and 95th percentile marked.

    panels: at least one, each with at least one bar, drawn in their order from the top.  The file is replaced
    atomically.  Raises UserError where it cannot be written.
    """
    heights = [0.32 * len(bars) + 0.7 for bars in panels.values()]  # inches
    figure = Figure(figsize=(8, sum(heights) + 0.3), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    for row, (title, bars) in enumerate(panels.items()):
        draw_latency(figure.add_subplot(grid[row, 0]), bars)
        figure.axes[-1].set_title(title, fontsize=11, loc="left")
    figure.axes[-1].set_xlabel("milliseconds: bar minimum, dot median, line to the 95th percentile")
    save_png(figure, path)


def draw_latency(axes: Axes, bars: Sequence[LatencyBar]) -> None:
    """Horizontal bars from the top, shorter is better."""
    places = range(len(bars))
    colours = [AFTER if bar.ours else BEFORE for bar in bars]
    axes.barh(places, [bar.min_ms for bar in bars], color=colours, height=0.7)
    axes.hlines(places, [bar.min_ms for bar in bars], [bar.p95_ms for bar in bars], color=GREY, linewidth=1)
    axes.plot([bar.median_ms for bar in bars], places, "o", color=GREY, markersize=4)
    for place, bar in zip(places, bars, strict=True):
        axes.annotate(f"{bar.min_ms:.3g}", (bar.p95_ms, place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, [bar.engine for bar in bars])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)


def plot_sqnr(path: Path, values: Mapping[str, float], worst: int = 10, title: str = "") -> None:
    """Write one PNG: signal to quantization noise (dB) of every layer in order, the ``worst`` drawn and named apart.

    values: dB by layer, at least one.  The file is replaced atomically.  Raises UserError where it cannot be written.
    """
    figure = Figure(figsize=(10, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(values)
    lowest = sorted(range(len(names)), key=lambda i: values[names[i]])[:worst]
    colours = [BEFORE if i in lowest else AFTER for i in range(len(names))]
    axes.bar(range(len(names)), [values[name] for name in names], color=colours, width=0.8)
    axes.set_xticks(sorted(lowest), [_short(names[i]) for i in sorted(lowest)], rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("signal to quantization noise, dB")
    axes.set_title(title or f"layers in order; the {len(lowest)} worst are named", fontsize=11, loc="left")
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    save_png(figure, path)


@dataclass(frozen=True)
class Front:
    """Damage against one cost: the best choices (cost, damage) ascending in cost, and the one that was taken."""

    label: str
    points: Sequence[tuple[float, float]]
    chosen: tuple[float, float]


def plot_fronts(path: Path, fronts: Sequence[Front], title: str) -> None:
    """Write one PNG with a panel for each front (at least one), each with at least one point.

    The damage is drawn on a logarithmic axis where it is positive everywhere.  The file is replaced atomically.
    Raises UserError where it cannot be written.
    """
    figure = Figure(figsize=(4.5 * len(fronts) + 0.5, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for column, front in enumerate(fronts):
        draw_front(figure.add_subplot(1, len(fronts), column + 1), front)
    figure.axes[0].set_ylabel("damage, sum over layers")
    figure.axes[0].legend(loc="upper right", frameon=False)
    figure.suptitle(title, fontsize=11)
    save_png(figure, path)


def draw_front(axes: Axes, front: Front) -> None:
    """A line through the best choices; lower and further left is better."""
    costs, damages = zip(*front.points, strict=True)
    axes.plot(costs, damages, "o-", color=AFTER, markersize=4, linewidth=1.2, label="best choices")
    axes.plot(*front.chosen, "D", color=BEFORE, markersize=9, markerfacecolor="none", markeredgewidth=2, label="taken")
    if min(*damages, front.chosen[1]) > 0:
        axes.set_yscale("log")
    axes.set_xlabel(front.label)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plot_runs(path: Path, panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], label: str) -> None:
    """Write one PNG with a panel for each budget; every run is a point, the runs of one scheme stand in one column.

    panels: title -> kind of scheme (at most four) -> values of each of its schemes.  The file is replaced atomically.
    Raises UserError where it cannot be written.
    """
    figure = Figure(figsize=(3 * len(panels), 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for column, (title, kinds) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), column + 1)
        for x, (schemes, colour, marker) in enumerate(
            zip(kinds.values(), (AFTER, BEFORE, GREY, GREY), "oDx+", strict=False)
        ):
            for i, values in enumerate(schemes):
                place = x + 0.1 * (i - (len(schemes) - 1) / 2)
                axes.plot([place] * len(values), values, marker, color=colour)
        axes.set_xticks(range(len(kinds)), [textwrap.fill(kind, 9) for kind in kinds], fontsize=9)
        axes.set_xlim(-0.5, len(kinds) - 0.5)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(label)
    save_png(figure, path)


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG without time stamp, atomically.  Raises UserError where the file cannot be written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})

    def write(file: BinaryIO) -> None:
        file.write(buffer.getbuffer())

    write_atomically(path, write)
