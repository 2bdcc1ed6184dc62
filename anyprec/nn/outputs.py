"""8-bit quantizers of values between layers, for runtimes that compute with integers throughout.

With `convert(placement="integer")` the outputs of convolutions and Linear layers, sums of two
activations and averages over space are quantized, too, each behind the norm and the clamp that
follow it. The module in whose forward such a value is made is given a derived class (see
`specialize.py`), whose forward runs the original one and quantizes what the right calls return.

Which values these are is found in `network/outputs.py`. How calls are told apart is in
`counting.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anyprec.errors import ConversionError
from anyprec.nn.backward import BackwardGuard, follow_precision
from anyprec.nn.counting import CountingMode, counted_name, uncounted
from anyprec.nn.grids import GridRule
from anyprec.nn.observers import Observers
from anyprec.nn.quantizers import InputQuantizer
from anyprec.nn.specialize import Specialized, despecialize, specialize

OUTPUTS = "output_quantizers"
"""Child of a module that holds the quantizers of values that are made in it."""

OUTPUT_BITS = 8
"""The one bit-width of these values."""


def output_prefix(holder: str) -> str:
    """What the names of all tensors begin with that output quantizers add to a module."""
    return f"{holder}.{OUTPUTS}." if holder else f"{OUTPUTS}."


class OutputQuantizer(InputQuantizer):
    """Quantizer of a value between layers: one candidate of 8 bits.

    Args:
        nonnegative: The value is known to be never negative.
        rule: Which zero points and step sizes are allowed; None is any.

    Attributes:
        observers: Called with the value before it is quantized, in floating point, too.
    """

    first: Tensor
    # The network may go on in place.
    _keeps_result = False

    def __init__(self, *, nonnegative: bool, rule: GridRule | None = None) -> None:
        super().__init__((OUTPUT_BITS,), nonnegative=nonnegative, rule=rule)
        self.observers = Observers()
        self.register_buffer("first", torch.zeros(1, dtype=torch.int64), persistent=False)

    def forward(self, values: Tensor, index: int = 0) -> Tensor:
        """Fake-quantize `values`; differentiable in both values and step size."""
        if torch.compiler.is_compiling():
            return self.forward_selected(values, self.first)
        return super().forward(values, index)


class OutputQuantizers(nn.Module):
    """Holds the `OutputQuantizer`s of its parent, by number.

    No `nn.ModuleList`, since the numbers may have gaps.
    """


@dataclass(frozen=True)
class OutputPoint:
    """A call of a function in the forward of a module, whose result is quantized.

    Attributes:
        function: What is called, by `counted_name`.
        index: How many of these calls come before, inside one call of the module.
        counts: How many there are in all, in each call of the module that was observed.
        quantizer: Path of the quantizer from the module.
    """

    function: str
    index: int
    counts: tuple[int, ...]
    quantizer: str


class OutputOwner(Specialized):
    """Mixin of a module in whose forward values are made that are quantized.

    One without any only keeps its calls apart from those of the modules around it.

    Attributes:
        output_points: The calls that make them.
    """

    class_prefix: ClassVar[str] = "Placed"

    _anyprec_added: ClassVar[tuple[str, ...]] = (
        "output_points",
        "_quantizes_outputs",
        "backward_guard",
        OUTPUTS,
    )

    output_points: tuple[OutputPoint, ...]
    backward_guard: BackwardGuard | None = None
    # Compiled networks read it: true at whatever bits.
    _quantizes_outputs: bool

    @property
    def quantizes_outputs(self) -> bool:
        """Whether the outputs are quantized at present."""
        return self._quantizes_outputs

    def switch_outputs(self, *, active: bool) -> None:
        """Quantize the outputs, or leave them in floating point."""
        # Past nn.Module.__setattr__, as layers do.
        vars(self)["_quantizes_outputs"] = active

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, with the results of those calls quantized.

        Raises:
            ConversionError: It makes other calls than when the network was converted.
        """
        follow_precision(self)
        quantizers: dict[OutputPoint, OutputQuantizer] = {}
        for point in self.output_points:
            quantizers[point] = self.get_submodule(point.quantizer)  # type: ignore[assignment]
        is_observed = any(bool(quantizer.observers) for quantizer in quantizers.values())
        with uncounted():
            if self._quantizes_outputs or is_observed:
                result = self._forward_with(quantizers, args, kwargs)
            else:
                result = super().forward(*args, **kwargs)
        return result

    def _forward_with(
        self,
        quantizers: dict[OutputPoint, OutputQuantizer],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The original forward, while these watch it."""
        # A function of its own: the compiler takes no block inside another one.
        mode = _OutputMode(self, quantizers)
        with mode:
            result = super().forward(*args, **kwargs)
        mode.require_all_calls()
        return result


class _OutputMode(CountingMode):
    """Quantizes the results of some calls during one call of an owner.

    Args:
        owner: The owner.
        quantizers: Those of its points.
    """

    def __init__(self, owner: OutputOwner, quantizers: dict[OutputPoint, OutputQuantizer]) -> None:
        super().__init__()
        self._kind = owner.original_class.__name__
        self._is_active = owner.quantizes_outputs
        self._counts: dict[str, int] = {}
        self._expected: dict[str, tuple[int, ...]] = {}
        self._quantizers: dict[tuple[str, int], OutputQuantizer] = {}
        for point, quantizer in quantizers.items():
            self._counts[point.function] = 0
            self._expected[point.function] = point.counts
            self._quantizers[point.function, point.index] = quantizer

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call, quantized if it is one of those."""
        result = func(*args, **kwargs)
        name = counted_name(func, args, kwargs)
        if self.pauses or name is None or name not in self._counts:
            return result
        number = self._counts[name]
        self._counts[name] = number + 1
        if number >= max(self._expected[name]):
            self._refuse(name)
        quantizer = self._quantizers.get((name, number))
        if quantizer is None or not result.is_floating_point():
            return result
        if quantizer.observers:
            quantizer.observers.notify(result)
        return quantizer(result, 0) if self._is_active else result

    def require_all_calls(self) -> None:
        """Refuse a forward that made fewer calls than it was observed to make.

        Raises:
            ConversionError: It did.
        """
        for name, count in self._counts.items():
            if count not in self._expected[name]:
                self._refuse(name)

    def _refuse(self, name: str) -> None:
        expected = " or ".join(map(str, self._expected[name]))
        msg = f"{self._kind} calls {name!r} {self._counts[name]} times or more in this forward "
        msg += f"pass, but {expected} times when the network was converted, so it is not known "
        msg += "which values are to be quantized: convert it on an example_input that takes the "
        msg += "same way through its forward, set hooks that compute before that, or convert it "
        msg += 'with placement="layers"'
        raise ConversionError(msg)


def add_output_quantizer(
    holder: nn.Module,
    name: str,
    *,
    nonnegative: bool,
    device: torch.device,
    rule: GridRule | None = None,
) -> OutputQuantizer:
    """Make a quantizer the child `output_quantizers.NAME` of `holder`, in place.

    Args:
        holder: Any module.
        name: Its number.
        nonnegative: The value that it quantizes is never negative.
        device: Where it is to be.
        rule: What is allowed of its grid; None is any.
    """
    quantizers = holder._modules.get(OUTPUTS)  # noqa: SLF001 (past a `__getattr__` of its own)
    if quantizers is None:
        quantizers = OutputQuantizers()
        holder.add_module(OUTPUTS, quantizers)
    quantizer = OutputQuantizer(nonnegative=nonnegative, rule=rule).to(device)
    quantizers.add_module(name, quantizer)
    quantizers.train(holder.training)
    return quantizer


def own_outputs(owner: nn.Module, points: tuple[OutputPoint, ...]) -> None:
    """Turn a module into an `OutputOwner`, in place, in floating point until switched."""
    specialize(owner, OutputOwner)
    vars(owner).update(output_points=points, _quantizes_outputs=False)


def restore_outputs(model: nn.Module) -> None:
    """Undo every `own_outputs` and `add_output_quantizer` in a network."""
    for module in list(model.modules()):
        if isinstance(module, OutputOwner):
            for name in ("output_points", "_quantizes_outputs", "backward_guard"):
                vars(module).pop(name, None)
            despecialize(module)
        if isinstance(module._modules.get(OUTPUTS), OutputQuantizers):  # noqa: SLF001 (as above)
            delattr(module, OUTPUTS)
