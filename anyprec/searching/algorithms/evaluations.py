"""The record of a search: every configuration that was measured, each once, and when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from anyprec.bits import BitConfig


class Judge(Protocol):
    """What measures configurations."""

    def __call__(self, config: BitConfig) -> float:
        """The loss of a configuration, lower is better."""
        ...

    def set_anchor(self, config: BitConfig) -> None:
        """Expect configurations that differ little from this one. Changes no result."""
        ...


class Stopped(Exception):  # noqa: N818 (no error: a search that was told to stop)
    """The search may measure no more.

    Attributes:
        reason: `"max_evaluations"`, `"max_seconds"` or `"interrupted"`.
    """

    def __init__(self, *, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Evaluations:
    """Measures configurations, each once.

    Args:
        judge: What measures.
        known: Losses measured before, which are not measured again. They count as evaluations once they are asked for, so
            that a search that goes on where it was stopped does what it would have done.
        max_evaluations: At most so many.
        max_seconds: Stop after so long.
        interrupted: Tells whether someone asked for the end.
        agree: Makes several processes agree on the reason to stop, which is empty where there is none.
        on_evaluation: Called with each configuration, its loss, and whether it was measured now.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        known: Mapping[BitConfig, float] | None = None,
        max_evaluations: int | None = None,
        max_seconds: float | None = None,
        interrupted: Callable[[], bool] = bool,
        agree: Callable[[str], str] = str,
        on_evaluation: Callable[[BitConfig, float, bool], None] | None = None,
    ) -> None:
        self._judge = judge
        self._known = known or {}
        self._limit = math.inf if max_evaluations is None else max_evaluations
        self._end = None if max_seconds is None else time.monotonic() + max_seconds
        self._interrupted = interrupted
        self._agree = agree
        self._on_evaluation = on_evaluation
        self._losses: dict[BitConfig, float] = {}

    @property
    def losses(self) -> Mapping[BitConfig, float]:
        """Every configuration that was asked for, in order, with its loss."""
        return self._losses

    def __contains__(self, config: object) -> bool:
        return config in self._losses

    def __len__(self) -> int:
        return len(self._losses)

    def __call__(self, config: BitConfig) -> float:
        """The loss of a configuration; infinite where it is not a finite number.

        Raises:
            Stopped: It was not measured yet, and the evaluations or the time are used up, or it was interrupted.
        """
        if config not in self._losses:
            if len(self._losses) >= self._limit:
                raise Stopped(reason="max_evaluations")
            measured = config not in self._known
            if measured and (reason := self._agree(self._reason())):
                raise Stopped(reason=reason)
            loss = float(self._judge(config) if measured else self._known[config])
            self._losses[config] = loss if math.isfinite(loss) else math.inf
            if self._on_evaluation is not None:
                self._on_evaluation(config, self._losses[config], measured)
        return self._losses[config]

    def _reason(self) -> str:
        if self._interrupted():
            return "interrupted"
        return "max_seconds" if self._end is not None and time.monotonic() >= self._end else ""

    def set_anchor(self, config: BitConfig) -> None:
        """Expect configurations that differ little from this one."""
        self._judge.set_anchor(config)

    def best(self, fits: Callable[[BitConfig], bool]) -> BitConfig | None:
        """The configuration of lowest loss among those that fit; the earlier one of two that are equal."""
        fitting = [config for config in self._losses if fits(config)]
        return min(fitting, key=self._losses.__getitem__, default=None)
