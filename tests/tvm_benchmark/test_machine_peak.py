"""The kernels that measure the machine's peak really do the multiply-adds that are counted."""

import pytest

pytest.importorskip("tvm")

import tvm

from tvm_benchmark import machine_peak
from tvm_benchmark.isa import TARGETS, runs_here
from tvm_benchmark.machine_peak import METHODS, TURNS, Method

pytestmark = pytest.mark.tvm


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.target)
def test_kernel_does_the_operations_that_are_counted(method: Method) -> None:
    if not runs_here(TARGETS[method.target]):
        pytest.skip(f"this CPU does not run {method.target}")
    tensors = [tvm.runtime.tensor(array) for array in machine_peak._buffers(method)]
    machine_peak.build(method)(*tensors)
    # All operands are 1, so the accumulators add up to the number of multiply-adds.
    sums = tensors[2].numpy()
    assert int(sums.astype("int64").sum()) == TURNS * method.accumulators * method.macs
    assert (sums == sums[0]).all()


def test_every_target_has_a_method() -> None:
    assert [method.target for method in METHODS] == list(TARGETS)


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_peak, "METHODS", METHODS[-1:])
    monkeypatch.setattr(machine_peak, "REPEATS", 2)
    assert machine_peak.main(["--threads", "1", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["portable", "1", "thread"], ["portable", "2", "threads"]]
    assert all(float(line.split()[3]) > 0 for line in lines)
