"""The JSON document in a checkpoint's metadata: what it says, and reading it without trusting it.

The safetensors metadata holds this document in the entry `anyprec`; `docs/checkpoint.md` specifies it. Every field is
checked for its type and range before it is used (`fields.py`); a message names the field. Whether it fits a network is
checked in `matching.py`.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from anyprec.bits import BitConfig
from anyprec.checkpoint.fields import Fields, is_count, require_tame, strings
from anyprec.errors import CheckpointError
from anyprec.model.record import ConfigNote, ConvertSettings
from anyprec.network.facts import LayerFacts, NetworkFacts
from anyprec.nn.norms import NormSharing

FORMAT_VERSION = 2
"""Written. Format 1, also read, lacks the packed form, compressed tensors, notes and digests of single tensors."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
"""Kinds of number that a document may name."""

Coding = Literal["fixed", "zstd"]
"""How cells are stored: in fields of fixed length, or entropy-coded; see `coding.py`."""


@dataclass(frozen=True)
class TensorRecord:
    """Kind of number and shape of a tensor that is not stored as such."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """The packed form of a network.

    Attributes:
        coding: How cells are stored.
        layers: The latent weight of each packed layer, by the layer's path.
        latent: Path of each layer whose latent weight is stored after all, with the reason.
        compressed: Other tensors that are stored as one Zstandard frame, by name.
    """

    coding: Coding
    layers: dict[str, TensorRecord]
    latent: dict[str, str]
    compressed: dict[str, TensorRecord]


@dataclass(frozen=True)
class Architecture:
    """How timm makes the float network: `timm.create_model(name, **arguments)`."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Document:
    """What a checkpoint says of its network.

    Attributes:
        version: The anyprec version that wrote it.
        architecture: How to rebuild the float network; None if it takes a network to load into.
        settings: The arguments of `convert`.
        facts: What was known of the network, so that loading observes nothing anew.
        configs: Named configurations.
        frozen: Lowest precision in use of layers with frozen candidates.
        statistics: Configurations with norm statistics of their own; their tensors are numbered in this order.
        aliases: Name of a tied tensor to the name under which it is stored.
        pretrained_cfg: timm's description of the weights (normalisation, labels), as far as JSON can hold it.
        notes: Cost of each named configuration, its score and how it was found.
        latents: Kind of number in which latent weights of float32 are stored; None is as they were.
        packing: The packed form; None is the training form, with latent weights.
        format: The format that it was read in; it is always written in the present one.
    """

    version: str
    architecture: Architecture | None
    settings: ConvertSettings
    facts: NetworkFacts
    configs: dict[str, BitConfig]
    frozen: BitConfig = field(default_factory=lambda: BitConfig({}))
    statistics: tuple[BitConfig, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, ConfigNote] = field(default_factory=dict)
    latents: torch.dtype | None = None
    packing: Packing | None = None
    format: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The document as text."""
        architecture = None if self.architecture is None else dataclasses.asdict(self.architecture)
        # Left out where there is nothing to say, as in files of format 1.
        floors = {"floors": self.frozen.to_json()} if self.frozen else {}
        statistics = (
            {"statistics": [config.to_json() for config in self.statistics]}
            if self.statistics
            else {}
        )
        return json.dumps(
            {
                "format": FORMAT_VERSION,
                "version": self.version,
                "architecture": architecture,
                "settings": _settings_json(self.settings),
                "layers": [_layer_json(layer) for layer in self.facts.layers.values()],
                "norms": self.facts.norms,
                "uncounted": self.facts.uncounted,
                "example_shape": self.facts.example_shape,
                "untraceable": self.facts.untraceable,
                "configs": {name: config.to_json() for name, config in self.configs.items()},
                **floors,
                **statistics,
                "aliases": self.aliases,
                "pretrained_cfg": self.pretrained_cfg,
                **({"notes": _notes_json(self.notes)} if self.notes else {}),
                **({"latents": _name(self.latents)} if self.latents else {}),
                **({"packing": _packing_json(self.packing)} if self.packing else {}),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Document:
        """Read a document.

        Raises:
            CheckpointError: It is not JSON, of a newer format, or a field is missing or of another type.
        """
        try:
            raw = json.loads(text)
        except (
            ValueError,
            RecursionError,
        ) as error:  # ValueError, not JSONDecodeError: Python caps digits of an int
            msg = f"the checkpoint's metadata is not valid JSON: {error}"
            raise CheckpointError(msg) from error
        require_tame(raw)
        fields = Fields(raw, "metadata")
        version = fields.take("format", int)
        if not 1 <= version <= FORMAT_VERSION:
            remedy = ": update anyprec" if version > FORMAT_VERSION else ""
            msg = f"the checkpoint has format {version}, this anyprec reads formats 1 to {FORMAT_VERSION}{remedy}"
            raise CheckpointError(msg)
        return cls(
            version=fields.take("version", str),
            architecture=_read_architecture(fields),
            settings=_read_settings(Fields(fields.take("settings", dict), "metadata.settings")),
            facts=_read_facts(fields),
            configs=_read_configs(fields.take("configs", dict)),
            frozen=_read_config(fields.take_or("floors", dict, default={}), "metadata.floors"),
            statistics=tuple(
                _read_config(config, "metadata.statistics[]")
                for config in fields.take_or("statistics", list, default=[])
            ),
            aliases=strings(fields.take("aliases", dict), "metadata.aliases"),
            pretrained_cfg=fields.take("pretrained_cfg", dict),
            notes=_read_notes(fields.take_or("notes", dict, default={})),
            latents=_read_dtype(fields, "latents") if fields.has("latents") else None,
            packing=_read_packing(fields.take("packing", dict)) if fields.has("packing") else None,
            format=version,
        )


def _read_architecture(fields: Fields) -> Architecture | None:
    raw = fields.take("architecture", dict, type(None))
    if raw is None:
        return None
    inner = Fields(raw, "metadata.architecture")
    return Architecture(inner.take("name", str), inner.take("arguments", dict))


def _read_settings(fields: Fields) -> ConvertSettings:
    fixed = fields.take("first_last_bits", int, type(None))
    include = fields.take("include", list, type(None))
    return ConvertSettings(
        bits=fields.bit_widths("bits"),
        activation_bits=fields.bit_widths("activation_bits"),
        first_last_bits=None if fixed is None else fields.bit_width("first_last_bits"),
        depthwise_min_bits=fields.bit_width("depthwise_min_bits"),
        per_channel=fields.take("per_channel", bool),
        include=None if include is None else fields.items("include", str),
        exclude=fields.items("exclude", str),
        norm=_read_norm(fields),
        only=_read_config(fields.take("only", dict), "metadata.settings.only")
        if fields.has("only")
        else None,
    )


def _read_norm(fields: Fields) -> NormSharing:
    found: Any = fields.take_or("norm", str, default="per-pair")
    if found not in get_args(NormSharing):
        msg = f"the checkpoint's metadata.settings.norm is {found!r:.40}, expected one of {get_args(NormSharing)}"
        raise CheckpointError(msg)
    sharing: NormSharing = found
    return sharing


def _settings_json(settings: ConvertSettings) -> dict[str, Any]:
    """The settings; `norm` and `only` are left out where they say what files of format 1 would say."""
    fields = {
        name: getattr(settings, name)
        for name in (field.name for field in dataclasses.fields(settings))
    }
    if settings.norm == "per-pair":
        del fields["norm"]
    only = fields.pop("only")
    return fields if only is None else {**fields, "only": only.to_json()}


def _read_facts(fields: Fields) -> NetworkFacts:
    layers = _read_layers(fields)
    norms = fields.take("norms", dict)
    if not all(
        feeding is None or (isinstance(feeding, str) and feeding in layers)
        for feeding in norms.values()
    ):
        msg = "the checkpoint's metadata.norms names a layer that metadata.layers does not list"
        raise CheckpointError(msg)
    uncounted = fields.take("uncounted", dict)
    for name, pair in uncounted.items():
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(is_count(number) for number in pair)
        ):
            msg = f"the checkpoint's metadata.uncounted[{name!r:.40}] is {reprlib.repr(pair)}, expected [calls, MACs]"
            raise CheckpointError(msg)
    shape = fields.items("example_shape", int)
    if not shape or min(shape) < 1:
        msg = f"the checkpoint's metadata.example_shape is {reprlib.repr(shape)}, expected lengths of at least 1"
        raise CheckpointError(msg)
    return NetworkFacts(
        layers=layers,
        norms=norms,
        uncounted={name: (calls, macs) for name, (calls, macs) in uncounted.items()},
        example_shape=shape,
        untraceable=fields.take("untraceable", str, type(None)),
    )


def _read_layers(fields: Fields) -> dict[str, LayerFacts]:
    layers: dict[str, LayerFacts] = {}
    for raw in fields.take("layers", list):
        entry = Fields(raw, "metadata.layers[]")
        layer = LayerFacts(
            path=entry.take("path", str),
            calls=entry.count("calls"),
            macs=entry.count("macs"),
            weights=entry.count("weights"),
            owner=entry.take("owner", str, type(None)),
            parameter=entry.take_or("parameter", str, type(None), default=None),
            axis=entry.take_or("axis", int, type(None), default=None),
            per_tensor=entry.take_or("per_tensor", bool, default=False),
            dynamic=entry.take_or("dynamic", bool, default=False),
            derived=entry.take_or("derived", bool, default=False),
            feature=entry.take_or("feature", str, type(None), default=None),
            depthwise=entry.take("depthwise", bool),
            nonnegative=entry.take("nonnegative", bool),
            first=entry.take("first", bool),
            last=entry.take("last", bool),
            constant=entry.take("constant", bool),
            problem=entry.take("problem", str, type(None)),
        )
        if layer.path in layers:
            msg = f"the checkpoint's metadata.layers lists {layer.path!r:.80} twice"
            raise CheckpointError(msg)
        layers[layer.path] = layer
    return layers


def _layer_json(layer: LayerFacts) -> dict[str, Any]:
    """The fields of a layer; those that most layers lack are left out there, as in the first files of this format."""
    return {
        name: value
        for name, value in dataclasses.asdict(layer).items()
        if name not in _RARE or (value is not None and value is not False)
    }


_RARE = {"parameter", "axis", "per_tensor", "dynamic", "derived", "feature"}


def _read_configs(raw: dict[str, Any]) -> dict[str, BitConfig]:
    return {
        name: _read_config(config, f"metadata.configs[{name!r:.40}]")
        for name, config in raw.items()
    }


def _read_config(raw: Any, where: str) -> BitConfig:
    try:
        return BitConfig(dict(strings(raw, where)))
    except (
        ValueError
    ) as error:  # BitsError, or a number of more digits than Python reads; also of our own refusal
        if isinstance(error, CheckpointError):
            raise
        msg = f"the checkpoint's {where} holds a precision that cannot be read: {error}"
        raise CheckpointError(msg) from error


def _notes_json(notes: Mapping[str, ConfigNote]) -> dict[str, Any]:
    return {
        name: {**dataclasses.asdict(note), "found": dict(note.found)}
        for name, note in notes.items()
    }


def _read_notes(raw: dict[str, Any]) -> dict[str, ConfigNote]:
    notes = {}
    for name, one in raw.items():
        where = f"metadata.notes[{name!r:.40}]"
        fields = Fields(one, where)
        found = fields.take("found", dict)
        if not all(isinstance(value, (str, int, float)) for value in found.values()):
            msg = f"the checkpoint's {where}.found is {reprlib.repr(found)}, expected texts and numbers"
            raise CheckpointError(msg)
        score = fields.take("score", int, float, type(None))
        notes[name] = ConfigNote(fields.count("bitops"), fields.count("size"), score, found)
    return notes


def _packing_json(packing: Packing) -> dict[str, Any]:
    return {
        "coding": packing.coding,
        "layers": {path: _record_json(record) for path, record in packing.layers.items()},
        "latent": packing.latent,
        "compressed": {name: _record_json(record) for name, record in packing.compressed.items()},
    }


def _read_packing(raw: Any) -> Packing:
    fields = Fields(raw, "metadata.packing")
    coding: Any = fields.take("coding", str)
    if coding not in get_args(Coding):
        msg = f"the checkpoint's metadata.packing.coding is {coding!r:.40}, expected one of {get_args(Coding)}"
        raise CheckpointError(msg)
    layers, compressed = (
        {
            name: _read_record(one, f"metadata.packing.{part}[{name!r:.80}]")
            for name, one in fields.take(part, dict).items()
        }
        for part in ("layers", "compressed")
    )
    latent = strings(fields.take("latent", dict), "metadata.packing.latent")
    return Packing(coding, layers, latent, compressed)


def _record_json(record: TensorRecord) -> dict[str, Any]:
    return {"dtype": _name(record.dtype), "shape": record.shape}


def _read_record(raw: Any, where: str) -> TensorRecord:
    fields = Fields(raw, where)
    shape = fields.items("shape", int)
    if any(length < 0 for length in shape):
        msg = (
            f"the checkpoint's {where}.shape is {reprlib.repr(shape)}, expected no negative length"
        )
        raise CheckpointError(msg)
    return TensorRecord(_read_dtype(fields, "dtype"), shape)


def _read_dtype(fields: Fields, name: str) -> torch.dtype:
    found = fields.take(name, str)
    if found not in DTYPES:
        msg = f"the checkpoint names {found!r:.40} as {name}, expected one of {', '.join(DTYPES)}"
        raise CheckpointError(msg)
    return DTYPES[found]


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
