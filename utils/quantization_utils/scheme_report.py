"""A resolved scheme as text: one line per layer, then size and BOPS in both conventions."""

from collections.abc import Mapping, Sequence

from utils.quantization_utils import cost_model
from utils.quantization_utils.cost_model import Layer, LayerBits

WIDTH = 120
MIN_REASON_WIDTH = 24
_HEADER = ("layer", "kind", "weights", "MACs M", "W", "A", "reason")
_RIGHT = ("weights", "MACs M", "W", "A")
_NOTE = """\
W, A: bits of the weights and of the activation in front of them.  BOPS: bit operations of one image.
size: weights * weight bits; the float row counts all parameters.  uniform: sums over the layers above.
published: the way HAWQ's model zoo counts; '-' where it has no such row."""


def format_table(
    layers: Sequence[Layer],
    bits: Mapping[str, LayerBits],
    arch: str,
    *,
    scheme: str,
    parameters: int,
    residual_bits: int = 16,
) -> str:
    """Plain-text table of a scheme, at most 120 columns wide, without a newline at its end.

    bits: by layer name.  arch: network name, which selects the published convention.  scheme: its name.
    parameters: number of all parameters of the float network, with BN and bias.  W, A: weight and activation bits.
    Names and reasons too long for their column lose their middle.
    """
    title = f"{arch}, scheme {scheme}: {len(layers)} layers, residuals {residual_bits} bit"
    return "\n\n".join(
        [shorten(title, WIDTH), _layer_table(layers, bits), _totals(layers, bits, arch, scheme, parameters), _NOTE]
    )


def shorten(text: str, width: int) -> str:
    """``text`` in at most ``width`` (>= 4) characters: the middle gives way to three dots, the end keeps more.

    >>> shorten("features.stage1.unit1.body.conv1.conv", 21)
    'feature....conv1.conv'
    """
    if len(text) <= width:
        return text
    head = (width - 3) * 2 // 5
    return text[:head] + "..." + text[len(text) - (width - 3 - head) :]


def _layer_table(layers: Sequence[Layer], bits: Mapping[str, LayerBits]) -> str:
    rows = [_HEADER] + [_row(layer, bits[layer.name]) for layer in layers]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    fixed = sum(widths[1:-1]) + 2 * (len(widths) - 1)
    room = WIDTH - fixed
    widths[0] = min(widths[0], room - min(widths[-1], MIN_REASON_WIDTH))
    widths[-1] = min(widths[-1], room - widths[0])
    lines = [_line(row, widths) for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _row(layer: Layer, bits: LayerBits) -> tuple[str, ...]:
    macs = f"{layer.macs / 1e6:,.3f}"
    return (layer.name, layer.kind, f"{layer.weights:,}", macs, str(bits.weight), str(bits.activation), bits.reason)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [shorten(cell, width) if len(cell) > width else cell for cell, width in zip(row, widths, strict=True)]
    columns = zip(cells, widths, _HEADER, strict=True)
    return "  ".join(c.rjust(w) if name in _RIGHT else c.ljust(w) for c, w, name in columns).rstrip()


def _totals(layers: Sequence[Layer], bits: Mapping[str, LayerBits], arch: str, scheme: str, parameters: int) -> str:
    float_row = (
        cost_model.float_size_mib(parameters),
        cost_model.published_float_size_mib(arch, layers, parameters),
        cost_model.float_bops_g(layers),
        cost_model.published_float_bops_g(arch, layers),
    )
    row = (
        cost_model.size_mib(layers, bits),
        cost_model.published_size_mib(arch, layers, bits),
        cost_model.bops_g(layers, bits),
        cost_model.published_bops_g(arch, layers, bits),
    )
    ratios = [f / q if f is not None and q else None for f, q in zip(float_row, row, strict=True)]
    weights, macs = sum(layer.weights for layer in layers), sum(layer.macs for layer in layers)
    label = max(len("compression"), min(len(scheme), 40))
    lines = [
        f"{'':{label}}  {'size MiB':^24}  {'BOPS G':^24}",
        f"{'':{label}}" + f"  {'uniform':>11}  {'published':>11}" * 2,
        _total("float", label, [_number(v, i) for i, v in enumerate(float_row)]),
        _total(shorten(scheme, label), label, [_number(v, i) for i, v in enumerate(row)]),
        _total("compression", label, ["-" if r is None else f"{r:.2f}x" for r in ratios]),
    ]
    head = f"total: {weights:,} weights, {macs / 1e6:,.3f} M MACs, {parameters:,} parameters"
    return head + "\n\n" + "\n".join(line.rstrip() for line in lines)


def _total(name: str, label: int, cells: Sequence[str]) -> str:
    return f"{name:{label}}" + "".join(f"  {cell:>11}" for cell in cells)


def _number(value: float | None, column: int) -> str:
    """Sizes (columns 0, 1) with two digits, BOPS with three."""
    return "-" if value is None else f"{value:,.{2 if column < 2 else 3}f}"
