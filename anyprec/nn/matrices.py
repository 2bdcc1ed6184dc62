"""Bare parameters as quantized layers.

Examples are `in_proj_weight` of `nn.MultiheadAttention` and the matrices of an LSTM. Such a
parameter has no layer of its own, so one is made for it, which holds the quantizers. The operators
that multiply the parameter run in its holder, which must be an owner (`owners.py`).
"""

from __future__ import annotations

from torch import Tensor, nn

from anyprec.bits import LayerCandidates
from anyprec.nn.channels import Axis
from anyprec.nn.grids import GridRule
from anyprec.nn.layers import QuantizedLayer, add_precision
from anyprec.nn.operators import MATRICES
from anyprec.nn.outputs import OutputQuantizer
from anyprec.nn.weights import LatentWeight


class QuantizedParameter(QuantizedLayer):
    """What quantizes a bare parameter of a module.

    It is a child of that module's `matrices` and holds no copy of the parameter, which keeps its
    name and place.

    Args:
        holder: The module whose parameter it is.
        name: The parameter's name in it.
    """

    def __init__(self, holder: nn.Module, name: str) -> None:
        super().__init__()
        # Past nn.Module.__setattr__, which would make the holder a child of its child.
        vars(self)["_holder"] = holder
        self._name = name

    @property
    def holder(self) -> nn.Module:
        """The module whose parameter it is."""
        return vars(self)["_holder"]  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The parameter."""
        return self.holder.get_parameter(self._name)

    def replace_weight(self, weight: nn.Parameter) -> None:
        """Put another parameter in the place of this one."""
        # By setattr and not into `_parameters`, since an LSTM keeps a list of its weights besides.
        setattr(self.holder, self._name, weight)

    def weight_tensors(self) -> list[Tensor]:
        """The parameter, which this layer does not hold itself."""
        return [self.weight]

    def extra_repr(self) -> str:
        """The parameter's name, for `print(model)`."""
        return self._name


class Matrices(nn.Module):
    """Holds the `QuantizedParameter`s of its parent, by the parameter's name.

    No `nn.ModuleDict`, whose methods are names that parameters have: keys, values.
    """

    def __getitem__(self, name: str) -> QuantizedLayer:
        """What quantizes the parameter of this name."""
        return self.get_submodule(name)  # type: ignore[return-value]


def quantize_parameter(
    holder: nn.Module,
    name: str,
    candidates: LayerCandidates,
    *,
    axis: Axis | None,
    rule: GridRule | None = None,
    trunk: OutputQuantizer | None = None,
) -> None:
    """Make a bare parameter of `holder` a quantized layer, in place.

    It is then the child `matrices.NAME` of `holder`, in floating point until switched; see
    `QuantizedParameter`.

    Args:
        holder: The module that has the parameter.
        name: The parameter's name in it.
        candidates: The bit-widths that it may take.
        axis: Output channels of the parameter, with a step size each; None for one step size.
        rule: What is allowed of the input's grid; None is any.
        trunk: What quantizes the values that it multiplies before it does; None if nothing does.
    """
    layer = QuantizedParameter(holder, name)
    source = LatentWeight(dynamic=False)
    add_precision(layer, candidates, source, nonnegative=False, axis=axis, rule=rule, trunk=trunk)
    matrices = holder._modules.get(MATRICES)  # noqa: SLF001 (past a `__getattr__` of its own)
    if matrices is None:
        matrices = Matrices()
    matrices.add_module(name, layer)
    setattr(holder, MATRICES, matrices.train(holder.training))


def restore_parameters(holder: nn.Module) -> None:
    """Undo every `quantize_parameter` of `holder`."""
    if isinstance(holder._modules.get(MATRICES), Matrices):  # noqa: SLF001 (as above)
        delattr(holder, MATRICES)
