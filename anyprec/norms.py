"""Switchable BatchNorm: a copy of the affine parameters and running statistics for each precision that feeds it.

Statistics differ between bit-widths (method of the paper, section 3.3; Yu and Huang, "Slimmable networks", 2019), so
a BatchNorm that follows a layer keeps one copy per (weight, activation) pair of that layer, or per weight bit-width; one
that follows a concatenation or a sum, where no single layer sets the precision, keeps one copy for all quantized
configurations. The float network's own parameters stay as they are and serve bits `None`.

Copies may share their affine parameters, which then learn from every path of a step instead of from one in so many. A norm
may also be shared as a whole by all precisions; then it has no copies, and the layers before it correct their quantized
weights instead. In any case a configuration can have statistics of its own (`recalibrate`), which override the others
while it is active in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from anyprec.specialize import Specialized, despecialize, specialize

NORM_TYPES = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Norms, subclasses included; the graph is not traced into them."""


NormSharing = Literal["per-pair", "shared-affine", "per-width", "shared"]
"""Copies of a norm: one per (weight, activation) pair of the layer before it, the same of the statistics only, one per
weight bit-width, or none."""

Statistics = tuple[Tensor, Tensor]
"""Running mean and variance, shape `(channels,)` each."""


class NormBank(nn.Module):
    """The copies of one BatchNorm, a row each.

    Args:
        norm: The BatchNorm that every row starts from.
        rows: Number of copies.
        shared_affine: All copies have the same affine parameters.

    Attributes:
        weight, bias: Affine parameters, shape `(rows, channels)` or, if they are shared, `(1, channels)`; or None.
        running_mean, running_var: Statistics, shape `(rows, channels)`.
    """

    running_mean: Tensor
    running_var: Tensor
    choice: Tensor

    def __init__(self, norm: _BatchNorm, rows: int, *, shared_affine: bool = False) -> None:
        super().__init__()
        for name in ("weight", "bias"):
            start = getattr(norm, name)
            copies = None if start is None else _repeat(start, 1 if shared_affine else rows)
            self.register_parameter(
                name, None if copies is None else nn.Parameter(copies, requires_grad=start.requires_grad)
            )
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, _repeat(getattr(norm, name), rows))
        # The active row as data, for compiled networks.
        choice = torch.zeros(1, dtype=torch.int64, device=self.running_mean.device)
        self.register_buffer("choice", choice, persistent=False)

    @property
    def rows(self) -> int:
        """Number of copies."""
        return self.running_mean.shape[0]

    @torch.no_grad()
    def keep_row(self, row: int) -> None:
        """Drop every copy but one."""
        rows = self.rows
        for name in ("weight", "bias", "running_mean", "running_var"):
            kept = getattr(self, name)
            if kept is None or len(kept) < rows:  # all copies have it in common
                continue
            if isinstance(kept, nn.Parameter):
                setattr(self, name, nn.Parameter(kept[row : row + 1].clone(), requires_grad=kept.requires_grad))
            else:
                setattr(self, name, kept[row : row + 1].clone())
        self.choice.zero_()

    @torch.no_grad()
    def copy_from(self, norm: _BatchNorm | SwitchableNorm) -> None:
        """Set every row to the float norm's values."""
        for name in ("weight", "bias", "running_mean", "running_var"):
            mine, source = getattr(self, name), getattr(norm, name)
            if mine is not None:
                mine.copy_(source.expand_as(mine))

    def extra_repr(self) -> str:
        """Number of copies, for `print(model)`."""
        return f"rows={self.rows}"


class SwitchableNorm(Specialized):
    """Mixin of a BatchNorm (timm's `BatchNormAct2d` included) with a copy per precision of the layer that feeds it.

    Attributes:
        bank: The copies; None if the norm is shared by all precisions.
        override: Statistics that are used in eval mode instead of any other; None is the usual case.
        observer: If set, it is called with every normalised output of an active copy, before any activation (training).
    """

    class_prefix: ClassVar[str] = "Switchable"

    bank: NormBank | None
    _row: int | None
    _active: bool
    override: Statistics | None
    observer: Callable[[Tensor], None] | None
    eps: float
    running_mean: Tensor
    running_var: Tensor

    @property
    def row(self) -> int | None:
        """The active copy; None is the float network's own."""
        return self._row

    @row.setter
    def row(self, row: int | None) -> None:
        self.switch(row, self.override)

    def switch(self, row: int | None, override: Statistics | None) -> None:
        """Make a copy and, for eval mode, other statistics the active ones."""
        # Past nn.Module, which takes ten times as long to set an attribute.
        vars(self).update(_row=row, _active=row is not None, override=override)
        if row is not None and self.bank is not None:
            self.bank.choice.fill_(row)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, with the active copy in place of the float parameters and statistics."""
        override = None if self.training else self.override
        if not self._active and override is None and self.observer is None:
            return super().forward(*args, **kwargs)
        with _NormInterceptor(self.bank if self._active else None, self, override, self.observer):
            return super().forward(*args, **kwargs)

    def active_statistics(self) -> Statistics:
        """Running mean and variance in use in eval mode; writing to them changes the norm."""
        if self.override is not None:
            return self.override
        if self.row is None or self.bank is None:
            return self.running_mean, self.running_var
        return self.bank.running_mean[self.row], self.bank.running_var[self.row]


class _NormInterceptor(TorchFunctionMode):
    def __init__(
        self,
        bank: NormBank | None,
        norm: SwitchableNorm,
        override: Statistics | None,
        observer: Callable[[Tensor], None] | None,
    ) -> None:
        super().__init__()
        self.bank = bank
        self.norm = norm
        self.override = override
        self.observer = observer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            result = self._run(func, args, kwargs or {})
            if self.observer is not None:
                self.observer(result)
            return result
        return func(*args, **(kwargs or {}))

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = {**dict(zip(_BATCH_NORM_ARGUMENTS, args, strict=False)), **kwargs}
        bank, traced = self.bank, torch.compiler.is_compiling()
        replaced = [name for name in ("running_mean", "running_var", "weight", "bias") if call.get(name) is not None]
        if bank is not None:
            for name in replaced:
                copies = getattr(bank, name)
                if len(copies) < bank.rows:
                    call[name] = copies[0]  # all copies have it in common
                else:
                    call[name] = copies.index_select(0, bank.choice)[0] if traced else copies[self.norm.row]
        if self.override is not None:
            call["running_mean"], call["running_var"] = self.override
        result = func(**call)
        if bank is not None and traced and call.get("training"):
            for name in replaced[:2]:  # a row that was selected by data is a copy
                getattr(bank, name).index_copy_(0, bank.choice, call[name][None])
        return result


class normalising_by_batch(TorchFunctionMode):  # noqa: N801 (used like a function)
    """For the length of a `with` block every BatchNorm takes the statistics of its batch, and keeps its own unchanged."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        call = {**dict(zip(_BATCH_NORM_ARGUMENTS, args, strict=False)), **(kwargs or {})}
        return func(**{**call, "running_mean": None, "running_var": None, "training": True})


_BATCH_NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def switch_norm(norm: _BatchNorm, rows: int, *, shared_affine: bool = False) -> None:
    """Turn a BatchNorm into a `SwitchableNorm` with `rows` copies, in place, in floating point until switched."""
    bank = NormBank(norm, rows, shared_affine=shared_affine).train(norm.training) if rows else None
    specialize(norm, SwitchableNorm)
    norm.register_module("bank", bank)
    vars(norm).update(_row=None, _active=False, override=None, observer=None)


def restore_norm(norm: SwitchableNorm) -> None:
    """Undo `switch_norm`."""
    del norm.bank
    for name in ("_row", "_active", "override", "observer"):
        vars(norm).pop(name, None)
    despecialize(norm)


def _repeat(row: Tensor, rows: int) -> Tensor:
    return row.detach().expand(rows, -1).clone()
