"""What a graph file holds, itemised: operators, layers with their bits, bytes of every kind."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from utils.integer_graph.ir import Graph, Node
from utils.integer_graph.serialize import graph_hash, load, stored_bytes

MIB = 1 << 20
KINDS = {
    "weight": "packed weights",
    "bias": "biases",
    "multiplier": "multipliers and shifts",
    "shift": "multipliers and shifts",
    "table": "tables",
}
OTHER = "other arrays"


def describe(path: Path) -> str:
    """The text of ``info FILE``.  Raises UserError for a file that is no graph."""
    graph = load(path)
    lines = [f"{path}", f"sha256    {graph_hash(graph)}", *_meta_lines(graph), *_op_lines(graph), ""]
    lines += [*_layer_lines(graph), "", *_size_lines(graph, path.stat().st_size)]
    return "\n".join(lines)


def layer_nodes(graph: Graph) -> list[Node]:
    """The nodes that hold weights, in order."""
    return [node for node in graph.nodes if "weight" in node.arrays]


def bytes_by_kind(graph: Graph) -> dict[str, int]:
    """Bytes of the arrays in the file: packed weights, biases, multipliers and shifts, tables, other arrays."""
    totals = dict.fromkeys((*KINDS.values(), OTHER), 0)
    for node in graph.nodes:
        for key, count in stored_bytes(node).items():
            totals[KINDS.get(key.rstrip("0123456789"), OTHER)] += count
    return totals


def _meta_lines(graph: Graph) -> Iterator[str]:
    for key, value in graph.meta.items():
        if isinstance(value, str | int | float | bool) or key in ("input_size", "mean", "std", "preprocess"):
            yield f"{key:<9} {value}"
        elif isinstance(value, list | dict):
            yield f"{key:<9} {len(value)} entries"


def _op_lines(graph: Graph) -> Iterator[str]:
    counts = Counter(node.op for node in graph.nodes)
    yield f"nodes     {len(graph.nodes)}: " + ", ".join(f"{count} {op}" for op, count in counts.most_common())
    islands = [f"{node.name} ({node.attrs['function']})" for node in graph.nodes if node.op == "float_op"]
    yield f"float     {', '.join(islands)}" if islands else "float     nothing between the input and the logits"


def _layer_lines(graph: Graph) -> Iterator[str]:
    types = {node.name: node.type for node in graph.nodes}
    width = max([len("layer"), *(len(node.name) for node in layer_nodes(graph))])
    yield f"{'layer':<{width}}  {'op':<7} {'weight shape':<18} {'bits':>4} {'input':>6} {'weights':>10} {'bytes':>10}"
    for node in layer_nodes(graph):
        source, weight = types[node.inputs[0]], node.arrays["weight"]
        shape = "x".join(str(n) for n in weight.shape)
        activation = f"{'i' if source.signed else 'u'}{source.bits}"
        counts = f"{weight.size:>10} {stored_bytes(node)['weight']:>10}"
        yield f"{node.name:<{width}}  {node.op:<7} {shape:<18} {node.attrs['weight_bits']:>4} {activation:>6} {counts}"


def _size_lines(graph: Graph, file_bytes: int) -> Iterator[str]:
    totals = bytes_by_kind(graph)
    totals["header"] = file_bytes - sum(totals.values())
    for kind, count in totals.items():
        yield f"{kind:<24} {count:>12} bytes"
    yield f"{'file':<24} {file_bytes:>12} bytes = {file_bytes / MIB:.2f} MiB"
