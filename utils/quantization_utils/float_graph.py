"""The captured network in the small vocabulary of ``float_ops``: every fx node becomes operators of known kinds."""

from torch import fx

from utils.quantization_utils.capture import Captured
from utils.quantization_utils.float_ops import Builder, Op, shape_of, sources, target_name
from utils.quantization_utils.float_rows import FUNCTIONS, MODULES


def float_graph(captured: Captured) -> list[Op]:
    """Translate a captured graph; operators in execution order, the last one of kind ``output``.

    Constants (values that no image influences) are not operators: those who use them compute them.
    Raises UserError naming the operator and the module that has no integer form.
    """
    builder = Builder(captured)
    order = {node: i for i, node in enumerate(captured.graph.nodes)}
    for node in order:
        if not node.meta.get("constant", False):
            _check_in_place(builder, node, order)
            for op in _translate(builder, node):
                builder.ops[op.name] = op
    return _used(list(builder.ops.values()))


def _used(ops: list[Op]) -> list[Op]:
    """The operators the output depends on, and the input."""
    needed = {ops[0].name, ops[-1].name}
    for op in reversed(ops):
        if op.name in needed:
            needed.update(op.inputs)
    return [op for op in ops if op.name in needed]


def _check_in_place(builder: Builder, node: fx.Node, order: dict[fx.Node, int]) -> None:
    """Refuse an operator that overwrites a tensor somebody reads later: replaying it out of place would differ."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or not _works_in_place(builder, node):
        return
    if any(order[user] > order[node] for user in first.users) or not node.users:
        raise builder.refuse(node, "it works in place on a tensor that is read again later; use inplace=False")


def _works_in_place(builder: Builder, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(vars(builder.module(node)).get("inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = target_name(node)
    return bool(node.kwargs.get("inplace", False)) or name in IN_PLACE or (name[-1] == "_" and name[0] != "_")


IN_PLACE = frozenset({"iadd", "isub", "imul"})


def _translate(builder: Builder, node: fx.Node) -> list[Op]:
    if node.op == "placeholder":
        return [builder.op(node, "input", lambda x: x)]
    if node.op == "output":
        if not isinstance(node.args[0], fx.Node) or not sources(node):
            raise builder.refuse(node, "it returns several values or a constant; a classifier returns its logits alone")
        logits = builder.op(node, "output", lambda x: x)
        logits.shape = shape_of(node.args[0])
        return [logits]
    if node.meta["holds"] == "host":
        return [builder.op(node, "host")]
    if all(n.meta["holds"] == "host" for n in sources(node)):
        raise builder.refuse(node, "it makes a tensor from constants and the batch size alone")
    if node.op == "call_module":
        module = builder.module(node)
        row = next((MODULES[c.__name__] for c in type(module).__mro__ if c.__name__ in MODULES), None)
    else:
        module, row = None, FUNCTIONS.get(target_name(node))
    if row is None:
        raise builder.refuse(node, "it has no integer form and no float island; replace it or keep that part outside")
    made = row(builder, node, module)
    return made if isinstance(made, list) else [made]
