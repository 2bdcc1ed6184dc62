"""Networks that are not timm's, tried at full depth."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import anyprec
from anyprec.testing import check_promises, check_structure
from benchmarks.zoo.trials import as_json, parameter_count


def _torchvision(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    def create() -> nn.Module:
        import torchvision  # noqa: PLC0415 (only the networks that are not timm's need it)

        model: nn.Module = getattr(torchvision.models, name)(**arguments)
        return model

    return create


def _hugging_face(architecture: str, **arguments: Any) -> Callable[[], nn.Module]:
    def create() -> nn.Module:
        import transformers  # noqa: PLC0415 (an optional extra)

        config = getattr(transformers, f"{architecture}Config")(**arguments)
        model_class = getattr(transformers, f"{architecture}ForImageClassification")
        model: nn.Module = model_class(config)
        return model

    return create


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision/resnet18": _torchvision("resnet18"),
    "torchvision/mobilenet_v3_small": _torchvision("mobilenet_v3_small"),
    "torchvision/convnext_tiny": _torchvision("convnext_tiny"),
    "torchvision/swin_v2_t": _torchvision("swin_v2_t"),
    "torchvision/vit_b_16": _torchvision("vit_b_16", image_size=64),
    "transformers/ViT": _hugging_face("ViT", image_size=64),
    "transformers/ResNet": _hugging_face("ResNet"),
}
"""How to create each network."""

IMAGE_SIZE = 64


def try_network(name: str) -> dict[str, Any]:
    """The record of one of `NETWORKS`: structure and numbers."""
    torch.manual_seed(0)
    create = NETWORKS[name]
    start = time.perf_counter()
    with torch.device("meta"):
        model = create()
    class_name = type(model).__name__
    parameters = parameter_count(model)
    structure = check_structure(model, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta"))
    numbers = check_promises(create(), lambda: torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    return {
        "name": name,
        "class": class_name if isinstance(model, anyprec.ConvertedModel) else "",
        "parameters": parameters,
        "structure": as_json(structure),
        "features": {"none": "not timm's"},
        "numbers": as_json(numbers),
        "arguments": {"size": IMAGE_SIZE},
        "numbers_seconds": round(time.perf_counter() - start, 2),
    }
