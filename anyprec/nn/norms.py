"""Switchable BatchNorm: a copy of the affine parameters and running statistics for each precision that feeds it.

Statistics differ between bit-widths (method of the paper, section 3.3; Yu and Huang, "Slimmable networks", 2019), so
a BatchNorm that follows a layer keeps one copy per (weight, activation) pair of that layer, or per weight bit-width; one
that follows a concatenation or a sum, where no single layer sets the precision, keeps one copy for all quantized
configurations. The float network's own parameters serve bits `None`; they learn nothing, and take over those of the highest
precision's copies after training (`update_norms(include_float=True)`).

Copies may share their affine parameters, which then learn from every path of a step instead of from one in so many. A norm
may also be shared as a whole by all precisions; then it has no copies, and the layers before it correct their quantized
weights instead.

A copy can serve several uniform precisions: a depthwise convolution without 2 bits takes 3 in W2A2 as in W3A3, where its
inputs are others; behind a sum one copy serves all. So a norm keeps statistics of each such uniform precision beside its
copies. In any case a configuration can have statistics of its own (`update_norms`). Both override the copies' while their
configuration is active in eval mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from anyprec.nn.specialize import Specialized, despecialize, specialize
from anyprec.nn.staleness import StaleRows, TrainedNetwork
from anyprec.nn.undecayed import Undecayed

NORM_TYPES = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Norms, subclasses included; the graph is not traced into them."""


NormSharing = Literal["per-pair", "shared-affine", "shared"]
"""Copies of a norm: one per (weight, activation) pair of the layer before it, the same of the statistics
only, or none."""

Statistics = tuple[Tensor, Tensor]
"""Running mean and variance, shape `(channels,)` each."""


class NormBank(Undecayed):
    """The copies of one BatchNorm, a row each.

    Args:
        norm: The BatchNorm that every row starts from.
        rows: Number of copies.
        shared_affine: All copies have the same affine parameters.
        widths: Uniform bit-widths with statistics beside the copies.

    Attributes:
        weight, bias: Affine parameters, shape `(rows, channels)` or, if they are shared, `(1, channels)`; or None.
        running_mean, running_var: Statistics, shape `(rows, channels)`.
        uniform_mean, uniform_var: Statistics of uniform precisions, shape `(len(widths), channels)`, NaN until they are
            estimated; absent if there are none.
        has_uniform: Whether they are estimated.
        stale: The rows whose statistics training has left behind; None before training.
    """

    stale: StaleRows | None = None

    running_mean: Tensor
    running_var: Tensor
    uniform_mean: Tensor
    uniform_var: Tensor
    choice: Tensor
    place: Tensor

    def __init__(
        self,
        norm: _BatchNorm,
        rows: int,
        *,
        shared_affine: bool = False,
        widths: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.widths = widths
        self.has_uniform = False
        for name in ("weight", "bias"):
            start = getattr(norm, name)
            copies = None if start is None else _repeat(start, 1 if shared_affine else rows)
            self.register_parameter(
                name,
                None if copies is None else nn.Parameter(copies, requires_grad=start.requires_grad),
            )
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, _repeat(getattr(norm, name), rows))
        for name in ("uniform_mean", "uniform_var") if widths else ():
            self.register_buffer(
                name, torch.full_like(self.running_mean[:1], math.nan).repeat(len(widths), 1)
            )
        # For compiled networks as data: the active row, and that of the statistics with those of uniform precisions behind.
        for name in ("choice", "place"):
            chosen = torch.zeros(1, dtype=torch.int64, device=self.running_mean.device)
            self.register_buffer(name, chosen, persistent=False)

    @property
    def rows(self) -> int:
        """Number of copies."""
        return self.running_mean.shape[0]

    def statistics(self, row: int, uniform: int | None) -> Statistics:
        """Those of a copy, or of the uniform bit-width of this index; writing to them changes the bank."""
        if uniform is None:
            return self.running_mean[row], self.running_var[row]
        return self.uniform_mean[uniform], self.uniform_var[uniform]

    def select(self, row: int, uniform: int | None) -> None:
        """Make these the ones that compiled networks take."""
        self.choice.fill_(row)
        self.place.fill_(row if uniform is None else self.rows + uniform)

    def selected(self, name: str, *, evaluating: bool) -> Tensor:
        """What `select` chose of the buffers or parameters of this name, where a change of it changes no program."""
        copies: Tensor = getattr(self, name)
        if evaluating and self.widths and name.startswith("running"):
            every = torch.cat((copies, getattr(self, name.replace("running", "uniform"))))
            return _where_known(
                every.index_select(0, self.place)[0], copies.index_select(0, self.choice)[0]
            )
        return copies.index_select(0, self.choice)[0]

    @torch.no_grad()
    def forget_uniform(self) -> None:
        """Drop the statistics of uniform precisions, which belonged to other weights."""
        if self.has_uniform:
            self.uniform_mean.fill_(math.nan)
            self.uniform_var.fill_(math.nan)
            self.has_uniform = False

    def mark_stale(self, network: TrainedNetwork) -> None:
        """Note that the weights of the network have moved, and all statistics stayed behind."""
        if self.stale is None or self.stale.network is not network:
            self.stale = StaleRows(network)
        self.stale.rows.update((None, *range(self.rows)))

    def refresh(self) -> None:
        """Note whether the statistics of uniform precisions are there, after they were written."""
        if self.widths and not self.uniform_mean.is_meta:
            self.has_uniform = all(
                bool(torch.isfinite(part).all()) for part in (self.uniform_mean, self.uniform_var)
            )

    @torch.no_grad()
    def keep_row(self, row: int, uniform: int | None = None) -> None:
        """Drop every copy but one, which takes the statistics of the uniform bit-width of this index if there is one."""
        rows, statistics = self.rows, self.statistics(row, uniform)
        for name in ("weight", "bias", "running_mean", "running_var"):
            kept = getattr(self, name)
            if kept is None or len(kept) < rows:  # all copies have it in common
                continue
            if isinstance(kept, nn.Parameter):
                setattr(
                    self,
                    name,
                    nn.Parameter(kept[row : row + 1].clone(), requires_grad=kept.requires_grad),
                )
            else:
                setattr(self, name, kept[row : row + 1].clone())
        self.running_mean.copy_(statistics[0])
        self.running_var.copy_(statistics[1])
        if self.widths:
            del self.uniform_mean, self.uniform_var
            self.widths, self.has_uniform = (), False
        self.select(0, None)

    @torch.no_grad()
    def copy_from(self, norm: _BatchNorm | SwitchableNorm) -> None:
        """Set every row to the float norm's values."""
        for name in ("weight", "bias", "running_mean", "running_var"):
            mine, source = getattr(self, name), getattr(norm, name)
            if mine is not None:
                mine.copy_(source.expand_as(mine))
        self.forget_uniform()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()
        self.stale = None  # they came with the weights

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
    _uniform: int | None
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

    @property
    def uniform(self) -> int | None:
        """Index of the uniform bit-width whose statistics are used in eval mode; None if those of the copy are."""
        return self._uniform

    def switch(
        self, row: int | None, override: Statistics | None, *, width: int | None = None
    ) -> None:
        """Make a copy the active one, and for eval mode other statistics.

        Args:
            row: The copy; None is the float network's own.
            override: Statistics to use instead of any other.
            width: Use those of this uniform bit-width, if the norm has a place for them.
        """
        bank = self.bank
        uniform = bank.widths.index(width) if bank is not None and width in bank.widths else None
        # Past nn.Module, which takes ten times as long to set an attribute.
        vars(self).update(_row=row, _uniform=uniform, _active=row is not None, override=override)
        if row is not None and bank is not None:
            bank.select(row, uniform)
        if bank is not None and bank.stale is not None and bank.stale.network.compiled:
            self._warn_if_stale(bank)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, with the active copy in place of the float parameters and statistics."""
        override = None if self.training else self.override
        # The copies learn, and statistics beside them would stay behind. In compiled training `OneShot` drops them.
        if self.training and self.bank is not None and not torch.compiler.is_compiling():
            self.bank.forget_uniform()
        if self.bank is not None and not torch.compiler.is_compiling():
            self._warn_if_stale(self.bank)
        if not self._active and override is None and self.observer is None:
            return super().forward(*args, **kwargs)
        with _NormInterceptor(self.bank if self._active else None, self, override, self.observer):
            return super().forward(*args, **kwargs)

    def _warn_if_stale(self, bank: NormBank) -> None:
        if bank.stale is not None and not self.training and self.override is None:
            bank.stale.warn_about(self.row)

    @torch.no_grad()
    def take_over_affine(self) -> None:
        """Give the float network's norm the affine parameters of the active copy."""
        if self.row is None or self.bank is None:
            return
        for name in ("weight", "bias"):
            copies, own = getattr(self.bank, name), getattr(self, name)
            if copies is not None and own is not None:
                own.copy_(copies[self.row if len(copies) > 1 else 0])

    def active_statistics(self) -> Statistics:
        """Running mean and variance in use in eval mode; writing to them changes the norm."""
        if self.override is not None:
            return self.override
        if self.row is None or self.bank is None:
            return self.running_mean, self.running_var
        return self.bank.statistics(self.row, self.uniform)


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
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm:
            result = self._run(func, args, kwargs or {})
            if self.observer is not None:
                self.observer(result)
            return result
        return func(*args, **(kwargs or {}))

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = {**dict(zip(_BATCH_NORM_ARGUMENTS, args, strict=False)), **kwargs}
        bank, traced, training = (
            self.bank,
            torch.compiler.is_compiling(),
            bool(call.get("training")),
        )
        replaced = [
            name
            for name in ("running_mean", "running_var", "weight", "bias")
            if call.get(name) is not None
        ]
        if bank is not None:
            for name in replaced:
                copies = getattr(bank, name)
                if len(copies) < bank.rows:
                    call[name] = copies.squeeze(0)  # all copies have it in common
                else:
                    call[name] = (
                        bank.selected(name, evaluating=not training)
                        if traced
                        else copies[self.norm.row]
                    )
            if not traced and not training and self.norm.uniform is not None:
                # Averaging weights from outside (an EMA) takes no notice of flags: what is NaN is not known.
                own = bank.statistics(0, self.norm.uniform)
                for name, known in zip(("running_mean", "running_var"), own, strict=True):
                    call[name] = _where_known(known, call[name])
        if self.override is not None:
            call["running_mean"], call["running_var"] = self.override
        result = func(**call)
        if bank is not None and traced and training:
            for name in replaced[:2]:  # a row that was selected by data is a copy
                getattr(bank, name).index_copy_(0, bank.choice, call[name][None])
        return result


class normalising_by_batch(TorchFunctionMode):  # noqa: N801 (used like a function)
    """For the length of a `with` block every BatchNorm takes the statistics of its batch, and keeps its own unchanged."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        call = {**dict(zip(_BATCH_NORM_ARGUMENTS, args, strict=False)), **(kwargs or {})}
        return func(**{**call, "running_mean": None, "running_var": None, "training": True})


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


def switch_norm(
    norm: _BatchNorm, rows: int, *, shared_affine: bool = False, widths: tuple[int, ...] = ()
) -> None:
    """Turn a BatchNorm into a `SwitchableNorm` with `rows` copies, in place, in floating point until switched.

    Args:
        norm: The norm.
        rows: Number of copies; none if all precisions share it.
        shared_affine: As for `NormBank`.
        widths: As for `NormBank`.
    """
    bank = (
        NormBank(norm, rows, shared_affine=shared_affine, widths=widths).train(norm.training)
        if rows
        else None
    )
    specialize(norm, SwitchableNorm)
    norm.register_module("bank", bank)
    vars(norm).update(_row=None, _uniform=None, _active=False, override=None, observer=None)


def restore_norm(norm: SwitchableNorm) -> None:
    """Undo `switch_norm`."""
    del norm.bank
    for name in ("_row", "_uniform", "_active", "override", "observer"):
        vars(norm).pop(name, None)
    despecialize(norm)


def _where_known(values: Tensor, others: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values), values, others)


def _repeat(row: Tensor, rows: int) -> Tensor:
    return row.detach().expand(rows, -1).clone()
