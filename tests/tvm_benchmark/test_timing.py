"""Interleaved timing: order, warm-up, statistics."""

import time

import pytest

from tvm_benchmark import timing
from tvm_benchmark.timing import Times, interleaved


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that engines move by hand: its time in the list's one element."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_minimum_median_and_95th_percentile(clock: list[float]) -> None:
    durations = iter([0.04, *[0.05] * 3] * 4 + [0.04, 0.01, 0.05, 0.45])

    def engine() -> None:
        clock[0] += next(durations)

    (times,) = interleaved([engine], seconds=0.05, progress=False)
    # Five turns of one run for warming up and three that count: fourteen of 50 ms, one of 10 ms, one of 450 ms.
    assert times.runs == 15
    assert times.min_ms == pytest.approx(10)
    assert times.median_ms == pytest.approx(50)
    assert 50 < times.p95_ms <= 450


def test_engines_take_turns_and_change_their_order(clock: list[float]) -> None:
    calls: list[str] = []

    def engine(name: str) -> None:
        clock[0] += 1.0
        calls.append(name)

    first, second = interleaved([lambda: engine("a"), lambda: engine("b")], seconds=0.01, progress=False)
    per_turn = timing.WARM_RUNS + timing.TURN_RUNS
    turns = [calls[i] for i in range(0, len(calls), per_turn)]
    assert turns == list("abbaabbaab")
    assert first == second == Times(1000.0, 1000.0, 1000.0, timing.ROUNDS * timing.TURN_RUNS)


def test_fast_engines_run_as_long_as_asked(clock: list[float]) -> None:
    def engine() -> None:
        clock[0] += 0.001

    (times,) = interleaved([engine], seconds=1.0, progress=False)
    assert times.runs * 0.001 == pytest.approx(1.0, rel=0.05)
