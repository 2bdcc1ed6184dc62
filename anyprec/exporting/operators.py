"""The three operators that a lowered network has beside those of torch.

They mark what is an integer on the chip: an activation on a grid, a weight that is codes and a
scale, and a weight operand that depends on the network's input. On the CPU each computes bit for
bit what the fake quantization of `nn/functional.py` does. What a target makes of them is in its
writer; integer arithmetic is in `integer.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("anyprec::fake_quantize", mutates_args=())
def fake_quantize(
    values: Tensor, scale: float, zero_point: int, low: int, high: int, bits: int, layer: str
) -> Tensor:
    """Quantize and dequantize an activation.

    Args:
        values: The activation, of any shape, float32.
        scale: Width of a bin; a number of float32.
        zero_point: Code of real zero on the grid of the codes `0 .. 2^bits - 1`.
        low: Lowest code in use: above 0 where a clamp was absorbed.
        high: Highest code in use.
        bits: Bit-width of the codes.
        layer: Path of the layer whose input, or of the point whose value it is.

    Returns:
        `(clamp(round(values / scale) + zero_point, low, high) - zero_point) * scale`.
    """
    del bits, layer
    # A tensor of float32: a Python number would be one of float64.
    step = torch.tensor(scale, dtype=torch.float32, device=values.device)
    codes = (values / step).round_().clamp_(low - zero_point, high - zero_point)
    return codes.mul_(step)


@fake_quantize.register_fake
def _(
    values: Tensor, scale: float, zero_point: int, low: int, high: int, bits: int, layer: str
) -> Tensor:
    del scale, zero_point, low, high, bits, layer
    return torch.empty_like(values)


@torch.library.custom_op("anyprec::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, bits: int, layer: str) -> Tensor:
    """A weight from its integer codes: `codes * scale`.

    Args:
        codes: int8, within `-2^(bits - 1) .. 2^(bits - 1) - 1`.
        scale: float32, of a shape that broadcasts against the codes. It may be negative where the
            scale of a norm was folded into it.
        bits: Bit-width of the codes.
        layer: Path of the layer whose weight it is.
    """
    del bits, layer
    return codes.to(scale.dtype) * scale


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, bits: int, layer: str) -> Tensor:
    del bits, layer
    return torch.empty(codes.shape, dtype=scale.dtype, device=scale.device)


@torch.library.custom_op("anyprec::fake_quantize_weight", mutates_args=())
def fake_quantize_weight(operand: Tensor, scale: Tensor, bits: int, layer: str) -> Tensor:
    """Quantize and dequantize a weight operand that the network computes.

    Args:
        operand: The weight operand, float32.
        scale: Positive widths of a bin, of a shape that broadcasts against the operand.
        bits: Bit-width of the codes, which are within `-2^(bits - 1) .. 2^(bits - 1) - 1`.
        layer: Path of the layer whose weight it is.
    """
    del layer
    return weight_codes(operand, scale, bits).mul_(scale)


@fake_quantize_weight.register_fake
def _(operand: Tensor, scale: Tensor, bits: int, layer: str) -> Tensor:
    del scale, bits, layer
    return torch.empty_like(operand)


def weight_codes(operand: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The codes of a weight operand, as whole numbers in its own dtype."""
    half = 2 ** (bits - 1)
    return (operand / scale).round_().clamp_(-half, half - 1)


FAKE_QUANTIZE = torch.ops.anyprec.fake_quantize.default
DEQUANTIZE = torch.ops.anyprec.dequantize.default
FAKE_QUANTIZE_WEIGHT = torch.ops.anyprec.fake_quantize_weight.default
