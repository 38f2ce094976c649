"""Competitors in turns: short bursts of calls in which nothing else runs.

Only the standard library: a rival in a process of its own times itself by the same file.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

Call = Callable[[], object]
Burst = Callable[[float], float]  # of so many seconds: the median seconds of a call

SECONDS = 0.25
_LOOK, _IDLE, _PATIENCE = 0.01, 0.1, 1.0  # seconds of a look, a share of one core, seconds in all


@dataclass(frozen=True)
class Spread:
    """Seconds a call: the median of the bursts' medians, and their quartiles."""

    median: float
    low: float
    high: float


def burst(call: Call) -> Burst:
    """Calls in a row, for so many seconds but one at least, after one that is not timed.

    That one wakes the threads, and finds the caches as others have left them.
    """

    def run(seconds: float) -> float:
        call()
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            before = time.perf_counter()
            call()
            times.append(time.perf_counter() - before)
        return median(times)

    return run


def in_turns(bursts: Mapping[str, Burst], rounds: int, seconds: float = SECONDS) -> dict[str, Spread]:
    """A burst of each in every round, each round in an order of its own.

    Everybody waits for work as it does by default: threads of OpenMP and of ONNX Runtime spin for some
    milliseconds after a call, which makes the next one faster. So before a burst all have gone to sleep.
    """
    times: dict[str, list[float]] = {name: [] for name in bursts}
    order, shuffle = list(bursts), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            wait_until_idle()
            times[name].append(bursts[name](seconds))
    return {name: _spread(found) for name, found in times.items()}


def wait_until_idle() -> None:
    """Until no thread of this process computes or spins any more; at most a second."""
    end = time.perf_counter() + _PATIENCE
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(_LOOK)
        if time.process_time() - before < _IDLE * _LOOK:
            break


def _spread(times: list[float]) -> Spread:
    low, middle, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Spread(middle, low, high)
