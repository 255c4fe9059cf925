"""Rows of pooling and reductions: every mean is an average pool, every maximum a max pool."""

from typing import Any

from torch import fx, nn

from utils.quantization_utils.float_joins import add_parts, stacked_parts
from utils.quantization_utils.float_ops import Builder, Op, Rows, argument, pair, shape_of, sources, target_name
from utils.quantization_utils.windows import AvgWindows, adaptive_windows, pool_windows


def _max_pool_attrs(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> dict[str, Any]:
    kernel = pair(kernel)
    return {
        "kernel": kernel,
        "stride": pair(stride) if stride else kernel,
        "padding": pair(padding),
        "dilation": pair(dilation),
        "ceil_mode": bool(ceil_mode),
    }


def _max_pool(b: Builder, node: fx.Node, m: nn.MaxPool2d) -> Op:
    return b.op(node, "max_pool", m, **_max_pool_attrs(m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode))


def _f_max_pool(b: Builder, node: fx.Node, _: Any) -> Op:
    kernel, stride = argument(node, 1, "kernel_size", None), argument(node, 2, "stride", None)
    padding, dilation = argument(node, 3, "padding", 0), argument(node, 4, "dilation", 1)
    attrs = _max_pool_attrs(kernel, stride, padding, dilation, argument(node, 5, "ceil_mode", False))
    return b.op(node, "max_pool", **attrs)


def _adaptive_max_pool(b: Builder, node: fx.Node, module: Any) -> Op:
    source, target = shape_of(sources(node)[0])[-2:], shape_of(node)[-2:]
    if any(s % t for s, t in zip(source, target, strict=True)):
        raise b.refuse(node, f"windows of unequal size, from {source} to {target}, have no integer form")
    kernel = (source[0] // target[0], source[1] // target[1])
    return b.op(node, "max_pool", module, **_max_pool_attrs(kernel, None, 0, 1, False))


def _avg_pool(b: Builder, node: fx.Node, m: nn.AvgPool2d) -> Op:
    windows = _avg_windows(node, m.kernel_size, m.stride, m.padding, m.count_include_pad, m.divisor_override)
    return b.op(node, "avg_pool", m, windows=windows)


def _f_avg_pool(b: Builder, node: fx.Node, _: Any) -> Op:
    kernel, stride = argument(node, 1, "kernel_size", None), argument(node, 2, "stride", None)
    include, divisor = argument(node, 5, "count_include_pad", True), argument(node, 6, "divisor_override", None)
    windows = _avg_windows(node, kernel, stride, argument(node, 3, "padding", 0), include, divisor)
    return b.op(node, "avg_pool", windows=windows)


def _avg_windows(node: fx.Node, kernel: Any, stride: Any, padding: Any, include_pad: bool, divisor: Any) -> AvgWindows:
    source = shape_of(sources(node)[0])[-2:]
    stride = pair(stride) if stride else pair(kernel)
    return pool_windows(source, shape_of(node)[-2:], pair(kernel), stride, pair(padding), include_pad, divisor)


def _adaptive(b: Builder, node: fx.Node, module: Any) -> Op:
    windows = adaptive_windows(shape_of(sources(node)[0])[-2:], shape_of(node)[-2:])
    return b.op(node, "avg_pool", module, windows=windows)


def _dims(node: fx.Node) -> list[int]:
    """The axes a reduction runs over, counted from the batch axis; all but the batch are never meant by None."""
    dims = argument(node, 1, "dim", None)
    rank = len(shape_of(sources(node)[0])) + 1
    return sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims or []))


def _mean(b: Builder, node: fx.Node, _: Any) -> Op | list[Op]:
    if (parts := stacked_parts(node)) is not None:
        total = add_parts(b, node, parts, "sum")
        return [total, b.step(node, "", "scale", [total.name], lambda x: x / len(parts), factor=1 / len(parts))]
    source, dims = shape_of(sources(node)[0]), _dims(node)
    if len(source) == 3 and dims == [2, 3]:
        return b.op(node, "avg_pool", windows=adaptive_windows(source[-2:], (1, 1)))
    if len(source) == 3 and dims == [1]:
        pixels = source[1] * source[2]
        return _over_channels(b, node, source, "avg_pool", windows=adaptive_windows((source[0], pixels), (1, pixels)))
    raise b.refuse(node, f"a mean over dimensions {dims} has no integer form, one over channels or over space has")


def _max(b: Builder, node: fx.Node, _: Any) -> Op | list[Op]:
    source, dims = shape_of(sources(node)[0]), _dims(node)
    takes_values = all(target_name(user) == "getitem" and user.args[1] == 0 for user in node.users)
    if node.meta["holds"] == "tensors" and not takes_values:
        raise b.refuse(node, "the positions of maxima have no integer form, only the maxima themselves have")
    if len(source) == 3 and dims == [1]:
        attrs = _max_pool_attrs((source[0], 1), None, 0, 1, False)
        return _over_channels(b, node, source, "max_pool", **attrs)
    if len(source) == 3 and dims == [2, 3]:
        return b.op(node, "max_pool", **_max_pool_attrs(source[1:], None, 0, 1, False))
    raise b.refuse(node, f"a maximum over dimensions {dims} has no integer form, one over channels or over space has")


def _over_channels(b: Builder, node: fx.Node, source: tuple[int, ...], kind: str, **attrs: Any) -> list[Op]:
    """A pool over channels: they become the rows of one picture whose columns are the pixels."""
    channels, height, width = source
    pixels = height * width
    x = sources(node)[0].name
    flat = b.step(node, "rows", "move", [x], lambda v: v.reshape(-1, 1, channels, pixels), shape=(1, channels, pixels))
    reduce = (lambda v: v.mean(2, keepdim=True)) if kind == "avg_pool" else (lambda v: v.amax(2, keepdim=True))
    pooled = b.step(node, "pool", kind, [flat.name], reduce, shape=(1, 1, pixels), **attrs)
    keeps = bool(argument(node, 2, "keepdim", False))
    shape = (1, height, width) if keeps else (height, width)
    last = b.step(node, "", "move", [pooled.name], lambda v: v.reshape(-1, *shape), shape=shape)
    if node.meta["holds"] == "tensors":
        last.run = lambda v: [v.reshape(-1, *shape)]
    return [flat, pooled, last]


MODULES: Rows = {
    "MaxPool2d": _max_pool,
    "AdaptiveMaxPool2d": _adaptive_max_pool,
    "AvgPool2d": _avg_pool,
    "AdaptiveAvgPool2d": _adaptive,
}

FUNCTIONS: Rows = {
    **dict.fromkeys(("max_pool2d", "_max_pool2d", "boolean_dispatch"), _f_max_pool),
    "adaptive_max_pool2d": _adaptive_max_pool,
    "avg_pool2d": _f_avg_pool,
    "adaptive_avg_pool2d": lambda b, node, _: _adaptive(b, node, None),
    "mean": _mean,
    **dict.fromkeys(("max", "amax"), _max),
}
