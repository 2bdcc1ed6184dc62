"""`update_norms`: running means and variances of BatchNorm layers, re-estimated from a few batches.

Statistics differ between precisions, so each copy is estimated at the precision that it belongs to
(Yu and Huang, "Slimmable networks", 2019). Scale and shift of the copies are learned in training
and stay as they are.

Here is which statistics are estimated: those asked for, or those that training has left behind.
Switching the network to each precision is the matter of `norm_updates.py`, measuring that of
`norm_inputs.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch

from anyprec.bits import BitConfig, Bits, uniform_widths
from anyprec.calibration.norm_inputs import float_statistics
from anyprec.calibration.norm_updates import (
    rows_used,
    stale_rows,
    update_configuration,
    update_copies,
)
from anyprec.calibration.passes import held_images, require_count
from anyprec.errors import BitsError
from anyprec.model.converted import BitsRequest, ConvertedModel, require_converted
from anyprec.model.intact import switchable_norms
from anyprec.nn.norms import SwitchableNorm
from anyprec.runtime.batches import Batch
from anyprec.runtime.modes import evaluating


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
    update_configuration(model, dict(switchable_norms(model)), images, config)


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
        update_copies(model, norms, images, uniform)
    for config in missing:
        update_configuration(model, norms, images, config)


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
    return any(row in stale_rows(bank) for bank, row in rows_used(model, norms, requests))


def _update_all_copies(
    model: ConvertedModel,
    loader: Iterable[Batch],
    limit: int | None,
    *,
    anchored: bool,
    include_float: bool,
) -> None:
    """Estimate every copy of every norm, and the statistics beside them."""
    norms = norms_with_copies(model)
    if not norms:
        return
    requests: list[Bits | None] = [*pairs_of_copies(model)]
    if include_float:
        requests.append(None)
    images = held_images(model, loader, limit, purpose="update_norms")
    reference = None
    if anchored:
        with evaluating(model), torch.no_grad():
            reference = float_statistics(model, norms, images)
    update_copies(model, norms, images, requests, reference=reference)


def norms_with_copies(model: ConvertedModel) -> dict[str, SwitchableNorm]:
    """The norms that have copies, by path: those that precisions do not share."""
    return {path: norm for path, norm in switchable_norms(model) if norm.bank is not None}


def pairs_of_copies(model: ConvertedModel) -> list[Bits]:
    """Precisions whose uniform configurations reach every copy of every norm."""
    weight: set[int] = set()
    activation: set[int] = set()
    for candidates in model.candidates.values():
        weight.update(candidates.weight)
        activation.update(candidates.activation)
    return [Bits(*pair) for pair in itertools.product(sorted(weight), sorted(activation))]


def _is_trained(norm: SwitchableNorm) -> bool:
    """Whether training moved the statistics of its copies."""
    return norm.bank is not None and norm.bank.stale is not None
