"""What a network costs at given bit widths: model size and bit operations.

Two conventions, never mixed:

* **uniform** (ours): size = sum(weights * weight bits) over the quantized layers, BOPS = sum(MACs * weight bits *
  activation bits), first and last layer and standalone BN included at their own bits.
* **published**: what the model zoo of the original HAWQ-V3 printed.  It mixes units from row to row and two of its
  constants are fitted, so it exists for a few networks only and is None elsewhere.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MIB = 2**20
FLOAT_BITS = 32
FLOAT_BOPS_PER_MAC = FLOAT_BITS**2
KINDS = ("conv", "linear", "affine")


@dataclass(frozen=True)
class Layer:
    """One convolution, linear or standalone BN layer of a captured network, for one image at its input size.

    name: full module path in the float model, unique.  kind: "conv", "linear" or "affine" (a standalone BN, which is
    a depthwise 1x1 convolution).  weights: count.  macs: multiply-accumulates.  channels: output channels.
    reads: id of the tensor it reads; layers with equal ``reads`` share one activation quantizer.
    first, last: reads the network input, produces the logits.  Raises ValueError for another kind.
    """

    name: str
    kind: str
    weights: int
    macs: int
    channels: int
    reads: str
    first: bool
    last: bool

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"layer {self.name!r} has kind {self.kind!r}, expected one of {', '.join(KINDS)}")


@dataclass(frozen=True)
class LayerBits:
    """Bits (2..8) of a layer's weights and of the activation it reads, and why, in words for people."""

    weight: int
    activation: int
    reason: str


def size_mib(layers: Iterable[Layer], bits: Mapping[str, LayerBits]) -> float:
    """Weights in MiB, uniform convention: ``sum(weights * bits) / 8 / 2**20``; no bias, BN or scales.

    bits: by layer name; a missing layer is a KeyError.
    """
    return sum(layer.weights * bits[layer.name].weight for layer in layers) / 8 / MIB


def bops_g(layers: Iterable[Layer], bits: Mapping[str, LayerBits]) -> float:
    """Bit operations of one image in 1e9, uniform convention: ``sum(MACs * weight bits * activation bits)``."""
    return sum(layer.macs * _product(bits[layer.name]) for layer in layers) / 1e9


def float_size_mib(parameters: int) -> float:
    """MiB of a float32 network.  parameters: all of them, with BN and bias."""
    return parameters * 4 / MIB


def float_bops_g(layers: Iterable[Layer]) -> float:
    """Bit operations of one image in 1e9 where both operands are float32: ``MACs * 1024``."""
    return sum(layer.macs for layer in layers) * FLOAT_BOPS_PER_MAC / 1e9


# --- The published convention: facts and fits about the table in the original's model_zoo.md -----------------------

# MACs of convolutions and classifier at the published input size (224, InceptionV3 299) with 1000 classes.  A network
# with another count (input size, classes, architecture) has no row in the table.
ZOO_MACS = {
    "resnet18": 1_814_073_344,
    "resnet50": 3_857_973_248,
    "resnet101": 7_570_194_432,
    "resnet101b": 7_801_405_440,
    "inceptionv3": 5_713_216_096,
}
# PyTorchCV's own FLOPs, which also count BN, ReLU and pooling, as its README lists them.  The original counts the
# layers outside its ILP with these.
ZOO_FLOPS = {"resnet18": 1_820_410_000, "resnet50": 3_877_950_000}
ZOO_FLOAT_FLOPS = {"resnet101": 7_597_950_000, "resnet101b": 7_830_480_000}  # float rows computed from FLOPs, not MACs


@dataclass(frozen=True)
class MixedSize:
    """Size of a mixed row: bytes of the ILP's layers in ``unit`` plus ``rest``, a constant fitted to the table.

    unit: 2**20 or 1e6, as the original's notebook divides.  rest: stands for the layers outside the ILP.  No clean
    derivation is known; the printed sizes of the mixed rows allow any value in 0.660..0.684 for resnet18 and in
    1.403..1.429 for resnet50 (without its size0.25 row, which was not printed from the published bits).
    """

    unit: float
    rest: float


ZOO_MIXED_SIZE = {
    "resnet18": MixedSize(unit=MIB, rest=0.672),
    "resnet50": MixedSize(unit=1e6, rest=1.415),
}


def ilp_layers(layers: Iterable[Layer]) -> list[Layer]:
    """The decision layers of the original's search: all convolutions except the first."""
    return [layer for layer in layers if layer.kind == "conv" and not layer.first]


def published_size_mib(arch: str, layers: Sequence[Layer], bits: Mapping[str, LayerBits]) -> float | None:
    """Size as the model zoo prints it (it says MB), or None where the table has no such row.

    Rows of resnet18 and resnet50 with 4 and 8 bits: all-4 and all-8 rows follow the uniform convention; mixed rows
    are bytes of the ILP's layers in :class:`MixedSize` units plus its constant.
    """
    if not _has_quantized_row(arch, layers, bits):
        return None
    searched = ilp_layers(layers)
    if len({bits[layer.name].weight for layer in searched}) == 1:
        return size_mib(layers, bits)
    convention = ZOO_MIXED_SIZE[arch]
    searched_bytes = sum(layer.weights * bits[layer.name].weight for layer in searched) / 8
    return searched_bytes / convention.unit + convention.rest


def published_bops_g(arch: str, layers: Sequence[Layer], bits: Mapping[str, LayerBits]) -> float | None:
    """Bit operations in 1e9 as the model zoo prints them, or None where the table has no such row.

    The all-8 row is uniform.  Mixed and all-4 rows use the notebook's unit, 1024e6 bit operations (1/16 for a million
    8-bit MACs, 1/64 for 4-bit ones), and count all outside the ILP at 8 bit with PyTorchCV's FLOPs.
    """
    if not _has_quantized_row(arch, layers, bits):
        return None
    searched = ilp_layers(layers)
    if all(bits[layer.name].weight == 8 for layer in searched):
        return bops_g(layers, bits)
    outside = ZOO_FLOPS[arch] - sum(layer.macs for layer in searched)
    return (sum(layer.macs * _product(bits[layer.name]) for layer in searched) + outside * 8 * 8) / 1.024e9


def published_float_size_mib(arch: str, layers: Sequence[Layer], parameters: int) -> float | None:
    """Size of a float row of the model zoo in MiB (parameters: all of them), None where the table has no such row."""
    return float_size_mib(parameters) if _is_zoo_network(arch, layers) else None


def published_float_bops_g(arch: str, layers: Sequence[Layer]) -> float | None:
    """BOPS of a float row of the model zoo in 1e9: MACs * 1024, for the ResNet101s PyTorchCV's FLOPs * 1024."""
    if not _is_zoo_network(arch, layers):
        return None
    if arch in ZOO_FLOAT_FLOPS:
        return ZOO_FLOAT_FLOPS[arch] * FLOAT_BOPS_PER_MAC / 1e9
    return float_bops_g(layers)


def _product(bits: LayerBits) -> int:
    return bits.weight * bits.activation


def _is_zoo_network(arch: str, layers: Sequence[Layer]) -> bool:
    return ZOO_MACS.get(arch) == sum(layer.macs for layer in layers)


def _has_quantized_row(arch: str, layers: Sequence[Layer], bits: Mapping[str, LayerBits]) -> bool:
    """Whether the table's convention covers it: 4 or 8 bits for weights and activation alike, 8 outside the ILP."""
    if arch not in ZOO_MIXED_SIZE or not _is_zoo_network(arch, layers):
        return False
    searched = {layer.name for layer in ilp_layers(layers)}
    pairs = {layer.name: (bits[layer.name].weight, bits[layer.name].activation) for layer in layers}
    return all(pair == (8, 8) or (pair == (4, 4) and name in searched) for name, pair in pairs.items())
