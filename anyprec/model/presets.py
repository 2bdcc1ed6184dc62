"""What `convert(hardware=...)` sets, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, get_args

from anyprec.bits import check_bit_width, check_candidates
from anyprec.errors import ConversionError
from anyprec.model.hardware import KINDS, Hardware, hardware
from anyprec.model.pairs import describe_pairs
from anyprec.model.placement import Placement
from anyprec.model.record import ConvertSettings
from anyprec.nn.grids import ACTIVATION_GRIDS, ACTIVATION_SCALES, ActivationGrid, ActivationScale

DEFAULT_BITS = (2, 3, 4, 5, 6, 8)

Value = TypeVar("Value", bound=str)


def make_settings(
    name: str | None,
    *,
    bits: Sequence[int] | None,
    activation_bits: Sequence[int] | None,
    first_last_bits: int | None,
    per_channel: bool | None,
    activation_grid: ActivationGrid | None,
    activation_scale: ActivationScale | None,
    placement: Placement | None,
    **others: Any,
) -> ConvertSettings:
    """Settings of a conversion for a target, or for none; None stands for an argument not given.

    Args:
        name: Of the target.
        bits: Candidates of weights; see `convert`, as for all that follow.
        activation_bits: Candidates of inputs.
        first_last_bits: Bit-width of first and last layers; None searches them too.
        per_channel: Whether each output channel has a step size.
        activation_grid: Allowed zero points.
        activation_scale: Allowed step sizes of inputs.
        placement: Where activations are quantized.
        others: The other fields of `ConvertSettings`.

    Raises:
        HardwareError: The target is not known.
        ConversionError: An argument asks for what the target cannot run.
        BitsError: A bit-width is not supported.
        ValueError: A grid, scale or placement is not known.
    """
    require_one_of("activation_grid", activation_grid, ACTIVATION_GRIDS)
    require_one_of("activation_scale", activation_scale, ACTIVATION_SCALES)
    require_one_of("placement", placement, get_args(Placement))
    if first_last_bits is not None:
        check_bit_width(first_last_bits, what="first_last_bits")
    wanted = None if bits is None else check_candidates(bits, what="bits")
    inputs = wanted
    if activation_bits is not None:
        inputs = check_candidates(activation_bits, what="activation_bits")
    if name is None:
        return ConvertSettings(
            bits=wanted or DEFAULT_BITS,
            activation_bits=inputs or DEFAULT_BITS,
            first_last_bits=first_last_bits,
            per_channel=True if per_channel is None else per_channel,
            activation_grid=activation_grid or "affine",
            activation_scale=activation_scale or "any",
            placement=placement or "layers",
            **others,
        )
    target = hardware(name)
    _require_first_last(first_last_bits, target)
    return ConvertSettings(
        bits=_widths("bits", wanted, target, operand="weight"),
        activation_bits=_activation_widths(inputs, target, given=activation_bits is not None),
        first_last_bits=first_last_bits,
        per_channel=_granularity(per_channel, target),
        activation_grid=_loosest(
            "activation_grid", activation_grid, target.grid, ACTIVATION_GRIDS, target
        ),
        activation_scale=_loosest(
            "activation_scale", activation_scale, target.scale, ACTIVATION_SCALES, target
        ),
        # A recommendation, unlike all else: the target runs networks of either placement.
        placement=placement or target.placement,
        hardware=name,
        pairs=target.pairs,
        **others,
    )


def _widths(
    argument: str, given: tuple[int, ...] | None, target: Hardware, *, operand: str
) -> tuple[int, ...]:
    """Bit-widths of an operand: those that were given, or those of the default that it can run."""
    runs = _runs(target, operand)
    if given is None:
        return _common(DEFAULT_BITS, runs) or runs
    for width in given:
        if width not in runs:
            msg = f"{argument}={given} has {width}, but {target.name} runs {operand} bits {runs} "
            msg += f"only: leave {argument} out, or choose from these"
            raise ConversionError(msg)
    return given


def _activation_widths(
    wanted: tuple[int, ...] | None, target: Hardware, *, given: bool
) -> tuple[int, ...]:
    if given:
        return _widths("activation_bits", wanted, target, operand="activation")
    # Those of weights were given for both operands, as far as the target has them for this one.
    common = _common(wanted or DEFAULT_BITS, _runs(target, "activation"))
    return common or _widths("activation_bits", None, target, operand="activation")


def _runs(target: Hardware, operand: str) -> tuple[int, ...]:
    """The bit-widths that some kind of layer may have."""
    widths: set[int] = set()
    for kind in KINDS:
        widths.update(getattr(bits, operand) for bits in target.pairs.of(kind))
    return tuple(sorted(widths))


def _common(widths: Iterable[int], allowed: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(widths) & set(allowed)))


def _require_first_last(given: int | None, target: Hardware) -> None:
    demanded = target.first_last
    if demanded is not None and given != demanded:
        msg = f"first_last_bits={given} does not fit {target.name}, whose first and last layers "
        msg += f"have {demanded} bits: pass first_last_bits={demanded}"
        raise ConversionError(msg)
    runs_equal = any(
        bits.weight == bits.activation == given for kind in KINDS for bits in target.pairs.of(kind)
    )
    if given is not None and not runs_equal:
        pairs = describe_pairs({bits for kind in KINDS for bits in target.pairs.of(kind)})
        msg = f"first_last_bits={given} stands for W{given}A{given}, but {target.name} runs "
        msg += f"{pairs} only: pass 8, or None to give these layers candidates like the others"
        raise ConversionError(msg)


def _granularity(per_channel: bool | None, target: Hardware) -> bool:  # noqa: FBT001 (a value)
    if target.weights == "either":
        return True if per_channel is None else per_channel
    demanded = target.weights == "per-channel"
    if per_channel is not None and per_channel != demanded:
        msg = f"per_channel={per_channel} does not fit {target.name}, whose weights have "
        msg += f"{target.weights} step sizes: leave per_channel out, or pass {demanded}"
        raise ConversionError(msg)
    return demanded


def _loosest(
    argument: str,
    given: Value | None,
    loosest: Value,
    ordered: tuple[Value, ...],
    target: Hardware,
) -> Value:
    """What was given, if it is no looser than the target's; `ordered` begins with the loosest."""
    if given is None:
        return loosest
    allowed = ordered[ordered.index(loosest) :]
    if given not in allowed:
        msg = f"{argument}={given!r} does not fit {target.name}, which takes "
        msg += f"{' or '.join(map(repr, allowed))}: leave {argument} out, or pass one of these"
        raise ConversionError(msg)
    return given


def require_one_of(argument: str, value: object, known: tuple[str, ...]) -> None:
    """Refuse a value that is not one of those known; None is not given.

    Raises:
        ValueError: It is not.
    """
    if value is not None and value not in known:
        msg = f"{argument}={value!r} is not known: use one of {known}"
        raise ValueError(msg)
