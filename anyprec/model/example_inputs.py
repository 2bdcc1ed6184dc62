"""The input that a network is observed on: the user's example, or a guess by its configuration."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.errors import ConversionError
from anyprec.network.analysis import analyze
from anyprec.network.facts import NetworkFacts
from anyprec.network.weights import named_layers
from anyprec.runtime.batches import device_of

USUAL_CHANNELS = 3
USUAL_SIZE = (224, 224)


def analyze_on_example(
    model: nn.Module, example_input: Any, *, outputs: bool = False
) -> NetworkFacts:
    """Facts of `model`, observed on an example input, or on a guessed one.

    Args:
        model: A float network.
        example_input: What the user gave.
        outputs: As for `analyze`.

    Raises:
        ConversionError: The example is no tensor or an empty batch, the network does not run on it,
            or no guess fits.
    """
    device = device_of(model)
    if example_input is None:
        return _analyze_on_guess(model, device, outputs=outputs)
    if not isinstance(example_input, Tensor):
        msg = f"example_input is a {type(example_input).__name__}: pass one tensor, a batch of "
        msg += "images as the network takes it, e.g. torch.zeros(1, 3, 224, 224); of an array, "
        msg += "torch.from_numpy makes one; of a list or mapping, pass the tensor in it"
        raise ConversionError(msg)
    if example_input.ndim == 0 or example_input.shape[0] == 0:
        msg = f"example_input has shape {tuple(example_input.shape)}: pass a batch of at least one "
        msg += "sample"
        raise ConversionError(msg)
    return analyze(model, example_input.to(device), outputs=outputs)


def _analyze_on_guess(model: nn.Module, device: torch.device, *, outputs: bool) -> NetworkFacts:
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(dtypes, torch.float32)
    first_error: ConversionError | None = None
    for shape in _likely_shapes(model):
        try:
            zeros = torch.zeros((1, *shape), device=device, dtype=dtype)
            return analyze(model, zeros, outputs=outputs)
        except ConversionError as error:
            first_error = first_error or error
    msg = f"cannot guess what input {type(model).__name__} takes: {first_error}"
    raise ConversionError(msg) from first_error


def _likely_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of one sample, the likeliest first."""
    channels: list[int] = []
    sizes: list[tuple[int, ...]] = []
    # The first layer knows best how many channels there are, unless the network rearranges pixels
    # before it.
    _, first_layer = next(named_layers(model), ("", None))
    in_channels = getattr(first_layer, "in_channels", None)
    if isinstance(in_channels, int):
        channels.append(in_channels)
    # timm's transformers are built for one image size, which need not be the configured one.
    size = _patch_embedding_size(model)
    if isinstance(size, (tuple, list)):
        sizes.append(tuple(size))
    configured = _configured_shape(model)
    if configured:
        channels.append(configured[0])
        sizes.append(tuple(configured[1:]))
    channels.append(USUAL_CHANNELS)
    sizes.append(USUAL_SIZE)
    shapes = dict.fromkeys(itertools.product(channels, sizes))
    return [(count, *size) for count, size in shapes]


def _configured_shape(model: nn.Module) -> Any:
    """What timm's configuration of the network, or of one inside it, says; None without one."""
    config = getattr(model, "default_cfg", None)
    for module in model.modules():
        if getattr(module, "pretrained_cfg", None):
            config = module.pretrained_cfg
            break
    return config.get("input_size") if isinstance(config, Mapping) else None


def _patch_embedding_size(model: nn.Module) -> Any:
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == "patch_embed":
            return getattr(module, "img_size", None)
    return None
