"""Outputs of a file against those of the network: how far apart, and whether classes agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from anyprec.errors import BatchError
from anyprec.exporting.parity_report import LogitParity

_SHOWN = 5000
"""Pairs of logits that a report keeps to plot them."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """Outputs of the same network for the same images, computed in several ways.

    Attributes:
        network: In torch at the configuration, float32.
        lowered: Its graph in torch.
        file: In the runtime.
        alone: In the runtime, where the last layer gets the codes that it has in torch.
        double: In torch at the configuration, float64.
        floating: The float network in float32.
        floating_double: The float network in float64.
    """

    network: Tensor
    lowered: Tensor
    file: Tensor
    alone: Tensor | None
    double: Tensor
    floating: Tensor | None
    floating_double: Tensor | None


def joined(parts: Iterable[Outputs]) -> Outputs:
    """The outputs of several batches as one."""
    every = list(parts)

    def join(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in every]
        return None if tensors[0] is None else torch.cat(tensors)

    return Outputs(**{name: join(name) for name in Outputs.__dataclass_fields__})  # type: ignore[arg-type]


def compare_logits(outputs: Outputs, labels: Tensor | None) -> LogitParity:
    """What is to be known of the outputs.

    Args:
        outputs: Of all images.
        labels: Class of each image.

    Raises:
        BatchError: There is not one label for each image, or the outputs are no logits.
    """
    network, file = outputs.network, outputs.file
    spread = float(network.double().std())
    difference = (file - network).abs()
    scale = spread if spread > 0 else 1.0
    floating_noise = alone = agreeing = accuracy = file_accuracy = None
    if outputs.floating is not None and outputs.floating_double is not None:
        floating_noise = _noise(outputs.floating, outputs.floating_double)
    if outputs.alone is not None:
        alone = float((outputs.alone - network).abs().max()) / scale
    if network.ndim == 2:
        agreeing = int((network.argmax(1) == file.argmax(1)).sum())
    if labels is not None:
        accuracy, file_accuracy = _accuracy(network, labels), _accuracy(file, labels)
    return LogitParity(
        images=len(network),
        mean=float(difference.mean()) / scale,
        largest=float(difference.max()) / scale,
        lowered_largest=float((outputs.lowered - network).abs().max()) / scale,
        alone_largest=alone,
        noise=_noise(network, outputs.double),
        float_noise=floating_noise,
        agreeing=agreeing,
        accuracy=accuracy,
        file_accuracy=file_accuracy,
        pairs=_pairs(network, file),
    )


def _noise(single: Tensor, double: Tensor) -> float:
    """Mean difference of two precisions of torch, in standard deviations."""
    spread = float(double.std())
    return float((single.double() - double).abs().mean()) / (spread if spread > 0 else 1.0)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    if logits.ndim != 2 or labels.shape != (len(logits),):
        msg = f"labels of shape {tuple(labels.shape)} do not fit outputs of shape "
        msg += f"{tuple(logits.shape)}: pass the class of each image"
        raise BatchError(msg)
    return 100 * float((logits.argmax(1) == labels).double().mean())


def _pairs(network: Tensor, file: Tensor) -> tuple[tuple[float, float], ...]:
    """Logits of both, of at most a few thousand evenly chosen places."""
    stride = -(-network.numel() // _SHOWN)
    chosen = network.flatten()[::stride].tolist(), file.flatten()[::stride].tolist()
    return tuple(zip(*chosen, strict=True))
