"""Where tensors lie: storage types, strides, views with halo."""

from itertools import product

import numpy as np
import pytest

from tvm_benchmark.layout import ITEM_BYTES, Buffer, Storage, View, shape3, storage_of
from utils.integer_graph.ir import TensorType, int_range


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(1, 17))
def test_every_integer_of_a_type_has_a_place_in_its_storage(bits: int, signed: bool) -> None:
    lo, hi = int_range(bits, signed)
    storage = storage_of(TensorType((3, 2, 2), bits, signed, lo, hi))
    info = np.iinfo(storage.dtype)
    assert info.min <= lo + storage.zero
    assert hi + storage.zero <= info.max
    assert storage.bytes == (1 if bits <= 8 else 2 if bits < 16 or signed else 4)


def test_accumulators_and_logits() -> None:
    assert storage_of(TensorType((3,), 32, True, -9, 9)) == Storage("int32")
    assert storage_of(TensorType((3,), 0, True, 0, 0)) == Storage("float32")


def test_a_vector_is_one_pixel() -> None:
    assert shape3(TensorType((7,), 8, True, 0, 1)) == (7, 1, 1)
    assert shape3(TensorType((7, 2, 3), 8, True, 0, 1)) == (7, 2, 3)


def test_item_sizes_are_those_of_numpy() -> None:
    assert {name: np.dtype(name).itemsize for name in ITEM_BYTES} == dict(ITEM_BYTES)


def test_offsets_of_a_view_are_those_of_an_array() -> None:
    buffer = Buffer("b", Storage("uint8"), (6, 3, 4), (1, 2, 3, 4))
    top, _, left, _ = buffer.halo
    array = np.arange(2 * buffer.image).reshape(2, 3 + 3, 4 + 7, 6)
    assert array.size * buffer.storage.bytes == buffer.bytes(2)
    view = View(buffer, 2, 3)
    for n, h, w in product(range(2), range(3), range(4)):
        assert eval(view.at(str(n), str(h), str(w))) == array[n, top + h, left + w, 2]


def test_still_axes_do_not_move() -> None:
    view = View(Buffer("b", Storage("uint8"), (6, 1, 4)), 0, 6, (True, False))
    assert view.at("n", "h", "w") == "(n)*24 + (w)*6"
    assert View(view.buffer, 0, 6, (True, True)).at("0", "h", "w") == "0"


def test_dense_views_have_no_gaps() -> None:
    plain, framed = Buffer("b", Storage("uint8"), (6, 3, 4)), Buffer("b", Storage("uint8"), (6, 3, 4), (0, 0, 1, 0))
    assert View(plain, 0, 6).is_dense
    assert not View(plain, 0, 5).is_dense
    assert not View(framed, 0, 6).is_dense
