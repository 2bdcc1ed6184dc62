"""What the checks of a network came to."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class BrokenPromiseError(AssertionError):
    """A converted network does not keep what anyprec promises."""


@dataclass
class Report:
    """What the checks of one network came to.

    Attributes:
        broken: What went wrong, by the name of the check.
        held: Names of the checks that passed.
        coverage: How many layers are quantized, exempt or skipped, and how many parameters are
            "only read": added, indexed, scaled with.
        reasons: Why layers are not quantized, and how many for each reason.
        functional: How many quantized layers have a weight that is used without calling them, and
            how many are bare parameters of a module.
        macs: MACs of one sample by anyprec's cost model, and by torch's counter.
        alone: How many layers have a gradient only while all others run at their highest bits, by
            bit-width.
        unreached: Layers without a gradient, to which the float network passes none either.
        convert_seconds: Time that `convert` took.
    """

    broken: dict[str, str] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)
    coverage: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    functional: dict[str, int] = field(default_factory=dict)
    macs: tuple[int, int] = (0, 0)
    alone: dict[str, int] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    convert_seconds: float = 0.0

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Run the block as a check: an exception in it is noted as broken, and goes no further.

        Args:
            name: Name of the check.

        Example:
            >>> report = Report()
            >>> with report.check("division"):
            ...     quotient = 1 // 0
            >>> list(report.broken)
            ['division']
        """
        try:
            yield
        except BrokenPromiseError as error:
            self.broken[name] = str(error)
        except Exception as error:  # noqa: BLE001 (any network may raise anything)
            self.broken[name] = _describe(error)
        else:
            self.held.append(name)


def _describe(error: Exception) -> str:
    """The first line of an exception, and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first_line = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {first_line} ({frame.name}:{frame.lineno})"
