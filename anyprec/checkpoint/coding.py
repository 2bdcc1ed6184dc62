"""Bytes for cells and tensors: bit fields of fixed length, and Zstandard frames of checked size.

Two codings of cells:

- `fixed`: the low `w` bits of each cell, one after the other, lowest bit first, where `w` is the
  number of bits that the largest cell needs. Weight i stands at bit `i * w`.
- `zstd`: what exceeds 8 bits is cut from the low end of each cell and stored `fixed`; the upper 8
  bits, a byte for each weight, are one Zstandard frame. The low bits of neighbouring cells are as
  good as random, so no entropy coder gains from them, and bytes are what Zstandard codes best.

Other tensors: `zstd` is one frame of their bytes, little-endian, with all first bytes of the
elements first, then all second ones, and so on, since sign and exponent repeat and the rest does
not.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from anyprec.errors import CheckpointError

_LARGEST_RATIO = 256
"""What compresses more than so many times is stored as it is, and such a frame is not opened.

So no frame of a few bytes can fill the memory.
"""

_SMALL = 4096
"""Bytes that may be compressed at any ratio."""

_LEVEL = 3


def bits_needed(count: int) -> int:
    """Bits of a field for `count` different values."""
    return max(1, (count - 1).bit_length())


def fixed_size(count: int, width: int) -> int:
    """Bytes of `count` fields of `width` bits."""
    return math.ceil(count * width / 8)


def to_fixed(values: Tensor, width: int) -> Tensor:
    """Fields of `width` bits, at most 16, lowest bit first; zeros fill up the last byte."""
    flat = values.flatten().numpy().astype(np.uint32)
    # Eight fields fill `width` whole bytes, so field k of every group starts at the same bit.
    groups = np.zeros((math.ceil(len(flat) / 8), 8), dtype=np.uint32)
    groups.reshape(-1)[: len(flat)] = flat
    # A field covers up to three bytes; two more to spill into, which stay zero.
    packed = np.zeros((len(groups), width + 2), dtype=np.uint8)
    for index in range(8):
        byte, shift = divmod(index * width, 8)
        shifted = groups[:, index] << np.uint32(shift)
        for spill in range(3):
            bits = (shifted >> np.uint32(8 * spill)) & np.uint32(255)
            packed[:, byte + spill] |= bits.astype(np.uint8)
    return torch.from_numpy(packed[:, :width].reshape(-1)[: fixed_size(len(flat), width)].copy())


def from_fixed(stored: Tensor, count: int, width: int) -> Tensor:
    """The `count` fields of `to_fixed`, int16."""
    groups = math.ceil(count / 8)
    padded = np.zeros((groups, width), dtype=np.uint8)
    padded.reshape(-1)[: stored.numel()] = stored.numpy()
    fields = np.empty((groups, 8), dtype=np.int16)
    for index in range(8):
        byte, shift = divmod(index * width, 8)
        field = padded[:, byte].astype(np.uint32)
        for spill in range(1, 3):
            if shift + width > 8 * spill:
                field |= padded[:, byte + spill].astype(np.uint32) << np.uint32(8 * spill)
        fields[:, index] = (field >> np.uint32(shift)) & np.uint32(2**width - 1)
    return torch.from_numpy(fields.reshape(-1)[:count])


def compress(raw: bytes) -> Tensor | None:
    """A frame that declares its size, as uint8; None if it gains nothing or would not be opened."""
    frame = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False).compress(raw)
    if len(frame) >= len(raw) or not _is_plausible(len(raw), len(frame)):
        return None
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def decompress(frame: Tensor, size: int, what: str) -> bytes:
    """The `size` bytes of a frame.

    Raises:
        CheckpointError: It is no frame, declares another size, or one that `compress` never makes.
    """
    raw = frame.numpy().tobytes()
    try:
        declared = zstandard.frame_content_size(raw)
        if declared == size and _is_plausible(size, len(raw)):
            # The bound on the window keeps a forged frame from taking memory for it.
            decompressor = zstandard.ZstdDecompressor(max_window_size=2**27)
            return decompressor.decompress(raw, max_output_size=size)
    except zstandard.ZstdError as error:
        msg = f"{what} is damaged: {error}"
        raise CheckpointError(msg) from error
    msg = f"{what} declares {declared} bytes in a frame of {len(raw)}, expected {size} and at most "
    msg += f"{_LARGEST_RATIO} for one"
    raise CheckpointError(msg)


def to_planes(tensor: Tensor) -> bytes:
    """The bytes of a tensor, all first bytes of its elements first."""
    flat: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return bytes(flat.reshape(-1, tensor.element_size()).T.tobytes())


def from_planes(raw: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor of `to_planes`."""
    planes = np.frombuffer(bytearray(raw), dtype=np.uint8).reshape(dtype.itemsize, -1)
    return torch.from_numpy(np.ascontiguousarray(planes.T)).reshape(-1).view(dtype).reshape(shape)


def _is_plausible(size: int, stored: int) -> bool:
    return size <= max(_SMALL, _LARGEST_RATIO * stored)
