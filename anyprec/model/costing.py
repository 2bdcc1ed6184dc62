"""The costs of a converted network, for `cost.py`: MACs and weights from its record.

Layers may share one weight. It is counted once; its codes are too, where the layers that read it
would store the same ones.
"""

from __future__ import annotations

import torch

from anyprec.bits import BitConfig
from anyprec.model.converted import BitsRequest, ConvertedModel, require_converted
from anyprec.model.cost import Cost, CostModel, LayerCost, Uncounted
from anyprec.model.intact import output_quantizers
from anyprec.network.facts import LayerFacts
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.outputs import OUTPUTS
from anyprec.nn.weights import PackedCodes

_QUANTIZATION = ("weight_quantizer.", "input_quantizer.", "bank.", f"{OUTPUTS}.")
"""Parts of the names of parameters that conversion adds."""


def cost_model(model: ConvertedModel) -> CostModel:
    """The costs of every configuration of a converted model.

    They are counted at the input size that the model was converted with, or that of the images
    that it was calibrated on or searched with since.

    Raises:
        ConversionError: `model` is not converted.
    """
    require_converted(model, purpose="cost_model")
    facts = model.anyprec_record.facts
    weights, codes = tied_weights(model), tied_codes(model)
    layers = {}
    steps = len(output_quantizers(model))
    for path, layer in model.quantized_layers.items():
        layers[path] = LayerCost(
            path,
            facts.layers[path].macs,
            facts.layers[path].weights,
            weights_of=weights.get(path),
            codes_of=codes.get(path),
        )
        steps += layer.weight_quantizer.step.shape[1] + 1
    return CostModel(
        layers=layers,
        candidates=model.candidates,
        uncounted=_uncounted(model),
        float_parameters=_float_parameters(model, layers),
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


def tied_weights(model: ConvertedModel) -> dict[str, str]:
    """Path of each quantized layer whose weight is that of an earlier one, to the path of that."""
    facts = model.anyprec_record.facts.layers
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # What is computed in every forward pass is no parameter, and belongs to its layer alone. A
    # layer that multiplies by products of others (a mixture of experts) has no weights.
    first: dict[int, str] = {}
    tied = {}
    for path in model.quantized_layers:
        parameter = parameters.get(weight_name(facts[path]))
        if parameter is None or not facts[path].weights:
            continue
        earlier = first.setdefault(id(parameter), path)
        if earlier != path:
            tied[path] = earlier
    return {**tied_codes(model), **tied}


def tied_codes(model: ConvertedModel) -> dict[str, str]:
    """Path of each quantized layer to that of an earlier one which has the same codes.

    Both have one weight, and equal candidates and step sizes. Training moves step sizes apart:
    then each layer needs codes of its own.
    """
    layers, facts = model.quantized_layers, model.anyprec_record.facts.layers
    groups: dict[object, list[str]] = {}
    tied = {}
    for path, layer in layers.items():
        if facts[path].dynamic or facts[path].derived or not facts[path].weights:
            continue
        quantizer, source = layer.weight_quantizer, layer.weight_source
        identity: object = tuple(layer.weight.shape)
        if not isinstance(source, PackedCodes):
            identity = id(layer.weight)
        key = identity, quantizer.candidates, quantizer.axis, source.corrected_axis
        group = groups.setdefault(key, [])
        for earlier in group:
            if _have_same_codes(layers[earlier], layer):
                tied[path] = earlier
                break
        else:
            group.append(path)
    return tied


def weight_name(facts: LayerFacts) -> str:
    """Name of the parameter that is the layer's latent weight."""
    return facts.parameter or f"{facts.path}.weight"


def _have_same_codes(layer: QuantizedLayer, other: QuantizedLayer) -> bool:
    """Whether two layers of one weight, or of as many codes, quantize it alike."""
    if not torch.equal(layer.weight_quantizer.step, other.weight_quantizer.step):
        return False
    source, other_source = layer.weight_source, other.weight_source
    if isinstance(source, PackedCodes) and isinstance(other_source, PackedCodes):
        buffers = dict(source.operand.named_buffers())
        other_buffers = dict(other_source.operand.named_buffers())
        if buffers.keys() != other_buffers.keys():
            return False
        return all(torch.equal(buffers[name], other_buffers[name]) for name in buffers)
    return True


def _float_parameters(model: ConvertedModel, layers: dict[str, LayerCost]) -> int:
    """Number of parameters that stay in floating point.

    A quantized weight that another module reads as well (the table of an embedding) is one.
    """
    facts = model.anyprec_record.facts.layers
    # A layer without weights of its own multiplies by products of others.
    quantized = {weight_name(facts[path]): path for path, layer in layers.items() if layer.weights}
    names, sizes = _parameters_by_id(model)
    total = 0
    for identity, names_of_parameter in names.items():
        if not names_of_parameter <= quantized.keys():
            total += sizes[identity]
    # A weight that is computed (a parametrization) is no parameter, but what it is made of is.
    computed = quantized.keys() - set().union(*names.values())
    return total - sum(layers[quantized[name]].weights for name in computed)


def _parameters_by_id(model: ConvertedModel) -> tuple[dict[int, set[str]], dict[int, int]]:
    """All names and the size of each parameter that conversion did not add, by its id."""
    names: dict[int, set[str]] = {}
    sizes: dict[int, int] = {}
    # A module that stands at two paths is listed once.
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{prefix}{name}"
            if not any(part in full_name for part in _QUANTIZATION):
                names.setdefault(id(parameter), set()).add(full_name)
                sizes[id(parameter)] = parameter.numel()
    return names, sizes


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
