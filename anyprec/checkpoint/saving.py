"""`save`: a converted model to one file.

The document is in `document.py`, writing a file in `runtime/storage.py`, the packed form in
`packing.py` and `packed_tensors.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from anyprec.bits import BitConfig
from anyprec.checkpoint.architecture import find_architecture
from anyprec.checkpoint.coding import compress, to_planes
from anyprec.checkpoint.document import (
    Document,
    NoteEntry,
    PackedCoding,
    Packing,
    TensorRecord,
)
from anyprec.checkpoint.entries import layer_entries, output_entries, settings_entry
from anyprec.checkpoint.matching import holds_layer
from anyprec.checkpoint.packed_tensors import PREFIX, to_tensors
from anyprec.checkpoint.packing import cells_of_layer, names_of_weights, split_layers
from anyprec.checkpoint.statistics import statistics_tensors
from anyprec.errors import BitsError
from anyprec.model.checks import require_calibrated, require_latents
from anyprec.model.converted import ConvertedModel, require_converted
from anyprec.model.costing import cost_model, tied_codes, weight_name
from anyprec.model.intact import submodule_or_none, switchable_norms
from anyprec.model.record import ConfigNote
from anyprec.network.facts import NetworkFacts
from anyprec.nn.layers import PACKED
from anyprec.nn.staleness import warn_before_saving
from anyprec.runtime.storage import stored_once, write_file
from anyprec.searching.result import SearchResult

_WORTH_COMPRESSING = 256
"""Bytes from which on a tensor is compressed."""


def save(
    model: ConvertedModel,
    path: str | os.PathLike[str],
    *,
    packed: bool = False,
    coding: PackedCoding = "zstd",
    latents: torch.dtype | None = None,
    configs: Mapping[str, BitConfig | SearchResult] | None = None,
    model_args: Mapping[str, Any] | None = None,
    rebuildable: bool = True,
) -> None:
    """Write a converted model to one safetensors file that serves every precision.

    The training form holds the latent weights, so that training can go on. The packed form holds,
    for each weight, one small integer that determines its code at every candidate bit-width. It is
    several times smaller, and every precision computes the same bit for bit, but the network that
    is loaded from it cannot be trained or run in floating point. Both hold step sizes, norm copies
    and, in the metadata, how to rebuild the network, its candidates and named configurations. The
    file is written to a temporary file and renamed, so `path` always holds the old content or the
    new one.

    Args:
        model: A converted model; only its `configs` are changed.
        path: Where to write; its folder must exist.
        packed: Write the packed form; layers that cannot be packed (see `docs/checkpoint.md`) keep
            their latent weight.
        coding: Of the packed form: `"zstd"` is smallest; `"fixed"` gives every weight the same
            number of bits.
        latents: Store latent weights of float32 as `torch.bfloat16` or `torch.float16`: half the
            size, and the loaded network is that of the rounded weights. None keeps them. Of the
            training form.
        configs: Named configurations, or search results, whose score and budget are kept with them;
            added to `model.configs`.
        model_args: Arguments that the network was created with, if `timm.create_model` needs any
            beyond `num_classes`, `in_chans`, `img_size`, `drop_rate` and `global_pool`, which are
            found out.
        rebuildable: Refuse a timm network that cannot be rebuilt from its name and arguments; False
            writes a file that `load` takes only together with a network.

    Warns:
        StaleNormsWarning: Training left all norm statistics behind. Save inside
            `oneshot.evaluating(...)`, or after `update_norms`.

    Raises:
        ConversionError: `model` is not converted, or a layer was replaced since.
        BitsError: A named configuration does not fit the model.
        NotCalibratedError: The packed form was asked for before calibration.
        PackedError: The training form was asked of a packed model.
        CheckpointError: The network cannot be rebuilt, or the file not be written; `path` is
            unchanged.
        ValueError: `coding` or `latents` is none of those above.

    Example:
        >>> import tempfile, timm, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     anyprec.save(model, f"{folder}/net.safetensors")
        ...     again = anyprec.load(f"{folder}/net.safetensors")
    """
    require_converted(model, purpose="save")
    warn_before_saving(norm.bank for _, norm in switchable_norms(model) if norm.bank is not None)
    _check_arguments(model, packed=packed, coding=coding, latents=latents)
    named = _checked_configs(model, {**model.configs, **(configs or {})})
    notes = _notes(model, named, configs or {})
    facts = _present_facts(model)
    document = Document(
        version=version("anyprec"),
        architecture=find_architecture(model, model_args) if rebuildable else None,
        settings=settings_entry(model.anyprec_record.settings),
        layers=layer_entries(facts),
        norms=facts.norms,
        uncounted=facts.uncounted,
        example_shape=facts.example_shape,
        untraceable=facts.untraceable,
        outputs=output_entries(facts),
        apart=facts.apart,
        configs=named,
        frozen=BitConfig(model.frozen),
        statistics=tuple(model.anyprec_record.statistics),
        aliases={},
        pretrained_cfg=_json_part(getattr(model, "pretrained_cfg", None)),
        notes={name: NoteEntry(**vars(note)) for name, note in notes.items()},
        latents=latents,
    )
    if packed:
        tensors, document = _packed_form(model, document, coding)
    else:
        tensors, document = _training_form(model, document)
    text = document.to_json()
    Document.from_json(text)  # what `load` would refuse is not written
    write_file(Path(path), tensors, text)
    model.configs.update(named)
    model.anyprec_record.notes.update(notes)


def _check_arguments(
    model: ConvertedModel, *, packed: bool, coding: str, latents: torch.dtype | None
) -> None:
    if coding not in {"fixed", "zstd"}:
        msg = f"coding={coding!r} is not known: use 'zstd' or 'fixed'"
        raise ValueError(msg)
    if latents not in {None, torch.bfloat16, torch.float16} or (packed and latents is not None):
        msg = f"latents={latents} cannot be: use torch.bfloat16 or torch.float16, "
        msg += "with packed=False, or leave it out"
        raise ValueError(msg)
    if packed:
        require_calibrated(model)
    else:
        require_latents(model, purpose="save(..., packed=False)")


def _training_form(model: ConvertedModel, document: Document) -> tuple[dict[str, Tensor], Document]:
    tensors, aliases = stored_once({**model.state_dict(), **statistics_tensors(model)})
    if document.latents is not None:
        facts = model.anyprec_record.facts.layers
        for path in model.quantized_layers:
            name = weight_name(facts[path])
            name = aliases.get(name, name)
            if name in tensors and tensors[name].dtype in {torch.float32, document.latents}:
                tensors[name] = tensors[name].to(document.latents)
    return tensors, replace(document, aliases=aliases)


def _packed_form(
    model: ConvertedModel, document: Document, coding: PackedCoding
) -> tuple[dict[str, Tensor], Document]:
    facts, layers = model.anyprec_record.facts.layers, model.quantized_layers
    paths, latent = split_layers(model)
    records: dict[str, TensorRecord] = {}
    for path in paths:
        weight = layers[path].weight
        records[path] = TensorRecord(weight.dtype, tuple(weight.shape))
    omitted = names_of_weights(model, facts, records)
    # The operand of a packed layer stands for its weight, and is stored as cells, too.
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in omitted and PACKED not in name.split(".")
    }
    tensors, aliases = stored_once({**state, **statistics_tensors(model)})
    compressed = _compress(tensors) if coding == "zstd" else {}
    tied = tied_codes(model)
    parts_of: dict[str, list[str]] = {}
    for path in paths:
        earlier = tied.get(path)
        if earlier is not None and earlier in records:
            for part in parts_of[earlier]:
                aliases[f"{PREFIX}{path}.{part}"] = f"{PREFIX}{earlier}.{part}"
            continue
        cells = cells_of_layer(layers[path], facts[path])
        parts = to_tensors(cells, layers[path].candidates.weight, coding)
        parts_of[path] = list(parts)
        for part, tensor in parts.items():
            tensors[f"{PREFIX}{path}.{part}"] = tensor
    packing = Packing(coding, records, latent, compressed)
    return tensors, replace(document, aliases=aliases, packing=packing)


def _compress(tensors: dict[str, Tensor]) -> dict[str, TensorRecord]:
    """Replace tensors by frames, in place, where that is worth it; returns what they were."""
    records: dict[str, TensorRecord] = {}
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() >= _WORTH_COMPRESSING and not tensor.is_complex():
            frame = compress(to_planes(tensor))
            if frame is not None:
                records[name] = TensorRecord(tensor.dtype, tuple(tensor.shape))
                tensors[name] = frame
    return records


def _notes(
    model: ConvertedModel,
    named: Mapping[str, BitConfig],
    given: Mapping[str, BitConfig | SearchResult],
) -> dict[str, ConfigNote]:
    """Costs of all named configurations, with what a search or an earlier file knew of them."""
    costs = cost_model(model)
    notes: dict[str, ConfigNote] = {}
    for name, config in named.items():
        cost = costs.cost(config)
        result, earlier = given.get(name), model.anyprec_record.notes.get(name)
        note = ConfigNote(cost.bitops, cost.size)
        if isinstance(result, SearchResult):
            note = _searched(note, result)
        elif earlier is not None and config == model.configs.get(name):
            note = dataclasses.replace(note, score=earlier.score, found=earlier.found)
        notes[name] = note
    return notes


def _searched(note: ConfigNote, result: SearchResult) -> ConfigNote:
    score = result.score if math.isfinite(result.score) else None
    origin: dict[str, str | int | float] = {
        "by": "search",
        "budget": str(result.budget),
        "evaluations": result.evaluations,
    }
    return dataclasses.replace(note, score=score, found=origin)


def _present_facts(model: ConvertedModel) -> NetworkFacts:
    """The facts without layers and norms that the network has lost since its conversion."""
    facts = model.anyprec_record.facts
    # `reset_classifier(0)` takes a layer out.
    present = {row.path for row in model.coverage if holds_layer(model, facts.layers[row.path])}
    # This raises if a layer was replaced: such a file could not be loaded.
    present |= model.quantized_layers.keys()
    norms: dict[str, str | None] = {}
    for path, layer in facts.norms.items():
        if isinstance(submodule_or_none(model, path), _BatchNorm):
            norms[path] = layer if layer in present else None
    layers = {path: layer for path, layer in facts.layers.items() if path in present}
    return dataclasses.replace(facts, layers=layers, norms=norms)


def _checked_configs(model: ConvertedModel, configs: Mapping[Any, Any]) -> dict[str, BitConfig]:
    checked: dict[str, BitConfig] = {}
    for name, given in configs.items():
        config = given.config if isinstance(given, SearchResult) else given
        if not isinstance(name, str) or not isinstance(config, Mapping):
            msg = f"configuration {name!r} is {config!r}: name a BitConfig by a string, e.g. "
            msg += "model.resolve_bits(4)"
            raise BitsError(msg)
        try:
            resolved = model.resolve_bits(BitConfig(config))
        except BitsError as cause:
            msg = f"configuration {name!r} does not fit the model: {cause}"
            raise BitsError(msg) from cause
        if resolved is not None:
            checked[name] = resolved
    return checked


def _json_part(config: Any) -> dict[str, Any]:
    """The entries of a timm pretrained_cfg that JSON can hold."""
    entries = {}
    for key, value in dict(config or {}).items():
        try:
            entries[str(key)] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue  # a custom loading function, for instance, does not describe the weights
    return entries
