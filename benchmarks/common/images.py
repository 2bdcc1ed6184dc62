"""Labelled images in memory: reading an archive, batches of augmented images, accuracy.

Images are bytes, shape `(count, 3, size, size)`. Batches are floating point with mean 0.5 and
deviation 0.5, as timm's EfficientNet-Lite expects, in channels-last order.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

Images = tuple[Tensor, Tensor]
"""Bytes of images, and their labels."""


def load(archive: Path, count: int, *, skip: int = 0, size: int = 32) -> Images:
    """`count` images of an archive after the first `skip`, in an order that is always the same."""
    transform = create_transform(
        (3, size, size), crop_pct=1.0, interpolation="bicubic", normalize=False
    )
    dataset = create_dataset("", root=str(archive), transform=transform)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    chosen = order[skip : skip + count].tolist()
    if len(chosen) < count:
        msg = f"{archive} holds {len(dataset)} images: no {count} after the first {skip}"
        raise ValueError(msg)
    images, labels = default_collate(list(map(dataset.__getitem__, chosen)))
    return images, labels


def batches(images: Images, batch_size: int, *, training: bool, seed: int = 0) -> DataLoader[Any]:
    """Batches: in training shuffled and augmented, otherwise all of them in order."""

    def collate(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        pixels, labels = zip(*pairs, strict=True)
        if training:
            pixels = tuple(map(augmented, pixels))
        stacked = torch.stack(pixels).contiguous(memory_format=torch.channels_last)
        return stacked.float().div_(127.5).sub_(1), torch.stack(labels)

    return DataLoader(
        TensorDataset(*images),
        batch_size=batch_size,
        shuffle=training,
        drop_last=training,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(seed),
    )


def augmented(image: Tensor) -> Tensor:
    """Mirrored with probability 1/2, and shifted by up to an eighth of its size."""
    size = image.shape[-1]
    most = size // 8
    across, down = torch.randint(0, 2 * most + 1, (2,)).tolist()
    grey = 128 if image.dtype == torch.uint8 else 0
    padded = nn.functional.pad(image, (most,) * 4, value=grey)
    shifted = padded[:, down : down + size, across : across + size]
    if torch.rand(()) < 0.5:
        return shifted.flip(2)
    return shifted


@torch.no_grad()
def accuracy(network: nn.Module, held: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Top-1 in percent, in eval mode, on the device of the network."""
    network.eval()
    device = next(network.parameters()).device
    right, count = 0, 0
    for images, labels in held:
        right += int((network(images.to(device)).argmax(dim=1) == labels.to(device)).sum())
        count += len(labels)
    return 100 * right / count
