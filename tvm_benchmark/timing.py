"""Times of several engines, taken in turns, so that whatever disturbs the machine disturbs all of them alike."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

# The first runs of a turn are not recorded: caches become this engine's again, and idle threads of the engine before
# spin for some 10 ms.
WARM_SECONDS = 0.03
TURN_SECONDS = 0.1
WARM_RUNS, TURN_RUNS, ROUNDS = 1, 3, 5  # at least


@dataclass(frozen=True)
class Times:
    """Milliseconds of one run over all recorded runs."""

    min_ms: float
    median_ms: float
    p95_ms: float
    runs: int


def interleaved(engines: Sequence[Callable[[], object]], seconds: float, progress: bool = True) -> list[Times]:
    """Run all engines in turns of a few runs, for about ``seconds`` of recorded time each, at least 5 turns.

    Odd rounds go through the engines backwards, so that each one runs after either neighbour.  The first runs of a
    turn are not recorded.
    """
    samples: list[list[float]] = [[] for _ in engines]
    rounds = max(ROUNDS, math.ceil(seconds / TURN_SECONDS))
    forwards = list(zip(engines, samples, strict=True))
    for index in tqdm(range(rounds), desc="timing", unit="round", disable=not progress):
        for engine, recorded in forwards if index % 2 == 0 else reversed(forwards):
            _turn(engine, WARM_SECONDS, WARM_RUNS)
            recorded.extend(_turn(engine, TURN_SECONDS, TURN_RUNS))
    return [_summary(recorded) for recorded in samples]


def _turn(engine: Callable[[], object], seconds: float, runs: int) -> list[float]:
    """Seconds of each run, until both limits are reached."""
    times: list[float] = []
    start = now = time.perf_counter()
    while len(times) < runs or now - start < seconds:
        before = now
        engine()
        now = time.perf_counter()
        times.append(now - before)
    return times


def _summary(seconds: Sequence[float]) -> Times:
    low, median, high = (1e3 * float(x) for x in np.percentile(seconds, (0, 50, 95)))
    return Times(low, median, high, len(seconds))
