"""A compiled model on disk and in memory: ``model.so`` (code, and behind it the constants) and ``model.json``.

:class:`CompiledModel` needs numpy and TVM's runtime, neither torch nor a compiler.
"""

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tvm_benchmark import runtime
from tvm_benchmark.isa import TARGETS, cpu_flags, request_tiles
from utils.errors import UserError

FORMAT, VERSION = "hawq compiled model", 1
LIBRARY, DESCRIPTION = "model.so", "model.json"
COMPILE = "python -m tvm_benchmark.compile"
# What model.json must hold, and as what; steps and tensors as ``lowering.Lowered`` describes them.
FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "arch": str,
    "scheme": str,
    "input_shape": list,  # [C, H, W]
    "input_dtype": str,  # uint8 pixels, or float32 for graphs that quantize their input
    "preprocess": (dict, type(None)),
    "classes": (list, type(None)),  # names
    "outputs": int,
    "batch": int,
    "target": str,
    "mcpu": str,
    "machine": str,
    "flags": list,  # of /proc/cpuinfo, all needed
    "graph_hash": str,
    "library_sha256": str,
    "arena_offset": int,  # of the constants in the library's file, with their size and hash
    "weight_bytes": int,
    "arena_sha256": str,
    "space_bytes": int,
    "result": int,
    "has_steps": bool,
    "keeps": bool,
    "steps": list,
    "tensors": dict,
    "versions": dict,
}


def read_info(folder: Path) -> dict[str, Any]:
    """The description of a compiled model.  Raises UserError where it is missing, foreign, damaged or of another
    version."""
    path = folder / DESCRIPTION
    for file in (path, folder / LIBRARY):
        if not file.is_file():
            raise UserError(f"{file} is missing; give a folder that {COMPILE} wrote")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; compile the model again") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise UserError(f"{path} does not describe a compiled model; give a folder that {COMPILE} wrote")
    if info.get("version") != VERSION:
        got = info.get("version")
        raise UserError(f"{path} has format version {got!r}, this program reads {VERSION}; compile the model again")
    wrong = [key for key, kind in FIELDS.items() if not isinstance(info.get(key, ...), kind)]
    if wrong or info["target"] not in TARGETS:
        raise UserError(f"{path} is damaged: {wrong[0] if wrong else 'target'!r} is not valid; compile the model again")
    return info


def check_cpu(info: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError, naming what is lacking, where this machine cannot execute the model's code."""
    lacks = sorted(set(info["flags"]) - cpu_flags())
    if info["machine"] != platform.machine():
        lacks = [f"the architecture {info['machine']} (this is {platform.machine()})"]
    elif not lacks and TARGETS[info["target"]].amx and not request_tiles():
        lacks = ["the system's permission to use AMX tiles"]
    if lacks:
        raise UserError(
            f"{folder} was compiled for the target {info['target']}, but this machine lacks {', '.join(lacks)}; "
            f"compile it again here: {COMPILE} --graph model.safetensors -o {folder} --batch-size {info['batch']}"
        )


def _check_library(info: Mapping[str, Any], path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != info["library_sha256"]:
        raise UserError(f"{path} is not the file that {DESCRIPTION} describes: it was changed; compile the model again")


class CompiledModel:
    """A compiled model, loaded; call it with one batch of images.

    folder: what :func:`tvm_benchmark.compile.compile_graph` wrote.  threads: that its kernels use.  One call at a
    time: calls share one workspace.  Attributes: ``info`` (the content of model.json), ``batch``, ``threads``.

    Raises UserError, one sentence, for files that are missing, changed or made for another machine, where TVM is
    absent, and for more threads than TVM's pool has.
    """

    def __init__(self, folder: str | Path, threads: int = 1) -> None:
        folder = Path(folder)
        self.info = read_info(folder)
        check_cpu(self.info, folder)
        _check_library(self.info, folder / LIBRARY)
        self.batch, self.threads = int(self.info["batch"]), threads
        self._shape = (self.batch, *self.info["input_shape"])
        self._dtype = np.dtype(self.info["input_dtype"])
        self._images = runtime.memory(int(np.prod(self._shape)) * self._dtype.itemsize).view(self._dtype)
        self._space = runtime.memory(self.info["space_bytes"])
        self._weights = _read_arena(folder / LIBRARY, self.info["arena_offset"], self.info["weight_bytes"])
        self._library = runtime.load_library(folder / LIBRARY)
        self._main = self._library["main"]
        self._arguments = [runtime.shared_tensor(a) for a in (self._space, self._weights, self._images)]
        size = 4 * self.batch * self.info["outputs"]
        logits = self._space[self.info["result"] : self.info["result"] + size].view(np.float32)
        self._logits = logits.reshape(self.batch, self.info["outputs"])
        runtime.use_threads(threads)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits float32 [batch, classes], a new array, of uint8 images [batch, C, H, W] (float32 where
        ``info["input_dtype"]`` says so).  Raises UserError for other shapes and dtypes, and for NaN."""
        if images.dtype != self._dtype or images.shape != self._shape:
            more = "; predict() takes any number of images" if images.shape[1:] == self._shape[1:] else ""
            raise UserError(
                f"got images {images.dtype} {list(images.shape)}, expected {self._dtype} {list(self._shape)}{more}"
            )
        if self._dtype.kind == "f" and np.isnan(images).any():
            raise UserError("the images hold NaN, expected numbers")
        self._images.reshape(self._shape)[...] = images
        self.run()
        return self._logits.copy()

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Logits float32 [N, classes] of any number of images [N, C, H, W]; the last batch is filled up with zeros.

        Raises UserError as calling the model does.
        """
        parts = [images[i : i + self.batch] for i in range(0, len(images), self.batch)]
        if parts and len(parts[-1]) < self.batch:
            tail = np.zeros((self.batch, *images.shape[1:]), images.dtype)
            tail[: len(parts[-1])] = parts[-1]
            parts[-1] = tail
        logits = [self(part) for part in parts]
        return np.concatenate([*logits, self._logits[:0]])[: len(images)]

    def run(self) -> None:
        """Compute the logits of the last call's images (zeros before the first call) once more; copies nothing."""
        runtime.use_threads(self.threads)
        self._main(*self._arguments)

    def step_times(self, rounds: int) -> list[float]:
        """Seconds that each step takes, the minimum of so many rounds, in the order of ``info["steps"]``.

        Raises UserError for a model that was compiled without ``steps=True``.
        """
        if not self.info["has_steps"]:
            raise UserError("the model has no entry points for its steps; compile it with steps=True")
        runtime.use_threads(self.threads)
        steps = [self._library[f"step_{i}"] for i in range(len(self.info["steps"]))]
        times = np.full(len(steps), np.inf)
        for _ in range(rounds):
            for index, step in enumerate(steps):
                start = time.perf_counter()
                step(*self._arguments)
                times[index] = min(times[index], time.perf_counter() - start)
        return [float(seconds) for seconds in times]

    def tensor(self, name: str) -> np.ndarray:
        """A stored tensor of the last run: int64 [batch, C, H, W] (float32 for the logits).

        name: of a node of the graph, one of ``info["tensors"]``.  Raises UserError for a model that was compiled
        without ``keep=True``, whose tensors overwrite each other, and for names that are not stored.
        """
        if not self.info["keeps"]:
            raise UserError("the model's tensors overwrite each other; compile it with keep=True")
        place = self.info["tensors"].get(name)
        if place is None:
            raise UserError(f"the tensor {name!r} is not stored: it never leaves the registers; see info['tensors']")
        channels, height, width = place["shape"]
        top, bottom, left, right = place["halo"]
        dtype, pitch = np.dtype(place["dtype"]), place["pitch"]
        frame = (self.batch, height + top + bottom, width + left + right, pitch)
        size = int(np.prod(frame)) * dtype.itemsize
        stored = self._space[place["offset"] : place["offset"] + size].view(dtype).reshape(frame)
        first = place["first"]
        inner = stored[:, top : top + height, left : left + width, first : first + channels].transpose(0, 3, 1, 2)
        return inner.copy() if dtype.kind == "f" else inner.astype(np.int64) - place["zero"]


def _read_arena(path: Path, offset: int, size: int) -> np.ndarray:
    """The constants, in memory of their own."""
    weights = runtime.memory(size)
    with path.open("rb") as file:
        file.seek(offset)
        read = file.readinto(weights.data)
    assert read == size, "the hash of the whole file was right"
    return weights
