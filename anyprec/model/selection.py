"""Which layers are quantized, and at which bit-widths: read off the facts and settings alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from anyprec.bits import Bits, LayerCandidates, match_paths
from anyprec.errors import BitsError, ConversionError
from anyprec.model.pairs import describe_pairs, nearest_pair
from anyprec.model.record import ConvertSettings, Coverage, quantized_paths
from anyprec.network.facts import LayerFacts, NetworkFacts

_CONSTANT = "its input does not depend on the image, so deployment folds it into a constant"


def select_layers(
    model: nn.Module, settings: ConvertSettings, facts: NetworkFacts
) -> tuple[Coverage, ...]:
    """What becomes of each layer of `model`.

    Raises:
        ConversionError: A pattern matches nothing, or no layer is left to quantize.
    """
    included: Mapping[str, str] | None = None
    if settings.include is not None:
        included = _match_all(settings.include, facts.layers, argument="include")
    excluded = _match_all(settings.exclude, facts.layers, argument="exclude")
    rows = []
    for path, layer in facts.layers.items():
        kind = "Parameter"
        if layer.parameter is None:
            kind = type(model.get_submodule(path)).__name__
        status, reason = _status(layer, included, excluded)
        if status == "quantized" and not _runs_on_hardware(layer, settings):
            status, reason = "exempt", f"{settings.hardware} has no precision for such a layer"
        rows.append(Coverage(path, kind, status, reason))
    if not quantized_paths(rows):
        reasons = sorted({row.reason for row in rows}) or ["it has no Conv or Linear layer"]
        msg = f"nothing to quantize in {type(model).__name__}: {'; '.join(reasons)}"
        raise ConversionError(msg)
    return tuple(rows)


def layer_candidates(facts: LayerFacts, settings: ConvertSettings) -> LayerCandidates:
    """The bit-widths that a layer with these facts may take.

    Raises:
        BitsError: None of the candidates is allowed for a depthwise convolution, or for the
            hardware that the network is converted for.
    """
    if settings.only is not None and facts.path in settings.only:
        bits = settings.only[facts.path]
        return LayerCandidates((bits.weight,), (bits.activation,))
    if settings.first_last_bits is not None and (facts.first or facts.last):
        fixed = LayerCandidates((settings.first_last_bits,), (settings.first_last_bits,))
        return _on_hardware(fixed, facts, settings, argument="first_last_bits")
    candidates = LayerCandidates(settings.bits, settings.activation_bits)
    if not facts.depthwise:
        return _on_hardware(candidates, facts, settings, argument="bits")
    lowest = settings.depthwise_min_bits
    allowed = candidates.above(Bits(lowest, lowest))
    if not allowed.weight or not allowed.activation:
        msg = f"depthwise convolution {facts.path!r} has no candidate left from "
        msg += f"bits={settings.bits}, activation_bits={settings.activation_bits} with "
        msg += f"depthwise_min_bits={lowest}: add a higher one or lower depthwise_min_bits"
        raise BitsError(msg)
    return _on_hardware(allowed, facts, settings, argument="bits")


def _on_hardware(
    candidates: LayerCandidates, facts: LayerFacts, settings: ConvertSettings, *, argument: str
) -> LayerCandidates:
    """The candidates that are part of a precision which the hardware has for such a layer.

    Raises:
        BitsError: There is none.
    """
    if settings.pairs is None or facts.kind is None:
        return candidates
    pairs = settings.pairs.of(facts.kind)
    common = [bits for bits in pairs if bits in candidates]
    if not common:
        msg = f"{settings.hardware} runs layer {facts.path!r} ({facts.kind}) at "
        msg += f"{describe_pairs(pairs)} only, but {argument} leaves it weight bits "
        msg += f"{candidates.weight} and activation bits {candidates.activation}: "
        msg += f"nearest is {nearest_pair(candidates.highest, pairs)}"
        raise BitsError(msg)
    weights = tuple(sorted({bits.weight for bits in common}))
    return LayerCandidates(weights, tuple(sorted({bits.activation for bits in common})))


def _runs_on_hardware(facts: LayerFacts, settings: ConvertSettings) -> bool:
    return settings.pairs is None or facts.kind is None or bool(settings.pairs.of(facts.kind))


def _status(
    layer: LayerFacts, included: Mapping[str, str] | None, excluded: Mapping[str, str]
) -> tuple[str, str]:
    """Status and reason of one layer; what the user asks for comes first."""
    if layer.path in excluded:
        return "exempt", f"excluded by {excluded[layer.path]!r}"
    if included is not None and layer.path not in included:
        return "exempt", "not named by include"
    if layer.problem is not None:
        return "skipped", layer.problem
    if layer.constant:
        return "exempt", _CONSTANT
    return "quantized", ""


def _match_all(patterns: Iterable[str], paths: Iterable[str], *, argument: str) -> dict[str, str]:
    """The paths that match, with the pattern that each one matches last."""
    matched: dict[str, str] = {}
    for pattern in patterns:
        try:
            matched.update(dict.fromkeys(match_paths(pattern, paths), pattern))
        except BitsError as error:
            msg = f"{argument}: {error}"
            raise ConversionError(msg) from error
    return matched
