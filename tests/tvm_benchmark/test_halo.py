"""The frame of zeros around a buffer's images."""

from itertools import product

import numpy as np
import pytest

from tests.tvm_benchmark.kernels import HERE
from tvm_benchmark.halo import emit_halo
from tvm_benchmark.isa import Target
from tvm_benchmark.layout import Buffer, Storage, View
from tvm_benchmark.lowering import compile_text, module_text
from tvm_benchmark.plan import Plan

pytestmark = pytest.mark.tvm

BATCH = 2
STORAGES = (Storage("uint8", 128), Storage("uint8"), Storage("int16"), Storage("int32"))
HALOS = ((1, 1, 1, 1), (0, 0, 2, 0), (0, 0, 0, 1), (3, 0, 0, 0), (0, 1, 2, 3), (2, 2, 0, 0))
SHAPES = ((1, 1, 1), (3, 2, 5), (70, 4, 1), (17, 1, 3))


def buffers() -> list[Buffer]:
    """Every halo, shape and storage at least once, each halo with each shape."""
    pairs = enumerate(product(HALOS, SHAPES))
    return [Buffer(f"b{i}", STORAGES[i % len(STORAGES)], shape, halo) for i, (halo, shape) in pairs]


def expected(buffer: Buffer, memory: np.ndarray) -> np.ndarray:
    """The memory of a buffer [N * image] with its frame at zero."""
    (c, h, w), (top, bottom, left, right) = buffer.shape, buffer.halo
    images = memory.reshape(BATCH, top + h + bottom, left + w + right, c)
    framed = np.full_like(images, buffer.storage.zero)
    inside = np.s_[:, top : top + h, left : left + w]
    framed[inside] = images[inside]
    return framed.ravel()


@pytest.mark.parametrize("target", [HERE[0], HERE[-1]], ids=lambda target: target.name)
def test_the_frame_is_zero_and_all_else_is_left_alone(target: Target) -> None:
    import tvm

    functions, calls, found, size = dict[str, str](), list[str](), [], 64
    for buffer in buffers():
        plan = Plan(BATCH, [], {buffer.name: View(buffer, 0, buffer.pitch)}, {}, buffer.name)
        name = functions.setdefault(emit_halo(plan, buffer).text("kernel"), f"kernel_{len(functions)}")
        calls.append(f"{name}(T.address_of(space[{size}]))")
        found.append((buffer, size))
        size += -(-buffer.bytes(BATCH) // 64) * 64 + 64
    module = module_text(functions, {"main": calls}, f'space: T.Buffer(({size},), "uint8")')
    memory = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    space = tvm.runtime.tensor(memory)
    compile_text(module, target)["main"](space)
    after = memory.copy()
    for buffer, offset in found:
        place = after[offset : offset + buffer.bytes(BATCH)].view(buffer.storage.dtype)
        place[:] = expected(buffer, place)
    np.testing.assert_array_equal(space.numpy(), after)
