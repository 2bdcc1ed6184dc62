"""Time or memory in training: whether backward passes compute quantized weights again."""

from __future__ import annotations

from typing import get_args

from anyprec.model.converted import ConvertedModel, require_converted
from anyprec.nn.weights import LatentWeight, Recompute


def recompute_weights(model: ConvertedModel, when: Recompute) -> None:
    """Choose which quantized weights the backward pass computes again instead of keeping them.

    Gradients are the same bit for bit. What is kept takes the memory of one more copy of the
    weights between a forward pass and its backward pass; what is computed again takes time. A
    converted model begins with `"auto"`. The choice holds for the views of the model, too, and goes
    with its copies, but into no file. Compiled networks keep what the compiler decides.

    Args:
        model: A converted model.
        when: `"auto"`: a layer computes its weight again where that is larger than a quarter of
            the input that it multiplies and than 16,384 elements. `"always"`: the least memory.
            `"never"`: the least time.

    Raises:
        ConversionError: `model` is not converted.
        ValueError: `when` is none of these.

    Example:
        >>> import timm, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet"))
        >>> anyprec.recompute_weights(model, "never")
    """
    if when not in get_args(Recompute):
        msg = f"when={when!r} is not known: use one of {get_args(Recompute)}"
        raise ValueError(msg)
    layers = require_converted(model, purpose="recompute_weights").quantized_layers
    for layer in layers.values():
        if isinstance(layer.weight_source, LatentWeight):
            layer.weight_source.recompute = when
