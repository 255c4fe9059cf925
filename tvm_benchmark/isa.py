"""The processors that kernels are generated for, and which of them this machine is."""

import ctypes
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError


@dataclass(frozen=True)
class Target:
    """One row of the table of targets.

    mcpu: LLVM's name of the oldest processor that has what the code uses.  flags: what /proc/cpuinfo must list.
    dot: row of the dot product table in ``dense``.  amx: whether tile registers are used.  vbmi: whether bytes can be
    permuted across 64-byte registers.
    """

    name: str
    mcpu: str
    flags: tuple[str, ...]
    dot: str
    amx: bool = False
    vbmi: bool = False

    def llvm(self) -> dict[str, object]:
        """TVM's description of the target."""
        triple = f"{platform.machine()}-linux-gnu"
        # TVM tells LLVM that pointers of different names never alias: wrong once kernels that share a workspace are
        # inlined into one function.
        options = ["-enable-tbaa=false"]
        return {"kind": "llvm", "mtriple": triple, "mcpu": self.mcpu, "opt-level": 3, "cl-opt": options}


VNNI512 = ("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512vbmi")
TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("amx", "sapphirerapids", (*VNNI512, "amx_tile", "amx_int8"), "avx512", amx=True, vbmi=True),
        Target("avx512vnni", "icelake-server", VNNI512, "avx512", vbmi=True),
        Target("avxvnni", "alderlake", ("avx2", "fma", "avx_vnni"), "avxvnni"),
        Target("avx2", "haswell", ("avx2", "fma"), "avx2"),
        Target("portable", "x86-64" if platform.machine() == "x86_64" else "generic", (), "portable"),
    )
}

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the processor says it can do (empty where the system does not tell)."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's family, model and stepping, as one word."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.machine()
    pairs = (line.partition(":") for line in lines)
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    keys = ("vendor_id", "cpu family", "model", "stepping")
    return "-".join(fields[key] for key in keys if key in fields) or platform.machine()


def request_tiles() -> bool:
    """Ask the kernel for the tile registers, once for the whole process; whether it agrees."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0


def runs_here(target: Target, flags: frozenset[str] | None = None) -> bool:
    """Whether this machine executes the target's code."""
    flags = cpu_flags() if flags is None else flags
    return flags.issuperset(target.flags) and (not target.amx or request_tiles())


def choose(name: str = "auto") -> Target:
    """The target of a name; "auto" is the first of the table that runs here.  Raises UserError for unknown names."""
    if name == "auto":
        return next(target for target in TARGETS.values() if runs_here(target))
    if name not in TARGETS:
        raise UserError(f"got --target {name}, expected one of auto, {', '.join(TARGETS)}")
    return TARGETS[name]
