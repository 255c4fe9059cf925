"""The tiling that a dense layer gets without a search, and code for processors other than this one."""

from dataclasses import dataclass
from typing import Any

import pytest

from tests.tvm_benchmark.dense_graphs import Shape, single
from tvm_benchmark.convolution import default_tiling
from tvm_benchmark.isa import TARGETS
from tvm_benchmark.lowering import build, lower
from tvm_benchmark.plan import make_plan


def kernel_of(shape: Shape, size: tuple[int, int], target: str, batch: int = 1) -> tuple[str, str]:
    plan = make_plan(single(shape, size), batch)
    step = next(step for step in plan.steps if step.kind == "conv")
    tiling = default_tiling(plan, step, TARGETS[target])
    return tiling.kernel, tiling.walk


def test_tile_registers_need_pixels() -> None:
    assert kernel_of(Shape(64, 64), (8, 8), "amx")[0] == "tiles"
    assert kernel_of(Shape(64, 64), (2, 2), "amx")[0] == "registers"
    assert kernel_of(Shape(64, 64), (2, 2), "amx", batch=2)[0] == "tiles"


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "amx"])
def test_processors_without_tile_registers_use_vectors(target: str) -> None:
    assert kernel_of(Shape(64, 64), (8, 8), target)[0] == "registers"


def test_narrow_images_are_walked_along_the_input() -> None:
    three = Shape(64, 64, kernel=(3, 3), padding=(1, 1, 1, 1))
    assert kernel_of(three, (7, 7), "amx") == ("tiles", "long")
    assert kernel_of(three, (14, 14), "amx") == ("tiles", "rows")


@dataclass(frozen=True)
class Other:
    """The portable target on a processor that this machine need not be."""

    triple: str

    def llvm(self) -> dict[str, Any]:
        return {"kind": "llvm", "mtriple": self.triple, "mcpu": "generic", "opt-level": 3}


@pytest.mark.tvm
def test_portable_code_compiles_for_aarch64() -> None:
    plan = make_plan(single(Shape(8, 20, kernel=(3, 3), padding=(1, 1, 1, 1)), (6, 6)), 1)
    executable = build(lower(plan, TARGETS["portable"]), Other("aarch64-linux-gnu"))  # type: ignore[arg-type]
    assert "smull" in executable.mod.inspect_source("asm")
