"""`convert`: from the facts of a network to quantized layers and switchable norms, in place.

Which layers are quantized, and at which bit-widths, is decided in `selection.py`; which input the
network is observed on, in `example_inputs.py`. How a layer is quantized is in `anyprec.nn`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anyprec.bits import check_bit_width, uniform_widths
from anyprec.model.checks import refuse_unfit
from anyprec.model.classifier import ConvertedClassifier
from anyprec.model.converted import ConvertedModel
from anyprec.model.example_inputs import analyze_on_example
from anyprec.model.intact import Structure
from anyprec.model.kinds import with_kinds
from anyprec.model.names import require_free_names
from anyprec.model.norm_copies import norm_rows, norm_widths
from anyprec.model.placement import Placement, add_outputs, place_outputs, trunk_of
from anyprec.model.precision import ActivePrecision
from anyprec.model.presets import make_settings, require_one_of
from anyprec.model.record import ConversionRecord, ConvertSettings, quantized_paths
from anyprec.model.restoring import restored_on_error
from anyprec.model.selection import layer_candidates, select_layers
from anyprec.network.facts import LayerFacts, NetworkFacts
from anyprec.nn.bodies import FUSING_TYPES
from anyprec.nn.channels import Axis, output_axis
from anyprec.nn.grids import ActivationGrid, ActivationScale
from anyprec.nn.layers import QuantizedLayer, QuantizedModule, quantize_layer, restore_layer
from anyprec.nn.matrices import QuantizedParameter, quantize_parameter, restore_parameters
from anyprec.nn.norms import NormSharing, SwitchableNorm, restore_norm, switch_norm
from anyprec.nn.operators import channel_axis
from anyprec.nn.outputs import OutputQuantizer, restore_outputs
from anyprec.nn.owners import FunctionalOwner, intercept_in_owner, restore_owner
from anyprec.nn.specialize import despecialize, specialize
from anyprec.nn.staleness import TrainedNetwork


def convert(  # noqa: PLR0913 (settings, by keyword)
    model: nn.Module,
    bits: Sequence[int] | None = None,
    *,
    activation_bits: Sequence[int] | None = None,
    first_last_bits: int | None = 8,
    depthwise_min_bits: int = 3,
    per_channel: bool | None = None,
    activation_grid: ActivationGrid | None = None,
    activation_scale: ActivationScale | None = None,
    hardware: str | None = None,
    norm: NormSharing = "shared-affine",
    placement: Placement | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    example_input: Tensor | None = None,
    inplace: bool = True,
) -> ConvertedModel:
    """Make every layer of `model` run at any of several bit-widths, with one set of weights.

    Layers are all Conv and Linear layers, subclasses included, and whatever else multiplies its
    input by a parameter: the packed projection of `nn.MultiheadAttention`, the matrices of an
    LSTM, a bare parameter in a matrix product. The model stays its own class, keeps its methods
    and parameter names, and runs in floating point, bit for bit as before, until `set_bits` is
    called. Calibrate it before that.

    Args:
        model: A float network: any timm or torch vision model.
        bits: Candidate bit-widths of weights and activations, from 2 to 8; by default 2, 3, 4, 5, 6
            and 8, or those of them that `hardware` runs.
        activation_bits: Candidates of activations, if they differ from those of weights.
        first_last_bits: Fixed bit-width of the layers that read the image or make the output; None
            searches them too.
        depthwise_min_bits: Depthwise convolutions get no candidate below this one.
        per_channel: One weight step size per output channel (what deployment wants; the default)
            instead of one per tensor.
        activation_grid: Where real zero may lie among the codes of an input. `"affine"` (the
            default): at a zero point from calibration. `"symmetric"`: at code 0 of inputs that
            cannot be negative, in the middle of the others' codes. `"signed"`: in the middle of all
            codes, also of inputs that cannot be negative.
        activation_scale: `"any"` (the default), or `"power-of-two"`: inputs are quantized with the
            power of two nearest to the step size that is learned.
        hardware: A target, whose demands are the defaults of all these arguments: each layer gets
            the bit-widths that the target runs for its kind. An argument that contradicts it is
            refused. See `anyprec.hardware`.
        norm: BatchNorm copies. `"shared-affine"`: statistics per (weight, activation) pair of the
            layer before it, with one scale and shift for all. `"per-pair"`: a whole copy per pair
            (the paper's). `"shared"`: a single one, with the quantized weights of the layer before
            it corrected to the latent weight's mean and spread per channel (EMQNet).
        placement: Where activations are quantized. `"layers"` (the default): at the inputs of
            layers (the paper's). `"integer"`: also at the outputs of layers, sums of two
            activations and averages over space, at 8 bits and behind the norm and the clamp that
            follow, so that 8-bit runtimes can compute with integers throughout. That of `hardware`
            is a recommendation: either may be passed.
        include: Patterns of the layers to quantize, all others staying float; None is every layer.
        exclude: Patterns of layers that stay float.
        example_input: A batch that the network accepts, to observe one forward pass; by default it
            is made from the network's own configuration. MACs are counted at its size,
            until `calibrate` or `search` sees images of another one.
        inplace: Change `model` itself and return it; False converts a deep copy.

    Returns:
        The converted model (`model` itself if `inplace`), of a class derived from its own and
        `ConvertedModel`.

    Raises:
        ConversionError: The model is converted already, has no layer to quantize, does not run on
            the example input, a pattern matches nothing, a module has something of its own under a
            name that conversion needs, or an argument contradicts `hardware`. The model is left as
            it was.
        HardwareError: `hardware` is not known.
        BitsError: A bit-width is not supported, or nothing is left that `hardware` runs a layer at.
        ValueError: `norm`, `placement`, `activation_grid` or `activation_scale` is none of these.

    Example:
        >>> import timm, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet"), bits=(2, 4, 8))
        >>> model.candidates["layer1.0.conv1"]
        LayerCandidates(weight=(2, 4, 8), activation=(2, 4, 8))
    """
    refuse_unfit(model)
    require_one_of("norm", norm, get_args(NormSharing))
    settings = make_settings(
        hardware,
        bits=bits,
        activation_bits=activation_bits,
        first_last_bits=first_last_bits,
        per_channel=per_channel,
        activation_grid=activation_grid,
        activation_scale=activation_scale,
        depthwise_min_bits=check_bit_width(depthwise_min_bits, what="depthwise_min_bits"),
        include=None if include is None else _as_patterns(include),
        exclude=_as_patterns(exclude),
        norm=norm,
        placement=placement,
    )
    if not inplace:
        model = copy.deepcopy(model)
    has_outputs = settings.placement == "integer"
    facts = analyze_on_example(model, example_input, outputs=has_outputs)
    if settings.pairs is not None:
        # Known before outputs are placed: what the target cannot run is not among their readers.
        facts = with_kinds(model, facts)
    if has_outputs:
        facts = place_outputs(facts, quantized_paths(select_layers(model, settings, facts)))
    return apply_settings(model, settings, facts)


def apply_settings(
    model: nn.Module, settings: ConvertSettings, facts: NetworkFacts
) -> ConvertedModel:
    """Convert `model` in place, as `settings` say, on facts that are known already.

    Raises:
        ConversionError: A pattern matches nothing, no layer is left to quantize, or a module has
            something of its own under a name that conversion takes. The model is left as it was.
    """
    if settings.pairs is not None:
        facts = with_kinds(model, facts)
    coverage = select_layers(model, settings, facts)
    paths = quantized_paths(coverage)
    owners = _functional_uses(model, facts, paths)
    norm_paths = _switchable_paths(model, facts)
    has_classifier = hasattr(type(model), "reset_classifier")
    mixin = ConvertedClassifier if has_classifier else ConvertedModel
    require_free_names(model, facts, paths=paths, owners=owners, norms=norm_paths, mixin=mixin)
    with restored_on_error(model):
        # First, so that all else can be taken back without them.
        outputs = add_outputs(model, facts, rule=settings.grid_rule)
        for path in paths:
            _quantize(model, facts.layers[path], settings, trunk_of(path, facts, outputs))
        for owner, children in owners.items():
            intercept_in_owner(model.get_submodule(owner), children)
        norms = _make_norms_switchable(model, settings, facts, norm_paths, paths)
        if settings.norm == "shared":
            _correct_moments(model, facts, norms)
        record = ConversionRecord(settings, facts, coverage, norms)
        specialize(model, mixin)
        vars(model).update(anyprec_record=record, anyprec_structure=Structure())
        converted: ConvertedModel = model  # type: ignore[assignment]
        ActivePrecision({}).connect(converted)
    return converted


def revert(model: nn.Module) -> None:
    """Make a converted model float again, in place: the inverse of `convert`.

    A float model is left as it is.
    """
    if isinstance(model, ConvertedModel):
        restore_class(model)
    for module in list(model.modules()):
        # A module may be an owner and a quantized layer; it was made an owner last.
        if isinstance(module, FunctionalOwner):
            restore_owner(module)
        if isinstance(module, QuantizedModule):
            restore_layer(module)
        elif isinstance(module, SwitchableNorm):
            restore_norm(module)
        elif isinstance(module, QuantizedParameter):
            restore_parameters(module.holder)
    restore_outputs(model)


def restore_class(model: ConvertedModel) -> None:
    """Give a converted model its own class back, in place; its layers and norms stay converted."""
    for name in ("anyprec_record", "anyprec_structure", "anyprec_precision"):
        vars(model).pop(name, None)
    despecialize(model)


def _quantize(
    model: nn.Module,
    facts: LayerFacts,
    settings: ConvertSettings,
    trunk: OutputQuantizer | None,
) -> None:
    candidates = layer_candidates(facts, settings)
    per_channel = settings.per_channel and not facts.per_tensor
    if facts.parameter is not None:
        holder, _, name = facts.parameter.rpartition(".")
        axis = _output_axis(model, facts) if per_channel else None
        quantize_parameter(
            model.get_submodule(holder),
            name,
            candidates,
            axis=axis,
            rule=settings.grid_rule,
            trunk=trunk,
        )
    else:
        layer = model.get_submodule(facts.path)
        axis = _output_axis(model, facts) if per_channel else None
        quantize_layer(
            layer,
            candidates,
            nonnegative=facts.nonnegative,
            axis=axis,
            dynamic=facts.dynamic,
            rule=settings.grid_rule,
            trunk=trunk,
        )


def _output_axis(model: nn.Module, facts: LayerFacts) -> Axis | None:
    """Where a layer's weight has its output channels."""
    axis = facts.axis
    if facts.parameter is None:
        axis = channel_axis(model.get_submodule(facts.path))
    return None if axis is None else output_axis(axis, facts.groups)


def _functional_uses(
    model: nn.Module, facts: NetworkFacts, paths: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The modules that use weights without calling their layers.

    Returns:
        Path of each such module to the paths of the layers, relative to it.
    """
    # The inner dictionaries are ordered sets of paths.
    layers_of: dict[str, dict[str, None]] = {}
    for path in paths:
        owner = facts.layers[path].owner
        if owner is not None:
            layers_of.setdefault(owner, {})[path] = None
    for owner, module in model.named_modules():
        if isinstance(module, FUSING_TYPES):
            # In eval mode it passes the weights of all layers inside to one native operator.
            for path in paths:
                if path.startswith(_prefix(owner)):
                    layers_of.setdefault(owner, {})[path] = None
    relative: dict[str, tuple[str, ...]] = {}
    for owner, layers in layers_of.items():
        relative[owner] = tuple(path.removeprefix(_prefix(owner)) for path in layers)
    return relative


def _prefix(path: str) -> str:
    """What the paths of all modules inside the one at `path` start with."""
    return f"{path}." if path else ""


def _switchable_paths(model: nn.Module, facts: NetworkFacts) -> list[str]:
    """Paths of the norms that can be switched."""
    paths: list[str] = []
    for path in facts.norms:
        norm = model.get_submodule(path)
        # Without running statistics, or with cumulative ones, nothing could be switched.
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.momentum is None:
            continue
        paths.append(path)
    return paths


def _make_norms_switchable(
    model: nn.Module,
    settings: ConvertSettings,
    facts: NetworkFacts,
    norms: Sequence[str],
    paths: Sequence[str],
) -> dict[str, str | None]:
    """Give every norm that can be switched its copies.

    Args:
        model: The network.
        settings: How it is converted.
        facts: What it is.
        norms: Paths of the norms that can be switched.
        paths: Paths of the quantized layers.

    Returns:
        Path of each such norm to the quantized layer that sets its row, or None.
    """
    network_widths: tuple[int, ...] = ()
    if settings.only is None:
        candidates = (layer_candidates(facts.layers[path], settings) for path in paths)
        network_widths = uniform_widths(candidates)
    row_setters: dict[str, str | None] = {}
    network = TrainedNetwork()
    for path in norms:
        feeding = facts.norms[path]
        norm: Any = model.get_submodule(path)
        row_setter = feeding if feeding in paths else None
        layer = _quantized_layer(model, row_setter)
        widths = norm_widths(layer, settings.norm, network_widths)
        if feeding is not None and facts.layers[feeding].first:
            widths = ()  # what the first layer puts out depends on no other layer's precision
        rows = norm_rows(layer, settings.norm)
        is_shared = settings.norm == "shared-affine"
        switch_norm(norm, rows, shared_affine=is_shared, widths=widths, network=network)
        row_setters[path] = row_setter
    return row_setters


def _correct_moments(
    model: nn.Module, facts: NetworkFacts, row_setters: Mapping[str, str | None]
) -> None:
    """Let layers that feed a shared norm correct their quantized weights for it."""
    for path in row_setters.values():
        layer = _quantized_layer(model, path)
        if path is not None and layer is not None and not facts.layers[path].dynamic:
            layer.weight_source.corrected_axis = _output_axis(model, facts.layers[path])


def _quantized_layer(model: nn.Module, path: str | None) -> QuantizedLayer | None:
    layer = None if path is None else model.get_submodule(path)
    return layer if isinstance(layer, QuantizedLayer) else None


def _as_patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
