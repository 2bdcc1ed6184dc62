"""Whether a target can run a converted network: at which precisions, and on which grids.

`search` chooses among these pairs, and `export` refuses what does not fit. The table of targets is
read in `hardware.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from anyprec.bits import BitConfig, Bits
from anyprec.model.converted import BitsRequest, ConvertedModel, require_converted
from anyprec.model.hardware import Hardware, hardware
from anyprec.model.intact import output_quantizers
from anyprec.model.kinds import layer_kind
from anyprec.model.pairs import LayerPairs, describe_pairs, nearest_pair
from anyprec.network.facts import LayerKind
from anyprec.nn.grids import GridRule
from anyprec.nn.quantizers import InputQuantizer


@dataclass(frozen=True)
class HardwareProblem:
    """A layer whose precision a target cannot run.

    Attributes:
        path: The layer.
        kind: Its kind.
        bits: Its precision.
        nearest: The precision nearest to it that the target can run, of the layer's candidates if
            there is any; None if the target runs no such layer.
        allowed: All that it can run.
    """

    path: str
    kind: LayerKind
    bits: Bits
    nearest: Bits | None
    allowed: tuple[Bits, ...]

    def __str__(self) -> str:
        text = f"layer {self.path!r} ({self.kind}) has {self.bits}, "
        if self.nearest is None:
            return text + "but such a layer runs in floating point only: exclude it in convert"
        return text + f"but {describe_pairs(self.allowed)} can run: nearest is {self.nearest}"


def hardware_problems(
    model: ConvertedModel, config: BitsRequest, name: str
) -> dict[str, HardwareProblem]:
    """What a target cannot run of a configuration.

    Args:
        model: A converted network.
        config: The configuration, or anything that `set_bits` takes; None is the active one.
        name: Of the target; see `anyprec.hardware`.

    Returns:
        Path of each layer that the target cannot run as configured, to what is wrong; in network
        order, and empty if all is well. What stays in floating point is not looked at.

    Raises:
        HardwareError: The target is not known.
        BitsError: The configuration does not fit the network.

    Example:
        >>> import timm, anyprec
        >>> model = anyprec.convert(timm.create_model("test_efficientnet"))
        >>> problems = hardware_problems(model, "W4A4", "litert")
        >>> print(problems["blocks.0.0.conv"])
        layer 'blocks.0.0.conv' (convolution) has W4A4, but W4A8, W8A8 can run: nearest is W4A8
    """
    require_converted(model, purpose="hardware_problems")
    pairs = hardware(name).pairs
    resolved = model.bits if config is None else model.resolve_bits(config)
    problems: dict[str, HardwareProblem] = {}
    for path, bits in (resolved or BitConfig({})).items():
        kind = layer_kind(model, model.anyprec_record.facts.layers[path])
        allowed = pairs.of(kind)
        if bits not in allowed:
            candidates = model.quantized_layers[path].candidates
            within = [pair for pair in allowed if pair in candidates]
            nearest = nearest_pair(bits, within or allowed)
            problems[path] = HardwareProblem(path, kind, bits, nearest, allowed)
    return problems


def grid_problems(model: ConvertedModel, name: str) -> dict[str, str]:
    """What of a network's grids a target cannot take, whatever its configuration.

    Args:
        model: A converted network.
        name: Of the target.

    Returns:
        Path of each layer or output with such a grid, to what is wrong and the remedy.

    Raises:
        HardwareError: The target is not known.
    """
    require_converted(model, purpose="grid_problems")
    target = hardware(name)
    problems: dict[str, str] = {}
    for path, layer in model.quantized_layers.items():
        problem = _problem_of_grid(layer.input_quantizer, target, subject="its input")
        is_per_channel = layer.weight_quantizer.axis is not None
        if problem is None and is_per_channel and target.weights == "per-tensor":
            problem = "its weight has a step size for each channel: convert with per_channel=False"
        if problem is not None:
            problems[path] = f"layer {path!r} does not fit {name}: {problem}"
    for path, output in output_quantizers(model).items():
        problem = _problem_of_grid(output, target, subject="it")
        if problem is not None:
            problems[path] = f"output {path!r} does not fit {name}: {problem}"
    return problems


def runnable_pairs(
    model: ConvertedModel, name: str | None
) -> tuple[str, dict[str, tuple[Bits, ...]]]:
    """The precisions that a target can run each layer at, by path.

    Args:
        model: A converted network.
        name: Of the target; None is the one that the network was converted for.

    Returns:
        Name of the target and its pairs; nothing of both if there is no target.

    Raises:
        HardwareError: The target is not known.
    """
    settings = model.anyprec_record.settings
    pairs: LayerPairs | None = settings.pairs
    if name is not None:
        pairs = hardware(name).pairs
    if pairs is None:
        return "", {}
    facts = model.anyprec_record.facts.layers
    runnable: dict[str, tuple[Bits, ...]] = {}
    for path in model.quantized_layers:
        runnable[path] = pairs.of(layer_kind(model, facts[path]))
    return name or settings.hardware or "", runnable


def _problem_of_grid(quantizer: InputQuantizer, target: Hardware, *, subject: str) -> str | None:
    rule = GridRule(target.grid, target.scale)
    for zero, bits in zip(quantizer.zero_points, quantizer.own_candidates, strict=True):
        if not rule.permits(zero, bits):
            return (
                f"{subject} has the zero point {zero} at {bits} bits, and {rule.permitted(bits)} "
                f"is allowed: convert with activation_grid={target.grid!r}"
            )
    if target.scale == "power-of-two" and quantizer.rule.scale != "power-of-two":
        return (
            f"{subject} has step sizes that are no powers of two: convert with "
            "activation_scale='power-of-two'"
        )
    return None
