"""Type rules: from input types, attributes and arrays to the output type, with proven integer bounds.

A rule checks everything its op demands and raises ValueError (what was got, what is expected); bounds come from
interval arithmetic, and for convolutions from the actual weights of each output channel.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from utils.integer_graph.ir import ACCUMULATOR_BITS, FLOAT_BITS, TensorType, int_range
from utils.quantization_utils.dyadic import MAX_SHIFT, ROUNDING

Attrs = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]
Rule = Callable[[Sequence[TensorType], Attrs, Arrays], TensorType]

ACCUMULATOR_LIMIT = 1 << 31
PRODUCT_LIMIT = 1 << 63
RESCALED_LIMIT = 1 << 48  # before the clamp: sums of up to 32 branches stay exact in float64
FLOAT32_LIMIT = 1 << 24  # float32 holds every integer up to it
MAX_OPERAND_BITS = 16
MAX_BRANCHES = 32


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def int_list(attrs: Attrs, key: str, length: int | None, minimum: int | None = None) -> tuple[int, ...]:
    """The attribute `key` as integers: `length` of them where it is given, each at least `minimum`."""
    values = attrs[key]
    good = isinstance(values, list) and all(type(v) is int for v in values)
    good = good and (length is None or len(values) == length)
    good = good and (minimum is None or all(v >= minimum for v in values))
    what = f"{'a list of' if length is None else length} integers" + ("" if minimum is None else f" >= {minimum}")
    require(good, f"attribute {key} is {values!r}, expected {what}")
    return tuple(values)


def integer(attrs: Attrs, key: str, minimum: int, maximum: int) -> int:
    """The attribute `key` as one integer in [minimum, maximum]."""
    value = attrs[key]
    good = type(value) is int and minimum <= value <= maximum
    require(good, f"attribute {key} is {value!r}, expected an integer in [{minimum}, {maximum}]")
    return value


def _storage(attrs: Attrs) -> tuple[int, bool]:
    bits = integer(attrs, "bits", 1, ACCUMULATOR_BITS)
    require(type(attrs["signed"]) is bool, f"attribute signed is {attrs['signed']!r}, expected true or false")
    fits = bits < ACCUMULATOR_BITS or attrs["signed"]
    require(fits, f"attribute bits is {bits} without a sign, expected at most {ACCUMULATOR_BITS - 1} or a sign")
    return bits, attrs["signed"]


def stored(shape: tuple[int, ...], attrs: Attrs, lo: int, hi: int) -> TensorType:
    """The type of values in [lo, hi] stored with the attributes bits and signed."""
    bits, signed = _storage(attrs)
    least, most = int_range(bits, signed)
    kind = "signed" if signed else "unsigned"
    message = f"values reach [{lo}, {hi}], expected within [{least}, {most}] of {bits} {kind} bits"
    require(least <= lo and hi <= most, message)
    return TensorType(shape, bits, signed, lo, hi)


def clamped(shape: tuple[int, ...], attrs: Attrs, lo: int, hi: int) -> TensorType:
    """The type of values in [lo, hi] after the clamp of the attributes lo and hi (null: no clamp)."""
    least, most = (_clamp_bound(attrs, key) for key in ("lo", "hi"))
    require(least is None or most is None or least <= most, f"the clamp [{least}, {most}] is empty")
    for bound in (b for b in (least, most) if b is not None):
        stored(shape, attrs, bound, bound)
    if least is not None:
        lo, hi = max(lo, least), max(hi, least)
    if most is not None:
        lo, hi = min(lo, most), min(hi, most)
    return stored(shape, attrs, lo, hi)


def _clamp_bound(attrs: Attrs, key: str) -> int | None:
    value = attrs[key]
    require(value is None or type(value) is int, f"attribute {key} is {value!r}, expected an integer or null")
    return value


def _shape3(x: TensorType) -> tuple[int, int, int]:
    require(len(x.shape) == 3, f"the input has shape {x.shape}, expected (C, H, W)")
    return x.shape[0], x.shape[1], x.shape[2]


def _image_shape(attrs: Attrs) -> tuple[int, ...]:
    shape = int_list(attrs, "shape", None, 1)
    require(len(shape) in (1, 3), f"attribute shape is {list(shape)}, expected [C, H, W] or [C]")
    return shape


def _array_shape(arrays: Arrays, key: str, *allowed: tuple[int, ...]) -> np.ndarray:
    array = arrays[key]
    expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(allowed))
    require(array.shape in allowed, f"array {key} has shape {list(array.shape)}, expected {expected}")
    return array


def _multiplier(
    arrays: Arrays, suffix: str, x: tuple[int, int], attrs: Attrs, *allowed: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Check one multiplier/shift pair; the bounds after requantizing x = (lo, hi), one per multiplier, int64."""
    m = _array_shape(arrays, f"multiplier{suffix}", *allowed).astype(np.int64)
    e = _array_shape(arrays, f"shift{suffix}", m.shape).astype(np.int64)
    require(bool((m >= 1).all()), f"array multiplier{suffix} has the value {m.min()}, expected 1..2^31-1")
    bad = e[(e < 1) | (e > MAX_SHIFT)]
    require(bad.size == 0, f"array shift{suffix} has the value {bad[:1].tolist()}, expected 1..{MAX_SHIFT}")
    rounding = attrs["rounding"]
    require(rounding in ROUNDING, f"attribute rounding is {rounding!r}, expected one of {', '.join(ROUNDING)}")
    top = max(abs(x[0]), abs(x[1])) * int(m.max()) + (1 << (int(e.max()) - 1))
    require(top < PRODUCT_LIMIT, f"the product |x| * multiplier reaches {top}, expected below 2^63")
    lo, hi = (ROUNDING[rounding](np.int64(bound), m, e) for bound in x)
    reach = max(-int(lo.min()), int(hi.max()))
    require(reach < RESCALED_LIMIT, f"the rescaled value may reach {reach} before its clamp, expected below 2^48")
    return lo, hi


def accumulator_bounds(weight: np.ndarray, x_lo: int, x_hi: int) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of every sum of some of the products weight[o, k] * x[k] with x in [x_lo, x_hi] or 0 (padding).

    weight: integers [O, K].  Returns int64 [O] twice: least (<= 0) and greatest (>= 0), the bias not included.
    """
    w = weight.astype(np.int64)
    positive, negative = np.maximum(w, 0).sum(1), np.maximum(-w, 0).sum(1)
    lo, hi = min(x_lo, 0), max(x_hi, 0)
    return lo * positive - hi * negative, hi * positive - lo * negative


def _accumulator(shape: tuple[int, ...], x: TensorType, attrs: Attrs, arrays: Arrays) -> TensorType:
    """The type of sum(weight * x) + bias, refusing weights out of range and sums that may leave int32."""
    weight, bias = arrays["weight"], arrays["bias"].astype(np.int64)
    low, high = int_range(integer(attrs, "weight_bits", 2, 8), True)
    w_lo, w_hi = int(weight.min()), int(weight.max())
    message = f"weights reach [{w_lo}, {w_hi}], expected within [{low}, {high}] of {attrs['weight_bits']} bits"
    require(low <= w_lo and w_hi <= high, message)
    require(1 <= x.bits <= MAX_OPERAND_BITS, f"the input has {x.bits} bits, expected 1..{MAX_OPERAND_BITS}")
    lo, hi = accumulator_bounds(weight.reshape(len(weight), -1), x.lo, x.hi)
    top = int(np.stack([-lo, hi, abs(lo + bias), abs(hi + bias)]).max())
    require(top < ACCUMULATOR_LIMIT, f"the accumulator may reach {top}, expected below 2^31")
    return TensorType(shape, ACCUMULATOR_BITS, True, int((lo + bias).min()), int((hi + bias).max()))


def image(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """uint8 pixels through one table of 256 integers per channel."""
    shape = _image_shape(attrs)
    table = _array_shape(arrays, "table", (shape[0], 256))
    return stored(shape, attrs, int(table.min()), int(table.max()))


def quantize(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """float32 values through a multiplication, a rounding and a clamp."""
    inverse = attrs["inverse_scale"]
    require(is_positive_float32(inverse), f"attribute inverse_scale is {inverse!r}, expected a positive float32 value")
    lo, hi = (integer(attrs, key, -FLOAT32_LIMIT, FLOAT32_LIMIT) for key in ("lo", "hi"))
    return clamped(_image_shape(attrs), attrs, lo, hi)


def is_positive_float32(value: Any) -> bool:
    """Whether a JSON number is exactly a positive finite float32."""
    if not isinstance(value, float) or not 0 < value <= float(np.finfo(np.float32).max):
        return False
    return float(np.float32(value)) == value


def conv2d(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """Grouped, strided, dilated convolution with zero padding into int32."""
    channels, height, width = _shape3(inputs[0])
    weight, groups = arrays["weight"], integer(attrs, "groups", 1, channels)
    require(weight.ndim == 4 and weight.size > 0, f"array weight has shape {list(weight.shape)}, expected 4 axes")
    outputs, per_group, *kernel = weight.shape
    message = f"{channels} input and {outputs} output channels in {groups} groups do not fit weight {weight.shape}"
    require(channels == per_group * groups and outputs % groups == 0, message)
    _array_shape(arrays, "bias", (outputs,))
    stride, dilation = int_list(attrs, "stride", 2, 1), int_list(attrs, "dilation", 2, 1)
    pads = int_list(attrs, "padding", 4, 0)
    size = []
    for axis, extent in enumerate((height, width)):
        free = extent + pads[2 * axis] + pads[2 * axis + 1] - dilation[axis] * (kernel[axis] - 1) - 1
        require(free >= 0, f"the kernel {kernel} is larger than the padded input {(height, width)}")
        size.append(free // stride[axis] + 1)
    return _accumulator((outputs, *size), inputs[0], attrs, arrays)


def linear(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """Matrix product of the weights [O, K] with one vector [K] per image, into int32."""
    (x,) = inputs
    require(len(x.shape) == 1, f"the input has shape {x.shape}, expected (K,)")
    outputs = len(arrays["bias"])
    require(outputs > 0, "array bias is empty, expected one value per output")
    _array_shape(arrays, "weight", (outputs, x.shape[0]))
    _array_shape(arrays, "bias", (outputs,))
    return _accumulator((outputs,), x, attrs, arrays)


def requantize(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """One dyadic rescaling per channel or per tensor, then a clamp."""
    (x,) = inputs
    lo, hi = _multiplier(arrays, "", (x.lo, x.hi), attrs, (x.shape[0],), (1,))
    return clamped(x.shape, attrs, int(lo.min()), int(hi.max()))


def add(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """Each branch requantized, summed, one clamp on the sum."""
    shape = inputs[0].shape
    require(len(inputs) <= MAX_BRANCHES, f"{len(inputs)} branches, expected at most {MAX_BRANCHES}")
    for x in inputs:
        require(x.shape == shape, f"the branches have shapes {[t.shape for t in inputs]}, expected equal ones")
    bounds = [_multiplier(arrays, str(i), (x.lo, x.hi), attrs, (shape[0],), (1,)) for i, x in enumerate(inputs)]
    lo, hi = int(sum(b[0] for b in bounds).min()), int(sum(b[1] for b in bounds).max())  # type: ignore[union-attr]
    return clamped(shape, attrs, lo, hi)


def concat(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """Each branch requantized and clamped, joined along the channels."""
    rest, types = inputs[0].shape[1:], []
    for i, x in enumerate(inputs):
        message = f"the branches have shapes {[t.shape for t in inputs]}, expected equal ones but for the channels"
        require(x.shape[1:] == rest and len(x.shape) == len(inputs[0].shape), message)
        lo, hi = _multiplier(arrays, str(i), (x.lo, x.hi), attrs, (x.shape[0],), (1,))
        types.append(clamped(x.shape, attrs, int(lo.min()), int(hi.max())))
    channels = sum(t.shape[0] for t in types)
    return stored((channels, *rest), attrs, min(t.lo for t in types), max(t.hi for t in types))


def mul(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """Broadcast product of two tensors, one rescaling, a clamp."""
    a, b = inputs
    fits = len(a.shape) == len(b.shape)
    fits = fits and all(p == q or 1 in (p, q) for p, q in zip(a.shape, b.shape, strict=True))
    require(fits, f"the factors have shapes {a.shape} and {b.shape}, expected ones that broadcast")
    corners = [p * q for p in (a.lo, a.hi) for q in (b.lo, b.hi)]
    lo, hi = _multiplier(arrays, "", (min(corners), max(corners)), attrs, (1,))
    shape = tuple(np.broadcast_shapes(a.shape, b.shape))
    return clamped(shape, attrs, int(lo.min()), int(hi.max()))


def clip(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """Clamp per channel or per tensor."""
    (x,) = inputs
    lo, hi = (_array_shape(arrays, key, (x.shape[0],), (1,)).astype(np.int64) for key in ("lo", "hi"))
    require(lo.shape == hi.shape and bool((lo <= hi).all()), "arrays lo and hi must have equal lengths and lo <= hi")
    least, most = int_range(x.bits, x.signed)
    inside = least <= int(lo.min()) and int(hi.max()) <= most
    require(inside, f"the clip bounds [{lo.min()}, {hi.max()}] leave the input's type [{least}, {most}]")
    ends = [np.clip(bound, lo, hi) for bound in (x.lo, x.hi)]
    return TensorType(x.shape, x.bits, x.signed, int(ends[0].min()), int(ends[1].max()))


def _pool_size(extent: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """torch's rule: in ceil mode the last window starts inside the input or the left padding."""
    free = extent + 2 * padding - dilation * (kernel - 1) - 1
    require(free >= 0, f"the pooling kernel {kernel} is larger than the padded input {extent}")
    size = (free + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (size - 1) * stride >= extent + padding:
        size -= 1
    rows = np.arange(size)[:, None] * stride - padding + np.arange(kernel) * dilation
    seen = ((rows >= 0) & (rows < extent)).any(1).all() and 2 * padding <= dilation * (kernel - 1) + 1
    require(bool(seen), f"padding {padding} is too much for a pooling kernel {kernel}: at most half of its reach")
    return size


def max_pool(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """Maximum of each window; padding never wins."""
    channels, *extents = _shape3(inputs[0])
    kernel, stride, dilation = (int_list(attrs, key, 2, 1) for key in ("kernel", "stride", "dilation"))
    padding, ceil_mode = int_list(attrs, "padding", 2, 0), attrs["ceil_mode"]
    require(type(ceil_mode) is bool, f"attribute ceil_mode is {ceil_mode!r}, expected true or false")
    size = [_pool_size(extents[i], kernel[i], stride[i], padding[i], dilation[i], ceil_mode) for i in (0, 1)]
    x = inputs[0]
    return TensorType((channels, *size), x.bits, x.signed, x.lo, x.hi)


def _windows(attrs: Attrs, axis: str, extent: int) -> np.ndarray:
    """Lengths of the windows of one axis."""
    start, stop = (np.array(int_list(attrs, f"{axis}_{end}", None, 0), np.int64) for end in ("start", "stop"))
    good = start.size > 0 and start.shape == stop.shape and bool(((start < stop) & (stop <= extent)).all())
    require(good, f"attributes {axis}_start and {axis}_stop must be windows 0 <= start < stop <= {extent}")
    return stop - start


def avg_pool(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """Sum of each window, one rescaling per position, a clamp."""
    (x,) = inputs
    channels, height, width = _shape3(x)
    area = np.outer(_windows(attrs, "row", height), _windows(attrs, "col", width))
    top = int(area.max())
    sums = (min(x.lo, x.lo * top), max(x.hi, x.hi * top))
    require(max(-sums[0], sums[1]) < ACCUMULATOR_LIMIT, f"a window's sum may reach {sums}, expected below 2^31")
    lo, hi = _multiplier(arrays, "", sums, attrs, area.shape, (1, 1))
    return clamped((channels, *area.shape), attrs, int(lo.min()), int(hi.max()))


def lookup(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """One stored integer for each input value."""
    (x,) = inputs
    offset, table = integer(attrs, "offset", -(1 << 16), 1 << 16), arrays["table"]
    good = table.ndim == 1 or (table.ndim == 2 and table.shape[0] == x.shape[0])
    require(good, f"array table has shape {list(table.shape)}, expected [T] or [{x.shape[0]}, T]")
    covered = (offset, offset + table.shape[-1] - 1)
    message = f"the table covers inputs {list(covered)}, expected at least [{x.lo}, {x.hi}]"
    require(covered[0] <= x.lo and x.hi <= covered[1], message)
    used = table[..., x.lo - offset : x.hi - offset + 1]
    return stored(x.shape, attrs, int(used.min()), int(used.max()))


def gather(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """Channels selected by index; -1 stands for a channel of zeros."""
    (x,) = inputs
    index = arrays["index"]
    good = index.ndim == 1 and index.size > 0 and index.min() >= -1 and index.max() < x.shape[0]
    require(bool(good), f"array index must be a list of channels in [0, {x.shape[0]}), or -1 for zeros")
    lo, hi = (min(x.lo, 0), max(x.hi, 0)) if index.min() < 0 else (x.lo, x.hi)
    return TensorType((len(index), *x.shape[1:]), x.bits, x.signed, lo, hi)


def pad2d(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """Zeros around the image, or rows and columns cut off."""
    channels, height, width = _shape3(inputs[0])
    top, bottom, left, right = pads = int_list(attrs, "padding", 4)
    size = (height + top + bottom, width + left + right)
    cropped = (height + min(top, 0) + min(bottom, 0), width + min(left, 0) + min(right, 0))
    require(min(cropped) > 0, f"padding {list(pads)} leaves nothing of an image of {(height, width)}")
    x, padded = inputs[0], max(pads) > 0
    lo, hi = (min(x.lo, 0), max(x.hi, 0)) if padded else (x.lo, x.hi)
    return TensorType((channels, *size), x.bits, x.signed, lo, hi)


def upsample(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """Nearest repetition by integer factors."""
    channels, height, width = _shape3(inputs[0])
    rows, cols = int_list(attrs, "scale", 2, 1)
    x = inputs[0]
    return TensorType((channels, height * rows, width * cols), x.bits, x.signed, x.lo, x.hi)


def reshape(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """The same values, row-major (channels first), in another shape."""
    (x,) = inputs
    shape = _image_shape(attrs)
    require(int(np.prod(shape)) == int(np.prod(x.shape)), f"shape {x.shape} cannot become {shape}: sizes differ")
    return TensorType(shape, x.bits, x.signed, x.lo, x.hi)


def logits(inputs: Sequence[TensorType], attrs: Attrs, arrays: Arrays) -> TensorType:
    """float32(x) * scale, one float32 product per class."""
    (x,) = inputs
    require(len(x.shape) == 1, f"the input has shape {x.shape}, expected (classes,)")
    scale = _array_shape(arrays, "scale", (x.shape[0],), (1,))
    require(bool(np.isfinite(scale).all()), "array scale holds infinite values or NaN, expected finite ones")
    return TensorType(x.shape, FLOAT_BITS, True, 0, 0)
