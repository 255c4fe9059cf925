"""Text of one kernel: a private TIR function over raw pointers, written line by line.

A kernel's parameters are pointers to tensors (views of the workspace) and to constants (packed arrays in the weight
arena).  Kernels with equal text are one function, however many layers call it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from tvm_benchmark.layout import View

DTYPES = {"uint8", "int8", "int16", "int32", "int64", "float32"}


@dataclass(frozen=True)
class Param:
    """One pointer.  Exactly one of ``tensor`` (name in the plan) and ``array`` (a constant) says what it points to."""

    name: str
    dtype: str
    tensor: str | None = None
    array: np.ndarray | None = None


@dataclass
class Source:
    """A function under construction.  Names are unique; ``let`` binds an expression to a fresh one."""

    params: list[Param] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    depth: int = 1
    count: int = 0

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """Lines inside ``header`` (a for statement, say)."""
        self.line(header)
        self.depth += 1
        yield
        self.depth -= 1

    @contextmanager
    def loop(self, name: str, extent: int | str, kind: str = "serial") -> Iterator[str]:
        """A loop over ``range(extent)``; gives the name of its variable, or "0" where one turn makes it needless."""
        if extent == 1 and kind != "parallel":
            yield "0"
            return
        self.count += 1
        variable = f"{name}{self.count}"
        with self.block(f"for {variable} in T.{kind}({extent}):"):
            yield variable

    def let(self, expression: str, name: str = "v") -> str:
        self.count += 1
        fresh = f"{name}{self.count}"
        self.line(f"{fresh}: T.let = {expression}")
        return fresh

    def evaluate(self, expression: str) -> None:
        self.line(f"T.evaluate({expression})")

    def local(self, size: int, dtype: str, name: str = "local") -> str:
        """An array of the function (or of one turn of a parallel loop): registers where all indices are constants,
        else the stack.  A vector dtype ("int32x16") gives vectors as elements and aligns them."""
        self.count += 1
        fresh = f"{name}{self.count}"
        self.line(f'{fresh} = T.alloc_buffer(({size},), "{dtype}", annotations={{"disable_lower_builtin": True}})')
        return fresh

    def tensor(self, tensor: str, view: View) -> str:
        """Pointer parameter of a tensor's buffer; offsets count from the buffer's start.  Tensors of one buffer share
        it: pointers must not alias."""
        tensor = view.buffer.name
        for param in self.params:
            if param.tensor == tensor:
                return param.name
        return self._param(view.storage.dtype, tensor, None)

    def images(self, dtype: str) -> str:
        """Pointer parameter of the images, NCHW, that the network is called with."""
        return self._param(dtype, "images", None)

    def constant(self, array: np.ndarray) -> str:
        """Pointer parameter of a packed constant."""
        return self._param(str(array.dtype), None, np.ascontiguousarray(array))

    def _param(self, dtype: str, tensor: str | None, array: np.ndarray | None) -> str:
        assert dtype in DTYPES, dtype
        name = f"p{len(self.params)}"
        self.params.append(Param(name, dtype, tensor, array))
        return name

    def text(self, name: str) -> str:
        """The whole function under a name.  It returns 0: where loops are parallel, TVM's code returns a status."""
        arguments = ", ".join(f'{p.name}_: T.handle("{p.dtype}")' for p in self.params)
        head = ["@T.prim_func(private=True, s_tir=True)", f"def {name}({arguments}) -> T.int32:"]
        head.append('    T.func_attr({"tirx.noalias": True})')
        head += [f'    {p.name} = T.decl_buffer((2147483647,), "{p.dtype}", data={p.name}_)' for p in self.params]
        return "\n".join([*head, *self.lines, "    return T.int32(0)"]) + "\n"
