"""`convert`: from the facts of a network to quantized layers and switchable norms, in place.

The graph decides what a layer is (first, last, depthwise, fed by what); this file decides what becomes of it, and
leaves a coverage report that names every Conv and Linear layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anyprec.bits import (
    LayerCandidates,
    check_bit_width,
    check_candidates,
    match_paths,
    uniform_widths,
)
from anyprec.errors import BitsError, ConversionError
from anyprec.model.converted import ConvertedClassifier, ConvertedModel
from anyprec.model.norm_copies import norm_rows, norm_widths
from anyprec.model.record import ConversionRecord, ConvertSettings, Coverage
from anyprec.network.facts import LayerFacts, NetworkFacts
from anyprec.network.graph import analyze
from anyprec.nn.layers import QuantizedLayer, QuantizedModule, quantize_layer, restore_layer
from anyprec.nn.matrices import QuantizedParameter, quantize_parameter, restore_parameters
from anyprec.nn.norms import NormSharing, SwitchableNorm, restore_norm, switch_norm
from anyprec.nn.operators import FUSING_TYPES, LAYER_TYPES, channel_axis
from anyprec.nn.owners import FunctionalOwner, intercept_in_owner, restore_owner
from anyprec.nn.specialize import Specialized, despecialize, specialize
from anyprec.runtime.batches import device_of

DEFAULT_BITS = (2, 3, 4, 5, 6, 8)


def convert(  # noqa: PLR0913 (settings, by keyword)
    model: nn.Module,
    bits: Sequence[int] = DEFAULT_BITS,
    *,
    activation_bits: Sequence[int] | None = None,
    first_last_bits: int | None = 8,
    depthwise_min_bits: int = 3,
    per_channel: bool = True,
    norm: NormSharing = "shared-affine",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    example_input: Tensor | None = None,
    inplace: bool = True,
) -> ConvertedModel:
    """Make every layer of `model` with a weight run at any of several bit-widths, sharing one weight.

    Layers are all Conv and Linear layers, subclasses included, and whatever else multiplies its input by a parameter:
    the packed projection of `nn.MultiheadAttention`, the matrices of an LSTM, a bare parameter in a matrix product.
    The model stays its own class, keeps its methods and parameter names, and runs in floating point, bit for bit as
    before, until `set_bits` is called. Calibrate it before that.

    Args:
        model: A float network: any timm or torch vision model.
        bits: Candidate bit-widths of weights and activations, from 2 to 8.
        activation_bits: Candidates of activations, if they differ from those of weights.
        first_last_bits: Fixed bit-width of the layers that read the image or make the output; None searches them too.
        depthwise_min_bits: Depthwise convolutions get no candidate below this one.
        per_channel: One weight step size per output channel (what deployment wants) instead of one per tensor.
        norm: BatchNorm copies: `"shared-affine"`, statistics per (weight, activation) pair of the layer before it, with
            one scale and shift for all; `"per-pair"`, a whole copy per pair (the paper's); `"shared"`, a single one, with the quantized weights of the layer before it corrected to the
            latent weight's mean and spread per channel (EMQNet).
        include: Patterns of the layers to quantize, all others staying float; None is every layer.
        exclude: Patterns of layers that stay float.
        example_input: A batch that the network accepts, to observe one forward pass; by default it is made from the
            network's own configuration. MACs are counted at its size.
        inplace: Change `model` itself and return it; False converts a deep copy.

    Returns:
        The converted model (`model` itself if `inplace`), of a class derived from its own and `ConvertedModel`.

    Raises:
        ConversionError: The model is converted already, has no layer to quantize, does not run on the example input,
            or a pattern matches nothing. The model is left as it was.
        BitsError: A bit-width is not supported.
        ValueError: `norm` is none of these.

    Example:
        >>> import timm, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet"), bits=(2, 4, 8))
        >>> model.candidates["layer1.0.conv1"]
        LayerCandidates(weight=(2, 4, 8), activation=(2, 4, 8))
    """
    _refuse_unfit(model)
    if norm not in get_args(NormSharing):
        msg = f"norm={norm!r} is not known: use one of {get_args(NormSharing)}"
        raise ValueError(msg)
    settings = ConvertSettings(
        bits=check_candidates(bits, what="bits"),
        activation_bits=check_candidates(
            bits if activation_bits is None else activation_bits, what="activation_bits"
        ),
        first_last_bits=None
        if first_last_bits is None
        else check_bit_width(first_last_bits, what="first_last_bits"),
        depthwise_min_bits=check_bit_width(depthwise_min_bits, what="depthwise_min_bits"),
        per_channel=per_channel,
        include=None if include is None else _patterns(include),
        exclude=_patterns(exclude),
        norm=norm,
    )
    if not inplace:
        model = copy.deepcopy(model)
    facts = _analyze(model, example_input)
    return apply_settings(model, settings, facts)


def apply_settings(
    model: nn.Module, settings: ConvertSettings, facts: NetworkFacts
) -> ConvertedModel:
    """Convert `model` in place, as `settings` say, on facts that are known already.

    Raises:
        ConversionError: A pattern matches nothing, or no layer is left to quantize.
    """
    coverage = _decide(model, settings, facts)
    quantized = [row.path for row in coverage if row.status == "quantized"]
    if not quantized:
        reasons = sorted({row.reason for row in coverage}) or ["it has no Conv or Linear layer"]
        msg = f"nothing to quantize in {type(model).__name__}: {'; '.join(reasons)}"
        raise ConversionError(msg)
    try:
        norms = _swap(model, settings, facts, quantized)
    except BaseException:
        revert(model)
        raise
    specialize(model, ConvertedClassifier if hasattr(model, "reset_classifier") else ConvertedModel)
    vars(model)["anyprec_record"] = ConversionRecord(settings, facts, coverage, norms)
    return model  # type: ignore[return-value]


def revert(model: nn.Module) -> None:
    """Make a converted model float again, in place: the inverse of `convert`. A float model is left as it is."""
    if isinstance(model, ConvertedModel):
        vars(model).pop("anyprec_record", None)
        despecialize(model)
    for module in list(model.modules()):
        if isinstance(module, FunctionalOwner):  # outermost, where a module is several of these
            restore_owner(module)
        if isinstance(module, QuantizedModule):
            restore_layer(module)
        elif isinstance(module, SwitchableNorm):
            restore_norm(module)
        elif isinstance(module, QuantizedParameter):
            restore_parameters(module.holder)


def _swap(
    model: nn.Module, settings: ConvertSettings, facts: NetworkFacts, paths: list[str]
) -> dict[str, str | None]:
    for path in paths:
        _quantize(model, facts.layers[path], settings)
    for owner, children in _functional_uses(model, facts, paths).items():
        intercept_in_owner(model.get_submodule(owner), children)
    candidates = (layer_candidates(facts.layers[path], settings) for path in paths)
    widths = () if settings.only is not None else uniform_widths(candidates)
    norms: dict[str, str | None] = {}
    for path, feeding in facts.norms.items():
        norm = model.get_submodule(path)
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.momentum is None:
            continue  # without running statistics, or with cumulative ones, there is nothing that could be switched
        layer = model.get_submodule(feeding) if feeding else None
        fed = layer if isinstance(layer, QuantizedLayer) else None
        switch_norm(
            norm,
            norm_rows(fed, settings.norm),
            shared_affine=settings.norm == "shared-affine",
            # What the first layer puts out depends on no other layer's precision.
            widths=()
            if feeding and facts.layers[feeding].first
            else norm_widths(fed, settings.norm, widths),
        )
        norms[path] = feeding if fed is not None else None
        if (
            fed is not None
            and settings.norm == "shared"
            and not facts.layers[feeding or ""].dynamic
        ):
            fed.weight_source.corrected_axis = channel_axis(fed)
    return norms


def _quantize(model: nn.Module, facts: LayerFacts, settings: ConvertSettings) -> None:
    candidates = layer_candidates(facts, settings)
    per_channel = settings.per_channel and not facts.per_tensor
    if facts.parameter is not None:
        holder, _, name = facts.parameter.rpartition(".")
        quantize_parameter(
            model.get_submodule(holder), name, candidates, axis=facts.axis if per_channel else None
        )
        return
    layer = model.get_submodule(facts.path)
    axis = channel_axis(layer) if per_channel else None
    quantize_layer(
        layer, candidates, nonnegative=facts.nonnegative, axis=axis, dynamic=facts.dynamic
    )


def layer_candidates(facts: LayerFacts, settings: ConvertSettings) -> LayerCandidates:
    """The bit-widths that a layer with these facts may take.

    Raises:
        BitsError: None of the candidates is allowed for a depthwise convolution.
    """
    if settings.only is not None and facts.path in settings.only:
        bits = settings.only[facts.path]
        return LayerCandidates((bits.weight,), (bits.activation,))
    if settings.first_last_bits is not None and (facts.first or facts.last):
        return LayerCandidates((settings.first_last_bits,), (settings.first_last_bits,))
    if not facts.depthwise:
        return LayerCandidates(settings.bits, settings.activation_bits)
    floor = settings.depthwise_min_bits
    weight = tuple(width for width in settings.bits if width >= floor)
    activation = tuple(width for width in settings.activation_bits if width >= floor)
    if not weight or not activation:
        msg = f"depthwise convolution {facts.path!r} has no candidate left from bits={settings.bits}, activation_bits="
        msg += f"{settings.activation_bits} with depthwise_min_bits={floor}: add a higher one or lower depthwise_min_bits"
        raise BitsError(msg)
    return LayerCandidates(weight, activation)


def _decide(
    model: nn.Module, settings: ConvertSettings, facts: NetworkFacts
) -> tuple[Coverage, ...]:
    included = (
        None if settings.include is None else _matched(settings.include, facts.layers, "include")
    )
    excluded = _matched(settings.exclude, facts.layers, "exclude")
    rows = []
    for path, layer in facts.layers.items():
        kind = type(model.get_submodule(path)).__name__ if layer.parameter is None else "Parameter"
        status, reason = "quantized", ""
        if path in excluded:
            status, reason = "exempt", f"excluded by {excluded[path]!r}"
        elif included is not None and path not in included:
            status, reason = "exempt", "not named by include"
        elif layer.problem is not None:
            status, reason = "skipped", layer.problem
        elif layer.constant:
            status, reason = (
                "exempt",
                "its input does not depend on the image, so deployment folds it into a constant",
            )
        rows.append(Coverage(path, kind, status, reason))
    return tuple(rows)


def _matched(patterns: Iterable[str], paths: Mapping[str, Any], argument: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern in patterns:
        try:
            found.update(dict.fromkeys(match_paths(pattern, paths), pattern))
        except BitsError as error:
            msg = f"{argument}: {error}"
            raise ConversionError(msg) from error
    return found


def _functional_uses(
    model: nn.Module, facts: NetworkFacts, paths: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Path of every module that uses weights without calling their layers, with these layers' paths relative to it."""
    owners: dict[str, list[str]] = {}
    for path in paths:
        owner = facts.layers[path].owner
        if owner is not None:
            owners.setdefault(owner, []).append(path)
    for owner, module in model.named_modules():
        if isinstance(module, FUSING_TYPES):
            inside = [path for path in paths if path.startswith(f"{owner}.") or not owner]
            owners.setdefault(owner, []).extend(
                path for path in inside if path not in owners[owner]
            )
    return {
        owner: tuple(path.removeprefix(f"{owner}.") if owner else path for path in children)
        for owner, children in owners.items()
        if children
    }


def _refuse_unfit(model: object) -> None:
    if not isinstance(model, nn.Module):
        msg = f"convert takes a torch.nn.Module, got {type(model).__name__}"
        raise ConversionError(msg)
    if isinstance(model, torch.jit.ScriptModule):
        msg = "convert cannot change a TorchScript module: convert the Python network before scripting it"
        raise ConversionError(msg)
    converted = next(
        (path for path, module in model.named_modules() if isinstance(module, Specialized)), None
    )
    if converted is not None:
        where = "it" if not converted else f"its {converted!r}"
        msg = f"{type(model).__name__} cannot be converted: {where} is converted already; create the float network anew"
        raise ConversionError(msg)
    if isinstance(model, LAYER_TYPES):
        msg = f"convert takes a network that holds layers, got a single {type(model).__name__}: wrap it in nn.Sequential"
        raise ConversionError(msg)


def _analyze(model: nn.Module, example_input: Tensor | None) -> NetworkFacts:
    device = device_of(model)
    if example_input is not None:
        if example_input.ndim == 0 or example_input.shape[0] == 0:
            msg = f"example_input has shape {tuple(example_input.shape)}: pass a batch of at least one sample"
            raise ConversionError(msg)
        return analyze(model, example_input.to(device))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    failure: ConversionError | None = None
    for shape in _likely_shapes(model):
        try:
            return analyze(model, torch.zeros((1, *shape), device=device, dtype=dtype))
        except ConversionError as error:
            failure = failure or error  # of the likeliest shape
    msg = f"cannot guess what input {type(model).__name__} takes: {failure}"
    raise ConversionError(msg) from failure


def _likely_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of one sample to try: what the network, or one inside it, says of itself; then the usual one."""
    configs = (getattr(module, "pretrained_cfg", None) for module in model.modules())
    config = next((config for config in configs if config), getattr(model, "default_cfg", None))
    sizes = [(224, 224)]
    channels = [3]
    if isinstance(config, Mapping) and config.get("input_size"):
        channels.insert(0, config["input_size"][0])
        sizes.insert(0, tuple(config["input_size"][1:]))
    first = next((m for m in model.modules() if isinstance(m, LAYER_TYPES)), None)
    if isinstance(getattr(first, "in_channels", None), int):
        channels.insert(0, first.in_channels)  # type: ignore[union-attr, arg-type]
    embeddings = (
        module for path, module in model.named_modules() if path.rpartition(".")[2] == "patch_embed"
    )
    size = getattr(next(embeddings, None), "img_size", None)
    if isinstance(size, (tuple, list)):
        sizes.insert(0, tuple(size))
    # The first layer knows best how many channels there are, unless the network rearranges pixels before it.
    return list(dict.fromkeys((count, *size) for count in channels for size in sizes))


def _patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
