"""The JSON document in a checkpoint's metadata: what it says, and reading it without trusting it.

The safetensors metadata holds this document in the entry `anyprec`. Every field is checked for its type and range
before it is used; a message names the field. Whether it fits a network is checked in `matching.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from dataclasses import dataclass, field
from typing import Any, get_args

from anyprec.bits import MAX_BITS, MIN_BITS, BitConfig
from anyprec.errors import CheckpointError
from anyprec.graph import LayerFacts, NetworkFacts
from anyprec.model import ConvertSettings
from anyprec.norms import NormSharing

FORMAT_VERSION = 1

_MAX_DEPTH = 16
_MAX_INTEGER = 2**63 - 1


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
        floors: Lowest precision in use of layers with frozen candidates.
        statistics: Configurations with norm statistics of their own; their tensors are numbered in this order.
        aliases: Name of a tied tensor to the name under which it is stored.
        pretrained_cfg: timm's description of the weights (normalisation, labels), as far as JSON can hold it.
    """

    version: str
    architecture: Architecture | None
    settings: ConvertSettings
    facts: NetworkFacts
    configs: dict[str, BitConfig]
    floors: BitConfig = field(default_factory=lambda: BitConfig({}))
    statistics: tuple[BitConfig, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The document as text."""
        architecture = None if self.architecture is None else dataclasses.asdict(self.architecture)
        # Left out where there is nothing to say, as in the first files of this format.
        floors = {"floors": self.floors.to_json()} if self.floors else {}
        statistics = {"statistics": [config.to_json() for config in self.statistics]} if self.statistics else {}
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
        except (ValueError, RecursionError) as error:  # ValueError, not JSONDecodeError: Python caps digits of an int
            msg = f"the checkpoint's metadata is not valid JSON: {error}"
            raise CheckpointError(msg) from error
        _require_tame(raw)
        fields = _Fields(raw, "metadata")
        version = fields.take("format", int)
        if version != FORMAT_VERSION:
            remedy = ": update anyprec" if version > FORMAT_VERSION else ""
            msg = f"the checkpoint has format {version}, this anyprec reads format {FORMAT_VERSION}{remedy}"
            raise CheckpointError(msg)
        return cls(
            version=fields.take("version", str),
            architecture=_read_architecture(fields),
            settings=_read_settings(_Fields(fields.take("settings", dict), "metadata.settings")),
            facts=_read_facts(fields),
            configs=_read_configs(fields.take("configs", dict)),
            floors=_read_config(fields.take_or("floors", dict, default={}), "metadata.floors"),
            statistics=tuple(
                _read_config(config, "metadata.statistics[]")
                for config in fields.take_or("statistics", list, default=[])
            ),
            aliases=_strings(fields.take("aliases", dict), "metadata.aliases"),
            pretrained_cfg=fields.take("pretrained_cfg", dict),
        )


class _Fields:
    """A JSON object whose fields are taken with their type."""

    def __init__(self, raw: Any, where: str) -> None:
        if not isinstance(raw, dict):
            msg = f"the checkpoint's {where} is not a JSON object"
            raise CheckpointError(msg)
        self._raw = raw
        self._where = where

    def take(self, name: str, *kinds: type) -> Any:
        """The value of `name`, which must be of one of `kinds`."""
        if name not in self._raw:
            msg = f"the checkpoint's {self._where} has no field {name!r}"
            raise CheckpointError(msg)
        value = self._raw[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            msg = f"the checkpoint's {self._where}.{name} is {reprlib.repr(value)}, expected {expected}"
            raise CheckpointError(msg)
        return value

    def take_or(self, name: str, *kinds: type, default: Any) -> Any:
        """As `take`, of a field that older files of this format lack."""
        return self.take(name, *kinds) if name in self._raw else default

    def items(self, name: str, kind: type) -> tuple[Any, ...]:
        """A list whose entries are all of one kind."""
        entries = self.take(name, list)
        if not all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in entries):
            msg = (
                f"the checkpoint's {self._where}.{name} is {reprlib.repr(entries)}, expected a list of {kind.__name__}"
            )
            raise CheckpointError(msg)
        return tuple(entries)

    def count(self, name: str) -> int:
        """A number that cannot be negative."""
        value: int = self.take(name, int)
        if value < 0:
            msg = f"the checkpoint's {self._where}.{name} is {value}, expected 0 or more"
            raise CheckpointError(msg)
        return value

    def bit_width(self, name: str) -> int:
        """A bit-width."""
        value: int = self.take(name, int)
        if not MIN_BITS <= value <= MAX_BITS:
            msg = f"the checkpoint's {self._where}.{name} is {value}, expected {MIN_BITS} to {MAX_BITS}"
            raise CheckpointError(msg)
        return value

    def bit_widths(self, name: str) -> tuple[int, ...]:
        """A list of candidate bit-widths, ascending."""
        widths = self.items(name, int)
        if not widths or list(widths) != sorted(set(widths)) or not all(MIN_BITS <= w <= MAX_BITS for w in widths):
            msg = (
                f"the checkpoint's {self._where}.{name} is {reprlib.repr(widths)}, expected ascending bit-widths from "
            )
            msg += f"{MIN_BITS} to {MAX_BITS}"
            raise CheckpointError(msg)
        return widths


def _read_architecture(fields: _Fields) -> Architecture | None:
    raw = fields.take("architecture", dict, type(None))
    if raw is None:
        return None
    inner = _Fields(raw, "metadata.architecture")
    return Architecture(inner.take("name", str), inner.take("arguments", dict))


def _read_settings(fields: _Fields) -> ConvertSettings:
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
    )


def _read_norm(fields: _Fields) -> NormSharing:
    found: Any = fields.take_or("norm", str, default="per-pair")
    if found not in get_args(NormSharing):
        msg = f"the checkpoint's metadata.settings.norm is {found!r:.40}, expected one of {get_args(NormSharing)}"
        raise CheckpointError(msg)
    sharing: NormSharing = found
    return sharing


def _settings_json(settings: ConvertSettings) -> dict[str, Any]:
    """The settings; `norm` is left out where the first files of this format would agree."""
    fields = dataclasses.asdict(settings)
    return {name: value for name, value in fields.items() if name != "norm" or value != "per-pair"}


def _read_facts(fields: _Fields) -> NetworkFacts:
    layers = _read_layers(fields)
    norms = fields.take("norms", dict)
    if not all(feeding is None or (isinstance(feeding, str) and feeding in layers) for feeding in norms.values()):
        msg = "the checkpoint's metadata.norms names a layer that metadata.layers does not list"
        raise CheckpointError(msg)
    uncounted = fields.take("uncounted", dict)
    for name, pair in uncounted.items():
        if not (isinstance(pair, list) and len(pair) == 2 and all(_is_count(number) for number in pair)):
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


def _read_layers(fields: _Fields) -> dict[str, LayerFacts]:
    layers: dict[str, LayerFacts] = {}
    for raw in fields.take("layers", list):
        entry = _Fields(raw, "metadata.layers[]")
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
    return {name: _read_config(config, f"metadata.configs[{name!r:.40}]") for name, config in raw.items()}


def _read_config(raw: Any, where: str) -> BitConfig:
    try:
        return BitConfig(dict(_strings(raw, where)))
    except ValueError as error:  # BitsError, or a number of more digits than Python reads; also of our own refusal
        if isinstance(error, CheckpointError):
            raise
        msg = f"the checkpoint's {where} holds a precision that cannot be read: {error}"
        raise CheckpointError(msg) from error


def _strings(raw: Any, where: str) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        msg = f"the checkpoint's {where} is not an object of strings"
        raise CheckpointError(msg)
    return raw


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require_tame(raw: Any) -> None:
    """Refuse what JSON allows but neither a message nor another program could handle: depth and endless numbers."""
    level = [raw]
    for _ in range(_MAX_DEPTH):
        numbers = [value for value in level if isinstance(value, (int, float))]
        if not all(math.isfinite(number) and abs(number) <= _MAX_INTEGER for number in numbers):
            msg = "the checkpoint's metadata holds a number that is not finite, or of more than 63 bits"
            raise CheckpointError(msg)
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    msg = f"the checkpoint's metadata is nested deeper than {_MAX_DEPTH} levels"
    raise CheckpointError(msg)
