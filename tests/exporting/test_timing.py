from __future__ import annotations

from anyprec.exporting.timing import median_times


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("file", "float")}
    times = median_times(calls, rounds=2, warm_up=1)
    assert order == ["file", "float"] * 3
    assert list(times) == ["file", "float"]
    assert min(times.values()) >= 0
