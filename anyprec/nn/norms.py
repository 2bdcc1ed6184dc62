"""Switchable BatchNorm: its own affine parameters and statistics for each precision.

Statistics differ between bit-widths (method of the paper, section 3.3; Yu and Huang, "Slimmable
networks", 2019), so a BatchNorm that follows a layer keeps one copy per (weight, activation) pair
of that layer. One that follows a concatenation or a sum, where no single layer sets the precision,
keeps one copy for all quantized configurations. The float network's own parameters serve bits
`None`; they learn nothing, and take over those of the highest precision's copies after training.

Copies may share their affine parameters, which then learn from every path of a step instead of from
one in so many. A norm may also be shared as a whole by all precisions; then it has no copies, and
the layers before it correct their quantized weights instead.

A copy can serve several uniform precisions: a depthwise convolution without 2 bits takes 3 in W2A2
as in W3A3, where its inputs are others; behind a sum one copy serves all. So a norm keeps
statistics of each such uniform precision beside its copies. In any case a configuration can have
statistics of its own (`update_norms`). Both override the copies' while their configuration is
active in eval mode.

The copies themselves are in `norm_bank.py`, and norms that compute with their own attributes in
`norm_stand_ins.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from anyprec.errors import TrainingError
from anyprec.nn.backward import BackwardGuard, follow_precision
from anyprec.nn.chosen import Chosen
from anyprec.nn.modes import FunctionMode
from anyprec.nn.norm_bank import AFFINE, STATISTICS, NormBank, Statistics
from anyprec.nn.norm_stand_ins import (
    OutputWatch,
    is_synchronised,
    passes_values_on,
    reading_stand_in,
    require_values_of_copies,
    returns_normalised,
    standing_in,
)
from anyprec.nn.observers import Observers
from anyprec.nn.specialize import Specialized, despecialize, specialize, user_class
from anyprec.nn.staleness import TrainedNetwork

NORM_TYPES = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Norms, subclasses included; the graph is not traced into them."""

NormSharing = Literal["per-pair", "shared-affine", "shared"]
"""Copies of a norm: one per (weight, activation) pair of the layer before it, the same of the
statistics only, or none."""


@dataclass(frozen=True, eq=False)
class NormSelection:
    """What a norm uses at the active precision.

    Attributes:
        row: The copy; None is the float network's own parameters and statistics.
        uniform: Index of the uniform bit-width whose statistics are used in eval mode instead of
            those of the copy; None if there are none, or the precision is not uniform.
        override: Statistics used in eval mode instead of any other; None is the usual case.
        has_row: Whether a copy is active. Compiled networks read this and neither `row` nor
            `uniform`, so that they are not compiled anew for another copy.
    """

    row: int | None = None
    uniform: int | None = None
    override: Statistics | None = None
    has_row: bool = field(init=False)

    def __post_init__(self) -> None:
        """Derive `has_row`."""
        object.__setattr__(self, "has_row", self.row is not None)


class SwitchableNorm(Specialized):
    """Mixin of a BatchNorm with a copy per precision of the layer that feeds it.

    timm's `BatchNormAct2d` is included.

    Attributes:
        bank: The copies; None if the norm is shared by all precisions.
        selection: What is used of them.
        chosen: For compiled networks, index of the active copy (`row`) and of the statistics in
            eval mode (`statistics`, where those of uniform precisions follow the copies); None
            without copies.
        output_observers: Called with every normalised output, before any activation.
    """

    class_prefix: ClassVar[str] = "Switchable"

    _anyprec_added: ClassVar[tuple[str, ...]] = (
        "bank",
        "chosen",
        "backward_guard",
        "selection",
        "output_observers",
        "_passes_values_on",
    )
    _anyprec_extended: ClassVar[tuple[str, ...]] = ("reset_running_stats",)

    bank: NormBank | None
    selection: NormSelection
    chosen: Chosen | None
    backward_guard: BackwardGuard | None = None
    output_observers: Observers
    # Whether its forward passes its values to `F.batch_norm`, and does nothing else with them. A
    # class attribute besides, for norms pickled before there was one.
    _passes_values_on: bool = True
    eps: float
    running_mean: Tensor
    running_var: Tensor

    @property
    def row(self) -> int | None:
        """The active copy; None is the float network's own."""
        return self.selection.row

    @property
    def uniform(self) -> int | None:
        """Index of the uniform bit-width whose statistics are used in eval mode, if any."""
        return self.selection.uniform

    @property
    def override(self) -> Statistics | None:
        """Statistics that are used in eval mode instead of any other, if any."""
        return self.selection.override

    def switch(
        self, row: int | None, override: Statistics | None = None, *, width: int | None = None
    ) -> None:
        """Make a copy the active one, and for eval mode other statistics.

        Args:
            row: The copy; None is the float network's own.
            override: Statistics to use instead of any other.
            width: Use those of this uniform bit-width, if the bank has any of it.
        """
        bank = self.bank
        uniform = None
        if bank is not None and width in bank.widths:
            uniform = bank.widths.index(width)
        if row is not None and bank is not None and self.chosen is not None:
            statistics = row if uniform is None else bank.rows + uniform
            self.chosen.choose(row=row, statistics=statistics)
        select(self, NormSelection(row, uniform, override))

    def override_with(self, statistics: Statistics | None) -> None:
        """Use these statistics in eval mode until the next `switch`; None ends that."""
        vars(self)["selection"] = replace(self.selection, override=statistics)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, with what is selected in place of the float values.

        Raises:
            ConversionError, TrainingError: A copy cannot stand in for the norm's own values.
        """
        follow_precision(self)
        bank = self.bank
        if bank is not None and not torch.compiler.is_compiling():
            _note_pass(self, bank)
        if not self._is_changed():
            return super().forward(*args, **kwargs)
        if self.selection.has_row:
            require_values_of_copies(self)
        if not self._passes_values_on or is_synchronised(self):
            return self._forward_of_stand_in(args, kwargs)
        if not torch.compiler.is_compiling():
            forward: Any = super().forward
            stand_in = self._reading_stand_in(forward, args, kwargs)
            if stand_in is not None:
                result = forward.__func__(stand_in, *args)
                self.output_observers.notify(result)
                return result
        with _NormInterceptor(self):
            return super().forward(*args, **kwargs)

    def _is_changed(self) -> bool:
        """Whether the norm does anything else than the float network's, or is observed."""
        is_overridden = not self.training and self.selection.override is not None
        return self.selection.has_row or is_overridden or bool(self.output_observers)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_of_stand_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original forward of an object like this one whose values are those selected."""
        values = self._selected_values()
        with standing_in(self, values) as stand_in, OutputWatch(self.output_observers) as watch:
            result = super(SwitchableNorm, stand_in).forward(*args, **kwargs)  # type: ignore[misc]
        if not watch.has_notified:
            self.output_observers.notify(result)
        return result

    def _reading_stand_in(
        self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> nn.Module | None:
        """What a known forward can run on; None if `F.batch_norm` must be intercepted in it."""
        is_normalised = returns_normalised(forward)
        # Observers see the values before an activation that the forward applies as well.
        if is_normalised is None or (self.output_observers and not is_normalised):
            return None
        # A tensor of another class may see in its operators what a stand-in would change.
        if kwargs or len(args) != 1 or type(args[0]) not in (Tensor, nn.Parameter):
            return None
        return reading_stand_in(self, self._selected_values())

    def _selected_values(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        bank, row = self.bank, self.selection.row
        if bank is not None and row is not None:
            names = self._names_of_values()
            # The batch's own statistics are used in training, and update those of the copy.
            values = bank.values(names, row, None if self.training else self.selection.uniform)
        if self.override is not None and not self.training:
            values["running_mean"], values["running_var"] = self.override
        return values

    def _names_of_values(self) -> list[str]:
        """Which parameters and statistics the norm has."""
        # Past nn.Module.__getattr__, since each norm asks in each pass.
        tensors = self._parameters | self._buffers
        names: list[str] = []
        for name in (*STATISTICS, *AFFINE):
            value = tensors[name] if name in tensors else getattr(self, name)
            if value is not None:
                names.append(name)
        return names

    def reset_running_stats(self) -> None:
        """Reset the float network's statistics.

        Raises:
            TrainingError: A copy is active: it is not what would be reset.
        """
        if self.selection.has_row:
            msg = "resetting statistics of norms, as torch.optim.swa_utils.update_bn does, would "
            msg += "erase those of the float network while a precision is set: use "
            msg += "anyprec.update_norms(model, loader), or call set_bits(None) first"
            raise TrainingError(msg)
        super().reset_running_stats()  # type: ignore[misc]

    @torch.no_grad()
    def take_over_affine(self) -> None:
        """Give the float network's norm the affine parameters of the active copy."""
        if self.row is None or self.bank is None:
            return
        names = [name for name in AFFINE if getattr(self, name) is not None]
        for name, value in self.bank.values(names, self.row, None).items():
            getattr(self, name).copy_(value)

    def active_statistics(self) -> Statistics:
        """Running mean and variance in use in eval mode; writing to them changes the norm."""
        if self.override is not None:
            return self.override
        if self.row is None or self.bank is None:
            return self.running_mean, self.running_var
        return self.bank.statistics(self.row, self.uniform)


def select(norm: SwitchableNorm, selection: NormSelection) -> None:
    """Make this what a norm uses of its copies; its `chosen` is written by the caller."""
    # Past nn.Module.__setattr__, which takes ten times as long: a network has many norms.
    vars(norm)["selection"] = selection
    bank: NormBank | None = norm._modules["bank"]  # type: ignore[assignment]  # noqa: SLF001 (as above)
    # Compiled forward passes cannot warn.
    if bank is not None and bank.stale is not None and bank.stale.network.compiled:
        _warn_if_stale(norm, bank)


def _note_pass(norm: SwitchableNorm, bank: NormBank) -> None:
    """Note that a norm runs in eager mode."""
    # In training the copies move, and statistics beside them would stay behind. In compiled
    # training `OneShot` drops them.
    if norm.training and bank.has_uniform:
        bank.forget_uniform()
    _warn_if_stale(norm, bank)


def _warn_if_stale(norm: SwitchableNorm, bank: NormBank) -> None:
    selection = norm.selection
    if bank.stale is not None and not norm.training and selection.override is None:
        bank.stale.warn_about(selection.row)


class _NormInterceptor(FunctionMode):
    """Runs a norm's `F.batch_norm` with the values that are selected."""

    def __init__(self, norm: SwitchableNorm) -> None:
        super().__init__()
        self.norm = norm

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        result = self._normalise(_batch_norm_arguments(args, kwargs))
        if self.norm.output_observers:
            self.norm.output_observers.notify(result)
        return result

    def _normalise(self, arguments: dict[str, Any]) -> Tensor:
        selection, training = self.norm.selection, bool(arguments.get("training"))
        names = [name for name in (*STATISTICS, *AFFINE) if arguments.get(name) is not None]
        if selection.has_row:
            arguments |= self._copy(names, training=training)
        if selection.override is not None and not self.norm.training:
            arguments["running_mean"], arguments["running_var"] = selection.override
        result = F.batch_norm(**arguments)
        if selection.has_row and training and torch.compiler.is_compiling():
            self._write_back(arguments)
        return result

    def _copy(self, names: list[str], *, training: bool) -> dict[str, Tensor]:
        """What the active copy has of these names; nothing of a norm that is shared."""
        bank, selection = self.norm.bank, self.norm.selection
        if bank is None:
            return {}
        chosen = self.norm.chosen
        if torch.compiler.is_compiling() and chosen is not None:
            statistics = None if training else chosen.statistics
            return bank.chosen_values(names, chosen.row, statistics=statistics)
        if selection.row is None:
            return {}
        # The batch's own statistics are used in training, and update those of the copy.
        uniform = None if training else selection.uniform
        return bank.values(names, selection.row, uniform)

    def _write_back(self, arguments: dict[str, Any]) -> None:
        """Store the statistics that batch_norm has updated: a row selected by data is no view."""
        bank, chosen = self.norm.bank, self.norm.chosen
        if bank is None or chosen is None:
            return
        for name in STATISTICS:
            if arguments.get(name) is not None:
                getattr(bank, name).index_copy_(0, chosen.row, arguments[name][None])


class normalising_by_batch(FunctionMode):  # noqa: N801 (used like a function)
    """In the block, every BatchNorm takes its batch's statistics and keeps its own unchanged."""

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `func`, which takes its statistics from its input if it is `F.batch_norm`."""
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        arguments = _batch_norm_arguments(args, kwargs)
        arguments |= {"running_mean": None, "running_var": None, "training": True}
        return func(**arguments)


def switch_norm(
    norm: _BatchNorm,
    rows: int,
    *,
    shared_affine: bool = False,
    widths: tuple[int, ...] = (),
    network: TrainedNetwork | None = None,
) -> None:
    """Turn a BatchNorm into a `SwitchableNorm`, in place, in floating point until switched.

    Args:
        norm: The norm.
        rows: Number of copies; none if all precisions share it.
        shared_affine: As for `NormBank`.
        widths: As for `NormBank`.
        network: As for `NormBank`.
    """
    bank, chosen = None, None
    if rows:
        bank = NormBank(norm, rows, shared_affine=shared_affine, widths=widths, network=network)
        bank.train(norm.training)
        chosen = Chosen("row", "statistics", device=bank.running_mean.device)
        chosen.train(norm.training)
    kind = user_class(type(norm))
    specialize(norm, SwitchableNorm)
    # None too, and past a `__getattr__` of its own.
    norm._modules.update(bank=bank, chosen=chosen)  # noqa: SLF001
    vars(norm).update(
        selection=NormSelection(),
        output_observers=Observers(),
        _passes_values_on=passes_values_on(kind),
    )


def restore_norm(norm: SwitchableNorm) -> None:
    """Undo `switch_norm`."""
    del norm.bank, norm.chosen
    for name in ("selection", "output_observers", "backward_guard", "_passes_values_on"):
        vars(norm).pop(name, None)
    despecialize(norm)


_BATCH_NORM_ARGUMENTS = (
    "input",
    "running_mean",
    "running_var",
    "weight",
    "bias",
    "training",
    "momentum",
    "eps",
)


def _batch_norm_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `F.batch_norm`, by name, however they were passed."""
    return {**dict(zip(_BATCH_NORM_ARGUMENTS, args, strict=False)), **kwargs}
