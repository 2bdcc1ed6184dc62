"""The record of a search: every configuration that was measured, each once, and when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from anyprec.bits import BitConfig

Evaluate = Callable[[BitConfig], float]
"""The loss of a configuration, lower is better."""


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
        evaluate: What measures.
        set_anchor: Called with a configuration from which those that follow will differ little.
            Changes no result.
        remembered: Losses measured before, which are not measured again. They count as evaluations
            once they are asked for, so that a search that goes on where it was stopped does what it
            would have done.
        max_evaluations: At most so many.
        max_seconds: Stop after so long.
        interrupted: Tells whether someone asked for the end.
        agree: Makes several processes agree on the reason to stop, which is empty if there is none.
        on_evaluation: Called with each configuration, its loss, and whether it was measured now.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        *,
        set_anchor: Callable[[BitConfig], None] | None = None,
        remembered: Mapping[BitConfig, float] | None = None,
        max_evaluations: int | None = None,
        max_seconds: float | None = None,
        interrupted: Callable[[], bool] = bool,
        agree: Callable[[str], str] = str,
        on_evaluation: Callable[[BitConfig, float, bool], None] | None = None,
    ) -> None:
        self._evaluate = evaluate
        self._set_anchor = set_anchor
        self._remembered = remembered or {}
        self._max_evaluations = math.inf if max_evaluations is None else max_evaluations
        self._end = math.inf if max_seconds is None else time.monotonic() + max_seconds
        self._interrupted = interrupted
        self._agree = agree
        self._on_evaluation = on_evaluation
        self._losses: dict[BitConfig, float] = {}
        self._first_unusable: tuple[BitConfig, float] | None = None

    @property
    def first_unusable(self) -> tuple[BitConfig, float] | None:
        """The first configuration whose loss was not finite, with that loss."""
        return self._first_unusable

    @property
    def losses(self) -> Mapping[BitConfig, float]:
        """Every configuration that was asked for, in order, with its loss."""
        return self._losses

    def __len__(self) -> int:
        return len(self._losses)

    def __call__(self, config: BitConfig) -> float:
        """The loss of a configuration; infinite where it is not a finite number.

        Raises:
            Stopped: It was not measured yet, and the evaluations or the time are used up, or it was
                interrupted.
        """
        if config not in self._losses:
            if len(self._losses) >= self._max_evaluations:
                raise Stopped(reason="max_evaluations")
            is_new = config not in self._remembered
            loss = self._measure(config) if is_new else self._remembered[config]
            if not math.isfinite(loss):
                self._first_unusable = self._first_unusable or (config, loss)
                loss = math.inf
            self._losses[config] = loss
            if self._on_evaluation is not None:
                self._on_evaluation(config, loss, is_new)
        return self._losses[config]

    def _measure(self, config: BitConfig) -> float:
        if reason := self._agree(self._reason_to_stop()):
            raise Stopped(reason=reason)
        return float(self._evaluate(config))

    def _reason_to_stop(self) -> str:
        if self._interrupted():
            return "interrupted"
        if self._end < math.inf and time.monotonic() >= self._end:
            return "max_seconds"
        return ""

    def set_anchor(self, config: BitConfig) -> None:
        """Expect configurations that differ little from this one."""
        if self._set_anchor is not None:
            self._set_anchor(config)

    def best(self, fits: Callable[[BitConfig], bool]) -> BitConfig | None:
        """The configuration of lowest loss among those that fit; the earliest of equal ones."""
        fitting = [config for config in self._losses if fits(config)]
        return min(fitting, key=self._losses.__getitem__, default=None)
