"""The tensors of an open checkpoint, decompressed and tied as the document describes them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor, nn

from anyprec.bits import BitConfig
from anyprec.checkpoint.coding import decompress, from_planes
from anyprec.checkpoint.document import Document, Packing, TensorRecord
from anyprec.checkpoint.packed_tensors import PREFIX, LayerCells, from_tensors
from anyprec.checkpoint.packing import names_of_weights
from anyprec.checkpoint.statistics import STATISTICS_PREFIX, statistics_prefixes
from anyprec.errors import CheckpointError
from anyprec.model.costing import weight_name
from anyprec.nn.layers import QuantizedLayer
from anyprec.runtime.storage import StoredFile, with_aliases

_NOTHING_PACKED = Packing("fixed", {}, {}, {})


class Content:
    """Document and tensors of an open file.

    Args:
        file: The file.
        document: Its document.

    Raises:
        CheckpointError: The document names layers or tensors that are not there.
    """

    def __init__(self, file: StoredFile, document: Document) -> None:
        self.document = document
        self._file = file
        self._packing = document.packing or _NOTHING_PACKED
        strange = [
            *(self._packing.layers.keys() - document.facts.layers.keys()),
            *(self._packing.compressed.keys() - file.shapes.keys()),
        ]
        if strange:
            msg = f"the checkpoint's metadata.packing names {strange[0]!r:.80}, which is not there"
            raise CheckpointError(msg)
        # For each packed layer: which tensor is which part.
        self._parts: dict[str, dict[str, str]] = {path: {} for path in self._packing.layers}
        for name, target in _stored_names(file, document, within=PREFIX).items():
            path, _, part = name.removeprefix(PREFIX).rpartition(".")
            if path not in self._parts:
                msg = f"the checkpoint has a tensor {name!r:.80} of no packed layer"
                raise CheckpointError(msg)
            self._parts[path][part] = target

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The network's state, without the latent weights of packed layers.

        Raises:
            CheckpointError: A tensor is damaged, or not stored as the document describes it.
        """
        outside = (PREFIX, STATISTICS_PREFIX)
        tensors = self._read(name for name in self._file.shapes if not name.startswith(outside))
        if self.document.latents is not None:
            # Latent weights of float32 were rounded to save space; they are float32 in the network.
            weights = {weight_name(facts) for facts in self.document.facts.layers.values()}
            for name in weights & tensors.keys():
                if tensors[name].dtype == self.document.latents:
                    tensors[name] = tensors[name].float()
        aliases = self.document.aliases.items()
        return with_aliases(
            tensors, {name: target for name, target in aliases if not name.startswith(PREFIX)}
        )

    def statistics(self, only: BitConfig | None) -> dict[str, Tensor]:
        """The norm statistics of all configurations, or of one."""
        prefixes = statistics_prefixes(self.document, only)
        return self._read(name for name in self._file.shapes if name.startswith(prefixes))

    def cells(self, path: str, layer: QuantizedLayer) -> LayerCells:
        """The cells of a packed layer.

        Raises:
            CheckpointError: They are damaged or not those of the layer.
        """
        names = self._parts[path]
        tensors = self._file.read(names.values())
        by_part = {part: tensors[name] for part, name in names.items()}
        steps = self.state[f"{path}.weight_quantizer.step"]
        return from_tensors(by_part, layer, steps, self.record(path), self._packing.coding, path)

    def record(self, path: str) -> TensorRecord:
        """Dtype and shape of the latent weight of a packed layer."""
        return self._packing.layers[path]

    def omitted(self, network: nn.Module) -> set[str]:
        """Names in a network's state of the latent weights that the file does not hold.

        Raises:
            CheckpointError: The network's weights have other shapes, or the file's records are not
                those of floating-point weights.
        """
        facts = self.document.facts.layers
        parameters = dict(network.named_parameters(remove_duplicate=False))
        for path, record in self._packing.layers.items():
            weight = parameters.get(weight_name(facts[path]))
            shape = None if weight is None else tuple(weight.shape)
            is_weight = record.dtype.is_floating_point and math.prod(record.shape) > 0
            if shape != record.shape or not is_weight:
                msg = f"the checkpoint holds codes of layer {path!r:.80} for a weight "
                msg += f"{record.shape} {record.dtype}, the network's is {shape}"
                raise CheckpointError(msg)
        return names_of_weights(network, facts, self._packing.layers)

    def dtype_of(self, name: str) -> torch.dtype | None:
        """Dtype of a tensor of the network's state; None if the file does not know it."""
        if name in self.state:
            return self.state[name].dtype
        return self._weight_dtypes.get(name)

    @cached_property
    def _weight_dtypes(self) -> dict[str, torch.dtype]:
        facts = self.document.facts.layers
        layers = self._packing.layers.items()
        return {weight_name(facts[path]): record.dtype for path, record in layers}

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = self._file.read(names)
        for name in tensors.keys() & self._packing.compressed.keys():
            tensors[name] = _decompressed(name, tensors[name], self._packing.compressed[name])
        return tensors


def _stored_names(file: StoredFile, document: Document, *, within: str) -> dict[str, str]:
    """Names that begin with `within`, to the names under which the tensors are stored.

    Raises:
        CheckpointError: An alias points to no tensor with such a name, or hides one.
    """
    names = {name: name for name in file.shapes if name.startswith(within)}
    aliases = {}
    for name, target in document.aliases.items():
        if name.startswith(within):
            if target not in names or name in names:
                msg = f"the checkpoint says that {name!r:.80} is stored as {target!r:.80}, "
                msg += "which is not so"
                raise CheckpointError(msg)
            aliases[name] = target
    return {**names, **aliases}


def _decompressed(name: str, stored: Tensor, record: TensorRecord) -> Tensor:
    what = f"the checkpoint's tensor {name!r:.80}"
    if stored.dtype != torch.uint8 or stored.ndim != 1:
        msg = f"{what} is compressed, but not stored as bytes"
        raise CheckpointError(msg)
    raw = decompress(stored, math.prod(record.shape) * record.dtype.itemsize, what)
    return from_planes(raw, record.dtype, record.shape)
