"""Which copy of a norm belongs to which precision of the layer that feeds it."""

from __future__ import annotations

from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norms import NormSharing


def norm_rows(layer: QuantizedLayer | None, sharing: NormSharing) -> int:
    """Number of copies of a norm that this layer feeds, or that no single layer feeds."""
    if sharing == "shared":
        return 0
    if layer is None:
        return 1
    return len(layer.candidates.weight) * len(layer.candidates.activation)


def norm_widths(
    layer: QuantizedLayer | None, sharing: NormSharing, widths: tuple[int, ...]
) -> tuple[int, ...]:
    """The uniform bit-widths that do not have a copy of the norm to themselves.

    Args:
        layer: The layer that feeds the norm, or None if no single one does.
        sharing: As in `convert(norm=...)`.
        widths: The network's uniform bit-widths.
    """
    if sharing == "shared" or len(widths) < 2:
        return ()
    if layer is None:
        return widths
    weight, activation = layer.candidates.weight, layer.candidates.activation
    return tuple(width for width in widths if width not in weight or width not in activation)


def norm_row(layer: QuantizedLayer | None, sharing: NormSharing) -> int | None:
    """The copy for the layer's active precision; None if there are no copies."""
    if sharing == "shared":
        return None
    if layer is None or layer.bits is None:
        return 0
    # Rows stand in the order of pairs (weight, activation), the activation changing fastest.
    weight, activation = layer.candidates.weight, layer.candidates.activation
    column = activation.index(layer.bits.activation)
    return weight.index(layer.bits.weight) * len(activation) + column
