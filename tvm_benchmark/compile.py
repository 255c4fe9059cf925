"""python -m tvm_benchmark.compile: an integer graph becomes a shared library for one kind of processor."""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tvm_benchmark import runtime
from tvm_benchmark.artifact import DESCRIPTION, FORMAT, LIBRARY, VERSION
from tvm_benchmark.isa import TARGETS, Target, choose, cpu_flags, runs_here
from tvm_benchmark.lowering import Emit, Lowered, build, lower
from tvm_benchmark.plan import Plan, Step, make_plan
from tvm_benchmark.source import Source
from tvm_benchmark.tune import Tuner
from utils.errors import UserError, command_line
from utils.integer_graph.interpreter import INPUT_DTYPES
from utils.integer_graph.ir import Graph
from utils.integer_graph.serialize import graph_hash, load

PAGE = 4096
PACKAGES = {"hawq": "hawq", "tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}
Say = Callable[[str], None]
EPILOG = """\
Give the file quant_train.py writes (model.safetensors).  The folder then holds model.so (code and weights) and
model.json (input, classes, versions, hash of the graph); tvm_benchmark.artifact.CompiledModel runs it with numpy.
The batch size is fixed here, the number of threads when the model is loaded.

examples:
  python -m tvm_benchmark.compile --graph runs/resnet18_uniform8/model.safetensors -o resnet18
  python -m tvm_benchmark.compile --graph model.safetensors -o out --batch-size 8 --target avx2

targets, the best first:
"""


def compile_graph(
    graph: Graph,
    folder: str | Path,
    *,
    batch: int = 1,
    target: str = "auto",
    tune: bool = False,
    steps: bool = False,
    keep: bool = False,
    threads: int = 1,
    say: Say = lambda line: None,
) -> None:
    """Compile a verified graph into ``folder``, as model.so and model.json; an older model there stays if this fails.

    batch: images of one call.  target: a row of ``isa.TARGETS``, or "auto" for the best one that this machine runs.
    tune: search the tiling of every dense layer, measured with so many threads.  steps: one entry point for each step,
    for ``step_times``.  keep: every stored tensor can be read after a run.  say: told about each stage, in one line.

    Raises UserError for a graph with float islands, an unknown target, a missing TVM or C compiler, a search for a
    target that this machine does not run, and where the files cannot be written.
    """
    if batch < 1:
        raise UserError(f"got a batch of {batch} images, expected at least 1")
    row = choose(target)
    _check_folder(Path(folder))
    require_tools()
    plan = make_plan(graph, batch)
    with _search(plan, row, threads) if tune else contextlib.nullcontext() as emit_conv:
        lowered = lower(plan, row, emit_conv=emit_conv, steps=steps, keep=keep)
    kernels = len({step["kernel"] for step in lowered.steps})
    size = f"{_mib(lowered.weights.nbytes)} of constants, {_mib(lowered.space_bytes)} of workspace"
    say(f"planned: {len(lowered.steps)} steps, {kernels} different kernels, {size}")
    start = time.perf_counter()
    library = build(lowered, row)
    say(f"generated code in {time.perf_counter() - start:.1f} s")
    info = _description(graph, batch, row, lowered) | {"has_steps": steps, "keeps": keep}
    _write(Path(folder), library, lowered.weights, info)


@contextlib.contextmanager
def _search(plan: Plan, target: Target, threads: int) -> Iterator[Emit]:
    """The emitter of dense layers that finds the best tiling of each, with a progress bar."""
    if not runs_here(target):
        raise UserError(f"--tune measures, and this machine does not run the target {target.name}; give --no-tune")
    runtime.use_threads(threads)
    tuner, layers = Tuner(), sum(step.kind == "conv" for step in plan.steps)
    with tqdm(total=layers, desc="tuning", unit="layer", disable=None) as bar:

        def emit(plan: Plan, step: Step, target: Target) -> Source:
            source = tuner.emit(plan, step, target)
            bar.update()
            return source

        yield emit


def require_tools() -> None:
    """Raise UserError, naming the remedy, where TVM's compiler or a C compiler to link with is missing."""
    runtime.require_compiler()
    from tvm.support import cc

    compiler = cc.get_cc()
    if compiler is None:
        raise UserError(
            "compiling needs a C compiler to link the library, and the PATH has neither g++, gcc nor clang; install "
            "one (Debian, Ubuntu: apt install g++), or name one in the variable CXX"
        )
    if shutil.which(compiler) is None:
        raise UserError(f"got {compiler} as the C compiler (variable CXX or CC), which is not there; name one that is")


def _check_folder(folder: Path) -> None:
    """Refuse a folder that could not be written after minutes of work; makes nothing."""
    ancestor = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        reason = "no permission to write there" if ancestor.is_dir() else f"{ancestor} is not a folder"
        raise UserError(f"cannot write {folder}: {reason}; give another place")


def _description(graph: Graph, batch: int, target: Target, lowered: Lowered) -> dict[str, Any]:
    """model.json, but for the library itself."""
    first, last, meta = graph.nodes[0], graph.nodes[-1], graph.meta
    return {
        "format": FORMAT,
        "version": VERSION,
        "arch": str(meta.get("arch", "")),
        "scheme": str(meta.get("scheme", "")),
        "input_shape": list(first.type.shape),
        "input_dtype": str(INPUT_DTYPES[first.op]),
        "preprocess": meta.get("preprocess"),
        "classes": meta.get("classes"),
        "outputs": last.type.shape[0],
        "batch": batch,
        "target": target.name,
        "mcpu": target.mcpu,
        "machine": platform.machine(),
        "flags": list(target.flags),
        "graph_hash": graph_hash(graph),
        "weight_bytes": lowered.weights.nbytes,
        "space_bytes": lowered.space_bytes,
        "result": lowered.result,
        "versions": versions(),
        "steps": lowered.steps,
        "tensors": lowered.tensors,
    }


def versions() -> dict[str, str]:
    """Versions of what makes the code: this package ("source" where it is not installed), TVM and its FFI."""
    found = {}
    for name, package in PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = "source"
    return found


def _write(folder: Path, library: Any, weights: np.ndarray, info: dict[str, Any]) -> None:
    """Both files, first complete in a hidden folder, then renamed; model.json last, whose hash tells them apart."""
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".compile-") as name:
            temporary = Path(name)
            library.export_library(str(temporary / LIBRARY))
            info |= _append(temporary / LIBRARY, weights)
            with (temporary / LIBRARY).open("rb") as file:
                info["library_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
            with (temporary / DESCRIPTION).open("w", encoding="utf-8") as file:
                json.dump(info, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            for name in (LIBRARY, DESCRIPTION):
                os.replace(temporary / name, folder / name)
    except BaseException as error:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise UserError(
                f"cannot write {folder}: {reason}; free space or choose another place, an older model is unchanged"
            ) from error
        raise


def _append(path: Path, weights: np.ndarray) -> dict[str, Any]:
    """Put the constants behind the library's code, on a page of their own; the loader of libraries ignores them."""
    offset = -(-path.stat().st_size // PAGE) * PAGE
    with path.open("r+b") as file:
        file.truncate(offset)
        file.seek(offset)
        file.write(weights.data)
    return {"arena_offset": offset, "arena_sha256": hashlib.sha256(weights.data).hexdigest()}


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _target_line(name: str) -> str:
    """Which code is generated, and why."""
    row = choose(name)
    if name == "auto":
        return f"target {row.name} ({row.mcpu}): the best that this machine runs"
    if runs_here(row):
        return f"target {row.name} ({row.mcpu}), as asked; this machine runs it"
    lacks = ", ".join(sorted(set(row.flags) - cpu_flags())) or "the permission to use AMX tiles"
    return f"target {row.name} ({row.mcpu}), as asked; this machine cannot run it: it lacks {lacks}"


def build_parser() -> argparse.ArgumentParser:
    """The parser; see ``--help``."""
    rows = [f"  {row.name:<11} needs {', '.join(row.flags) or 'nothing special'}" for row in TARGETS.values()]
    parser = argparse.ArgumentParser(
        prog="python -m tvm_benchmark.compile",
        description="Compile an integer graph with TVM into a shared library that gives the same integers.",
        epilog=EPILOG + "\n".join(rows),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--graph", type=Path, required=True, metavar="FILE", help="integer graph (model.safetensors)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the two files")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images of one call (default 1)")
    parser.add_argument("--target", default="auto", help="auto (default: the best this machine runs) or a name below")
    parser.add_argument(
        "--tune",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="search the tiling of each layer (minutes, then remembered); default: --no-tune, good ones",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="that --tune measures with (default 1)")
    return parser


@command_line()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    start = time.perf_counter()
    graph = load(args.graph)
    print(_target_line(args.target))
    say: Say = lambda line: print(line, flush=True)  # noqa: E731
    compile_graph(
        graph,
        args.output,
        batch=args.batch_size,
        target=args.target,
        tune=args.tune,
        threads=args.threads,
        say=say,
    )
    size = (args.output / LIBRARY).stat().st_size
    print(f"wrote {args.output / LIBRARY} ({_mib(size)}) and {DESCRIPTION}, {time.perf_counter() - start:.1f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
