"""The published model zoo table beside our own figures: which cells differ, and why.

Everything but the printed figures is computed from the networks, in the two conventions of `cost_model`.  A cell
agrees where our figure, rounded to the printed digits, is the printed one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import bit_config
from utils.models import create_model
from utils.provenance import write_csv
from utils.quantization_utils import cost_model
from utils.quantization_utils.capture import capture
from utils.quantization_utils.cost_model import Layer, LayerBits
from utils.quantization_utils.prepare import describe_layers, fold_network
from utils.tables import markdown_table, plain_table
from zoo.manifest import FLOAT, Published

UNIFORM, PUBLISHED = "uniform", "published"
CONVENTIONS = (UNIFORM, PUBLISHED)
SIZE, BOPS = "size", "BOPS"
PRINTED_DIGITS = {SIZE: 1, BOPS: 0}
MARK = "*"


@dataclass(frozen=True)
class Network:
    """A float network: its layers, and the numbers of elements of its parameters and of its BatchNorms' statistics."""

    layers: tuple[Layer, ...]
    parameters: int
    statistics: int


@dataclass(frozen=True)
class Row:
    """One row of the published table.  bits: by layer name, None for the float rows.

    float_size: as printed for the float network.  figures: (quantity, convention) -> our figure; MiB and 1e9.
    """

    entry: Published
    network: Network
    float_size: float
    bits: Mapping[str, LayerBits] | None
    figures: Mapping[tuple[str, str], float]

    def printed(self, quantity: str) -> float:
        """What the model zoo printed."""
        return self.entry.size_mb if quantity == SIZE else self.entry.bops_g

    def agrees(self, quantity: str, convention: str) -> bool:
        """Whether our figure is the printed one to its last digit."""
        return prints_as(self.figures[quantity, convention], self.printed(quantity), PRINTED_DIGITS[quantity])

    @property
    def mixed(self) -> bool:
        """Whether the layers of the original's search have 4 and 8 bits both."""
        if self.bits is None:
            return False
        return len({self.bits[layer.name].weight for layer in cost_model.ilp_layers(self.network.layers)}) > 1


def prints_as(value: float, printed: float, digits: int) -> bool:
    """Whether a figure, rounded, is the printed one.

    >>> prints_as(9.9069, 9.9, 1), prints_as(72.83, 72, 0)
    (True, False)
    """
    return f"{value:.{digits}f}" == f"{printed:.{digits}f}"


def read_network(arch: str) -> Network:
    """Layers and sizes of a PyTorchCV network, without its weights: only shapes are computed."""
    with torch.device("meta"):
        info = create_model(arch)
        example = torch.zeros(1, *info.preprocess.input_shape)
    layers = describe_layers(fold_network(capture(info.module, example)))
    statistics = sum(b.numel() for name, b in info.module.named_buffers() if not name.endswith("num_batches_tracked"))
    return Network(tuple(layers), sum(p.numel() for p in info.module.parameters()), statistics)


def compute(entries: Iterable[Published]) -> list[Row]:
    """Our figures for published rows, in their order."""
    entries = list(entries)
    networks = {arch: read_network(arch) for arch in dict.fromkeys(entry.arch for entry in entries)}
    float_sizes = {entry.arch: entry.size_mb for entry in entries if entry.scheme == FLOAT}
    return [_row(entry, networks[entry.arch], float_sizes[entry.arch]) for entry in entries]


def _row(entry: Published, network: Network, float_size: float) -> Row:
    layers, arch = network.layers, entry.arch
    if entry.scheme == FLOAT:
        size = cost_model.float_size_mib(network.parameters)
        published = cost_model.published_float_size_mib(arch, layers, network.parameters)
        bops, published_bops = cost_model.float_bops_g(layers), cost_model.published_float_bops_g(arch, layers)
        bits = None
    else:
        bits = bit_config.resolve(bit_config.load_scheme(entry.scheme, arch), layers)
        size, published = cost_model.size_mib(layers, bits), cost_model.published_size_mib(arch, layers, bits)
        bops, published_bops = cost_model.bops_g(layers, bits), cost_model.published_bops_g(arch, layers, bits)
    assert published is not None, f"{entry.name} is a row of the published table"
    assert published_bops is not None
    figures = {(SIZE, UNIFORM): size, (SIZE, PUBLISHED): published}
    return Row(entry, network, float_size, bits, figures | {(BOPS, UNIFORM): bops, (BOPS, PUBLISHED): published_bops})


# ---- why cells differ: one reason for a kind of rows and a quantity, or for one row ---------------------------------


def _searched_size(row: Row) -> str:
    convention = cost_model.ZOO_MIXED_SIZE[row.entry.arch]
    searched = row.figures[SIZE, PUBLISHED] - convention.rest
    unit = "MiB" if convention.unit == cost_model.MIB else "MB"
    return f"size: {searched:.2f} {unit} of the searched layers + {convention.rest:g} fitted"


def _searched_bops(row: Row) -> str:
    searched = sum(layer.macs for layer in cost_model.ilp_layers(row.network.layers))
    outside = (cost_model.ZOO_FLOPS[row.entry.arch] - searched) / 1e6
    return f"BOPS: in 1.024e9, {outside:.1f} M FLOPs outside the search at 8 bit"


def _flops(row: Row) -> str:
    flops, macs = cost_model.ZOO_FLOAT_FLOPS[row.entry.arch], sum(layer.macs for layer in row.network.layers)
    return f"BOPS: of PyTorchCV's {flops / 1e6:.2f} M FLOPs, not of the {macs / 1e6:.2f} M MACs"


def _quarter(row: Row) -> str:
    quarter = row.float_size / 4
    return f"size: unknown, perhaps a quarter of the float row's {row.float_size}, which is {quarter:.2f}"


def _optimum(row: Row) -> str:
    """The row whose printed figures belong to another configuration than the published one."""
    assert row.bits is not None
    layers, arch = row.network.layers, row.entry.arch
    optimum = {**row.bits, MISPRINTED: LayerBits(8, 8, "optimum")}
    size, bops = (f(arch, layers, optimum) for f in (cost_model.published_size_mib, cost_model.published_bops_g))
    return (
        f"bit_config.py has stage3.unit6.quant_convbn1 at {row.bits[MISPRINTED].weight} bit where the optimum, to "
        f"which the printed numbers belong, has 8 (then {size:.2f} and {bops:.1f})"
    )


def _cut_off(row: Row) -> str:
    return f"that makes {row.figures[BOPS, PUBLISHED]:.2f}, cut off instead of rounded"


def _file_size(row: Row) -> str:
    with_statistics = cost_model.float_size_mib(row.network.parameters + row.network.statistics)
    return f"size: unknown; with BatchNorm's statistics it is {with_statistics:.2f}, so perhaps the length of a file"


def _whole(row: Row) -> str:
    return f"size: {row.figures[SIZE, PUBLISHED]:.2f} rounded to a whole number"


MISPRINTED = "features.stage3.unit6.body.conv1.conv"  # of resnet50_size0.25
Reason = Callable[[Row], str]
# Rows that differ in the published convention too.
OWN_REASONS: Mapping[tuple[str, str], Reason] = {
    ("resnet50_uniform8", SIZE): _quarter,
    ("resnet50_size0.25", SIZE): _optimum,
    ("resnet50_size0.25", BOPS): _optimum,
    ("resnet18_bops0.5", BOPS): _cut_off,
    ("resnet50_baseline", SIZE): _file_size,
    ("resnet101_baseline", SIZE): _whole,
    ("resnet101b_baseline", SIZE): _whole,
}
# Rows that differ in the uniform convention: quantity -> which rows count otherwise, and how.
CONVENTION_REASONS: Mapping[str, tuple[Callable[[Row], bool], Reason]] = {
    SIZE: (lambda row: row.mixed, _searched_size),
    BOPS: (lambda row: True, lambda row: _flops(row) if row.bits is None else _searched_bops(row)),
}


def reasons(row: Row) -> list[str]:
    """Why cells of this row differ, in words; empty where none does."""
    found: list[str] = []
    for quantity in (SIZE, BOPS):
        applies, reason = CONVENTION_REASONS[quantity]
        if not row.agrees(quantity, UNIFORM) and applies(row):
            found.append(reason(row))
        if not row.agrees(quantity, PUBLISHED):
            found.append(OWN_REASONS[row.entry.name, quantity](row))
    return list(dict.fromkeys(found))


# ---- the text -------------------------------------------------------------------------------------------------------


def cells(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The rows of the printed table; differing cells end in ``*``, "why" is the number of the row's reason."""
    numbers = {row.entry.name: str(i) for i, row in enumerate((row for row in rows if reasons(row)), 1)}
    table = []
    for row in rows:
        line = {"row": row.entry.name}
        for quantity in (SIZE, BOPS):
            digits = PRINTED_DIGITS[quantity]
            line[f"{quantity} printed"] = f"{row.printed(quantity):.{digits}f}"
            for convention in CONVENTIONS:
                mark = " " if row.agrees(quantity, convention) else MARK
                line[f"{quantity} {convention}"] = f"{row.figures[quantity, convention]:>8.{digits + 1}f}{mark}"
        table.append(line | {"why": numbers.get(row.entry.name, "-")})
    return table


def summary(rows: Sequence[Row]) -> list[str]:
    """How many rows agree, in each convention."""
    lines = []
    for name, group in (
        ("quantized ResNet rows", [row for row in rows if row.bits is not None]),
        ("float rows", [row for row in rows if row.bits is None]),
    ):
        counts = {c: [sum(row.agrees(q, c) for row in group) for q in (SIZE, BOPS)] for c in CONVENTIONS}
        shown = "; ".join(f"{c} convention: {counts[c][0]} sizes, {counts[c][1]} BOPS" for c in reversed(CONVENTIONS))
        lines.append(f"agree to the last printed digit, of {len(group)} {name}: {shown}")
    return lines


def text(rows: Sequence[Row], source: str, markdown: bool = False) -> str:
    """The whole answer: table, reasons, summary.  source: where the printed figures are from."""
    make = markdown_table if markdown else plain_table
    table = cells(rows)
    if markdown:
        table = [{key: value.strip() for key, value in line.items()} for line in table]
    differing = (row for row in rows if reasons(row))
    why = [f"{i}. {row.entry.name}: {'; '.join(reasons(row))}" for i, row in enumerate(differing, 1)]
    notes = [
        f"printed: {source}",
        "uniform: weights * bits in MiB, MACs * weight bits * activation bits in 1e9; the float rows count parameters",
        "published: as the zoo counted, which differs from row to row and needs two fitted constants",
        f"{MARK} is not the printed figure.  Why, by number, how the printed one is made:",
    ]
    parts = [make(table), "\n".join(notes), "\n".join(why), "\n".join(summary(rows))]
    return ("\n\n" if markdown else "\n").join(parts)


def save(rows: Sequence[Row], path: Path) -> None:
    """The same as CSV, unrounded, with provenance.  Raises UserError where it cannot be written."""
    write_csv(path, [_csv_row(row) for row in rows])


def _csv_row(row: Row) -> dict[str, object]:
    line: dict[str, object] = {"row": row.entry.name, "arch": row.entry.arch, "scheme": row.entry.scheme}
    for quantity, unit in ((SIZE, "mib"), (BOPS, "g")):
        key = f"{quantity.lower()}_{unit}"
        line[f"{key}_printed"] = row.printed(quantity)
        for convention in CONVENTIONS:
            line[f"{key}_{convention}"] = round(row.figures[quantity, convention], 4)
            line[f"{key}_{convention}_agrees"] = row.agrees(quantity, convention)
    return line | {"reason": "; ".join(reasons(row))}
