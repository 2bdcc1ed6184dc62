"""The costs of a converted network, for `cost.py`: MACs and weights from its record."""

from __future__ import annotations

from anyprec.bits import BitConfig
from anyprec.model.converted import BitsRequest, ConvertedModel, require_converted
from anyprec.model.cost import Cost, CostModel, LayerCost, Uncounted

_QUANTIZATION = ("weight_quantizer.", "input_quantizer.", "bank.")
"""Parts of the names of parameters that conversion adds."""


def cost_model(model: ConvertedModel) -> CostModel:
    """The costs of every configuration of a converted model.

    They are counted at the input size that the model was converted with.

    Raises:
        ConversionError: `model` is not converted.
    """
    require_converted(model, purpose="cost_model")
    facts = model.anyprec_record.facts
    layers = {}
    steps = 0
    for path, layer in model.quantized_layers.items():
        layers[path] = LayerCost(path, facts.layers[path].macs, facts.layers[path].weights)
        steps += layer.weight_quantizer.step.shape[1] + 1
    parameters = 0
    for name, parameter in model.named_parameters():
        if not any(part in name for part in _QUANTIZATION):
            parameters += parameter.numel()
    return CostModel(
        layers=layers,
        candidates=model.candidates,
        uncounted=_uncounted(model),
        float_parameters=parameters - sum(layer.weights for layer in layers.values()),
        steps=steps,
        input_shape=facts.example_shape[1:],
    )


def cost_of(model: ConvertedModel, bits: BitsRequest | BitConfig = "active") -> Cost:
    """What a configuration of a converted model costs.

    Args:
        model: A converted model.
        bits: Anything that `set_bits` takes; by default the active configuration.

    Raises:
        ConversionError: `model` is not converted.
        BitsError: `bits` does not fit the model.

    Example:
        >>> import timm, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet"))
        >>> anyprec.cost_of(model, 4).bitops < anyprec.cost_of(model, 8).bitops
        True
    """
    require_converted(model, purpose="cost_of")
    config = model.bits if bits == "active" else model.resolve_bits(bits)
    return cost_model(model).cost(config)


def _uncounted(model: ConvertedModel) -> tuple[Uncounted, ...]:
    facts = model.anyprec_record.facts
    entries = []
    for row in model.coverage:
        if row.status != "quantized":
            layer = facts.layers[row.path]
            reason = f"float layer: {row.reason}"
            entries.append(Uncounted(row.path, layer.calls, layer.macs, reason))
    for name, (calls, macs) in facts.uncounted.items():
        reason = "no Conv or Linear layer: runs in floating point"
        entries.append(Uncounted(name, calls, macs, reason))
    return tuple(entries)
