"""Weight and input quantizers: the step sizes of one layer, one entry (or row) per candidate.

All step sizes exist after `__init__`; how they are estimated from data is in `calibration/`, the
rounding itself in `functional.py`. Step sizes are those of LSQ (Esser et al., ICLR 2020), with
gradients of a scale of our own above 2 bits (`gradient_scale`); zero points follow LSQ+ (Bhalgat et
al., CVPR 2020), but are integers fixed by calibration, so that real zero (padding, ReLU) is always
a code.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from anyprec.errors import CalibrationError
from anyprec.kernels import Grid
from anyprec.nn.channels import GroupedAxis, rows_of_channels
from anyprec.nn.functional import (
    STEP_FLOOR,
    effective_step,
    fake_quantize,
    fake_quantize_with,
    integer_codes,
)
from anyprec.nn.grids import GridRule, middle
from anyprec.nn.powers import power_of_two_step
from anyprec.nn.precision import FullPrecision
from anyprec.nn.undecayed import Undecayed

Number = TypeVar("Number", float, Tensor)


def gradient_scale(values: int, largest: Number, spans: Number) -> Number:
    """Factor on the gradient of a step size.

    LSQ scales by `1 / sqrt(values x largest)` (Esser et al. 2020, section 2.2), which suits step
    sizes that shrink with the square root of the largest code. Those of least squared error shrink
    with the code itself: at 8 bits one optimizer step can then move them by many times their size,
    and the layer is lost. Here it is the range `step x spans` that learns, at every bit-width about
    as fast as LSQ has it at 2 bits: its gradient is that of the step size over `spans`, and the
    step size follows it over `spans` again.

    Args:
        values: That one step size quantizes: weights, or features of one image.
        largest: Magnitude of a code, at most.
        spans: Steps between the lowest and the highest code, `2^b - 1`.
    """
    # `largest` grows with `spans`: two powers of it, all told.
    scale: Number = (values * largest) ** -0.5 * (3 / spans) ** 1.5
    return scale


class _Switchable(FullPrecision, Undecayed):
    """A quantizer of several candidates. Its layer knows the active one.

    That is so because the views of a network share its quantizers, whatever precision each has.

    Attributes:
        candidates: Bit-widths, ascending.
        widths: The candidates as a tensor.
    """

    widths: Tensor

    def __init__(self, candidates: tuple[int, ...]) -> None:
        super().__init__()
        self.candidates = candidates
        self.register_buffer("widths", torch.tensor(candidates), persistent=False)

    def restore_constants(self) -> None:
        """Write the candidates again, after the quantizer got memory of its own."""
        self.widths.copy_(torch.tensor(self.candidates))

    def _top(self, choice: Tensor) -> Tensor:
        """`2^b` of a candidate, shape `(1,)`."""
        return torch.exp2(self.widths.index_select(0, choice).float())


class WeightQuantizer(_Switchable):
    """Symmetric quantizer of one weight, with step sizes for every candidate bit-width.

    The grid of b bits is `[-2^(b-1), 2^(b-1) - 1]`.

    Args:
        candidates: Bit-widths, ascending.
        channels: Number of output channels for per-channel step sizes, or None for per-tensor ones.
        axis: Where the output channels of the weight are.

    Attributes:
        step: Learned step sizes, shape `(len(candidates), channels or 1)`.
    """

    def __init__(
        self, candidates: tuple[int, ...], *, channels: int | None, axis: int | GroupedAxis = 0
    ) -> None:
        super().__init__(candidates)
        self.axis = None if channels is None else axis
        self.step = unknown_steps(len(candidates), channels or 1)

    def limits(self, index: int) -> tuple[int, int]:
        """Lowest and highest code of the candidate at `index`."""
        half = 2 ** (self.candidates[index] - 1)
        return -half, half - 1

    def forward(self, weight: Tensor, index: int) -> Tensor:  # type: ignore[override]  # its base is a norm by name only
        """Fake-quantize `weight` at a candidate; differentiable in both weight and step size."""
        step = self.step
        row, qmin, qmax, factor = self._grid_of(weight, index)
        return fake_quantize(
            weight, step, row=row, qmin=qmin, qmax=qmax, axis=self.axis, gradient_scale=factor
        )

    def _grid_of(self, weight: Tensor, index: int) -> Grid:
        """How `forward` quantizes."""
        return _grid(index, *self.limits(index), _sharing(weight, self.step))

    def forward_selected(self, weight: Tensor, choice: Tensor) -> Tensor:
        """`forward` at the candidate of the index `choice`, which is data and not program."""
        half = self._top(choice) / 2
        return fake_quantize_with(
            weight,
            self.step.index_select(0, choice).squeeze(0),
            qmin=-half,
            qmax=half - 1,
            axis=self.axis,
            gradient_scale=gradient_scale(_sharing(weight, self.step), half - 1, 2 * half - 1),
        )

    def codes(self, weight: Tensor, index: int) -> Tensor:
        """Integer codes of `weight` at the candidate at `index`, int32, in its shape."""
        qmin, qmax = self.limits(index)
        return integer_codes(weight, self.step[index], qmin=qmin, qmax=qmax, axis=self.axis)

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """Set start values from the weight alone: `2 mean|w| / sqrt(qmax)` (LSQ, section 2.1)."""
        if weight.is_meta:
            return  # there are no values; torch would only spend time on shapes
        magnitude = self.per_channel(weight.float().abs()).mean(dim=1)
        for index in range(len(self.candidates)):
            qmax = self.limits(index)[1]
            self.step[index] = usable_steps(2 * magnitude / math.sqrt(qmax), weight)

    def per_channel(self, weight: Tensor) -> Tensor:
        """`weight` as a matrix with a row per step size, shape `(channels or 1, rest)`."""
        if self.axis is None:
            return weight.reshape(1, -1)
        return rows_of_channels(weight, self.axis)

    def extra_repr(self) -> str:
        """Candidates and granularity, for `print(model)`."""
        granularity = "per tensor" if self.axis is None else "per channel"
        return f"bits={self.candidates}, {granularity}"


class InputQuantizer(_Switchable):
    """Per-tensor quantizer of a layer's input: a step size and a zero point for every candidate.

    The grid of b bits is `[-z, 2^b - 1 - z]` with the integer zero point z: 0 for inputs that
    cannot be negative, `2^(b-1)` for symmetric ones, anything between for lopsided ones (SiLU,
    GELU, hard-swish). A rule may allow only some of these grids, since not every target has all.

    Args:
        candidates: Bit-widths, ascending.
        nonnegative: The input is known to be never negative, so the zero point is 0 where the rule
            allows it.
        rule: Which zero points and step sizes are allowed.

    Attributes:
        step: Learned step sizes, shape `(len(own_candidates),)`; NaN until calibrated. What they
            are used as is said by `step_in_use`.
        zero_point: Integer zero points, shape `(len(own_candidates),)`.
        calibrated: Whether step sizes have been set.
    """

    zero_point: Tensor
    # Nobody but the layer's operator sees the result.
    _keeps_result: bool = True

    def __init__(
        self, candidates: tuple[int, ...], *, nonnegative: bool, rule: GridRule | None = None
    ) -> None:
        super().__init__(candidates)
        self.nonnegative = nonnegative
        self.rule = GridRule() if rule is None else rule
        self.calibrated = False
        own = self.own_candidates
        self.step = unknown_steps(len(own))
        start = [self.rule.start(bits, nonnegative=nonnegative) for bits in own]
        self.register_buffer("zero_point", torch.tensor(start, dtype=torch.int32))
        # The same as Python numbers: reading the buffer would stall a GPU.
        self._zero_points = tuple(start)

    @property
    def own_candidates(self) -> tuple[int, ...]:
        """The candidates with a step size of this quantizer: all, unless a grid is shared."""
        return self.candidates

    def grid(self, index: int) -> tuple[Tensor, int]:
        """Step size, shape `()`, and zero point of the candidate at `index`.

        The step size is differentiable, and a power of two where the rule demands one.
        """
        return self._ruled(self.step[index]), self._zero_points[index]

    @property
    def kind(self) -> str:
        """`"unsigned"`, `"signed"` or `"affine"`, which the zero points determine."""
        if not any(self._zero_points):
            return "unsigned"
        if self._zero_points == tuple(map(middle, self.own_candidates)):
            return "signed"
        return "affine"

    @property
    def zero_points(self) -> tuple[int, ...]:
        """The zero points as Python numbers."""
        return self._zero_points

    def limits(self, index: int) -> tuple[int, int]:
        """Lowest and highest code at a candidate, less the zero point."""
        zero = self._zero_points[index]
        return -zero, 2 ** self.candidates[index] - 1 - zero

    def forward(self, values: Tensor, index: int) -> Tensor:  # type: ignore[override]  # as above
        """Fake-quantize `values` at a candidate; differentiable in both values and step size."""
        step, row = self._step_and_row(index)
        _, qmin, qmax, factor = self._grid_of(values, index)
        return fake_quantize(
            values,
            step,
            row=row,
            qmin=qmin,
            qmax=qmax,
            gradient_scale=factor,
            keep_result=self._keeps_result,
        )

    def _grid_of(self, values: Tensor, index: int) -> Grid:
        """How `forward` quantizes, with entry `index` of `step` unless the rule changes that."""
        return _input_grid(index, *self.limits(index), _features(values))

    def _uses_step(self, index: int) -> bool:
        """Whether `forward` is to quantize with entry `index` of `step`, and nothing else."""
        del index
        return self.rule.scale != "power-of-two" and self._keeps_result

    def forward_selected(self, values: Tensor, choice: Tensor) -> Tensor:
        """`forward` at the candidate of the index `choice`, which is data and not program."""
        top = self._top(choice)
        zero = self.zero_point.index_select(0, choice).float()
        qmax = top - 1 - zero
        largest = torch.maximum(qmax, zero).clamp_min(1)
        return fake_quantize_with(
            values,
            self._ruled(self.step.index_select(0, choice)),
            qmin=-zero,
            qmax=qmax,
            axis=None,
            gradient_scale=gradient_scale(_features(values), largest, top - 1),
        )

    def step_in_use(self, index: int) -> Tensor:
        """The step size at a candidate as inputs are quantized with it, without gradient.

        It is positive, and a power of two where the rule demands one: read it, and not `step`, to
        compute or to export what the network computes.

        Shape:
            The result is `()`.
        """
        return effective_step(self.grid(index)[0].detach())

    @torch.no_grad()
    def set_grid(self, steps: Tensor, zero_points: Tensor) -> None:
        """Take over calibrated step sizes and zero points, one for each own candidate.

        Raises:
            CalibrationError: The rule does not allow a zero point; nothing is changed.
        """
        problem = self._problem_of(zero_points)
        if problem is not None:
            raise CalibrationError(problem)
        self.step.copy_(steps)
        self.zero_point.copy_(zero_points)
        self._refresh()

    @torch.no_grad()
    def forget(self) -> None:
        """Go back to the state before calibration."""
        self.step.fill_(math.nan)
        self.calibrated = False

    def extra_repr(self) -> str:
        """Candidates and kind, for `print(model)`."""
        suffix = "" if self.calibrated else ", not calibrated"
        return f"bits={self.candidates}, {self.kind}{suffix}"

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        loaded = state_dict.get(f"{prefix}zero_point")
        problem = None
        # torch reports another shape itself.
        if isinstance(loaded, Tensor) and loaded.shape == self.zero_point.shape:
            problem = self._problem_of(loaded)
        if problem is None:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            self._refresh()
        else:
            error_messages: list[str] = args[-1]
            error_messages.append(f"{prefix}zero_point: {problem}")

    def _ruled(self, step: Tensor) -> Tensor:
        """Step sizes as the rule has them, differentiable."""
        return power_of_two_step(step) if self.rule.scale == "power-of-two" else step

    def _step_and_row(self, index: int) -> tuple[Tensor, int | None]:
        """The step size at a candidate, as `fake_quantize` takes it: all of them and a row."""
        if self.rule.scale == "power-of-two":
            return power_of_two_step(self.step[index]), None
        return self.step, index

    def _problem_of(self, zero_points: Tensor) -> str | None:
        """Why the rule does not allow these zero points; None if it does."""
        if zero_points.is_meta:
            return None
        return self.rule.problem(zero_points.tolist(), self.own_candidates)

    def _refresh(self) -> None:
        if not self.zero_point.is_meta:
            self._zero_points = tuple(int(zero) for zero in self.zero_point.tolist())
            self.calibrated = bool(torch.isfinite(self.step).all())


@lru_cache(maxsize=4096)
def _grid(index: int, qmin: int, qmax: int, values: int) -> Grid:
    """The grid of a weight, of so many values to a step size."""
    return Grid(index, qmin, qmax, gradient_scale(values, qmax, qmax - qmin))


@lru_cache(maxsize=4096)
def _input_grid(index: int, qmin: int, qmax: int, values: int) -> Grid:
    """The grid of an input, of so many values to an image."""
    return Grid(index, qmin, qmax, gradient_scale(values, max(qmax, -qmin, 1), qmax - qmin))


def _sharing(weight: Tensor, step: Tensor) -> int:
    """Number of weights that share a step size; at least 1."""
    return max(1, weight.numel() // max(1, step.shape[1]))


def _features(values: Tensor) -> int:
    """Number of values of one image, of a batch with any number of them; at least 1."""
    count = values.numel()
    if values.ndim > 1:
        # A batch without images has features, too.
        count = count // values.shape[0] if count else math.prod(values.shape[1:])
    return max(1, count)


def unknown_steps(*shape: int) -> nn.Parameter:
    """Step sizes that are not calibrated, in float32 at least."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return nn.Parameter(torch.full(shape, math.nan, dtype=dtype))


def usable_steps(steps: Tensor, weight: Tensor) -> Tensor:
    """Step sizes with those of dead (all-zero) channels replaced, so that these can still learn.

    A dead channel takes the mean of the living ones; a dead layer takes the standard deviation that
    a He-initialised weight of its fan-in would have.
    """
    dead = steps <= STEP_FLOOR
    living = (~dead).sum()
    fan_in = max(1, math.prod(weight.shape[1:]))
    mean = torch.where(dead, 0, steps).sum() / living.clamp_min(1)
    # No branch on the values: they may be on a device that answers late, or on the meta device.
    fill = torch.where(living > 0, mean, math.sqrt(2 / fan_in)).to(steps.dtype)
    return torch.where(dead, fill, steps)
