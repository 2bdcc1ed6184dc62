"""The copies of one BatchNorm: affine parameters and running statistics, a row each.

Which copy is used when is in `norms.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anyprec.nn.staleness import STALE, Relatives, StaleRows, TrainedNetwork
from anyprec.nn.undecayed import Undecayed

Statistics = tuple[Tensor, Tensor]
"""Running mean and variance, shape `(channels,)` each."""

STATISTICS = ("running_mean", "running_var")
AFFINE = ("weight", "bias")


class _Source(NamedTuple):
    """A tensor of which a row is shown, as it was then.

    Attributes:
        name: Of a parameter or buffer.
        tensor: What the bank had under this name.
        address: Of its memory.
        strides: Its own.
        learns: Whether it required a gradient.
        version: Of the tensor, if gradients pass the view: after a change in place torch would take
            another way back. None otherwise.
    """

    name: str
    tensor: Tensor
    address: int
    strides: tuple[int, ...]
    learns: bool
    version: int | None


@dataclass(frozen=True, eq=False)
class _Views:
    """Views of a row that are used again.

    They keep the memory that they show alive, so no other tensor can have its address meanwhile:
    the same tensor at the same address, in the same layout, still has this row.

    Attributes:
        values: The views, by name.
        sources: What they show a row of.
    """

    values: dict[str, Tensor]
    sources: list[_Source]

    def are_of(self, tensors: Mapping[str, Any]) -> bool:
        """Whether they show a row of these tensors as those are now."""
        for name, tensor, address, strides, learns, version in self.sources:
            if tensors.get(name) is not tensor or tensor.data_ptr() != address:
                return False
            if tensor.requires_grad is not learns:
                return False
            if version is not None and tensor._version != version:  # noqa: SLF001 (no public name)
                return False
            if tensor.stride() != strides:
                return False
        return True


class NormBank(Undecayed):
    """The copies of one BatchNorm, a row each.

    Args:
        norm: The BatchNorm that every row starts from.
        rows: Number of copies.
        shared_affine: All copies have the same affine parameters.
        widths: Uniform bit-widths with statistics beside the copies.
        network: What the norms of one network share. A copy of the network has one of its own.

    Attributes:
        weight, bias: Affine parameters, shape `(rows, channels)` or, if they are shared,
            `(1, channels)`; or None.
        running_mean, running_var: Statistics, shape `(rows, channels)`.
        uniform_mean, uniform_var: Statistics of uniform precisions, of shape
            `(len(widths), channels)`, NaN until they are estimated; absent if there are none.
        has_uniform: Whether they are estimated.
        stale: The rows whose statistics training has left behind; None before training.
    """

    stale: StaleRows | None = None

    running_mean: Tensor
    running_var: Tensor
    uniform_mean: Tensor
    uniform_var: Tensor

    def __init__(
        self,
        norm: _BatchNorm,
        rows: int,
        *,
        shared_affine: bool = False,
        widths: tuple[int, ...] = (),
        network: TrainedNetwork | None = None,
    ) -> None:
        super().__init__()
        self.widths = widths
        self.has_uniform = False
        affine_rows = 1 if shared_affine else rows
        for name in AFFINE:
            start = getattr(norm, name)
            copies = None
            if start is not None:
                copies = nn.Parameter(
                    _repeat(start, affine_rows), requires_grad=start.requires_grad
                )
            self.register_parameter(name, copies)
        for name in STATISTICS:
            self.register_buffer(name, _repeat(getattr(norm, name), rows))
        if widths:
            missing = torch.full_like(self.running_mean[:1], math.nan)
            for name in ("uniform_mean", "uniform_var"):
                self.register_buffer(name, missing.repeat(len(widths), 1))
        self.network = network or TrainedNetwork()
        self._views: dict[tuple[Any, ...], _Views] = {}
        self._relatives = Relatives()
        self._relatives.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_views": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Those pickled before there was one have none.
        super().__setstate__({"_views": {}, **state})  # type: ignore[no-untyped-call]  # torch's
        self._relatives.add(self)

    @property
    def rows(self) -> int:
        """Number of copies."""
        return self.running_mean.shape[0]

    def statistics(self, row: int, uniform: int | None) -> Statistics:
        """Those of a copy, or of the uniform bit-width of this index.

        Writing to them changes the bank.
        """
        if uniform is None:
            return self.running_mean[row], self.running_var[row]
        return self.uniform_mean[uniform], self.uniform_var[uniform]

    def values(self, names: list[str], row: int, uniform: int | None) -> dict[str, Tensor]:
        """Parameters and statistics of a copy, by name, for one call in eager mode.

        Args:
            names: What is wanted.
            row: The copy.
            uniform: Statistics of this uniform bit-width, by index, instead of those of the copy.
        """
        # Past nn.Module.__getattr__, since each norm asks in each pass.
        tensors = self._parameters | self._buffers
        key = row, torch.is_grad_enabled(), *names
        views = self._views.get(key)
        if views is None or not views.are_of(tensors):
            views = self._make_views(tensors, names, row)
            self._views[key] = views
        values = dict(views.values)
        for name in names:
            if name not in values:
                # Those of a replica are attributes.
                values[name] = self._new_row(getattr(self, name), row)
        if uniform is not None:
            for name, estimated in zip(STATISTICS, self.statistics(row, uniform), strict=True):
                values[name] = _finite_or(estimated, values[name])
        return values

    def _make_views(
        self, tensors: Mapping[str, Tensor | None], names: Iterable[str], row: int
    ) -> _Views:
        """Views of a row, through which batch_norm updates the statistics of the bank.

        Those of tensors that are computed are left out: their graph ends with the backward pass.
        """
        views = _Views({}, [])
        for name in names:
            copies: Any = tensors.get(name)
            if type(copies) not in (Tensor, nn.Parameter) or not copies.is_leaf:
                continue
            version = None
            if torch.is_grad_enabled() and copies.requires_grad:
                views.values[name] = self._new_row(copies, row)
                version = copies._version  # noqa: SLF001 (no public name)
            else:
                # Outside inference mode, so that it can be written in any mode.
                with torch.inference_mode(mode=False), torch.no_grad():
                    views.values[name] = self._new_row(copies, row)
            place = copies.data_ptr(), copies.stride()
            views.sources.append(_Source(name, copies, *place, copies.requires_grad, version))
        return views

    def _new_row(self, copies: Tensor, row: int) -> Tensor:
        # To squeeze takes no kernel in the backward pass, to select one does.
        return copies.squeeze(0) if self._is_shared(copies) else copies.select(0, row)

    def chosen_values(
        self, names: list[str], row: Tensor, *, statistics: Tensor | None
    ) -> dict[str, Tensor]:
        """`values` by indices that are data, so that others are the same program.

        Args:
            names: What is wanted.
            row: Index of the copy, shape `(1,)`.
            statistics: In eval mode the same for statistics, where those of uniform precisions are
                counted behind the rows.
        """
        values: dict[str, Tensor] = {}
        for name in names:
            copies = getattr(self, name)
            if self._is_shared(copies):
                values[name] = copies.squeeze(0)
                continue
            values[name] = copies.index_select(0, row)[0]
            if statistics is not None and self.widths and name in STATISTICS:
                # Behind the copies, so that one index chooses among both.
                uniform = getattr(self, name.replace("running", "uniform"))
                candidates = torch.cat((copies, uniform))
                estimated = candidates.index_select(0, statistics)[0]
                values[name] = _finite_or(estimated, values[name])
        return values

    @torch.no_grad()
    def forget_uniform(self) -> None:
        """Drop the statistics of uniform precisions, which belonged to other weights."""
        if self.has_uniform:
            self.uniform_mean.fill_(math.nan)
            self.uniform_var.fill_(math.nan)
            self.has_uniform = False

    def mark_stale(self, network: TrainedNetwork) -> None:
        """Note that the weights of the network have moved, and all statistics stayed behind.

        So have those of a copy whose weights were written since the last time, by an average.
        """
        for copy in self._relatives.moved(self):
            copy.mark_stale(copy.network)
        if self.stale is None or self.stale.network is not network:
            self.stale = StaleRows(network)
        self.stale.rows.update((None, *range(self.rows)))

    def refresh(self) -> None:
        """Note whether the statistics of uniform precisions are there, after they were written."""
        if self.widths and not self.uniform_mean.is_meta:
            self.has_uniform = bool(self.uniform_is_finite())

    def uniform_is_finite(self) -> Tensor:
        """Whether the statistics of uniform precisions are there: all finite, shape `()`."""
        return torch.isfinite(self.uniform_mean).all() & torch.isfinite(self.uniform_var).all()

    @torch.no_grad()
    def keep_row(self, row: int, uniform: int | None = None) -> None:
        """Drop every copy but one, which takes the statistics of this uniform bit-width, if any."""
        rows = self.rows
        mean, variance = self.statistics(row, uniform)
        for name in (*AFFINE, *STATISTICS):
            copies = getattr(self, name)
            if copies is None or len(copies) < rows:
                continue  # nothing to drop: all copies have it in common
            remaining = copies[row : row + 1].clone()
            if isinstance(copies, nn.Parameter):
                remaining = nn.Parameter(remaining, requires_grad=copies.requires_grad)
            setattr(self, name, remaining)
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        if self.widths:
            del self.uniform_mean, self.uniform_var
            self.widths, self.has_uniform = (), False
        self._relatives.add(self)

    @torch.no_grad()
    def copy_from(self, norm: nn.Module) -> None:
        """Set every row to the values of a float norm."""
        for name in (*AFFINE, *STATISTICS):
            copies = getattr(self, name)
            if copies is not None:
                copies.copy_(getattr(norm, name).expand_as(copies))
        self.forget_uniform()
        self._relatives.add(self)  # a new beginning, and no following of weights in training

    def _is_shared(self, copies: Tensor) -> bool:
        """Whether all copies have these values in common."""
        return len(copies) < self.rows

    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,  # noqa: FBT001 (torch's)
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stale is not None and self.stale.rows:
            # Beside the tensors, where nobody who compares or averages them sees it.
            metadata: dict[str, Any] = getattr(destination, "_metadata", {})
            metadata.setdefault(prefix.removesuffix("."), {})[STALE] = list(self.stale.rows)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        self.refresh()
        # They came with the weights, and are as stale as they were there.
        rows = local_metadata.get(STALE)
        self.stale = StaleRows(self.network, set(rows)) if rows else None
        self._relatives.add(self)

    def extra_repr(self) -> str:
        """Number of copies, for `print(model)`."""
        return f"rows={self.rows}"


def _finite_or(values: Tensor, fallback: Tensor) -> Tensor:
    # NaN and no flag marks what is missing: averaging weights from outside (EMA) copies no flags.
    is_readable = type(values) is Tensor and values.device.type == "cpu"
    # A finite sum of squares has finite summands, and on a CPU to look at it takes the least time.
    if (
        is_readable
        and not torch.compiler.is_compiling()
        and math.isfinite(float(values.dot(values)))
    ):
        return values
    return torch.where(torch.isfinite(values), values, fallback)


def _repeat(row: Tensor, rows: int) -> Tensor:
    return row.detach().expand(rows, -1).clone()
