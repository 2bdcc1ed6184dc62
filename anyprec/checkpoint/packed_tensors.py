"""The tensors of a packed layer: from its cells to what a file holds, and back without trusting it.

A packed layer at PATH has the tensors `anyprec.packed.PATH.PART`. The parts are `cells` and `low`
(see `coding.py`), `places` and `codes` of exceptions (see `cells.py`), and `mean` and `spread` of
the latent weight's channels if the layer corrects them. Nothing here changes a network;
`packing.py` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anyprec.checkpoint.cells import Exceptions, cell_count
from anyprec.checkpoint.coding import (
    bits_needed,
    compress,
    decompress,
    fixed_size,
    from_fixed,
    to_fixed,
)
from anyprec.checkpoint.document import PackedCoding, TensorRecord
from anyprec.errors import CheckpointError
from anyprec.nn.channels import channel_count
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.quantizers import WeightQuantizer

PREFIX = "anyprec.packed."


@dataclass(frozen=True)
class LayerCells:
    """A layer's weight operand in the form that a file holds.

    Attributes:
        cells: The cell of every weight, int16, a row for each step size; on the CPU.
        exceptions: Weights whose codes the cells do not determine.
        moments: Mean and spread of each channel of the latent weight, float32, if the layer
            corrects them.
    """

    cells: Tensor
    exceptions: Exceptions
    moments: tuple[Tensor, Tensor] | None


def to_tensors(
    stored: LayerCells, candidates: tuple[int, ...], coding: PackedCoding
) -> dict[str, Tensor]:
    """The parts of a packed layer, by their names."""
    width = bits_needed(cell_count(candidates))
    tensors: dict[str, Tensor] = {}
    if coding == "fixed":
        tensors["cells"] = to_fixed(stored.cells, width)
    else:
        # Zstandard codes whole bytes: the upper one of each cell, which alone gains from it.
        low_bits = max(0, width - 8)
        high = (stored.cells >> low_bits).to(torch.uint8).flatten()
        frame = compress(high.numpy().tobytes())
        tensors["cells"] = high if frame is None else frame
        if low_bits:
            tensors["low"] = to_fixed(stored.cells & (2**low_bits - 1), low_bits)
    if stored.exceptions.places.numel():
        tensors.update(places=stored.exceptions.places, codes=stored.exceptions.codes)
    if stored.moments is not None:
        tensors.update(mean=stored.moments[0], spread=stored.moments[1])
    return tensors


def from_tensors(
    tensors: Mapping[str, Tensor],
    layer: QuantizedLayer,
    steps: Tensor,
    record: TensorRecord,
    coding: PackedCoding,
    path: str,
) -> LayerCells:
    """The cells of a layer, from untrusted tensors.

    Args:
        tensors: The layer's parts, by name.
        layer: The layer, which may be without values.
        steps: Its step sizes.
        record: Dtype and shape of its latent weight, which are those of the network.
        coding: How the cells are stored.
        path: The layer's path, for messages.

    Raises:
        CheckpointError: A part is missing, of another size or dtype, or holds a number out of
            range.
    """
    quantizer, axis = layer.weight_quantizer, layer.weight_source.corrected_axis
    count = math.prod(record.shape)
    _require_parts(tensors, quantizer.candidates, coding, path, corrects=axis is not None)
    # Thresholds of step sizes that are not finite have no order.
    _require(bool(torch.isfinite(steps).all()), path, "a step size is not finite")
    cells = _read_cells(tensors, quantizer.candidates, count, coding, path)
    moments = None
    if axis is not None:
        _require_moments(tensors, channel_count(record.shape, axis), path)
        moments = tensors["mean"], tensors["spread"]
    exceptions = _read_exceptions(tensors, quantizer, count, path)
    return LayerCells(cells.reshape(steps.shape[1], -1), exceptions, moments)


def _require_parts(
    tensors: Mapping[str, Tensor],
    candidates: tuple[int, ...],
    coding: PackedCoding,
    path: str,
    *,
    corrects: bool,
) -> None:
    # Exactly these: a part too many would be read by no one, and may be meant for another layer.
    expected = {"cells"}
    if coding == "zstd" and cell_count(candidates) > 256:
        expected.add("low")
    if corrects:
        expected |= {"mean", "spread"}
    if "places" in tensors:
        expected |= {"places", "codes"}
    _require(tensors.keys() == expected, path, f"its parts are {sorted(tensors)}")


def _require_moments(tensors: Mapping[str, Tensor], channels: int, path: str) -> None:
    for name in ("mean", "spread"):
        tensor = tensors[name]
        fits = tensor.dtype == torch.float32 and tuple(tensor.shape) == (channels,)
        _require(
            fits and bool(torch.isfinite(tensor).all()),
            path,
            f"{name} holds no numbers of its channels",
        )


def _read_cells(
    tensors: Mapping[str, Tensor],
    candidates: tuple[int, ...],
    count: int,
    coding: PackedCoding,
    path: str,
) -> Tensor:
    width = bits_needed(cell_count(candidates))
    stored = tensors["cells"]
    _require(stored.dtype == torch.uint8 and stored.ndim == 1, path, "its cells are no bytes")
    if coding == "fixed":
        fits = stored.numel() == fixed_size(count, width)
        _require(fits, path, f"it has {stored.numel()} bytes for {count} weights")
        cells = from_fixed(stored, count, width)
    else:
        # The writer leaves bytes uncompressed where a frame would not be smaller; their number
        # tells.
        if stored.numel() != count:
            raw = decompress(stored, count, f"the checkpoint's layer {path!r:.80}")
            stored = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        cells = stored.to(torch.int16)
        if width > 8:
            low = tensors["low"]
            fits = low.dtype == torch.uint8 and low.shape == (fixed_size(count, width - 8),)
            _require(fits, path, f"it has {low.numel()} bytes of low bits for {count} weights")
            cells = (cells << (width - 8)) | from_fixed(low, count, width - 8)
    # A field has room for more numbers than there are cells.
    _require(int(cells.max()) < cell_count(candidates), path, "a cell is out of range")
    return cells


def _read_exceptions(
    tensors: Mapping[str, Tensor], quantizer: WeightQuantizer, count: int, path: str
) -> Exceptions:
    candidates = len(quantizer.candidates)
    if "places" not in tensors:
        return Exceptions(
            torch.empty(0, dtype=torch.int64), torch.empty((candidates, 0), dtype=torch.int8)
        )
    places, codes = tensors["places"], tensors["codes"]
    problem = "its exceptions are out of range"
    _require(places.dtype == torch.int64 and codes.dtype == torch.int8, path, problem)
    _require(places.ndim == 1 and len(places) > 0, path, problem)
    _require(codes.shape == (candidates, len(places)), path, problem)
    # Ascending places need their first and last compared only, and none of them stands twice.
    _require(bool((places.diff() > 0).all()), path, problem)
    _require(int(places[0]) >= 0 and int(places[-1]) < count, path, problem)
    for index in range(candidates):
        qmin, qmax = quantizer.limits(index)
        lowest, highest = int(codes[index].min()), int(codes[index].max())
        _require(qmin <= lowest and highest <= qmax, path, problem)
    return Exceptions(places, codes)


def _require(fits: bool, path: str, problem: str) -> None:  # noqa: FBT001 (a condition, as in assert)
    if not fits:
        msg = f"the checkpoint's layer {path!r:.80} cannot be unpacked: {problem}"
        raise CheckpointError(msg)
