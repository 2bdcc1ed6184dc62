"""The JSON document in a checkpoint's metadata: the types of its fields, and reading it safely.

The safetensors metadata holds this document in the entry `anyprec`; `docs/checkpoint.md` specifies
it. The classes below and in `entries.py` are its objects, and their attributes its fields. msgspec
checks every type and range, refuses unknown fields, and names the path of a bad one;
`__post_init__` checks what a type cannot express. Whether a document fits a network is checked in
`matching.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta, Struct
from msgspec.structs import asdict

from anyprec.bits import BitConfig
from anyprec.checkpoint.entries import (
    MAX_INTEGER,
    Count,
    Entry,
    LayerEntry,
    Length,
    OutputEntry,
    SettingsEntry,
    drop_default_texts,
    layer_facts,
    output_facts,
    settings_of,
)
from anyprec.errors import CheckpointError
from anyprec.model.record import ConfigNote, ConvertSettings
from anyprec.network.facts import NetworkFacts

FORMAT_VERSION = 2
"""The one format that is written and read."""

PackedCoding = Literal["fixed", "zstd"]
"""How cells are stored: in fields of fixed length, or entropy-coded; see `coding.py`."""

_MAX_DEPTH = 16
_OPTIONAL = {"floors", "statistics", "notes", "latents", "packing", "outputs", "apart"}
"""Fields of the document that are left out where they are empty."""

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""The dtypes that a document may name."""


class Architecture(Entry, frozen=True):
    """How timm makes the float network: `timm.create_model(name, **arguments)`."""

    name: str
    arguments: dict[str, Any]


class TensorRecord(Entry, frozen=True):
    """Dtype and shape of a tensor that is not stored as such."""

    dtype: torch.dtype
    shape: tuple[Count, ...]


class Packing(Entry, frozen=True):
    """The packed form of a network.

    Attributes:
        coding: How cells are stored.
        layers: The latent weight of each packed layer, by the layer's path.
        latent: Path of each layer whose latent weight is stored after all, with the reason.
        compressed: Other tensors that are stored as one Zstandard frame, by name.
    """

    coding: PackedCoding
    layers: dict[str, TensorRecord]
    latent: dict[str, str]
    compressed: dict[str, TensorRecord]


class NoteEntry(Entry, frozen=True):
    """The fields of `ConfigNote`."""

    bitops: Count
    size: Count
    score: int | float | None
    found: dict[str, str | int | float]


class Document(Entry, frozen=True, kw_only=True, dict=True):
    """What a checkpoint says of its network.

    Attributes:
        format: Version of the format.
        version: The anyprec version that wrote it.
        architecture: How to rebuild the float network; None if it takes a network to load into.
        settings: The arguments of `convert`.
        layers: Facts of every layer with a weight.
        norms: Path of every BatchNorm to the path of the layer that feeds it, or None.
        uncounted: Operators that are no layer, with calls and MACs.
        example_shape: Shape of the input that MACs are counted for.
        untraceable: Why torch.fx could not trace the network, or None.
        outputs: Values between layers that have a quantizer.
        apart: Modules whose calls are not counted for the modules around them.
        configs: Named configurations.
        frozen: Lowest precision in use of layers with frozen candidates.
        statistics: Configurations with norm statistics of their own; their tensors are numbered in
            this order.
        aliases: Name of a tied tensor to the name under which it is stored.
        pretrained_cfg: timm's description of the weights (normalisation, labels), as far as JSON
            can hold it.
        notes: Cost of each named configuration, its score and how it was found.
        latents: The dtype in which latent weights of float32 are stored; None is as they were.
        packing: The packed form; None is the training form, with latent weights.
    """

    format: int = FORMAT_VERSION
    version: str
    architecture: Architecture | None
    settings: SettingsEntry
    layers: tuple[LayerEntry, ...]
    norms: dict[str, str | None]
    uncounted: dict[str, tuple[Count, Count]]
    example_shape: Annotated[tuple[Length, ...], Meta(min_length=1)]
    untraceable: str | None
    outputs: tuple[OutputEntry, ...] = ()
    apart: tuple[str, ...] = ()
    configs: dict[str, BitConfig]
    frozen: BitConfig = msgspec.field(name="floors", default=BitConfig({}))
    statistics: tuple[BitConfig, ...] = ()
    aliases: dict[str, str]
    pretrained_cfg: dict[str, Any]
    notes: dict[str, NoteEntry] = msgspec.field(default_factory=dict)
    latents: torch.dtype | None = None
    packing: Packing | None = None

    def __post_init__(self) -> None:
        outputs = {output.path for output in self.outputs}
        if len(outputs) < len(self.outputs):
            msg = "outputs lists a path twice"
            raise ValueError(msg)
        for entry in self.layers:
            if entry.reads is not None and entry.reads not in outputs:
                msg = f"{entry.path!r:.80} reads {entry.reads!r:.80}, which outputs does not list"
                raise ValueError(msg)
        paths = Counter(layer.path for layer in self.layers)
        for path, count in paths.items():
            if count > 1:
                msg = f"layers lists {path!r:.80} twice"
                raise ValueError(msg)
        for norm, layer in self.norms.items():
            if layer is not None and layer not in paths:
                msg = f"norms[{norm!r:.80}] is {layer!r:.80}, which layers does not list"
                raise ValueError(msg)

    @cached_property
    def facts(self) -> NetworkFacts:
        """What was known of the network, so that loading observes nothing anew."""
        return NetworkFacts(
            layers={entry.path: layer_facts(entry) for entry in self.layers},
            norms=self.norms,
            uncounted=self.uncounted,
            example_shape=self.example_shape,
            untraceable=self.untraceable,
            outputs=tuple(map(output_facts, self.outputs)),
            apart=self.apart,
        )

    @cached_property
    def convert_settings(self) -> ConvertSettings:
        """The arguments of `convert`, as the converted model keeps them."""
        return settings_of(self.settings)

    @cached_property
    def config_notes(self) -> dict[str, ConfigNote]:
        """The notes, as the converted model keeps them."""
        return {name: ConfigNote(**asdict(note)) for name, note in self.notes.items()}

    def to_json(self) -> str:
        """The document as text."""
        document = msgspec.to_builtins(self, enc_hook=_to_json)
        for name in _OPTIONAL:
            if not document[name]:
                del document[name]
        drop_default_texts(document["settings"])
        return json.dumps(document)

    @classmethod
    def from_json(cls, text: str) -> Document:
        """Read a document.

        Raises:
            CheckpointError: It is not JSON, of another format, or a field is missing, unknown, or
                not of its type.
        """
        try:
            raw = msgspec.json.decode(text)
        # ValueError: bad JSON and text that is no UTF-8; RecursionError: thousands of brackets.
        except (ValueError, RecursionError) as error:
            msg = f"the checkpoint's metadata is not valid JSON: {error}"
            raise CheckpointError(msg) from error
        _require_bounded(raw)
        try:
            # The format first: another one may have other fields.
            _require_format(msgspec.convert(raw, _Versioned).format)
            return msgspec.convert(raw, cls, dec_hook=_from_json)
        except msgspec.ValidationError as error:
            msg = f"the checkpoint's metadata is not as expected: {_shortened(str(error))}"
            raise CheckpointError(msg) from error


class _Versioned(Struct):
    """The one field that documents of all formats share."""

    format: int


def _require_format(version: int) -> None:
    if version == FORMAT_VERSION:
        return
    remedy = "save the network again with this anyprec"
    if version > FORMAT_VERSION:
        remedy = "update anyprec"
    msg = f"the checkpoint has format {version}, this anyprec reads format {FORMAT_VERSION}: "
    msg += remedy
    raise CheckpointError(msg)


def _require_bounded(raw: Any) -> None:
    """Refuse what JSON allows but other programs cannot handle: deep nesting and huge numbers."""
    level = [raw]
    for _ in range(_MAX_DEPTH):
        next_level: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                next_level += value.values()
            elif isinstance(value, list):
                next_level += value
            elif isinstance(value, (int, float)) and abs(value) > MAX_INTEGER:
                msg = "the checkpoint's metadata holds a number of more than 63 bits"
                raise CheckpointError(msg)
        if not next_level:
            return
        level = next_level
    msg = f"the checkpoint's metadata is nested deeper than {_MAX_DEPTH} levels"
    raise CheckpointError(msg)


def _from_json(expected: type, raw: Any) -> Any:
    """The values whose types JSON lacks; msgspec adds the path to what is raised here."""
    if expected is BitConfig:
        if not isinstance(raw, dict) or not all(isinstance(text, str) for text in raw.values()):
            msg = "expected an object of precisions such as 'W4A6'"
            raise TypeError(msg)
        return BitConfig(raw)
    if not isinstance(raw, str) or raw not in _DTYPES:
        msg = f"{raw!r:.40} is no dtype of a checkpoint, expected one of {', '.join(_DTYPES)}"
        raise ValueError(msg)
    return _DTYPES[raw]


def _to_json(value: Any) -> Any:
    if isinstance(value, BitConfig):
        return value.to_json()
    return str(value).removeprefix("torch.")


def _shortened(text: str, limit: int = 300) -> str:
    """`text`, without its middle if it is long: it may quote the file, and ends in the path."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
