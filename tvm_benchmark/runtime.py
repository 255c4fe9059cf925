"""TVM at run time: its libraries without the compiler, its thread pool, memory that kernels use in place.

Nothing here needs torch or the compiler, and TVM is imported by the functions that use it.
"""

import contextlib
import ctypes
import importlib.util
import mmap
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError

INSTALL = 'pip install "apache-tvm==0.27.0.post1" "apache-tvm-ffi==0.1.14.post1"'
HUGE_PAGE = 1 << 21
POOL_SIZE, BINDING = "TVM_NUM_THREADS", "TVM_BIND_THREADS"
ANY_CORES = 0  # neither large nor small ones in particular
_pool = threading.local()  # TVM has one pool for each thread that calls kernels


def _missing(error: Exception | None = None) -> UserError:
    why = f" ({error})" if error else ""
    return UserError(f"compiled models need TVM, which this Python does not have{why}: {INSTALL}")


def runtime() -> Any:
    """The module ``tvm_ffi``, with TVM's runtime library in the process.  Raises UserError where TVM is absent."""
    # Read by TVM when its first pool starts: room for every processor, of which ``use_threads`` takes some.  Threads
    # stay where the system puts them, so that taskset and containers are respected.
    os.environ.setdefault(POOL_SIZE, str(len(os.sched_getaffinity(0))))
    os.environ.setdefault(BINDING, "0")
    try:
        import tvm_ffi

        if "tvm" not in sys.modules:
            ctypes.CDLL(str(_runtime_library()), mode=ctypes.RTLD_GLOBAL)
    except (ImportError, OSError) as error:
        raise _missing(error) from error
    return tvm_ffi


def _runtime_library() -> Path:
    spec = importlib.util.find_spec("tvm")
    folders = spec.submodule_search_locations if spec else None
    found = [file for folder in folders or () for file in Path(folder, "lib").glob("libtvm_runtime.*")]
    if not found:
        raise ImportError("no libtvm_runtime")
    return found[0]


def require_compiler() -> Any:
    """The module ``tvm``.  Raises UserError where it is absent or has no compiler."""
    runtime()
    try:
        import tvm
        import tvm.script
    except ImportError as error:
        raise _missing(error) from error
    if not hasattr(tvm, "compile"):
        raise _missing(ImportError("this one has the runtime alone"))
    return tvm


def load_library(path: Path) -> Any:
    """The functions of a compiled library, by name.

    The system recognises libraries by their path, so each is opened under a new one: a file that was replaced by
    another is never taken for the old one.  Raises UserError for a file that is no library.
    """
    ffi = runtime()
    try:
        with tempfile.TemporaryDirectory() as folder:
            alias = Path(folder, path.name)
            alias.symlink_to(path.resolve())
            return ffi.load_module(str(alias))
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[-1]
        raise UserError(f"cannot load the library {path}: {reason}; compile the model again") from error


def use_threads(count: int) -> None:
    """Let the kernels that this thread calls from now on use so many threads.

    Raises UserError where TVM's pool has fewer: its size is fixed when the first kernel runs.
    """
    if getattr(_pool, "threads", None) == count:
        return
    ffi = runtime()
    if count < 1:
        raise UserError(f"got {count} threads, expected at least 1")
    ffi.get_global_func("runtime.config_threadpool")(ANY_CORES, count)
    found = ffi.get_global_func("runtime.NumThreads")()
    if found != count:
        raise UserError(
            f"got {count} threads, but TVM's thread pool in this process has {found}; ask for at most as many, or set "
            f"{POOL_SIZE}={count} before Python starts"
        )
    _pool.threads = count


def memory(size: int) -> np.ndarray:
    """uint8 [size] of zeros, in large pages where it fills one and the system has them.

    Aligned to 64 bytes (to a large page), and at least 4096 bytes behind it may be read.
    """
    pages = mmap.mmap(-1, max(size, 1) + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without large pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(pages, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    return whole[start : start + size]


def shared_tensor(array: np.ndarray) -> Any:
    """A TVM tensor on the array's own memory; keep the array as long as the tensor."""
    return runtime().from_dlpack(array)
