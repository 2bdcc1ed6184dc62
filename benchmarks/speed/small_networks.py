"""Networks of the structure of well-known ones with few channels: their time is the host's.

What remains of a step on them is Python and the dispatch of operations, which is what a GPU waits
for. The same networks serve counts of launches, and comparisons of weights after training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.efficientnet import _gen_mobilenet_v2
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

import anyprec
from anyprec.model.converted import ConvertedModel

CLASSES = 10


@dataclass(frozen=True)
class Pair:
    """A float network, its converted and calibrated copy, and a batch for both."""

    network: nn.Module
    model: ConvertedModel
    images: Tensor
    labels: Tensor


criterion = nn.functional.cross_entropy
"""The loss that all of these benchmarks train by."""


def make_pair(name: str, *, batch: int = 2, **conversion: Any) -> Pair:
    """Both networks with the same weights, which are always the same.

    Args:
        name: A key of `NETWORKS`.
        batch: Images in the batch.
        **conversion: Arguments of `convert`.
    """
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    network = make()
    images = torch.randn(batch, 3, size, size)
    labels = torch.randint(CLASSES, (batch,))
    model = anyprec.convert(copy.deepcopy(network), example_input=images[:1], **conversion)
    anyprec.calibrate(model, [images], norm_batches=1)
    return Pair(network, model, images, labels)


def _resnet18() -> nn.Module:
    channels = (8, 8, 8, 8)
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=CLASSES, channels=channels, stem_width=8)


def _mobilenetv2() -> nn.Module:
    network: nn.Module = _gen_mobilenet_v2(
        "mobilenetv2_100", channel_multiplier=0.05, num_classes=CLASSES
    )
    return network


def _vit_tiny() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, embed_dim=24, num_heads=3, num_classes=CLASSES
    )


def _vit_base() -> nn.Module:
    return timm.create_model(
        "vit_base_patch16_224", img_size=16, embed_dim=24, num_heads=3, num_classes=CLASSES
    )


def _named(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return timm.create_model(name, num_classes=CLASSES, **options)

    return make


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (_resnet18, 33),
    "mobilenetv2_100": (_mobilenetv2, 33),
    "vit_tiny_patch16_224": (_vit_tiny, 16),
    "vit_base_patch16_224": (_vit_base, 16),
    "test_resnet": (_named("test_resnet"), 32),
    "test_efficientnet": (_named("test_efficientnet"), 32),
    "test_nfnet": (_named("test_nfnet"), 32),
    "test_vit": (_named("test_vit", img_size=32), 32),
}
"""Name of a network to what makes it with few channels, and the size of its images."""
