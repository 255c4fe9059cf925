"""How many 8-bit multiply-adds this machine can do in a second, measured with each kind of instruction it has.

    python -m tvm_benchmark.machine_peak [--threads 1 2]

A kernel keeps many independent accumulators in registers and multiplies bytes from the first-level cache into them.
One such kernel runs in each thread; nothing else that a network needs (weights from memory, rescaling) is counted.
"""

import argparse
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tvm_benchmark.isa import TARGETS, runs_here
from tvm_benchmark.runtime import require_compiler
from utils.errors import command_line

TURNS = 1 << 14  # of a kernel's loop
REPEATS = 50
REPEAT_SECONDS = 0.01  # long beside the time that threads need to start together
SLOTS = 16  # vectors that the loop goes through
AMX = "amx"


@dataclass(frozen=True)
class Method:
    """How the instructions of one target (``isa.TARGETS``) multiply and add.

    vector, result: types of an operand and of an accumulator.  accumulators: as many as hide the latency.  macs:
    multiply-adds of one ``update``, an expression of {acc}, {a} and {b}.
    """

    target: str
    vector: str
    result: str
    accumulators: int
    macs: int
    update: str


METHODS = (
    Method(AMX, "int8x64", "int32x16", 4, 16 * 16 * 64, ""),
    Method(
        *("avx512vnni", "int8x64", "int32x16", 16, 64),
        'T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", {acc}, {a}, {b})',
    ),
    Method(
        *("avxvnni", "int8x32", "int32x8", 12, 32),
        'T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx512.vpdpbusd.256", {acc}, {a}, {b})',
    ),
    Method(
        *("avx2", "int16x16", "int32x8", 12, 16),
        '{acc} + T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", {a}, {b})',
    ),
    Method("portable", "int8x4", "int32x4", 8, 4, '{acc} + T.cast({a}, "int32x4") * T.cast({b}, "int32x4")'),
)
HEAD = """\
@T.prim_func(s_tir=True)
def main(a: T.Buffer(({inputs},), "{vector}"), b: T.Buffer(({weights},), "{vector}"), c: T.Buffer(({sums},), "int32")):
    T.func_attr({{"tirx.noalias": True}})
"""
TILE = 16 * 64  # bytes


def source(method: Method) -> str:
    """Text of the kernel ``main(a, b, c)``: inputs, weights, accumulators; see :func:`_buffers` for their sizes."""
    return _tile_source() if method.target == AMX else _vector_source(method)


def _vector_source(method: Method) -> str:
    element, lanes = method.vector.split("x")
    width = int(method.result.split("x")[1])
    head = HEAD.format(
        vector=element, inputs=SLOTS * int(lanes), weights=method.accumulators * int(lanes), sums=_sums(method)
    )
    lines = [f'    acc = T.alloc_buffer(({_sums(method)},), "int32", annotations={{"disable_lower_builtin": True}})']
    places = [f"[T.Ramp({i * width}, 1, {width})]" for i in range(method.accumulators)]
    lines += [f"    acc{place} = c{place}" for place in places]
    lines.append(f"    for i in T.serial({TURNS}):")
    for k, place in enumerate(places):
        a = f"a[T.Ramp(i % {SLOTS} * {lanes}, 1, {lanes})]"
        b = f"b[T.Ramp({k * int(lanes)}, 1, {lanes})]"
        lines.append(f"        acc{place} = {method.update.format(acc=f'acc{place}', a=a, b=b)}")
    lines += [f"    c{place} = acc{place}" for place in places]
    return head + "\n".join(lines) + "\n"


def _tile_source() -> str:
    """Two tiles of inputs times two of weights into four; the configuration lies behind the weights."""
    head = HEAD.format(vector="int8", inputs=2 * TILE, weights=2 * TILE + 64, sums=4 * 256)

    def call(name: str, *arguments: str) -> str:
        return f'T.evaluate(T.call_llvm_intrin("void", "llvm.x86.{name}", {", ".join(arguments)}))'

    def move(name: str, tile: int, buffer: str, offset: int) -> str:
        return "    " + call(name, f"T.int8({tile})", f"T.address_of({buffer}[{offset}])", "T.int64(64)")

    lines = ["    " + call("ldtilecfg", f"T.address_of(b[{2 * TILE}])")]
    lines += [move("tileloadd64", tile, "c", tile * 256) for tile in range(4)]
    lines += [move("tileloadd64", 4 + i, "a", i * TILE) for i in range(2)]
    lines += [move("tileloadd64", 6 + i, "b", i * TILE) for i in range(2)]
    lines.append(f"    for i in T.serial({TURNS}):")
    for tile in range(4):
        arguments = (f"T.int8({tile})", f"T.int8({4 + tile // 2})", f"T.int8({6 + tile % 2})")
        lines.append("        " + call("tdpbusd", *arguments))
    lines += [move("tilestored64", tile, "c", tile * 256) for tile in range(4)]
    return head + "\n".join([*lines, "    " + call("tilerelease")]) + "\n"


def _sums(method: Method) -> int:
    """int32 values of all accumulators."""
    return method.accumulators * (256 if method.target == AMX else int(method.result.split("x")[1]))


def _buffers(method: Method) -> list[np.ndarray]:
    """Inputs, weights and accumulators of one thread: small numbers, so that nothing overflows soon."""
    if method.target == AMX:
        weights = np.ones(2 * TILE + 64, np.int8)
        weights[2 * TILE :] = _tile_configuration().view(np.int8)
        return [np.ones(2 * TILE, np.int8), weights, np.zeros(_sums(method), np.int32)]
    element, lanes = method.vector.split("x")
    inputs = np.ones(SLOTS * int(lanes), element)
    return [inputs, np.ones(method.accumulators * int(lanes), element), np.zeros(_sums(method), np.int32)]


def _tile_configuration() -> np.ndarray:
    """Palette 1, eight tiles of 16 rows of 64 bytes: uint8 [64]."""
    configuration = np.zeros(64, np.uint8)
    configuration[0] = 1
    configuration[16:32:2] = 64
    configuration[48:56] = 16
    return configuration


def build(method: Method) -> Callable[..., None]:
    """The compiled kernel, to be called with TVM tensors of :func:`_buffers`.  Raises UserError without TVM."""
    tvm = require_compiler()
    from tvm.script import tirx

    module = tvm.IRModule({"main": tvm.script.from_source(source(method), extra_vars={"T": tirx})})
    kernel: Callable[..., None] = tvm.compile(module, target=tvm.target.Target(TARGETS[method.target].llvm()))["main"]
    return kernel


def measure(method: Method, threads: int = 1) -> float:
    """GOP/s (two operations a multiply-add) of all threads together, the best of many repetitions."""
    tvm, kernel = require_compiler(), build(method)
    buffers = [[tvm.runtime.tensor(array) for array in _buffers(method)] for _ in range(threads)]
    calls = math.ceil(REPEAT_SECONDS / _fastest(lambda index: kernel(*buffers[index]), 1))

    def work(index: int) -> None:
        for _ in range(calls):
            kernel(*buffers[index])

    operations = 2 * threads * calls * TURNS * method.accumulators * method.macs
    return operations / _fastest(work, threads) / 1e9


def _fastest(work: Callable[[int], None], threads: int) -> float:
    """Seconds from the first start to the last end of ``work(0) .. work(threads - 1)`` at the same time, minimum."""
    barrier = threading.Barrier(threads)
    spans: list[list[tuple[float, float]]] = [[] for _ in range(threads)]

    def repeat(index: int) -> None:
        for _ in range(REPEATS):
            barrier.wait()
            start = time.perf_counter()
            work(index)
            spans[index].append((start, time.perf_counter()))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(repeat, range(threads)))
    return min(max(end for _, end in turn) - min(start for start, _ in turn) for turn in zip(*spans, strict=True))


def machine_peaks(threads: int = 1) -> dict[str, float]:
    """Target -> measured GOP/s, for every target that this machine executes.  Raises UserError without TVM."""
    return {m.target: measure(m, threads) for m in METHODS if runs_here(TARGETS[m.target])}


@command_line()
def main(argv: Sequence[str] | None = None) -> int:
    """Print the peaks; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tvm_benchmark.machine_peak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N", help="threads at once (default 1)")
    args = parser.parse_args(argv)
    for threads in args.threads:
        for name, gops in machine_peaks(threads).items():
            print(f"{name:<12} {threads} thread{'s' if threads > 1 else ''}  {gops:10.1f} GOP/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
