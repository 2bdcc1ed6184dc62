"""The weights of a network: the row of its coverage that each of them belongs to.

Weights are all parameters of two or more axes.

A Conv or Linear layer is a row, with its weight or all that its weight is made from. Any other
parameter is a row of its own, `HOLDER.matrices.NAME`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from anyprec.nn.operators import LAYER_TYPES, matrix_path


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every Conv and Linear layer."""
    for path, module in model.named_modules():
        if isinstance(module, LAYER_TYPES):
            yield path, module


class Weights:
    """Finds the weight that a tensor is, or is a view of.

    Attributes:
        parameters: Path of each bare parameter as a layer (`HOLDER.matrices.NAME`) to its path as a
            parameter (`HOLDER.NAME`).
        rows: Path of a row with a parameter of it, for every parameter of two or more axes.
    """

    def __init__(self, model: nn.Module) -> None:
        # By id, with the tensor itself: a parametrized weight is made on each access, and a tensor
        # that nothing holds would leave its id to another one.
        self._weights: dict[int, tuple[str, Tensor]] = {}
        self.parameters: dict[str, str] = {}
        self.rows: list[tuple[str, Tensor]] = []
        factors: set[int] = set()
        for path, layer in named_layers(model):
            weight: Tensor = layer.weight  # type: ignore[assignment]
            self._weights[id(weight)] = path, weight
            for factor in _factors(layer):
                factors.add(id(factor))
                self.rows.append((path, factor))
        for name, parameter in model.named_parameters():
            if id(parameter) in factors or is_lazy(parameter) or parameter.ndim < 2:
                continue
            path = matrix_path(name)
            self._weights[id(parameter)] = path, parameter
            self.parameters[path] = name
            self.rows.append((path, parameter))

    def find(self, operand: Tensor) -> tuple[str, Tensor] | None:
        """Path and tensor of the weight that `operand` is, or is a view of."""
        for tensor in (operand, operand._base):  # noqa: SLF001 (torch has no public name for it)
            if tensor is not None and id(tensor) in self._weights:
                return self._weights[id(tensor)]
        return None


def _factors(layer: nn.Module) -> Iterator[Tensor]:
    """The parameters that the weight of a Conv or Linear layer is made from: itself, as a rule."""
    if parametrize.is_parametrized(layer, "weight"):
        parametrizations: nn.ModuleDict = layer.parametrizations  # type: ignore[assignment]
        yield from parametrizations["weight"].parameters()
        return
    own = dict(layer.named_parameters(recurse=False))
    if "weight" in own:
        yield own["weight"]
        return
    # Before parametrizations, torch's weight_norm and spectral_norm made the weight in a hook, from
    # `weight_g` and `weight_v`, or from `weight_orig`.
    for name, parameter in own.items():
        if name.startswith("weight_"):
            yield parameter
