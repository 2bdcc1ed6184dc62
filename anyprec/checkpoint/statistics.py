"""Norm statistics of single configurations in a file: tensors of their own, beside those of the network's state.

The n-th configuration that the document lists has the tensors `anyprec.statistics.N.PATH.mean` and `.variance` for
every norm at PATH.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from anyprec.bits import BitConfig
from anyprec.checkpoint.document import Document
from anyprec.errors import BitsError, CheckpointError
from anyprec.model.converted import ConvertedModel
from anyprec.nn.norm_bank import Statistics
from anyprec.nn.norms import SwitchableNorm

_PREFIX = "anyprec.statistics."
_PARTS = ("mean", "variance")


def statistics_tensors(model: ConvertedModel) -> dict[str, Tensor]:
    """The statistics of all configurations that have their own, by the names that they have in a file."""
    return {
        f"{_PREFIX}{number}.{path}.{part}": tensor
        for number, norms in enumerate(model.anyprec_record.statistics.values())
        for path, statistics in norms.items()
        for part, tensor in zip(_PARTS, statistics, strict=True)
    }


def is_statistic(name: str, number: int | None = None) -> bool:
    """Whether a tensor of this name belongs to a configuration's statistics, or to those of the configuration `number`."""
    return name.startswith(_PREFIX if number is None else f"{_PREFIX}{number}.")


def fitting_statistics(
    model: ConvertedModel,
    document: Document,
    tensors: Mapping[str, Tensor],
    *,
    only: BitConfig | None = None,
) -> dict[BitConfig, dict[str, Statistics]]:
    """The file's statistics by configuration, or those of one configuration.

    Raises:
        CheckpointError: A configuration does not fit the network, or the tensors are not those of its norms.
    """
    norms = {
        path: norm.running_mean
        for path in model.anyprec_record.norms
        if isinstance(norm := model.get_submodule(path), SwitchableNorm)
    }
    numbers = [
        number
        for number, config in enumerate(document.statistics)
        if only is None or config == only
    ]
    expected = {
        f"{_PREFIX}{number}.{path}.{part}": like
        for number in numbers
        for path, like in norms.items()
        for part in _PARTS
    }
    strange = sorted(expected.keys() ^ tensors.keys())
    if strange:
        msg = f"the checkpoint's norm statistics are not those of {len(document.statistics)} configurations of this "
        msg += f"network: {len(strange)} tensors are missing or too many, e.g. {strange[0]!r:.80}"
        raise CheckpointError(msg)
    for name, like in expected.items():
        tensor = tensors[name]
        if (
            tensor.shape != like.shape
            or not tensor.is_floating_point()
            or not torch.isfinite(tensor).all()
        ):
            msg = f"the checkpoint's {name!r:.80} is {tuple(tensor.shape)} {tensor.dtype}, expected finite numbers of shape "
            msg += f"{tuple(like.shape)}"
            raise CheckpointError(msg)
    found: dict[BitConfig, dict[str, Statistics]] = {}
    for number in numbers:
        mean, variance = (
            {path: tensors[f"{_PREFIX}{number}.{path}.{part}"] for path in norms} for part in _PARTS
        )
        found[_fitting(model, document.statistics[number])] = {
            path: (mean[path], variance[path]) for path in norms
        }
    return found


def _fitting(model: ConvertedModel, config: BitConfig) -> BitConfig:
    try:
        resolved = model.resolve_bits(config)
    except BitsError as error:
        msg = (
            f"a configuration of the checkpoint's norm statistics does not fit the network: {error}"
        )
        raise CheckpointError(msg) from error
    return config if resolved is None else resolved
