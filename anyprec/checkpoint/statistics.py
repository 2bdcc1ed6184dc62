"""Norm statistics of single configurations in a file: tensors beside those of the network's state.

The n-th configuration that the document lists has the tensors `anyprec.statistics.N.PATH.mean` and
`.variance` for every norm at PATH.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anyprec.bits import BitConfig
from anyprec.checkpoint.document import Document
from anyprec.errors import BitsError, CheckpointError
from anyprec.model.converted import ConvertedModel
from anyprec.model.intact import switchable_norms
from anyprec.nn.norm_bank import Statistics

STATISTICS_PREFIX = "anyprec.statistics."
_PARTS = ("mean", "variance")


def statistics_tensors(model: ConvertedModel) -> dict[str, Tensor]:
    """The statistics of all configurations that have their own, by their names in a file."""
    tensors: dict[str, Tensor] = {}
    for number, norms in enumerate(model.anyprec_record.statistics.values()):
        for path, statistics in norms.items():
            tensors.update(zip(_names(number, path), statistics, strict=True))
    return tensors


def statistics_prefixes(document: Document, only: BitConfig | None) -> tuple[str, ...]:
    """What the names of all statistics start with, or of those of one configuration."""
    if only is None:
        return (STATISTICS_PREFIX,)
    return tuple(f"{STATISTICS_PREFIX}{number}." for number in _numbers(document, only))


def fitting_statistics(
    model: ConvertedModel,
    document: Document,
    tensors: Mapping[str, Tensor],
    *,
    only: BitConfig | None = None,
) -> dict[BitConfig, dict[str, Statistics]]:
    """The file's statistics by configuration, or those of one configuration.

    Raises:
        CheckpointError: A configuration does not fit the network, or the tensors are not those of
            its norms.
    """
    norms = {path: norm.running_mean for path, norm in switchable_norms(model)}
    numbers = _numbers(document, only)
    expected: dict[str, Tensor] = {}
    for number in numbers:
        for path, running_mean in norms.items():
            expected.update(dict.fromkeys(_names(number, path), running_mean))
    strange = expected.keys() ^ tensors.keys()
    if strange:
        msg = f"the checkpoint's norm statistics are not those of {len(document.statistics)} "
        msg += f"configurations of this network: {len(strange)} tensors are missing or too many, "
        msg += f"e.g. {min(strange)!r:.80}"
        raise CheckpointError(msg)
    for name, running_mean in expected.items():
        _require_statistic(name, tensors[name], running_mean)
    fitting: dict[BitConfig, dict[str, Statistics]] = {}
    for number in numbers:
        statistics: dict[str, Statistics] = {}
        for path in norms:
            mean, variance = _names(number, path)
            statistics[path] = tensors[mean], tensors[variance]
        fitting[_fitting_config(model, document.statistics[number])] = statistics
    return fitting


def _names(number: int, path: str) -> tuple[str, ...]:
    return tuple(f"{STATISTICS_PREFIX}{number}.{path}.{part}" for part in _PARTS)


def _numbers(document: Document, only: BitConfig | None) -> list[int]:
    configs = enumerate(document.statistics)
    return [number for number, config in configs if only is None or config == only]


def _require_statistic(name: str, tensor: Tensor, running_mean: Tensor) -> None:
    fits = tensor.shape == running_mean.shape and tensor.is_floating_point()
    if not fits or not torch.isfinite(tensor).all():
        msg = f"the checkpoint's {name!r:.80} is {tuple(tensor.shape)} {tensor.dtype}, expected "
        msg += f"finite numbers of shape {tuple(running_mean.shape)}"
        raise CheckpointError(msg)


def _fitting_config(model: ConvertedModel, config: BitConfig) -> BitConfig:
    try:
        resolved = model.resolve_bits(config)
    except BitsError as error:
        msg = "a configuration of the checkpoint's norm statistics does not fit the network: "
        msg += str(error)
        raise CheckpointError(msg) from error
    return config if resolved is None else resolved
