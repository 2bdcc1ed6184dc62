"""Which values between layers can have a quantizer of their own, and who reads them.

A runtime that computes with integers throughout needs the outputs of layers, sums of two
activations and averages over space on a grid of 8 bits, each behind the norm and the clamp that
follow it with no other reader in between. All of it is read off one observed forward pass; values
are followed in `trail.py`. Which of them get a quantizer is decided in `anyprec.model.placement`.

How the converted network finds such a value again: the module whose forward makes it, the function
that returns it, and how many calls of this function come before in one call of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from anyprec.network.flow import tensors_anywhere
from anyprec.network.output_search import Frame, Function, Outputs, OutputSearch
from anyprec.network.trail import Trail
from anyprec.network.values import ValueTracker, fills_its_storage
from anyprec.nn.counting import CLAMPS, POOLINGS, SUMS, counted_name
from anyprec.nn.operators import tensors_in


class OutputTracker:
    """Watches values between layers during one forward pass.

    Args:
        model: The network.
        values: What is known of every value; must be active during the pass.
    """

    def __init__(self, model: nn.Module, values: ValueTracker) -> None:
        self._values = values
        self._trail = Trail()
        values.listener = self._trail.operation_ran
        self._modules = dict(model.named_modules())
        self._calls: dict[str, int] = {}
        self._frames: list[Frame] = []
        self._functions: list[Function] = []
        self._bodies = 0

    def module_starts(self, path: str, module: nn.Module) -> None:
        """Note that a module is called."""
        self._calls[path] = self._calls.get(path, 0) + 1
        self._frames.append(Frame(path, module))

    def module_ends(self) -> None:
        """Note that the innermost module ends."""
        self._frames.pop()

    def body_starts(self) -> None:
        """Note that a function is run operator by operator, which others see as one."""
        self._bodies += 1

    def body_ends(self) -> None:
        """Note the end of that."""
        self._bodies -= 1

    def function_starts(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note that a function is called."""
        name = None if self._bodies or not self._frames else counted_name(func, args, kwargs)
        function = Function(name, tuple(self._frames))
        tensors = list(tensors_in((*args, *kwargs.values())))
        if name is not None and tensors:
            function.input = self._trail.number(tensors[0])
            function.is_sum = name in SUMS and self._adds(tensors, kwargs)
            function.is_average = name in POOLINGS and _is_over_space(name, args, kwargs)
            function.has_limits = name in CLAMPS and len(tensors) == 1
        self._trail.function = len(self._functions)
        self._functions.append(function)

    def layer_ran(self, path: str, input_: Tensor) -> None:
        """Note that the function that runs is the operator of a layer."""
        function = self._functions[-1]
        function.layer, function.layer_input = path, self._trail.number(input_)

    def function_ends(self, args: tuple[Any, ...], result: Any) -> Any:
        """Note what the function returned.

        Returns:
            The result, under another name if it is an argument that was changed in place.
        """
        function = self._functions[-1]
        self._trail.function = None
        if not isinstance(result, Tensor) or function.name is None:
            return result
        is_fit = result.is_floating_point() and fills_its_storage(result)
        if is_fit and self._values.varies(result):
            function.result = self._trail.number(result)
            function.nonnegative = self._values.is_nonnegative(result)
        if args and result is args[0]:
            return self._trail.renamed(result)
        return result

    def finish(self, output: object) -> Outputs:
        """The values, once the network has returned `output` and is no longer watched.

        Raises:
            ConversionError: One of them is read under the name that it had before an operation in
                place.
        """
        last = {self._trail.number(tensor) for tensor in tensors_anywhere(output)}
        return OutputSearch(
            self._functions, self._trail, self._calls, self._modules, last
        ).outputs()

    def _adds(self, tensors: list[Tensor], kwargs: Mapping[str, Any]) -> bool:
        """Whether two activations are added as they are."""
        return kwargs.get("alpha", 1) == 1 and all(map(self._values.varies, tensors))


def _is_over_space(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an average is one over the axes of space, for each channel by itself."""
    if name != "mean":
        return True
    dims = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    if dims is None or not args:
        return False
    number = args[0].ndim
    axes = {axis % number for axis in ((dims,) if isinstance(dims, int) else tuple(dims))}
    # Channels stand first or last. Tokens have one axis of space, before that of their channels.
    channels_first, channels_last = set(range(2, number)), set(range(1, number - 1))
    return axes == channels_last or (number > 3 and axes == channels_first)
