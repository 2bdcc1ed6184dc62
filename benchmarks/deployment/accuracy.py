"""EfficientNet-Lite0 with its ImageNet weights: an exported file against the network, on images."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import default_collate

import anyprec
from benchmarks.common.pretrained import efficientnet_lite0

PRECISIONS = ((8, 8), (4, 8), (4, 4))


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record for each placement, target and precision; calibrated, not trained."""
    images, labels = _images(options.data, options.count)
    half = options.count // 2
    for placement in options.placements:
        model = anyprec.convert(efficientnet_lite0().eval(), bits=(2, 4, 8), placement=placement)
        anyprec.calibrate(model, list(images[:half].split(25)))
        for target, suffix in (("onnx", ".onnx"), ("openvino", ".xml")):
            for bits in PRECISIONS:
                record = {"placement": placement, "target": target, "bits": list(bits)}
                report = _compare(model, bits, target, suffix, images[half:], labels[half:])
                yield {**record, **report}


def _compare(
    model: anyprec.ConvertedModel,
    bits: tuple[int, int],
    target: str,
    suffix: str,
    images: Tensor,
    labels: Tensor,
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        exported = anyprec.export(
            model, Path(folder) / f"network{suffix}", bits=bits, target=target
        )
        report = anyprec.check_export(model, exported, images, labels=labels, speed=False)
    logits = report.logits
    return {
        "images": len(images),
        "mean": logits.mean,
        "noise": logits.noise,
        "agreeing": logits.agreeing,
        "accuracy": logits.accuracy,
        "file_accuracy": logits.file_accuracy,
        "broken": len(report.broken),
        "bytes": report.size,
    }


def _images(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    transform = create_transform(224, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875)
    dataset = create_dataset(
        "",
        root=str(folder / "val.tar"),
        class_map=str(folder / "synsets.txt"),
        transform=transform,
    )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    pairs = [dataset[index] for index in order[:count].tolist()]
    images, labels = default_collate(pairs)
    return images, labels
