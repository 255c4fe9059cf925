"""Modules built from kernel texts equal those of TVM's own parser, node by node."""

import pytest

from tests.tvm_benchmark.small_graphs import float_graph, small_graph
from tvm_benchmark.isa import TARGETS
from tvm_benchmark.lowering import lower, module_text
from tvm_benchmark.plan import make_plan
from tvm_benchmark.script import parse
from utils.integer_graph.ir import Graph

pytestmark = pytest.mark.tvm
BRANCHES = """\
@T.prim_func(private=True, s_tir=True)
def kernel(p0_: T.handle("uint8")) -> T.int32:
    p0 = T.decl_buffer((64,), "uint8", data=p0_)
    one: T.let = 1
    for i in T.serial(8):
        if i < 4:
            p0[i] = T.uint8(1)
        else:
            p0[i + one] = T.uint8(2)
    return T.int32(0)
"""


def assert_like_tvm(text: str) -> None:
    import tvm
    from tvm.script import ir, tirx

    expected = tvm.script.from_source(text, extra_vars={"T": tirx, "I": ir})
    tvm.ir.assert_structural_equal(parse(text), expected)


@pytest.mark.parametrize("target", ["amx", "avx2", "portable"])
@pytest.mark.parametrize("graph", [small_graph(), float_graph()], ids=["uint8", "float32"])
def test_networks_are_like_tvms(graph: Graph, target: str) -> None:
    assert_like_tvm(lower(make_plan(graph, 2), TARGETS[target], steps=True).module)


def test_branches_are_like_tvms() -> None:
    calls = {"main": ["kernel_0(T.address_of(space[0]))"]}
    assert_like_tvm(module_text({BRANCHES: "kernel_0"}, calls, 'space: T.Buffer((64,), "uint8")'))
