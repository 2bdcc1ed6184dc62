"""New statistics for the copies of norms, or for one configuration, from images that are held.

The network is switched to each precision in turn, and what its norms use there is estimated. If
anything fails, they are as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from anyprec.bits import BitConfig, Bits, highest_config, shorten
from anyprec.calibration.norm_inputs import Reference, estimate_active_copies
from anyprec.calibration.passes import undo_on_error
from anyprec.errors import CalibrationError
from anyprec.model.converted import ConvertedModel
from anyprec.model.intact import switchable_norms
from anyprec.nn.norm_bank import NormBank
from anyprec.nn.norms import SwitchableNorm
from anyprec.runtime.modes import evaluating
from anyprec.runtime.transfers import numbers_of


def update_copies(
    model: ConvertedModel,
    norms: dict[str, SwitchableNorm],
    images: list[Tensor],
    requests: list[Bits | None],
    *,
    reference: Reference | None = None,
) -> None:
    """Estimate the copies that these uniform precisions use, and the statistics beside them.

    Args:
        model: The network.
        norms: The norms to estimate copies of, by path.
        images: Batches of images.
        requests: Uniform precisions, None for floating point.
        reference: What the float network that came with these statistics has on these images. The
            statistics are then corrected, and not estimated anew.
    """
    with _trusting(norms), undo_on_error(model), evaluating(model), torch.no_grad():
        if None in requests:
            hand_over_affine(model)
        _estimate_uniform(model, norms, images, requests, reference)
        _require_finite_banks(norms)
    _note_uniform(norms)
    if reference is None:  # what is anchored is as stale as the float statistics
        for bank, row in rows_used(model, norms, requests):
            stale_rows(bank).discard(row)
    # The active precision may have statistics now that it lacked when it was set.
    model.set_bits(model.bits)


def update_configuration(
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
        estimate_active_copies(model, norms, images, None)
        statistics = {path: norm.active_statistics() for path, norm in norms.items()}
    _require_finite(statistics)
    model.anyprec_record.statistics[config] = statistics
    if model.bits == config:
        model.set_bits(config)


def hand_over_affine(model: ConvertedModel) -> None:
    """Give the float network's norms scale and shift of the highest precision, which learned."""
    with model.using_bits(highest_config(model.candidates)):
        for _, norm in switchable_norms(model):
            norm.take_over_affine()


def stale_rows(bank: NormBank) -> set[int | None]:
    """The copies whose statistics training has left behind: the set that the bank itself keeps."""
    return set() if bank.stale is None else bank.stale.rows


def rows_used(
    model: ConvertedModel, norms: dict[str, SwitchableNorm], requests: list[Bits | None]
) -> list[tuple[NormBank, int | None]]:
    """The copies of these norms that these uniform precisions use."""
    used: list[tuple[NormBank, int | None]] = []
    with _trusting(norms):
        for request in requests:
            with model.using_bits(request):
                used += [(norm.bank, norm.row) for norm in norms.values() if norm.bank is not None]
    return used


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


def _estimate_uniform(
    model: ConvertedModel,
    norms: dict[str, SwitchableNorm],
    batches: list[Tensor],
    requests: list[Bits | None],
    reference: Reference | None,
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
                estimate_active_copies(model, norms, batches, reference)
            estimated.add(selected)
            for norm in norms.values():
                _share_with_row(norm)


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


def _note_uniform(norms: dict[str, SwitchableNorm]) -> None:
    """Do for all banks what `NormBank.refresh` does for one, in one transfer."""
    banks = [norm.bank for norm in norms.values() if norm.bank is not None and norm.bank.widths]
    are_there = numbers_of([bank.uniform_is_finite() for bank in banks])
    for bank, is_there in zip(banks, are_there, strict=True):
        bank.has_uniform = bool(is_there)


def _require_finite_banks(norms: dict[str, SwitchableNorm]) -> None:
    statistics = {}
    for path, norm in norms.items():
        if norm.bank is not None:
            statistics[path] = norm.bank.running_mean, norm.bank.running_var
    _require_finite(statistics)


def _require_finite(statistics: dict[str, tuple[Tensor, Tensor]]) -> None:
    are_finite = numbers_of([_is_finite(*values) for values in statistics.values()])
    broken = [path for path, is_finite in zip(statistics, are_finite, strict=True) if not is_finite]
    if broken:
        msg = f"norm statistics of {shorten(broken, 3)} came out not finite: check the calibration "
        msg += "data"
        raise CalibrationError(msg)


def _is_finite(mean: Tensor, variance: Tensor) -> Tensor:
    return torch.isfinite(mean).all() & torch.isfinite(variance).all()
