"""Time of calls that are to be compared: they take turns, so that a busy machine slows down all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def times_in_turns(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 30, warm_up: int = 3
) -> dict[str, list[float]]:
    """Times of each call in every round, in seconds.

    Args:
        calls: By name; in each round all are timed, one after the other.
        rounds: How often.
        warm_up: Rounds before that, which do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def median_times(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 30, warm_up: int = 3
) -> dict[str, float]:
    """Median time of each call, in seconds; the arguments are those of `times_in_turns`."""
    times = times_in_turns(calls, rounds=rounds, warm_up=warm_up)
    return {name: statistics.median(measured) for name, measured in times.items()}
