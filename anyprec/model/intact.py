"""Whether a converted network still has every layer and norm that conversion made, at its path.

What takes the place of one afterwards (a merged branch, a SyncBatchNorm, a frozen norm) knows no
precision: it would run as the float network does while low bits are set, without a word. So
whoever reads or switches layers and norms asks here, and so does every call of the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from anyprec.errors import ConversionError
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norms import SwitchableNorm
from anyprec.nn.outputs import OutputOwner, OutputQuantizer
from anyprec.nn.owners import FunctionalOwner

if TYPE_CHECKING:
    from anyprec.model.converted import ConvertedModel
    from anyprec.model.record import ConversionRecord
    from anyprec.model.switchboard import Switchboard

_Part = TypeVar(
    "_Part", QuantizedLayer, SwitchableNorm, FunctionalOwner, OutputOwner, OutputQuantizer
)

_Slot = tuple[dict[str, Any], str, nn.Module]
"""Children of a module, the name of one, and the module that it was."""


@dataclass(frozen=True, eq=False)
class Parts:
    """The layers and norms of a network, as they were when the network was last looked through.

    Attributes:
        layers: Every quantized layer by path, in network order.
        norms: Every switchable norm by path.
        outputs: Every output quantizer by path.
        owners: The modules that let them quantize, by path.
        record: The record that names them.
        root: The children of the network itself.
        slots: Where each of them stands, and all modules around it.
    """

    layers: dict[str, QuantizedLayer]
    norms: dict[str, SwitchableNorm]
    outputs: dict[str, OutputQuantizer]
    owners: dict[str, OutputOwner]
    record: ConversionRecord
    root: dict[str, Any]
    slots: list[_Slot] = field(repr=False)

    def are_those_of(self, model: ConvertedModel) -> bool:
        """Whether `model` has these very modules at their paths."""
        # This runs in each call of a network: 40 ns for each module.
        if self.root is not model._modules or self.record is not model.anyprec_record:  # noqa: SLF001
            return False
        for children, name, module in self.slots:  # noqa: SIM110 (`all` would take twice as long)
            if children.get(name) is not module:
                return False
        return True


class Structure:
    """Remembers the parts of one network, and their switches; a copy of it remembers none."""

    def __init__(self) -> None:
        self.parts: Parts | None = None
        self.switchboard: Switchboard | None = None

    def __reduce__(self) -> tuple[type[Structure], tuple[()]]:
        """Copy and pickle as a new one."""
        return Structure, ()


def parts_of(model: ConvertedModel) -> Parts:
    """The quantized layers, switchable norms and output quantizers of a converted network.

    Raises:
        ConversionError: One of them was replaced or removed after conversion.
    """
    structure = model.anyprec_structure
    parts = structure.parts
    if parts is None or not parts.are_those_of(model):
        structure.parts = None
        parts = structure.parts = _look_through(model)
    return parts


def switchable_norms(model: ConvertedModel) -> Iterator[tuple[str, SwitchableNorm]]:
    """Path and module of every switchable norm.

    Raises:
        ConversionError: as `parts_of`.
    """
    yield from parts_of(model).norms.items()


def output_quantizers(model: ConvertedModel) -> dict[str, OutputQuantizer]:
    """The quantizers of values between layers, by path; none unless `placement="integer"`.

    Raises:
        ConversionError: as `parts_of`.
    """
    return dict(parts_of(model).outputs)


def outputs_of(model: ConvertedModel) -> dict[str, OutputQuantizer]:
    """As `output_quantizers`, of a network whose layers and norms may be others by now.

    Raises:
        ConversionError: A quantizer, or the module that uses it, was replaced or removed.
    """
    return _outputs(model)[0]


def require_intact(model: ConvertedModel) -> None:
    """Refuse to run a network at a precision that some of its parts have lost.

    In floating point it may run, since then it does what the float network would do.

    Raises:
        ConversionError: as `parts_of`, and a precision is set.
    """
    try:
        parts_of(model)
    except ConversionError:
        if _has_precision(model):
            raise


def submodule_or_none(model: nn.Module, path: str) -> nn.Module | None:
    """The module at `path`, or None if there is none."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        if module is not None:
            # `get_submodule` would take most of the time of a look through the network.
            module = module._modules.get(name)  # noqa: SLF001
    return module


_REMEDY_FOR_LAYERS = (
    "merge branches and replace layers before anyprec.convert, or use the model's reset_classifier"
)

_REMEDY_FOR_NORMS = (
    "convert norms (SyncBatchNorm, frozen norms) and merge branches before anyprec.convert"
)


def _look_through(model: ConvertedModel) -> Parts:
    record = model.anyprec_record
    layers: dict[str, QuantizedLayer] = {}
    norms: dict[str, SwitchableNorm] = {}
    slots: dict[tuple[int, str], _Slot] = {}
    for path in record.quantized:
        layers[path] = _required(
            model, path, QuantizedLayer, noun="layer", remedy=_REMEDY_FOR_LAYERS
        )
        _require_owner(model, path)
    for path in record.norms:
        norms[path] = _required(model, path, SwitchableNorm, noun="norm", remedy=_REMEDY_FOR_NORMS)
    outputs, owners = _outputs(model)
    owner_paths = (output.owner for output in record.facts.outputs)
    for path in (*layers, *norms, *outputs, *owner_paths):
        _note_slots(model, path, slots)
    root = model._modules  # noqa: SLF001
    return Parts(layers, norms, outputs, owners, record, root, list(slots.values()))


def _outputs(model: ConvertedModel) -> tuple[dict[str, OutputQuantizer], dict[str, OutputOwner]]:
    """Output quantizers and their owners, by path."""
    quantizers: dict[str, OutputQuantizer] = {}
    owners: dict[str, OutputOwner] = {}
    for output in model.anyprec_record.facts.outputs:
        remedy = "replace modules before anyprec.convert"
        quantizers[output.path] = _required(
            model, output.path, OutputQuantizer, noun="output quantizer", remedy=remedy
        )
        remedy = f"it quantized the output of {output.source!r}: {remedy}"
        owners[output.owner] = _required(
            model, output.owner, OutputOwner, noun="module", remedy=remedy
        )
    return quantizers, owners


def _require_owner(model: ConvertedModel, path: str) -> None:
    """Require that a weight used without a call is still used by the module that quantizes it."""
    owner_path = model.anyprec_record.facts.layers[path].owner
    if owner_path is not None:
        remedy = f"it quantized the layer {path!r}: replace modules before anyprec.convert"
        _required(model, owner_path, FunctionalOwner, noun="module", remedy=remedy)


def _required(
    model: ConvertedModel, path: str, kind: type[_Part], *, noun: str, remedy: str
) -> _Part:
    """The module at `path`, which conversion gave this class.

    Raises:
        ConversionError: It was replaced or removed.
    """
    module = submodule_or_none(model, path)
    if isinstance(module, kind):
        return module
    change = "removed" if module is None else f"replaced by a {type(module).__name__}"
    msg = f"{noun} {path!r} was {change} after conversion: {remedy}"
    raise ConversionError(msg)


def _note_slots(model: nn.Module, path: str, slots: dict[tuple[int, str], _Slot]) -> None:
    module = model
    for name in path.split(".") if path else ():
        children: Any = module._modules  # noqa: SLF001
        module = children[name]
        slots[id(children), name] = children, name, module


def _has_precision(model: nn.Module) -> bool:
    """Whether a layer that is left has a precision, or none is left that could tell."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    return not layers or any(layer.bits is not None for layer in layers)
