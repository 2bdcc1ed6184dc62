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

The copies themselves are in `norm_bank.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from anyprec.nn.norm_bank import AFFINE, STATISTICS, NormBank, Statistics
from anyprec.nn.observers import Observers
from anyprec.nn.specialize import Specialized, despecialize, specialize
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
        output_observers: Called with every normalised output, before any activation.
    """

    class_prefix: ClassVar[str] = "Switchable"

    bank: NormBank | None
    selection: NormSelection
    output_observers: Observers
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
        self._select(NormSelection(row, uniform, override))
        if row is not None and bank is not None:
            bank.select(row, uniform)
        if bank is not None and bank.stale is not None and bank.stale.network.compiled:
            self._warn_if_stale(bank)

    def override_with(self, statistics: Statistics | None) -> None:
        """Use these statistics in eval mode until the next `switch`; None ends that."""
        self._select(replace(self.selection, override=statistics))

    def _select(self, selection: NormSelection) -> None:
        # Past nn.Module.__setattr__, which takes ten times as long: a network has many norms.
        vars(self)["selection"] = selection

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, with what is selected in place of the float values."""
        # In training the copies move, and statistics beside them would stay behind. In compiled
        # training `OneShot` drops them.
        if self.training and self.bank is not None and not torch.compiler.is_compiling():
            self.bank.forget_uniform()
        if self.bank is not None and not torch.compiler.is_compiling():
            self._warn_if_stale(self.bank)
        is_overridden = not self.training and self.selection.override is not None
        if not (self.selection.has_row or is_overridden or self.output_observers):
            return super().forward(*args, **kwargs)
        with _NormInterceptor(self):
            return super().forward(*args, **kwargs)

    def _warn_if_stale(self, bank: NormBank) -> None:
        if bank.stale is not None and not self.training and self.override is None:
            bank.stale.warn_about(self.row)

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


class _NormInterceptor(TorchFunctionMode):
    """Runs a norm's `F.batch_norm` with the values that are selected."""

    def __init__(self, norm: SwitchableNorm) -> None:
        super().__init__()
        self.norm = norm

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        result = self._run(_batch_norm_arguments(args, kwargs))
        if self.norm.output_observers:
            self.norm.output_observers.notify(result)
        return result

    def _run(self, arguments: dict[str, Any]) -> Tensor:
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
        if torch.compiler.is_compiling():
            return bank.selected_values(names, evaluating=not training)
        if selection.row is None:
            return {}
        # The batch's own statistics are used in training, and update those of the copy.
        uniform = None if training else selection.uniform
        return bank.values(names, selection.row, uniform)

    def _write_back(self, arguments: dict[str, Any]) -> None:
        """Store the statistics that batch_norm has updated: a row selected by data is no view."""
        bank = self.norm.bank
        if bank is None:
            return
        for name in STATISTICS:
            if arguments.get(name) is not None:
                getattr(bank, name).index_copy_(0, bank.choice, arguments[name][None])


class normalising_by_batch(TorchFunctionMode):  # noqa: N801 (used like a function)
    """In the block, every BatchNorm takes its batch's statistics and keeps its own unchanged."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
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
    bank = None
    if rows:
        bank = NormBank(norm, rows, shared_affine=shared_affine, widths=widths, network=network)
        bank.train(norm.training)
    specialize(norm, SwitchableNorm)
    norm.register_module("bank", bank)
    vars(norm).update(selection=NormSelection(), output_observers=Observers())


def restore_norm(norm: SwitchableNorm) -> None:
    """Undo `switch_norm`."""
    del norm.bank
    for name in ("selection", "output_observers"):
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


def _batch_norm_arguments(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of a call of `F.batch_norm`, by name, however they were passed."""
    return {**dict(zip(_BATCH_NORM_ARGUMENTS, args, strict=False)), **(kwargs or {})}
