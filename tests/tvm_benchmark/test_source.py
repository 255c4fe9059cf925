"""The text of a kernel: parameters, names, loops."""

import numpy as np

from tvm_benchmark.layout import Buffer, Storage, View
from tvm_benchmark.source import Source


def test_tensors_of_one_buffer_share_a_pointer() -> None:
    source, buffer = Source(), Buffer("joined", Storage("uint8"), (6, 1, 1))
    other = Buffer("other", Storage("int16"), (6, 1, 1))
    first, second = source.tensor("a", View(buffer, 0, 2)), source.tensor("b", View(buffer, 2, 4))
    assert first == second != source.tensor("c", View(other, 0, 6))
    assert [(p.dtype, p.tensor) for p in source.params] == [("uint8", "joined"), ("int16", "other")]


def test_constants_are_contiguous_and_never_shared() -> None:
    source, array = Source(), np.arange(6, dtype=np.int32).reshape(2, 3).T
    assert source.constant(array) != source.constant(array)
    assert all(p.array is not None and p.array.flags.c_contiguous for p in source.params)


def test_a_loop_of_one_turn_is_none_unless_it_is_parallel() -> None:
    source = Source()
    with source.loop("n", 1) as n, source.loop("job", 1, "parallel") as job, source.loop("h", "extent") as h:
        source.evaluate(f"{n} + {job} + {h}")
    assert source.lines == [
        "    for job1 in T.parallel(1):",
        "        for h2 in T.serial(extent):",
        "            T.evaluate(0 + job1 + h2)",
    ]
    assert source.depth == 1


def test_names_are_fresh() -> None:
    source = Source()
    names = [source.let("1"), source.let("1"), source.local(2, "int32x16"), source.local(2, "int32x16")]
    assert len(set(names)) == 4


def test_the_text_does_not_depend_on_what_pointers_point_to() -> None:
    texts = []
    for name in ("a", "b"):
        source = Source()
        source.tensor(name, View(Buffer(name, Storage("uint8"), (6, 1, 1)), 0, 6))
        source.constant(np.full(3, len(name), np.int8))
        source.images("uint8")
        texts.append(source.text("kernel"))
    assert texts[0] == texts[1]
    assert 'def kernel(p0_: T.handle("uint8"), p1_: T.handle("int8"), p2_: T.handle("uint8")) -> T.int32:' in texts[0]
