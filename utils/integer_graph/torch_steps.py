"""One builder per op: from a node to a closure that computes it with torch, exactly.

Values are float32 tensors holding integers (float64 where they may pass 2**24), laid out [N, H, W, C] or [N, C], or an
``Accumulator`` whose parts are not yet added up.  Everything that depends on the node alone happens in the builder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from utils.errors import UserError
from utils.integer_graph import float_islands
from utils.integer_graph.exact_conv import Piece, split
from utils.integer_graph.ir import Node, TensorType
from utils.integer_graph.torch_rescale import (
    Accumulator,
    Branch,
    Dyadic,
    Scratch,
    Source,
    Value,
    batch_size,
    dense,
    plan_branch,
    repeats,
    rescale_sum,
)
from utils.integer_graph.type_rules import FLOAT32_LIMIT, accumulator_bounds

Step = Callable[[Sequence[Value]], Value]


@dataclass(frozen=True)
class Context:
    """What a builder may know: the device, shared buffers, types and proofs of the nodes before."""

    device: torch.device
    scratch: Scratch
    types: Mapping[str, TensorType]
    sources: dict[str, Source]

    def tensor(self, array: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A copy of an array on the device."""
        return torch.tensor(array, device=self.device).to(dtype)

    def source(self, name: str) -> Source:
        """What is proved about the value of a node."""
        if name in self.sources:
            return self.sources[name]
        return Source(np.array([max(-self.types[name].lo, self.types[name].hi)], np.int64))


def storage(tensor_type: TensorType) -> torch.dtype:
    """float32 where it holds every integer of the type, else float64."""
    return torch.float32 if max(-tensor_type.lo, tensor_type.hi) <= FLOAT32_LIMIT else torch.float64


def as_nchw(x: torch.Tensor) -> torch.Tensor:
    """[N, H, W, C] seen as [N, C, H, W]; [N, C] as it is."""
    return x.permute(0, 3, 1, 2) if x.dim() == 4 else x


def as_nhwc(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] laid out as [N, H, W, C]; [N, C] as it is."""
    return (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).contiguous()


def image(node: Node, context: Context) -> Step:
    """Table lookup of uint8 [N, C, H, W]."""
    tables = [context.tensor(row, storage(node.type)) for row in node.arrays["table"]]

    def step(inputs: Sequence[Value]) -> Value:
        pixels = dense(inputs[0])
        out = torch.empty(as_nhwc(pixels[:1]).shape, dtype=tables[0].dtype, device=context.device)
        out = out.expand(len(pixels), *out.shape[1:]).contiguous()
        for c, table in enumerate(tables):
            index = pixels[:, c].to(torch.int32)
            out[..., c] = table.index_select(0, index.view(-1)).view(index.shape)
        return out

    return step


def quantize(node: Node, context: Context) -> Step:
    """clamp(rne(fl(x * inverse_scale))) of float32 [N, C, H, W] or [N, C]."""
    attrs, dtype = node.attrs, storage(node.type)

    def step(inputs: Sequence[Value]) -> Value:
        scaled = torch.round(dense(inputs[0]) * attrs["inverse_scale"])
        if bool(torch.isnan(scaled).any()):
            raise UserError(f"{node.name}: the input holds NaN, expected numbers")
        return as_nhwc(scaled.to(dtype).clamp_(attrs["lo"], attrs["hi"]))

    return step


def _products(node: Node, context: Context, groups: int) -> tuple[list[Piece], torch.dtype]:
    """Exact pieces of a convolution and their dtype; records what is proved about the accumulators."""
    x, weight = context.types[node.inputs[0]], node.arrays["weight"]
    lo, hi = accumulator_bounds(weight.reshape(len(weight), -1), x.lo, x.hi)
    context.sources[node.name] = Source(np.maximum(-lo, hi), node.arrays["bias"].astype(np.int64))
    pieces = split(weight, x.lo, x.hi, groups)
    if pieces is None:
        return [Piece(0, weight.shape[1], weight, 1)], torch.float64
    return pieces, torch.float32


def conv2d(node: Node, context: Context) -> Step:
    """Convolution by direct or im2col algorithms, in one or several exact pieces."""
    attrs = node.attrs
    pieces, dtype = _products(node, context, attrs["groups"])
    if _is_channelwise(node):
        return _channelwise(node, context, pieces, dtype)
    weights = [context.tensor(p.weight, dtype).contiguous(memory_format=torch.channels_last) for p in pieces]
    bias, factors = context.tensor(node.arrays["bias"], torch.float64), tuple(p.factor for p in pieces)
    stride, (top, bottom, left, right) = _needed_stride(node, context.types[node.inputs[0]].shape[2])
    symmetric = top == bottom and left == right
    padding = (top, left) if symmetric else (0, 0)
    dilation, groups = tuple(attrs["dilation"]), attrs["groups"]

    def step(inputs: Sequence[Value]) -> Value:
        x = dense(inputs[0]).to(dtype)
        x = as_nchw(x if symmetric else F.pad(x, (0, 0, left, right, top, bottom)))
        parts = []
        for piece, weight in zip(pieces, weights, strict=True):
            chunk = x if len(weight[0]) * groups == x.shape[1] else x[:, piece.start : piece.stop]
            parts.append(as_nhwc(F.conv2d(chunk, weight, None, stride, padding, dilation, groups)))
        return Accumulator(tuple(parts), factors, bias)

    return step


def _needed_stride(node: Node, width: int) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Stride and padding of a convolution; where the results are one column, without a column stride and what lies
    right of the only window: oneDNN (of torch 2.11) reads rows of one-channel images wrongly under such a stride."""
    attrs = node.attrs
    (rows, columns), (top, bottom, left, right) = attrs["stride"], attrs["padding"]
    reach = attrs["dilation"][1] * (node.arrays["weight"].shape[3] - 1) + 1
    if columns > 1 and node.type.shape[2] == 1 and reach > left:
        columns, right = 1, reach - width - left
    return (rows, columns), (top, bottom, left, right)


def _is_channelwise(node: Node) -> bool:
    """Whether a convolution only multiplies each channel by one weight, as a standalone batch norm does."""
    attrs, weight = node.attrs, node.arrays["weight"]
    plain = not any(attrs["padding"]) and attrs["stride"] == [1, 1]
    return plain and weight.shape == (attrs["groups"], 1, 1, 1)


def _channelwise(node: Node, context: Context, pieces: list[Piece], dtype: torch.dtype) -> Step:
    weights = [context.tensor(piece.weight.reshape(-1), dtype) for piece in pieces]
    bias, factors = context.tensor(node.arrays["bias"], torch.float64), tuple(p.factor for p in pieces)

    def step(inputs: Sequence[Value]) -> Value:
        x = dense(inputs[0]).to(dtype)
        return Accumulator(tuple(x * weight for weight in weights), factors, bias)

    return step


def linear(node: Node, context: Context) -> Step:
    """x @ weight.T in one or several exact pieces."""
    pieces, dtype = _products(node, context, 1)
    weights = [context.tensor(piece.weight.T, dtype) for piece in pieces]
    bias, factors = context.tensor(node.arrays["bias"], torch.float64), tuple(p.factor for p in pieces)

    def step(inputs: Sequence[Value]) -> Value:
        x = dense(inputs[0]).to(dtype)
        parts = [x[:, p.start : p.stop] @ weight for p, weight in zip(pieces, weights, strict=True)]
        return Accumulator(tuple(parts), factors, bias)

    return step


def _branch(node: Node, context: Context, index: int, suffix: str = "", area: np.ndarray | None = None) -> Branch:
    """The rescaling of input `index`; `area`: bounds of window sums, for multipliers by position."""
    x = context.types[node.inputs[index]]
    source = context.source(node.inputs[index])
    shape = (*x.shape[1:], x.shape[0]) if area is None else (*area.shape, x.shape[0])
    m, e = (node.arrays[key + suffix].astype(np.int64) for key in ("multiplier", "shift"))
    bias = np.zeros(1, np.int64) if source.bias is None else source.bias
    bound = source.bound if area is None else (area * max(-x.lo, x.hi))[..., None]
    if area is not None:
        m, e = m[..., None], e[..., None]
    positions = int(np.prod(shape[:-1]))
    count = repeats(positions, shape[-1]) if area is None else positions
    row = slice(0, count * shape[-1])
    m, e, bias, bound = (np.broadcast_to(a, shape).reshape(-1)[row].copy() for a in (m, e, bias, bound))
    return plan_branch(Dyadic(m, e, bias, bound, node.attrs["rounding"]), context.device)


def _empty(node: Node, batch: int, context: Context) -> torch.Tensor:
    shape = (*node.type.shape[1:], node.type.shape[0])
    return torch.empty(batch, *shape, dtype=storage(node.type), device=context.device)


def requantize(node: Node, context: Context) -> Step:
    """clamp(requantize(x)); see :func:`add`, of which this is the case of one branch."""
    return _sum(node, context, [_branch(node, context, 0)])


def add(node: Node, context: Context) -> Step:
    """clamp(sum of the requantized branches)."""
    return _sum(node, context, [_branch(node, context, i, str(i)) for i in range(len(node.inputs))])


def _sum(node: Node, context: Context, branches: list[Branch]) -> Step:
    clamp, channels = (node.attrs["lo"], node.attrs["hi"]), node.type.shape[0]

    def step(inputs: Sequence[Value]) -> Value:
        out = _empty(node, batch_size(inputs[0]), context)
        rescale_sum(inputs, branches, context.scratch, clamp, out.view(-1, channels))
        return out

    return step


def concat(node: Node, context: Context) -> Step:
    """Requantized, clamped branches side by side."""
    clamp, channels = (node.attrs["lo"], node.attrs["hi"]), node.type.shape[0]
    branches = [_branch(node, context, i, str(i)) for i in range(len(node.inputs))]
    ends = np.cumsum([context.types[name].shape[0] for name in node.inputs]).tolist()

    def step(inputs: Sequence[Value]) -> Value:
        out = _empty(node, batch_size(inputs[0]), context)
        columns, start = out.view(-1, channels), 0
        for value, branch, stop in zip(inputs, branches, ends, strict=True):
            rescale_sum([value], [branch], context.scratch, clamp, columns[:, start:stop])
            start = stop
        return out

    return step


def mul(node: Node, context: Context) -> Step:
    """clamp(requantize(x0 * x1)), the product in float32 where that is exact."""
    a, b = (context.types[name] for name in node.inputs)
    reach = max(-a.lo, a.hi) * max(-b.lo, b.hi)
    dtype = torch.float32 if reach <= FLOAT32_LIMIT else torch.float64
    product = TensorType(node.type.shape, 0, True, -reach, reach)
    inner = Node(node.name, "requantize", ("product",), node.type, node.attrs, node.arrays)
    within = Context(context.device, context.scratch, {"product": product}, {})
    rescale = requantize(inner, within)

    def step(inputs: Sequence[Value]) -> Value:
        left, right = (dense(value).to(dtype) for value in inputs)
        return rescale([left * right])

    return step


def clip(node: Node, context: Context) -> Step:
    """min(max(x, lo), hi) along the last axis."""
    lo, hi = (context.tensor(node.arrays[key], torch.float64) for key in ("lo", "hi"))
    lo32, hi32 = lo.float(), hi.float()  # rounded only where no result that float32 holds can reach them
    wide = storage(node.type) == torch.float64

    def step(inputs: Sequence[Value]) -> Value:
        x = dense(inputs[0])
        if wide or x.dtype == torch.float64:
            return torch.clamp(x.double(), lo, hi)
        return torch.clamp(x, lo32, hi32)

    return step


def max_pool(node: Node, context: Context) -> Step:
    """torch's max pooling; integers are ordered as floats are."""
    attrs = node.attrs
    kernel, stride, padding, dilation = (tuple(attrs[k]) for k in ("kernel", "stride", "padding", "dilation"))

    def step(inputs: Sequence[Value]) -> Value:
        x = as_nchw(dense(inputs[0]))
        return as_nhwc(F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode=attrs["ceil_mode"]))

    return step


def _selector(node: Node, axis: str, extent: int) -> np.ndarray:
    """0/1 matrix [outputs, inputs] whose rows are the windows of one axis."""
    start, stop = (np.array(node.attrs[f"{axis}_{end}"]) for end in ("start", "stop"))
    position = np.arange(extent)
    return (position >= start[:, None]) & (position < stop[:, None])


def avg_pool(node: Node, context: Context) -> Step:
    """Window sums as products with 0/1 matrices, then one rescaling by position."""
    x = context.types[node.inputs[0]]
    rows, cols = (_selector(node, axis, extent) for axis, extent in zip(("row", "col"), x.shape[1:], strict=True))
    area = np.outer(rows.sum(1), cols.sum(1)).astype(np.int64)
    exact = int(area.max()) * max(-x.lo, x.hi) <= FLOAT32_LIMIT
    dtype = torch.float32 if exact else torch.float64
    whole = bool(rows.all() and cols.all())
    down, across = context.tensor(rows, dtype), context.tensor(cols, dtype)
    branch, channels = _branch(node, context, 0, area=area), node.type.shape[0]
    clamp = (node.attrs["lo"], node.attrs["hi"])

    def step(inputs: Sequence[Value]) -> Value:
        values = dense(inputs[0]).to(dtype)
        if whole and len(area) == area.shape[1] == 1:
            total = values.sum((1, 2))
        else:
            total = down @ values.flatten(2)
            total = across @ total.view(len(values), len(down), *values.shape[2:])
        out = _empty(node, len(values), context)
        rescale_sum([total.contiguous()], [branch], context.scratch, clamp, out.view(-1, channels))
        return out

    return step


def lookup(node: Node, context: Context) -> Step:
    """table[x - offset], or one table per channel laid end to end."""
    table, offset = node.arrays["table"], node.attrs["offset"]
    values = context.tensor(table.reshape(-1), storage(node.type))
    first = np.zeros(1) if table.ndim == 1 else np.arange(len(table)) * table.shape[1]
    base = context.tensor(first - offset, torch.int32)

    def step(inputs: Sequence[Value]) -> Value:
        x = dense(inputs[0])
        index = x.to(torch.int32).add_(base)
        return values.index_select(0, index.view(-1)).view(x.shape)

    return step


def gather(node: Node, context: Context) -> Step:
    """Channels by index, zeros where it is -1."""
    index = context.tensor(node.arrays["index"].clip(0), torch.int64)
    zeros = context.tensor(np.flatnonzero(node.arrays["index"] < 0), torch.int64)
    if len(zeros) == 0:
        return lambda inputs: dense(inputs[0]).index_select(-1, index)
    return lambda inputs: dense(inputs[0]).index_select(-1, index).index_fill_(-1, zeros, 0)


def pad2d(node: Node, context: Context) -> Step:
    """Zeros or crops around [N, H, W, C]."""
    top, bottom, left, right = node.attrs["padding"]
    return lambda inputs: F.pad(dense(inputs[0]), (0, 0, left, right, top, bottom)).contiguous()


def upsample(node: Node, context: Context) -> Step:
    """Nearest repetition."""
    rows, cols = node.attrs["scale"]

    def step(inputs: Sequence[Value]) -> Value:
        x = dense(inputs[0])
        batch, height, width, channels = x.shape
        wide = x[:, :, None, :, None, :].expand(batch, height, rows, width, cols, channels)
        return wide.reshape(batch, height * rows, width * cols, channels).contiguous()

    return step


def reshape(node: Node, context: Context) -> Step:
    """Row-major reshape in the order [C, H, W]."""

    def step(inputs: Sequence[Value]) -> Value:
        x = as_nchw(dense(inputs[0]))
        return as_nhwc(x.reshape(len(x), *node.type.shape))

    return step


def float_op(node: Node, context: Context) -> Step:
    """The numpy function itself, so that no float operation can differ."""

    def step(inputs: Sequence[Value]) -> Value:
        x = as_nchw(dense(inputs[0])).contiguous().long().cpu().numpy()
        result = torch.from_numpy(float_islands.compute([x], node))
        return as_nhwc(result.to(context.device, storage(node.type)))

    return step


def logits(node: Node, context: Context) -> Step:
    """float32(x) * scale."""
    scale = context.tensor(node.arrays["scale"])
    return lambda inputs: dense(inputs[0]).float() * scale


STEPS: Mapping[str, Callable[[Node, Context], Step]] = {
    "image": image,
    "quantize": quantize,
    "conv2d": conv2d,
    "linear": linear,
    "requantize": requantize,
    "add": add,
    "concat": concat,
    "mul": mul,
    "clip": clip,
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "lookup": lookup,
    "gather": gather,
    "pad2d": pad2d,
    "upsample": upsample,
    "reshape": reshape,
    "float_op": float_op,
    "logits": logits,
}
