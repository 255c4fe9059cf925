"""One safetensors file per graph: the nodes as JSON in the header, weights bit-packed at their width.

The header's one entry, ``integer_graph``, is JSON (deflated, base64): ``version``, ``sha256`` (:func:`graph_hash`),
``meta`` and ``nodes``.  Tensors are named ``<number of the node>.<array>``; a weight tensor of b bits is stored as
ceil(count * b / 8) bytes, two's complement, value i in bits [i*b, (i+1)*b) of the little-endian bit string; its shape
is in the JSON.  Equal graphs give equal files.  Reading never runs code.
"""

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as safetensors_bytes

from utils.atomic_file import write_atomically
from utils.errors import UserError
from utils.integer_graph.ir import FORMAT_VERSION, Graph, Node, TensorType
from utils.integer_graph.ops import OPS, verify

ENTRY = "integer_graph"
MAX_JSON = 1 << 26  # bytes: a header that inflates to more is refused
CHUNK = 1 << 20  # values packed at a time, a multiple of 8 so that chunks end on bytes
PACKED = "weight"
DAMAGED = "it is damaged or was not written by this program; convert the model again"


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Bit-pack signed integers.  values: any shape, within `bits` (2..8) two's complement.  Returns uint8 [bytes].

    >>> pack(np.array([1, -1, 0, -2], np.int8), 2).tolist()
    [141]
    """
    flat = values.astype(np.int8).reshape(-1).view(np.uint8)
    if bits == 8:
        return flat.copy()
    return np.concatenate([_pack_chunk(flat[i : i + CHUNK], bits) for i in range(0, len(flat), CHUNK)])


def _pack_chunk(values: np.ndarray, bits: int) -> np.ndarray:
    digits = np.unpackbits(values[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(digits.reshape(-1), bitorder="little")


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of :func:`pack`: int8 of the given shape.  Raises ValueError where the number of bytes does not fit.

    >>> unpack(np.array([141], np.uint8), 2, (4,)).tolist()
    [1, -1, 0, -2]
    """
    count = int(np.prod(shape, dtype=object))
    if packed.dtype != np.uint8 or packed.shape != (-(-count * bits // 8),):
        expected = -(-count * bits // 8)
        raise ValueError(f"packed weights are {packed.dtype} {list(packed.shape)}, expected uint8 [{expected}]")
    if bits == 8:
        return packed.view(np.int8).reshape(shape).copy()
    step = CHUNK * bits // 8
    parts = [_unpack_chunk(packed[i : i + step], bits) for i in range(0, len(packed), step)]
    return np.concatenate(parts)[:count].reshape(shape)


def _unpack_chunk(packed: np.ndarray, bits: int) -> np.ndarray:
    digits: np.ndarray = np.unpackbits(packed, bitorder="little")
    digits = digits[: len(digits) // bits * bits].reshape(-1, bits)
    bytes_ = np.packbits(digits, axis=1, bitorder="little").reshape(-1)
    return (bytes_ << (8 - bits)).view(np.int8) >> (8 - bits)


def _is_packed(node: Node, key: str) -> bool:
    return key == PACKED and "weight_bits" in node.attrs


def stored_bytes(node: Node) -> dict[str, int]:
    """Bytes each array of a node takes in the file."""
    bits = int(node.attrs.get("weight_bits", 8))
    return {k: -(-a.size * bits // 8) if _is_packed(node, k) else a.nbytes for k, a in node.arrays.items()}


def _node_json(node: Node) -> dict[str, Any]:
    t = node.type
    row: dict[str, Any] = {"name": node.name, "op": node.op, "inputs": list(node.inputs), "attrs": dict(node.attrs)}
    row["type"] = [list(t.shape), t.bits, t.signed, t.lo, t.hi]
    row["arrays"] = {key: list(a.shape) if _is_packed(node, key) else None for key, a in node.arrays.items()}
    return row | ({} if node.scale is None else {"scale": node.scale})


def _content(graph: Graph) -> dict[str, Any]:
    return {"meta": dict(graph.meta), "nodes": [_node_json(node) for node in graph.nodes]}


def _dump(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def graph_hash(graph: Graph) -> str:
    """SHA-256 of everything a graph says, hexadecimal: equal hashes mean equal files and equal integers."""
    digest = hashlib.sha256(_dump(_content(graph)))
    for node in graph.nodes:
        for key, array in sorted(node.arrays.items()):
            digest.update(f"{node.name}.{key} {array.dtype.str} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def to_bytes(graph: Graph) -> bytes:
    """The content of the file."""
    tensors = {}
    for number, node in enumerate(graph.nodes):
        for key, array in node.arrays.items():
            packed = pack(array, node.attrs["weight_bits"]) if _is_packed(node, key) else array
            tensors[f"{number}.{key}"] = np.ascontiguousarray(packed)
    header = _dump({"version": FORMAT_VERSION, "sha256": graph_hash(graph), **_content(graph)})
    return safetensors_bytes(tensors, metadata={ENTRY: base64.b64encode(zlib.compress(header, 9)).decode()})


def save(graph: Graph, path: str | Path) -> None:
    """Write a graph, atomically: the old file stays until the new one is complete.

    Raises ValueError for a graph that does not verify, UserError where the system refuses to write.
    """
    verify(graph)
    content = to_bytes(graph)
    write_atomically(Path(path), lambda file: _write(file, content))


def _write(file: Any, content: bytes) -> None:
    file.write(content)


def load(path: str | Path) -> Graph:
    """Read and verify a graph.

    Raises UserError, one sentence with the path, for a file that is missing, truncated, damaged, of another format or
    version, or that holds an op this program does not know.
    """
    metadata, tensors = _read(Path(path))
    if ENTRY not in metadata:
        raise UserError(f"{path} is a safetensors file but not an integer graph; give a file that was converted to one")
    try:
        header = json.loads(_inflate(metadata[ENTRY]))
        if header["version"] != FORMAT_VERSION:
            raise UserError(f"graph format version {header['version']!r}, expected {FORMAT_VERSION}; convert it again")
        graph = _parse(header, tensors)
        same = graph_hash(graph) == header["sha256"]
    except UserError as error:
        raise UserError(f"cannot use {path}: {error}") from error
    except Exception as error:  # whatever a hostile header provokes is one refusal
        raise UserError(f"cannot use {path}: {_one_line(error)}; {DAMAGED}") from error
    if not same:
        raise UserError(f"cannot use {path}: its checksum does not match its content; {DAMAGED}")
    return graph


def _inflate(entry: str) -> bytes:
    inflater = zlib.decompressobj()
    text = inflater.decompress(base64.b64decode(entry, validate=True), MAX_JSON)
    if not inflater.eof:
        raise ValueError("the header is cut off or too large")
    return text


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()) if str(error) else type(error).__name__


def _read(path: Path) -> tuple[Mapping[str, str], dict[str, np.ndarray]]:
    if not path.is_file():
        raise UserError(f"{path} is {'not a file' if path.exists() else 'missing'}; give an integer graph's file")
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; check the file and its permissions") from error
    except (SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"cannot read {path}: not a complete safetensors file ({error}); {DAMAGED}") from error


def _parse(content: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> Graph:
    nodes = []
    for number, row in enumerate(content["nodes"]):
        if row["op"] not in OPS:
            raise UserError(f"node {row['name']} has the op {row['op']!r}, which this version does not know; update it")
        nodes.append(_node(number, row, tensors))
    if tensors:
        raise ValueError(f"the tensors {sorted(tensors)[:3]} belong to no node")
    graph = Graph(tuple(nodes), content["meta"])
    verify(graph)
    return graph


def _node(number: int, row: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> Node:
    shape, bits, signed, lo, hi = row["type"]
    arrays = {}
    for key, packed_shape in row["arrays"].items():
        array = tensors.pop(f"{number}.{key}")
        arrays[key] = array if packed_shape is None else unpack(array, row["attrs"]["weight_bits"], tuple(packed_shape))
    tensor_type = TensorType(tuple(shape), bits, signed, lo, hi)
    return Node(row["name"], row["op"], tuple(row["inputs"]), tensor_type, row["attrs"], arrays, row.get("scale"))
