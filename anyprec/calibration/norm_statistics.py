"""`update_norms`: running means and variances of BatchNorm layers, re-estimated from a few batches.

Statistics differ between precisions, so each copy is estimated at the precision that it belongs to
(Yu and Huang, "Slimmable networks", 2019). Scale and shift of the copies are learned in training
and stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from anyprec.bits import BitConfig, Bits, highest_config, shorten, uniform_widths
from anyprec.calibration.passes import (
    held_images,
    require_count,
    run_on_images,
    undo_on_error,
)
from anyprec.errors import BitsError, CalibrationError
from anyprec.model.converted import BitsRequest, ConvertedModel, require_converted
from anyprec.model.intact import switchable_norms
from anyprec.nn.counting import uncounted
from anyprec.nn.norm_bank import NormBank
from anyprec.nn.norms import SwitchableNorm
from anyprec.runtime.batches import Batch
from anyprec.runtime.modes import evaluating
from anyprec.runtime.processes import process_count, sum_over_processes


def update_norms(
    model: ConvertedModel,
    loader: Iterable[Batch],
    bits: BitsRequest = "all",
    *,
    batches: int | None = None,
    anchored: bool = False,
    include_float: bool = False,
) -> None:
    """Re-estimate the statistics of BatchNorm layers, of all precisions or of one configuration.

    With `bits="all"` the network runs uniformly at each pair of candidates, and every norm's active
    copy takes the statistics of all batches together. Where a copy serves several uniform
    bit-widths, those of each are kept besides. Norms that all precisions share are left alone.

    With a configuration, every norm gets statistics that are used whenever exactly this
    configuration is active in eval mode. They are kept in the model's file; those of all other
    configurations stay as they are. A mixed configuration gains from them: copies are estimated
    with all layers at one precision, but here the layers before a norm are at others. Further
    training drops them.

    Affine parameters of copies, step sizes, and the model's mode and precision are left as they
    were. If anything fails, the statistics are too.

    Args:
        model: A converted and calibrated model.
        loader: Batches of images, or of pairs (images, labels); training images.
        bits: "all", or a configuration: anything that `set_bits` takes, except None.
        batches: At most so many batches of `loader`; None takes all of them.
        anchored: Trust the statistics that the float network brought, and only correct them by what
            quantization changes on these images: means by the difference, variances by the ratio.
            Far more accurate on few images, as long as the weights are those that the float
            statistics belong to. Only for "all".
        include_float: Serve the float network too, once training moved the weights: its norms take
            scale and shift of the highest precision's copies, which learned, and statistics of
            their own are estimated anew. Only for "all".

    Raises:
        ConversionError: `model` is not converted.
        BitsError: `bits` does not fit the model, or is None.
        NotCalibratedError: Step sizes are missing.
        NoValuesError: It is on the meta device.
        BatchError: The loader yields something else than batches of images that the network takes.
        CalibrationError: The loader is empty, `batches` is not positive, or statistics come out not
            finite.
        ValueError: Both `anchored` and `include_float` are asked for, or one of them for a
            configuration.

    Example:
        >>> import timm, torch, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet"))
        >>> images = torch.randn(8, 3, 160, 160)
        >>> anyprec.calibrate(model, [images])
        >>> anyprec.update_norms(model, [images])
        >>> anyprec.update_norms(model, [images], {"layer1.*": 4})
    """
    require_converted(model, purpose="update_norms")
    if batches is not None:
        require_count(batches, name="batches")
    if anchored and include_float:
        msg = "anchored=True takes the float statistics as given, include_float=True re-estimates "
        msg += "them: choose one"
        raise ValueError(msg)
    if bits == "all":
        _update_all_copies(model, loader, batches, anchored=anchored, include_float=include_float)
        return
    config = model.resolve_bits(bits)
    if config is None:
        msg = "update_norms got bits=None, the float network, which is no configuration: use "
        msg += 'include_float=True with bits="all"'
        raise BitsError(msg)
    if anchored or include_float:
        msg = f'anchored=True and include_float=True need bits="all", got bits={bits!r}: leave '
        msg += "them out for a configuration"
        raise ValueError(msg)
    images = held_images(model, loader, batches, purpose="update_norms")
    _update_configuration(model, dict(switchable_norms(model)), images, config)


def refresh_norms(
    model: ConvertedModel,
    loader: Iterable[Batch],
    configs: Sequence[BitConfig | None] | None = None,
    *,
    batches: int | None = None,
) -> None:
    """Bring statistics up to date that training has left behind, for some precisions only.

    `update_norms` estimates every copy; this costs a forward pass for each precision and batch. If
    nothing was left behind it does nothing. Norms that were in eval mode in training are left
    alone: their statistics are what training uses.

    Args:
        model: A converted and calibrated model.
        loader: As for `update_norms`.
        configs: Configurations, each of which gets statistics of its own; None among them is the
            float network. By default every uniform bit-width and the float network, whose
            statistics stand in the norms' copies.
        batches: At most so many batches of `loader`.

    Raises:
        CalibrationError: The loader is empty, or statistics come out not finite.
    """
    norms = {path: norm for path, norm in switchable_norms(model) if _is_trained(norm)}
    if not norms:
        return
    uniform, missing = _requested_statistics(model, configs)
    is_stale = _uses_stale_rows(model, norms, uniform)
    if not (is_stale or missing):
        return
    images = held_images(model, loader, batches, purpose="refreshing norm statistics")
    if is_stale:
        _update_copies(model, norms, images, uniform)
    for config in missing:
        _update_configuration(model, norms, images, config)


def _requested_statistics(
    model: ConvertedModel, configs: Sequence[BitConfig | None] | None
) -> tuple[list[Bits | None], list[BitConfig]]:
    """Uniform precisions, and configurations that have no statistics of their own yet."""
    if configs is None:
        widths = uniform_widths(model.candidates.values())
        return [*(Bits(width, width) for width in widths), None], []
    present = model.anyprec_record.statistics  # training drops them
    missing = [config for config in configs if config is not None and config not in present]
    return [None] if None in configs else [], missing


def _uses_stale_rows(
    model: ConvertedModel, norms: dict[str, SwitchableNorm], requests: list[Bits | None]
) -> bool:
    return any(row in _stale_rows(bank) for bank, row in _rows_used(model, norms, requests))


def hand_over_affine(model: ConvertedModel) -> None:
    """Give the float network's norms scale and shift of the highest precision, which learned."""
    with model.using_bits(highest_config(model.candidates)):
        for _, norm in switchable_norms(model):
            norm.take_over_affine()


def _update_all_copies(
    model: ConvertedModel,
    loader: Iterable[Batch],
    limit: int | None,
    *,
    anchored: bool,
    include_float: bool,
) -> None:
    """Estimate every copy of every norm, and the statistics beside them."""
    norms = {path: norm for path, norm in switchable_norms(model) if norm.bank is not None}
    if not norms:
        return
    requests: list[Bits | None] = [*_uniform_pairs(model)]
    if include_float:
        requests.append(None)
    images = held_images(model, loader, limit, purpose="update_norms")
    _update_copies(model, norms, images, requests, anchored=anchored)


def _update_copies(
    model: ConvertedModel,
    norms: dict[str, SwitchableNorm],
    images: list[Tensor],
    requests: list[Bits | None],
    *,
    anchored: bool = False,
) -> None:
    """Estimate the copies that these uniform precisions use, and the statistics beside them."""
    with _trusting(norms), undo_on_error(model), evaluating(model), torch.no_grad():
        if None in requests:
            hand_over_affine(model)
        reference = _float_statistics(model, norms, images) if anchored else None
        _estimate_uniform(model, norms, images, requests, reference)
        _require_finite_banks(norms)
    for norm in norms.values():
        if norm.bank is not None:
            norm.bank.refresh()
    if not anchored:  # what is anchored is as stale as the float statistics
        for bank, row in _rows_used(model, norms, requests):
            _stale_rows(bank).discard(row)
    # The active precision may have statistics now that it lacked when it was set.
    model.set_bits(model.bits)


def _is_trained(norm: SwitchableNorm) -> bool:
    """Whether training moved the statistics of its copies."""
    return norm.bank is not None and norm.bank.stale is not None


def _stale_rows(bank: NormBank) -> set[int | None]:
    return set() if bank.stale is None else bank.stale.rows


@contextmanager
def _trusting(norms: dict[str, SwitchableNorm]) -> Iterator[None]:
    """No norm warns in the block: its passes make the statistics that it would warn about."""
    banks = [norm.bank for norm in norms.values() if norm.bank is not None]
    stale = [bank.stale for bank in banks]
    for bank in banks:
        bank.stale = None
    try:
        yield
    finally:
        for bank, rows in zip(banks, stale, strict=True):
            bank.stale = rows


def _rows_used(
    model: ConvertedModel, norms: dict[str, SwitchableNorm], requests: list[Bits | None]
) -> list[tuple[NormBank, int | None]]:
    """The copies of these norms that these uniform precisions use."""
    used: list[tuple[NormBank, int | None]] = []
    with _trusting(norms):
        for request in requests:
            with model.using_bits(request):
                used += [(norm.bank, norm.row) for norm in norms.values() if norm.bank is not None]
    return used


def _estimate_uniform(
    model: ConvertedModel,
    norms: dict[str, SwitchableNorm],
    batches: list[Tensor],
    requests: list[Bits | None],
    reference: _Reference | None,
) -> None:
    """Estimate the statistics that each of these uniform precisions uses."""
    estimated: set[tuple[tuple[int | None, int | None], ...]] = set()
    for request in requests:
        with model.using_bits(request):
            _select_statistics(norms, request)
            selected = tuple((norm.row, norm.uniform) for norm in norms.values())
            # Layers without a bit-width (depthwise ones) take the next, so two requests may be the
            # same to every norm.
            if selected not in estimated:
                _estimate(model, norms, batches, reference)
            estimated.add(selected)
            for norm in norms.values():
                _share_with_row(norm)


def _update_configuration(
    model: ConvertedModel,
    norms: dict[str, SwitchableNorm],
    images: list[Tensor],
    config: BitConfig,
) -> None:
    """Estimate the statistics of one configuration, apart from those of the norms."""
    with evaluating(model), torch.no_grad(), _trusting(norms), model.using_bits(config):
        for norm in norms.values():
            mean, variance = norm.active_statistics()
            norm.override_with((mean.clone(), variance.clone()))
        _estimate(model, norms, images, None)
        statistics = {path: norm.active_statistics() for path, norm in norms.items()}
    _require_finite(statistics)
    model.anyprec_record.statistics[config] = statistics
    if model.bits == config:
        model.set_bits(config)


def _uniform_pairs(model: ConvertedModel) -> list[Bits]:
    """Precisions whose uniform configurations reach every copy of every norm."""
    weight: set[int] = set()
    activation: set[int] = set()
    for candidates in model.candidates.values():
        weight.update(candidates.weight)
        activation.update(candidates.activation)
    return [Bits(*pair) for pair in itertools.product(sorted(weight), sorted(activation))]


def _select_statistics(norms: dict[str, SwitchableNorm], bits: Bits | None) -> None:
    """Make each norm use the statistics that are to be estimated for this uniform precision.

    `set_bits` does not do it: it takes statistics of the configuration's own where there are any,
    and those of a uniform bit-width only if they are known already.
    """
    width = None
    if bits is not None and bits.weight == bits.activation:
        width = bits.weight
    for norm in norms.values():
        norm.switch(norm.row, None, width=width)


def _share_with_row(norm: SwitchableNorm) -> None:
    """Copy statistics beside the active copy into it, for mixed configurations.

    Pairs come in rising order, so a copy that serves several has those of the highest in the end.
    """
    if norm.bank is None or norm.row is None or norm.uniform is None:
        return
    copy = norm.bank.statistics(norm.row, None)
    uniform = norm.bank.statistics(norm.row, norm.uniform)
    for target, value in zip(copy, uniform, strict=True):
        target.copy_(value)


_Reference = dict[tuple[str, int], tuple[Tensor, Tensor]]
"""Mean and variance at a norm (by path) after so many calls."""


class _RunningStatistics:
    """Mean and variance per channel over several batches.

    They are combined pairwise (Chan, Golub and LeVeque 1979), which stays exact where a sum of
    squares would cancel.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._count = 0.0
        self.mean = torch.zeros(())
        self._squares = torch.zeros(())

    @property
    def variance(self) -> Tensor:
        """Unbiased, as BatchNorm keeps it."""
        return self._squares / max(1, self._count - 1)

    @property
    def is_empty(self) -> bool:
        """Whether no batch had a sample so far."""
        return not self._count

    def add(self, values: Tensor) -> None:
        """Take in a batch, channels on axis 1, with those of all processes of a distributed run."""
        count: float = values.numel() // values.shape[1]
        dims = [dim for dim in range(values.ndim) if dim != 1]
        values = values.float()
        # In two passes: torch.var_mean is as exact and 5 to 15 times slower on a CPU.
        average = values.mean(dim=dims, keepdim=True)
        variance = (values - average).square_().mean(dim=dims).double()
        mean = average.flatten().double()
        if not count:  # then the means are NaN
            mean, variance = torch.zeros_like(mean), torch.zeros_like(variance)
        if process_count() > 1:
            count, mean, variance = _of_all_processes(count, mean, variance)
        self.calls += 1
        total = self._count + count
        if not total:
            return
        shift = mean - self.mean
        self._squares = self._squares + variance * count + shift**2 * (self._count * count / total)
        self.mean = self.mean + shift * (count / total)
        self._count = total


def _of_all_processes(count: float, mean: Tensor, variance: Tensor) -> tuple[float, Tensor, Tensor]:
    """Count, mean and biased variance of the batches of all processes together."""
    sums = torch.cat((mean.new_tensor([count]), count * mean, count * (variance + mean**2)))
    total, first, second = sum_over_processes(sums).split([1, len(mean), len(mean)])
    # Without a sample in any process all sums are zero.
    count = float(total)
    mean = first / max(1.0, count)
    return count, mean, (second / max(1.0, count) - mean**2).clamp_min_(0)


def _estimate(
    model: ConvertedModel,
    norms: dict[str, SwitchableNorm],
    batches: list[Tensor],
    reference: _Reference | None,
) -> None:
    """Write statistics into every norm's active copy, layer by layer in each forward pass.

    A norm takes over what it has seen so far before it runs, so the layers behind it are measured
    on inputs that are normalised as they will be.
    """

    def take_over(path: str, so_far: _RunningStatistics) -> None:
        norm, mean, variance = norms[path], so_far.mean, so_far.variance
        if reference is not None and (path, so_far.calls) not in reference:
            return  # the float network had no sample there so far
        if reference is not None:
            # Of the same images, or the difference would hold the noise between images too.
            float_mean, float_variance = reference[path, so_far.calls]
            mean = norm.running_mean + (mean - float_mean)
            # eps keeps a channel that is constant on these images from making the ratio noise.
            variance = norm.running_var * (variance + norm.eps) / (float_variance + norm.eps)
        active_mean, active_variance = norm.active_statistics()
        active_mean.copy_(mean)
        active_variance.copy_(variance)

    _watch_norms(model, norms, batches, take_over)


def _float_statistics(
    model: ConvertedModel, norms: dict[str, SwitchableNorm], batches: list[Tensor]
) -> _Reference:
    """What the float network has on `batches` at the input of each norm."""
    reference: _Reference = {}

    def note(path: str, so_far: _RunningStatistics) -> None:
        reference[path, so_far.calls] = so_far.mean, so_far.variance

    with model.using_bits(None):
        _watch_norms(model, norms, batches, note)
    return reference


def _watch_norms(
    model: ConvertedModel,
    norms: dict[str, SwitchableNorm],
    batches: list[Tensor],
    before_norm: Callable[[str, _RunningStatistics], None],
) -> None:
    """Run `batches`, and before each norm runs call `before_norm` with its statistics so far."""
    statistics = {path: _RunningStatistics() for path in norms}

    def watch(path: str, _norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        with uncounted():
            statistics[path].add(args[0])
            if not statistics[path].is_empty:
                before_norm(path, statistics[path])

    hooks = []
    for path, norm in norms.items():
        hooks.append(norm.register_forward_pre_hook(partial(watch, path)))
    try:
        for images in batches:
            run_on_images(model, images)
    finally:
        for hook in hooks:
            hook.remove()


def _require_finite_banks(norms: dict[str, SwitchableNorm]) -> None:
    statistics = {}
    for path, norm in norms.items():
        if norm.bank is not None:
            statistics[path] = norm.bank.running_mean, norm.bank.running_var
    _require_finite(statistics)


def _require_finite(statistics: dict[str, tuple[Tensor, Tensor]]) -> None:
    broken = []
    for path, (mean, variance) in statistics.items():
        if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
            broken.append(path)
    if broken:
        msg = f"norm statistics of {shorten(broken, 3)} came out not finite: check the calibration "
        msg += "data"
        raise CalibrationError(msg)
