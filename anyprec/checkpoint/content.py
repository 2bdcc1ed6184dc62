"""The tensors of an open checkpoint, as the document says they are stored: decompressed, tied, and read when asked for."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor, nn

from anyprec.bits import BitConfig
from anyprec.checkpoint.coding import decompress, from_planes
from anyprec.checkpoint.document import Document, TensorRecord
from anyprec.checkpoint.packing import (
    PREFIX,
    LayerCells,
    from_tensors,
    names_of_weights,
    weight_name,
)
from anyprec.checkpoint.statistics import is_statistic
from anyprec.errors import CheckpointError
from anyprec.nn.layers import QuantizedLayer
from anyprec.runtime.storage import StoredFile, with_aliases


class Content:
    """Document and tensors of an open file.

    Args:
        file: The file.
        document: What its document says.

    Raises:
        CheckpointError: The document speaks of layers or tensors that are not there.
    """

    def __init__(self, file: StoredFile, document: Document) -> None:
        self.document = document
        self._file = file
        self._compressed = document.packing.compressed if document.packing else {}
        self._packed = document.packing.layers if document.packing else {}
        strange = [
            *(self._packed.keys() - document.facts.layers.keys()),
            *(self._compressed.keys() - file.shapes.keys()),
        ]
        if strange:
            msg = f"the checkpoint's metadata.packing speaks of {strange[0]!r:.80}, which is not there"
            raise CheckpointError(msg)
        self._parts: dict[str, dict[str, str]] = {path: {} for path in self._packed}
        for name in file.shapes:
            if name.startswith(PREFIX):
                path, _, part = name.removeprefix(PREFIX).rpartition(".")
                if path not in self._parts:
                    msg = f"the checkpoint has a tensor {name!r:.80} of no packed layer"
                    raise CheckpointError(msg)
                self._parts[path][part] = name

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The network's state, without the latent weights of packed layers.

        Raises:
            CheckpointError: A tensor is damaged, or not stored as the document says.
        """
        names = [
            name
            for name in self._file.shapes
            if not name.startswith(PREFIX) and not is_statistic(name)
        ]
        tensors = self._read(names)
        if self.document.latents is not None:
            weights = {weight_name(facts) for facts in self.document.facts.layers.values()}
            for name in weights & tensors.keys():
                if tensors[name].dtype == self.document.latents:
                    tensors[name] = tensors[name].float()
        return with_aliases(tensors, self.document.aliases)

    def statistics(self, only: BitConfig | None) -> dict[str, Tensor]:
        """The norm statistics of all configurations, or of one."""
        numbers = (
            [None]
            if only is None
            else [n for n, one in enumerate(self.document.statistics) if one == only]
        )
        return self._read(
            [
                name
                for name in self._file.shapes
                if any(is_statistic(name, number) for number in numbers)
            ]
        )

    def cells(self, path: str, layer: QuantizedLayer) -> LayerCells:
        """The cells of a packed layer.

        Raises:
            CheckpointError: They are damaged or not those of the layer.
        """
        parts = self._file.read(self._parts[path].values())
        by_part = {part: parts[name] for part, name in self._parts[path].items()}
        steps = self.state[f"{path}.weight_quantizer.step"]
        coding = "fixed" if self.document.packing is None else self.document.packing.coding
        return from_tensors(by_part, layer, steps, self.record(path), coding, path)

    def record(self, path: str) -> TensorRecord:
        """Type and shape of the latent weight of a packed layer."""
        return self._packed[path]

    def omitted(self, network: nn.Module) -> set[str]:
        """Names in a network's state of the latent weights that the file does not hold.

        Raises:
            CheckpointError: The network's weights have other shapes, or types that are no floating-point numbers.
        """
        facts = self.document.facts.layers
        parameters = dict(network.named_parameters(remove_duplicate=False))
        for path, record in self._packed.items():
            weight = parameters.get(weight_name(facts[path]))
            shape = None if weight is None else tuple(weight.shape)
            if (
                shape != record.shape
                or not record.dtype.is_floating_point
                or not math.prod(record.shape)
            ):
                msg = f"the checkpoint holds codes of layer {path!r:.80} for a weight {record.shape} {record.dtype}, the "
                msg += f"network's is {shape}"
                raise CheckpointError(msg)
        return names_of_weights(network, facts, self._packed)

    def dtype_of(self, name: str) -> torch.dtype | None:
        """Kind of number of a tensor of the network's state; None if the file does not know it."""
        if name in self.state:
            return self.state[name].dtype
        return self._weight_dtypes.get(name)

    @cached_property
    def _weight_dtypes(self) -> dict[str, torch.dtype]:
        return {
            weight_name(self.document.facts.layers[path]): one.dtype
            for path, one in self._packed.items()
        }

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        tensors = self._file.read(names)
        for name in names:
            record = self._compressed.get(name)
            if record is not None:
                what = f"the checkpoint's tensor {name!r:.80}"
                if tensors[name].dtype != torch.uint8 or tensors[name].ndim != 1:
                    msg = f"{what} is compressed, but not stored as bytes"
                    raise CheckpointError(msg)
                raw = decompress(
                    tensors[name], math.prod(record.shape) * record.dtype.itemsize, what
                )
                tensors[name] = from_planes(raw, record.dtype, record.shape)
        return tensors
