"""`inspect`: what is inside a checkpoint, from its header, without building a network."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyprec.bits import BitConfig, LayerCandidates
from anyprec.checkpoint.content import Content
from anyprec.checkpoint.document import Architecture, Document
from anyprec.checkpoint.packed_tensors import PREFIX
from anyprec.checkpoint.rebuilding import call_of
from anyprec.errors import BitsError, CheckpointError
from anyprec.model.costing import weight_name
from anyprec.model.record import ConfigNote, ConvertSettings
from anyprec.model.selection import layer_candidates
from anyprec.network.facts import LayerFacts
from anyprec.runtime.storage import StoredFile, opened
from anyprec.runtime.tables import TableContent


@dataclass(frozen=True)
class StoredLayer:
    """A quantized layer in a file.

    Attributes:
        path: Its path.
        weights: Number of weights.
        macs: Multiply-accumulates for one sample.
        candidates: The bit-widths that it may take.
        storage: "cells" or "latent", or "tied" for a weight that is stored with another layer.
        bytes: What its weight takes in the file.
        reason: Why its latent weight is kept in a packed file; empty otherwise.
    """

    path: str
    weights: int
    macs: int
    candidates: LayerCandidates
    storage: str
    bytes: int
    reason: str = ""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds. Prints as a summary with a table of layers.

    Attributes:
        path: The file.
        bytes: Its size.
        form: "training", "packed (fixed)" or "packed (zstd)".
        format_version: Version of the format.
        version: The anyprec version that wrote it.
        architecture: How timm makes the network; None if loading takes a network.
        settings: The arguments of `convert`.
        input_shape: Shape of the input that MACs are counted for.
        pretrained_cfg: timm's description of images and labels.
        layers: The quantized layers, by path.
        configs: Named configurations.
        notes: Their costs, scores, and how they were found.
        frozen: Lowest precision in use, of layers with frozen candidates.
        statistics: Configurations with norm statistics of their own.
        tensors: Number of tensors.
    """

    path: str
    bytes: int
    form: str
    format_version: int
    version: str
    architecture: Architecture | None
    settings: ConvertSettings
    input_shape: tuple[int, ...]
    pretrained_cfg: Mapping[str, Any]
    layers: Mapping[str, StoredLayer]
    configs: Mapping[str, BitConfig]
    notes: Mapping[str, ConfigNote]
    frozen: BitConfig
    statistics: tuple[BitConfig, ...]
    tensors: int

    def __str__(self) -> str:
        lines = [*self._heading(), "", _table(self.layers.values())]
        if self.configs:
            lines += ["", "configurations"]
            lines += [f"  {self._config_line(name)}" for name in self.configs]
        return "\n".join(lines)

    def _heading(self) -> list[str]:
        network = "a network that must be passed to load"
        if self.architecture is not None:
            network = call_of(self.architecture)
        candidates = f"candidates {self.settings.bits}"
        if self.settings.only:
            candidates = "one precision for each layer"
        untied = [layer for layer in self.layers.values() if layer.storage != "tied"]
        weights = sum(layer.weights for layer in untied)
        stored = _mebibytes(sum(layer.bytes for layer in self.layers.values()))
        shape = " x ".join(map(str, self.input_shape[1:]))
        mean, std = self.pretrained_cfg.get("mean", "?"), self.pretrained_cfg.get("std", "?")
        return [
            f"{self.path}: {self.form} form, format {self.format_version}, "
            f"written by anyprec {self.version}",
            f"  network     {network}",
            f"  size        {_mebibytes(self.bytes)} in {self.tensors} tensors; "
            f"{weights:,} weights in {stored}",
            f"  precision   {candidates}, norm copies {self.settings.norm!r}, "
            f"{len(self.frozen)} layers with frozen ones",
            f"  input       {shape}, mean {mean}, std {std}",
        ]

    def _config_line(self, name: str) -> str:
        note = self.notes.get(name)
        details = [name]
        if note is not None:
            details += [f"{note.bitops / 1e9:.4g} GBitOPs", _mebibytes(note.size / 8)]
            if note.score is not None:
                details.append(f"score {note.score:.4g}")
            if note.found:
                details.append(", ".join(f"{key} {value}" for key, value in note.found.items()))
        if self.configs[name] in self.statistics:
            details.append("norm statistics of its own")
        return "; ".join(details)


def inspect(path: str | os.PathLike[str]) -> CheckpointInfo:
    """What is inside a checkpoint, without building its network or reading its tensors.

    Args:
        path: The file.

    Returns:
        The facts; print them.

    Raises:
        CheckpointError: The file is missing, its header is damaged, or anyprec did not write it.

    Example:
        >>> import tempfile, timm, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     anyprec.save(model, f"{folder}/net.safetensors")
        ...     info = anyprec.inspect(f"{folder}/net.safetensors")
        >>> info.form, info.architecture.name, info.layers["fc"].candidates.weight
        ('training', 'test_resnet', (8,))
    """
    with opened(Path(path)) as file:
        document = Document.from_json(file.document)
        Content(file, document)  # checks that the layers of the packed form are there
        form = "training" if document.packing is None else f"packed ({document.packing.coding})"
        layers = {}
        for layer in document.facts.layers.values():
            if f"{layer.path}.weight_quantizer.step" in file.shapes:
                layers[layer.path] = _stored_layer(file, document, layer)
        return CheckpointInfo(
            path=str(path),
            bytes=Path(path).stat().st_size,
            form=form,
            format_version=document.format,
            version=document.version,
            architecture=document.architecture,
            settings=document.convert_settings,
            input_shape=document.facts.example_shape,
            pretrained_cfg=document.pretrained_cfg,
            layers=layers,
            configs=document.configs,
            notes=document.config_notes,
            frozen=document.frozen,
            statistics=document.statistics,
            tensors=len(file.shapes),
        )


def _stored_layer(file: StoredFile, document: Document, facts: LayerFacts) -> StoredLayer:
    try:
        candidates = layer_candidates(facts, document.convert_settings)
    except BitsError as error:
        msg = f"the checkpoint contradicts itself: {error}"
        raise CheckpointError(msg) from error
    name, packing = weight_name(facts), document.packing
    storage, size, reason = "tied", 0, ""
    if packing is not None and facts.path in packing.layers:
        size = _size_of_parts(file, f"{PREFIX}{facts.path}.")
        storage = "cells" if size else "tied"
    elif name in file.shapes:
        storage, size = "latent", _size(file, name)
    if packing is not None:
        reason = packing.latent.get(facts.path, "")
    return StoredLayer(facts.path, facts.weights, facts.macs, candidates, storage, size, reason)


def _size_of_parts(file: StoredFile, prefix: str) -> int:
    """Bytes of the tensors of a layer, without those of layers inside it."""
    total = 0
    for name in file.shapes:
        if name.startswith(prefix) and "." not in name.removeprefix(prefix):
            total += _size(file, name)
    return total


def _size(file: StoredFile, name: str) -> int:
    dtype, shape = file.shapes[name]
    # The first number in a name of safetensors is an element's bits ("F8_E4M3"); "BOOL" has none.
    number = re.search(r"\d+", dtype)
    bits = int(number[0]) if number else 8
    return bits * math.prod(shape) // 8


def _table(layers: Iterable[StoredLayer]) -> str:
    header = ("layer", "weights", "MACs", "weight bits", "input bits", "stored as", "bytes")
    rows = []
    for layer in layers:
        weight_bits = ",".join(map(str, layer.candidates.weight))
        input_bits = ",".join(map(str, layer.candidates.activation))
        stored = f"{layer.storage}: {layer.reason}" if layer.reason else layer.storage
        counts = (f"{layer.weights:,}", f"{layer.macs:,}")
        rows.append((layer.path, *counts, weight_bits, input_bits, stored, f"{layer.bytes:,}"))
    return TableContent(header, rows, numbers=("weights", "MACs", "bytes")).text()


def _mebibytes(number: float) -> str:
    return f"{number / 2**20:.3f} MiB"
