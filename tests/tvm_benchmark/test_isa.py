"""Targets: which of them this machine runs, and how one is chosen."""

from pathlib import Path

import pytest

from tvm_benchmark import isa
from tvm_benchmark.isa import TARGETS, choose, cpu_flags, cpu_name, runs_here
from utils.errors import UserError

CPUINFO = """processor : 0
vendor_id\t: SomeVendor
cpu family\t: 6
model\t\t: 143
model name\t: Some(R) Processor
stepping\t: 8
flags\t\t: fpu avx2 fma avx512f

processor : 1
flags\t\t: fpu
"""


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Path:
    """A file as /proc/cpuinfo."""
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO)
    return path


def test_flags_and_name_are_those_of_the_first_processor(cpuinfo: Path) -> None:
    assert cpu_flags(cpuinfo) == {"fpu", "avx2", "fma", "avx512f"}
    assert cpu_name(cpuinfo) == "SomeVendor-6-143-8"


def test_a_machine_that_tells_nothing_has_no_flags(tmp_path: Path) -> None:
    assert cpu_flags(tmp_path / "absent") == frozenset()
    assert cpu_name(tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.write_text("")
    assert cpu_flags(empty) == frozenset()
    assert cpu_name(empty)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_a_target_runs_where_no_flag_is_missing(target: isa.Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "request_tiles", lambda: True)
    assert runs_here(target, frozenset(target.flags) | {"fpu"})
    for flag in target.flags:
        assert not runs_here(target, frozenset(target.flags) - {flag})


def test_tiles_need_the_kernels_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "request_tiles", lambda: False)
    flags = frozenset(TARGETS["amx"].flags)
    assert not runs_here(TARGETS["amx"], flags)
    assert runs_here(TARGETS["avx512vnni"], flags)


def test_other_systems_have_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not isa.request_tiles()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (frozenset(TARGETS["avx512vnni"].flags) | {"avx2", "fma"}, "avx512vnni"),
        (frozenset({"avx2", "fma", "avx_vnni", "avx512f"}), "avxvnni"),
        (frozenset({"avx2", "fma"}), "avx2"),
        (frozenset(), "portable"),
    ],
)
def test_auto_is_the_first_that_runs(flags: frozenset[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "cpu_flags", lambda: flags)
    assert choose().name == expected


def test_a_name_is_taken_as_it_is() -> None:
    assert choose("avx2") is TARGETS["avx2"]
    with pytest.raises(UserError, match=r"^got --target znver9, expected one of auto, amx, avx512vnni, avxvnni, avx2"):
        choose("znver9")


def test_the_portable_target_runs_everywhere() -> None:
    assert runs_here(TARGETS["portable"], frozenset())
    assert list(TARGETS)[-1] == "portable"
    assert all(name == target.name for name, target in TARGETS.items())


def test_a_target_for_tvm_names_the_processor() -> None:
    described = TARGETS["avx2"].llvm()
    assert described["kind"] == "llvm"
    assert described["mcpu"] == "haswell"
