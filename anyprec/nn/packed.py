"""Weights of which only the integer codes exist: how they are held in memory.

A packed layer holds no latent weight. The rounding thresholds of all its candidates cut the weight
axis of a channel into cells; two weights of one cell have the same code at every candidate. So any
point of its cell stands for a weight, and `PackedOperand` keeps one that a small integer can name:
two bytes for each weight, from which each bit-width's codes come by one multiplication and
rounding. `PackedWeight` takes the latent weight's place in its layer.

How cells are found and stored is in `checkpoint/`; this file does not know how the points were
chosen.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._C import _disabled_torch_function_impl
from torch.utils._pytree import tree_map

from anyprec.errors import PackedError
from anyprec.nn.channels import Axis, along
from anyprec.nn.functional import dequantize
from anyprec.nn.moments import with_moments
from anyprec.nn.precision import FullPrecision

NO_LATENTS = (
    "this network was loaded from a packed file and holds integer codes instead of its latent "
    "weights: it runs at every quantized precision, but cannot be trained, calibrated or run in "
    "floating point. Load the training form for that"
)
"""What every `PackedError` says at the end."""


class PackedWeight(Tensor):
    """Stands for a weight that is not there. It has its shape, dtype and device, and views.

    The operator that multiplies it by the input is given the quantized weight instead (see
    `layers.py`). Anything else that needs a value raises `PackedError`.

    Args:
        like: Gives shape, strides, offset, dtype and, if `device` is None, the device.
        device: Where the weight would be.
        derives: The layer makes its operand from the weight (weight standardisation), so operations
            on it are allowed and give stand-ins, too.
    """

    derives: bool

    # As for nn.Parameter: no operation is redefined for it, only what computes the result.
    __torch_function__ = _disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[Self], like: Tensor, *, device: torch.device | None = None, derives: bool = False
    ) -> Self:
        """See the class."""
        weight = Tensor._make_wrapper_subclass(  # noqa: SLF001 (torch's way to make one)
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=like.device if device is None else device,
            requires_grad=False,
        )
        weight.derives = derives
        return weight

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub leaves out `func`
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        stand_ins = [value for value in (*args, *kwargs.values()) if isinstance(value, cls)]
        if func is torch.ops.aten.copy_.default and len(stand_ins) == 2:
            return args[0]  # the state of one packed network loaded into another
        derives = any(value.derives for value in stand_ins)
        if not _is_allowed(func, derives=derives):
            msg = f"{func} needs the values of a weight; {NO_LATENTS}"
            raise PackedError(msg)
        device = kwargs.pop("device", None)
        if device is None and stand_ins:
            device = stand_ins[0].device

        def stand_in_for(value: Any) -> Any:
            if isinstance(value, Tensor):
                return cls(value, device=device, derives=derives)
            return value

        # Outside inference mode, or views of the weight could not be made in it.
        with torch.inference_mode(mode=False), torch.no_grad():
            result = func(*tree_map(_outline, args), **tree_map(_outline, kwargs))
            return tree_map(stand_in_for, result)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        copy: PackedWeight = _rebuild(*self._recipe())
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, self._recipe()

    def _recipe(self) -> tuple[Any, ...]:
        return tuple(self.shape), self.dtype, str(self.device), self.derives


def stand_in(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, *, derives: bool
) -> nn.Parameter:
    """A parameter without values."""
    with torch.inference_mode(mode=False):
        like = torch.empty(shape, dtype=dtype, device="meta")
        weight = PackedWeight(like, device=torch.device(device), derives=derives)
        parameter = nn.Parameter(weight, requires_grad=False)
        parameter.derives = derives  # type: ignore[attr-defined]
        return parameter


class PackedOperand(FullPrecision):
    """The integer codes of one weight operand at every candidate of its layer.

    A weight's code at a candidate is `clamp(round(point * ratio), qmin, qmax)`, with the ratio of
    the candidate and of the weight's channel; the few weights for which no point gives all codes
    have theirs listed.

    Args:
        points: A point of each weight's cell, int16 (int8 of a layer with a single candidate), in
            the operand's shape.
        ratios: Point's unit in step sizes, float32, shape `(candidates, channels or 1)`.
        axis: The operand's channels; None if one ratio serves all of it.
        listed: Indices, in the flattened operand, of the weights that no point serves: int64, shape
            `(n,)`.
        listed_codes: Their codes, int8, shape `(candidates, n)`.
        moments: Mean and spread of each channel of the latent weight, for `match_moments`, and
            where these are; or None.

    Attributes:
        points, listed, listed_codes, mean, spread: As above; the last two are None without moments.
        ratio_bits: The bits of the ratios as int32, which a change of the network's dtype leaves
            alone.
    """

    points: Tensor
    ratio_bits: Tensor
    listed: Tensor
    listed_codes: Tensor
    mean: Tensor | None
    spread: Tensor | None

    def __init__(
        self,
        points: Tensor,
        ratios: Tensor,
        *,
        axis: Axis | None,
        listed: Tensor,
        listed_codes: Tensor,
        moments: tuple[Tensor, Tensor, Axis] | None,
    ) -> None:
        super().__init__()
        self.axis = axis
        mean, spread, moments_axis = moments or (None, None, None)
        self.moments_axis: Axis | None = moments_axis
        self.register_buffer("points", points)
        self.register_buffer("ratio_bits", ratios.float().contiguous().view(torch.int32))
        self.register_buffer("listed", listed)
        self.register_buffer("listed_codes", listed_codes)
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)

    def codes(self, index: int, *, qmin: int, qmax: int) -> Tensor:
        """Integer codes at the candidate at `index`, float32, in the shape of the operand."""
        ratio = self.ratio_bits[index].view(torch.float32)
        ratio = along(ratio, self.axis, self.points)
        codes = self.points.float().mul_(ratio).round_().clamp_(qmin, qmax)
        if self.listed.numel():
            codes.view(-1)[self.listed] = self.listed_codes[index].float()
        return codes

    def weight(
        self, index: int, step: Tensor, *, qmin: int, qmax: int, dtype: torch.dtype
    ) -> Tensor:
        """The operand at the candidate at `index`: the quantized latent weight, bit for bit."""
        codes = self.codes(index, qmin=qmin, qmax=qmax)
        quantized = dequantize(codes, step, axis=self.axis, dtype=dtype)
        if self.mean is None or self.spread is None or self.moments_axis is None:
            return quantized
        return with_moments(
            quantized, self.mean.float(), self.spread.float(), axis=self.moments_axis, inplace=True
        )

    def extra_repr(self) -> str:
        """Size in memory, for `print(model)`."""
        size = sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())
        return f"{tuple(self.points.shape)}, {size:,} bytes"


_COPIES = (
    torch.ops.aten._to_copy.default,  # noqa: SLF001 (the operator's public name)
    torch.ops.aten.clone.default,
    torch.ops.aten.detach.default,
)

_NEEDS_VALUES = {
    "convolution",
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "linear",
    "_local_scalar_dense",
    "item",
}
"""Operators that put what has no values into the network's output, or read it."""


def _is_view(func: Any) -> bool:
    """Whether an operator's result shares its argument's memory."""
    schema = func._schema  # noqa: SLF001 (torch has no public name for it)
    aliases = [result.alias_info for result in schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _is_allowed(func: Any, *, derives: bool) -> bool:
    """Whether an operator may run on weights without values.

    Args:
        func: The operator.
        derives: One of these weights is an operand in the making.
    """
    if func in _COPIES or _is_view(func):
        return True
    is_mutable = func._schema.is_mutable  # noqa: SLF001 (torch has no public name for it)
    return derives and not is_mutable and func.overloadpacket.__name__ not in _NEEDS_VALUES


def _outline(value: Any) -> Any:
    """A tensor without memory in the place of `value`, if that is a tensor."""
    if isinstance(value, PackedWeight):
        # In a storage as long as the weight's, so that views of views lie where they should.
        end = int(value.storage_offset()) + 1
        for size, stride in zip(value.shape, value.stride(), strict=True):
            end += (size - 1) * stride
        whole = torch.empty((max(0, end),), dtype=value.dtype, device="meta")
        return whole.as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, Tensor):
        return value.to("meta")
    return value


def _rebuild(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    derives: bool,  # noqa: FBT001 (pickle passes by position)
) -> Any:
    return stand_in(shape, dtype, device, derives=derives)
