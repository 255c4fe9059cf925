"""The table of operations: one row per op, holding its type rule, its numpy reference and what it needs.

``make_node`` builds a checked node from a row, ``verify`` proves a whole graph.  Activations are integers; ``lo`` and
``hi`` attributes are the clamp (an integer or null for none), ``bits`` and ``signed`` the storage of the result,
``rounding`` is a rule of ``dyadic.ROUNDING``: "up", "even" (halves) or "down" (no rounding).  Sums that are not clamped
are stored in 32 bits, where their proven bounds allow it.

===========  ==========================================================================================================
op           meaning, attributes and arrays
===========  ==========================================================================================================
image        first node: uint8 [N, C, H, W] through ``table`` int16 [C, 256]; shape [C, H, W], bits, signed
quantize     first node: float32 [N, *shape], clamp(rne(fl(x * inverse_scale))); shape, inverse_scale, lo, hi, bits,
             signed
conv2d       ``weight`` int8 [O, I/groups, kh, kw], ``bias`` int32 [O]; stride, dilation [2], padding [top, bottom,
             left, right], groups, weight_bits; 32-bit accumulators
linear       ``weight`` int8 [O, K], ``bias`` int32 [O]; weight_bits; 32-bit accumulators
requantize   ``multiplier`` int32, ``shift`` uint8 [C] or [1]; rounding, lo, hi, bits, signed
add          ``multiplier0``, ``shift0``, ``multiplier1`` ...: every branch requantized, summed, one clamp
concat       arrays as add: every branch requantized, clamped, joined along the channels
mul          broadcast product of two inputs of equal rank, ``multiplier``, ``shift`` [1], clamp
clip         ``lo``, ``hi`` int32 [C] or [1] within the input's type, accumulators included
max_pool     kernel, stride, padding, dilation [2], ceil_mode (torch's meaning)
avg_pool     row_start, row_stop, col_start, col_stop: windows; ``multiplier``, ``shift`` [Ho, Wo] or [1, 1], clamp
             (``dyadic.floor_dyadic`` and rounding "down" give the floor of the mean)
lookup       ``table`` int16 [T] or [C, T]; offset, bits, signed: table[x - offset]
gather       ``index`` int32: channels of the result, -1 for zeros
pad2d        padding [top, bottom, left, right], zeros; negative values crop
upsample     scale [rows, cols], nearest
reshape      shape of one image, row-major
float_op     float island: ``float_islands``; function ("softmax" | "interpolate" with size [H, W], align_corners),
             input_scale, inverse_scale, lo, hi, bits, signed
logits       last node: ``scale`` float32 [C] or [1], float32(x) * scale
===========  ==========================================================================================================

Further attributes (a layer's name, say) are allowed everywhere and mean nothing here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.integer_graph import float_islands, reference, type_rules
from utils.integer_graph.ir import Graph, Node, TensorType
from utils.integer_graph.reference import Reference
from utils.integer_graph.type_rules import Rule, require

I8, I16, I32, U8, F32 = (np.dtype(name) for name in ("int8", "int16", "int32", "uint8", "float32"))
STORAGE = ("bits", "signed")
CLAMP = ("lo", "hi", *STORAGE)
DYADIC = {"multiplier": I32, "shift": U8}


@dataclass(frozen=True)
class Op:
    """A row: type rule, reference, required attributes, arrays with dtypes, number of inputs (None: one or more).

    branches: the arrays exist once for each input, with the input's index appended to their names.
    inherits_scale: the result has the scale of the input unless the builder says otherwise.
    """

    rule: Rule
    compute: Reference
    attrs: tuple[str, ...] = ()
    arrays: Mapping[str, np.dtype] | None = None
    inputs: int | None = 1
    branches: bool = False
    inherits_scale: bool = False

    def expected_arrays(self, inputs: int) -> dict[str, np.dtype]:
        """Name -> dtype of the arrays a node with so many inputs has."""
        arrays = self.arrays or {}
        if not self.branches:
            return dict(arrays)
        return {f"{name}{i}": dtype for i in range(inputs) for name, dtype in arrays.items()}


CONV_ATTRS = ("stride", "padding", "dilation", "groups", "weight_bits")
POOL_ATTRS = ("kernel", "stride", "padding", "dilation", "ceil_mode")
WINDOW_ATTRS = ("row_start", "row_stop", "col_start", "col_stop")
ISLAND_ATTRS = ("function", "input_scale", "inverse_scale", *CLAMP)
WEIGHTED = {"weight": I8, "bias": I32}
ROUNDED = ("rounding", *CLAMP)

OPS: Mapping[str, Op] = {
    "image": Op(type_rules.image, reference.image, ("shape", *STORAGE), {"table": I16}, inputs=0),
    "quantize": Op(type_rules.quantize, reference.quantize, ("shape", "inverse_scale", *CLAMP), inputs=0),
    "conv2d": Op(type_rules.conv2d, reference.conv2d, CONV_ATTRS, WEIGHTED),
    "linear": Op(type_rules.linear, reference.linear, ("weight_bits",), WEIGHTED),
    "requantize": Op(type_rules.requantize, reference.requantize, ROUNDED, DYADIC),
    "add": Op(type_rules.add, reference.add, ROUNDED, DYADIC, inputs=None, branches=True),
    "concat": Op(type_rules.concat, reference.concat, ROUNDED, DYADIC, inputs=None, branches=True),
    "mul": Op(type_rules.mul, reference.mul, ROUNDED, DYADIC, inputs=2),
    "clip": Op(type_rules.clip, reference.clip, (), {"lo": I32, "hi": I32}, inherits_scale=True),
    "max_pool": Op(type_rules.max_pool, reference.max_pool, POOL_ATTRS, inherits_scale=True),
    "avg_pool": Op(type_rules.avg_pool, reference.avg_pool, (*WINDOW_ATTRS, *ROUNDED), DYADIC),
    "lookup": Op(type_rules.lookup, reference.lookup, ("offset", *STORAGE), {"table": I16}),
    "gather": Op(type_rules.gather, reference.gather, (), {"index": I32}, inherits_scale=True),
    "pad2d": Op(type_rules.pad2d, reference.pad2d, ("padding",), inherits_scale=True),
    "upsample": Op(type_rules.upsample, reference.upsample, ("scale",), inherits_scale=True),
    "reshape": Op(type_rules.reshape, reference.reshape, ("shape",), inherits_scale=True),
    "float_op": Op(float_islands.rule, float_islands.compute, ISLAND_ATTRS),
    "logits": Op(type_rules.logits, reference.logits, (), {"scale": F32}),
}
FIRST_OPS = ("image", "quantize")
LAST_OP = "logits"


def infer_type(
    op: str, inputs: Sequence[TensorType], attrs: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> TensorType:
    """The type an op gives, after checking everything it demands.  Raises ValueError (got, expected)."""
    require(op in OPS, f"op {op!r} is unknown, expected one of {', '.join(OPS)}")
    row = OPS[op]
    count = "one or more" if row.inputs is None else row.inputs
    good = len(inputs) >= 1 if row.inputs is None else len(inputs) == row.inputs
    require(good, f"op {op} got {len(inputs)} inputs, expected {count}")
    missing = [key for key in row.attrs if key not in attrs]
    require(not missing, f"op {op} lacks the attributes {missing}")
    dtypes = {key: array.dtype for key, array in arrays.items()}
    expected = row.expected_arrays(len(inputs))
    require(dtypes == expected, f"op {op} got arrays {_listed(dtypes)}, expected {_listed(expected)}")
    require(all(t.bits > 0 for t in inputs), f"op {op} reads float32, expected integers")
    return row.rule(inputs, attrs, arrays)


def _listed(dtypes: Mapping[str, np.dtype]) -> str:
    return "{" + ", ".join(f"{key}: {dtype}" for key, dtype in sorted(dtypes.items())) + "}"


def make_node(
    name: str,
    op: str,
    inputs: Sequence[Node] = (),
    *,
    attrs: Mapping[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
    scale: float | None = None,
) -> Node:
    """A node whose type is derived and checked.

    attrs: JSON values (tuples become lists).  arrays: exactly those of the op's row, in its dtypes.
    scale: real value of one integer step; ops that only move or clamp integers inherit it from their input.
    Raises ValueError that starts with the node's name.
    """
    plain = json.loads(json.dumps(dict(attrs or {})))
    contiguous = {key: np.ascontiguousarray(array) for key, array in (arrays or {}).items()}
    try:
        tensor = infer_type(op, [node.type for node in inputs], plain, contiguous)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if scale is None and OPS[op].inherits_scale:
        scale = inputs[0].scale
    return Node(name, op, tuple(node.name for node in inputs), tensor, plain, contiguous, scale)


def verify(graph: Graph) -> None:
    """Prove every invariant of a graph; raises ValueError naming the node, what was got and what is expected.

    Names are unique and defined before use, the first node alone takes the images and the last alone gives logits;
    every type, with its bounds, is derived again from the actual arrays and must equal the stored one, which proves
    that accumulators fit int32 and products int64.
    """
    require(len(graph.nodes) >= 2, f"the graph has {len(graph.nodes)} nodes, expected an input and the logits")
    types: dict[str, TensorType] = {}
    for node in graph.nodes:
        try:
            _verify_node(graph, node, types)
        except ValueError as error:
            raise ValueError(f"{node.name}: {error}") from error
        types[node.name] = node.type


def _verify_node(graph: Graph, node: Node, types: Mapping[str, TensorType]) -> None:
    require(node.name not in types, "the name is used twice, expected unique names")
    undefined = [name for name in node.inputs if name not in types]
    require(not undefined, f"the inputs {undefined} are not defined before it")
    is_first, is_last = node is graph.nodes[0], node is graph.nodes[-1]
    require(is_first == (node.op in FIRST_OPS), f"op {node.op}: the first node, and no other, is one of {FIRST_OPS}")
    require(is_last == (node.op == LAST_OP), f"op {node.op}: the last node, and no other, has op {LAST_OP!r}")
    derived = infer_type(node.op, [types[name] for name in node.inputs], node.attrs, node.arrays)
    require(node.type == derived, f"the stored type is {node.type}, expected {derived}")
    good = node.scale is None or (np.isfinite(node.scale) and node.scale > 0)
    require(bool(good), f"the scale is {node.scale}, expected a positive number or none")
