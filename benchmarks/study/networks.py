"""The networks of the study: small ones of timm's, and EfficientNet-Lite0 with ImageNet weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock
from torch import nn

from benchmarks.common.pretrained import efficientnet_lite0


def thin_resnet(num_classes: int) -> nn.Module:
    """A timm ResNet of four basic blocks, 0.13 M parameters.

    At 32 px its stages have 16, 8, 4 and 2 positions a side.
    """
    settings: dict[str, Any] = {
        "block": BasicBlock,
        "layers": (1, 1, 1, 1),
        "channels": (16, 32, 48, 64),
        "stem_width": 8,
    }
    network = timm.create_model("test_resnet", num_classes=num_classes, **settings)
    network.maxpool = nn.Identity()
    return network


def small_mobile(num_classes: int) -> nn.Module:
    """A timm EfficientNet with the blocks of MobileNetV2, 0.1 M parameters.

    At 32 px its stages have 16, 8 and 4 positions a side.
    """
    blocks = [
        ["ds_r1_k3_s1_c16"],
        ["ir_r2_k3_s2_e6_c24"],
        ["ir_r2_k3_s2_e6_c40"],
        ["ir_r1_k3_s1_e6_c64"],
    ]
    return EfficientNet(
        decode_arch_def(blocks),
        num_classes=num_classes,
        num_features=256,
        stem_size=16,
        act_layer=nn.ReLU6,
    )


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet": thin_resnet,
    "mobile": small_mobile,
    "lite0": efficientnet_lite0,
}
"""How each network is made."""
