"""A promise about weights, for the sake of speed: they are not changed behind torch's back."""

from __future__ import annotations

from anyprec.model.converted import ConvertedModel, require_converted


def trust_weights(model: ConvertedModel, *, trusted: bool = True) -> None:
    """Keep quantized weights in eval mode without comparing the values of weights. For serving.

    In eval mode without gradients, each layer keeps its quantized weight for as long as the weight
    does not change. That is checked in each forward pass: on a CPU by the values of float32 and
    float64 weights, which takes a few per cent of its time. On other devices, and of other dtypes,
    a weight is quantized in each pass. With trust it is kept everywhere, for as long as torch's own
    record shows no change. Optimizers, `copy_`, loading and every other operation on a parameter
    are on the record. What is not: writing through `.data`, a NumPy array or DLPack, and from
    another process. Who does that, such as for a moving average by hand, must not trust, or call
    this again after each change.

    Copies of a trusted model are not trusted.

    Args:
        model: A converted model; its outputs stay the same.
        trusted: False ends the trust.

    Raises:
        ConversionError: `model` is not converted.

    Example:
        >>> import timm, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet")).eval()
        >>> anyprec.trust_weights(model)
    """
    for layer in require_converted(model, purpose="trust_weights").quantized_layers.values():
        layer.weight_source.trusted = trusted
        # What was kept before may be out of date by now.
        layer.weight_source.forget()
