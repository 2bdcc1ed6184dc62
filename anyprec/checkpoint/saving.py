"""`save` and `load`: a converted model to one file and back, strictly.

What the file says is in `document.py`, how it is written and read in `file.py`, how a network is rebuilt from its
timm name in `architecture.py`, and whether file and network fit in `matching.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.bits import BitConfig
from anyprec.checkpoint.architecture import create, create_skeleton, describe, find_architecture
from anyprec.checkpoint.document import Document
from anyprec.checkpoint.matching import (
    fitting_configs,
    holds_layer,
    our_prefixes,
    require_converted_fit,
    require_float_fit,
    require_state_fit,
)
from anyprec.checkpoint.statistics import fitting_statistics, split_statistics, statistics_tensors
from anyprec.conversion import apply_settings, revert
from anyprec.errors import AnyprecError, BitsError, CheckpointError
from anyprec.graph import NetworkFacts
from anyprec.model import ConvertedModel, require_converted
from anyprec.storage import digest, read_file, stored_once, with_aliases, write_file


def save(
    model: ConvertedModel,
    path: str | os.PathLike[str],
    *,
    configs: Mapping[str, BitConfig] | None = None,
    model_args: Mapping[str, Any] | None = None,
    rebuildable: bool = True,
) -> None:
    """Write a converted model to one safetensors file that serves every precision.

    The file holds latent weights, step sizes, norm copies and, in its metadata, how to rebuild the network, its
    candidates and named configurations. It is written to a temporary file and renamed, so `path` always holds the
    old content or the new one.

    Args:
        model: A converted model; only its `configs` are changed.
        path: Where to write; its folder must exist.
        configs: Named configurations, added to `model.configs`.
        model_args: Arguments that the network was created with, if `timm.create_model` needs any beyond
            `num_classes`, `in_chans`, `img_size`, `drop_rate` and `global_pool`, which are found out.
        rebuildable: Refuse a timm network that cannot be rebuilt from its name and arguments; False writes a file
            that `load` takes only together with a network.

    Raises:
        ConversionError: `model` is not converted, or a layer was replaced since.
        BitsError: A named configuration does not fit the model.
        CheckpointError: The network cannot be rebuilt, or the file not be written; `path` is unchanged.

    Example:
        >>> import tempfile, timm, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     anyprec.save(model, f"{folder}/net.safetensors")
        ...     again = anyprec.load(f"{folder}/net.safetensors")
    """
    require_converted(model, purpose="save")
    named = _checked_configs(model, {**model.configs, **(configs or {})})
    tensors, aliases = stored_once({**model.state_dict(), **statistics_tensors(model)})
    document = Document(
        version=version("anyprec"),
        architecture=find_architecture(model, model_args) if rebuildable else None,
        settings=model.anyprec_record.settings,
        facts=_present_facts(model),
        configs=named,
        floors=BitConfig(model.floors),
        statistics=tuple(model.anyprec_record.statistics),
        aliases=aliases,
        pretrained_cfg=_json_part(getattr(model, "pretrained_cfg", None)),
    )
    write_file(Path(path), tensors, document.to_json())
    model.configs.update(named)


def load(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, device: str | torch.device = "cpu"
) -> ConvertedModel:
    """Read a converted model from a file that `save` wrote.

    Args:
        path: The file.
        model: The network to load into, float (it is converted in place) or converted with the same arguments;
            None rebuilds it with timm from what the file says.
        device: Where a rebuilt network goes; a given one stays where it is.

    Returns:
        The converted model, in floating point, with the file's named configurations in place of its own and, if
        rebuilt, in eval mode. Its outputs equal those of the saved model bit for bit at every precision, on the same
        device and memory format.

    Raises:
        CheckpointError: The file is missing, damaged, of another format or of another network; keys that do not
            match are named, and a given `model` is left as it was.
        ConversionError: A layer of a given converted `model` was replaced since its conversion.
    """
    _require_module(model)
    tensors, text, written = read_file(Path(path))
    document = Document.from_json(text)
    if digest(tensors, text) != written:
        msg = f"{str(path)!r} is damaged: its content does not match its digest; copy it again from its source"
        raise CheckpointError(msg)
    state, statistics = split_statistics(with_aliases(tensors, document.aliases))
    if isinstance(model, ConvertedModel):
        require_converted_fit(model, document)
        _fill(model, document, state, statistics)
        return model
    network = _rebuilt(document, state, str(path)).to(device).eval() if model is None else model
    require_float_fit(network, document, state)
    return _convert_and_fill(network, document, state, statistics)


def _require_module(model: Any) -> None:
    if model is not None and not isinstance(model, nn.Module):
        msg = f"load takes a torch.nn.Module to load into, got {type(model).__name__}"
        raise CheckpointError(msg)


def _rebuilt(document: Document, state: Mapping[str, Tensor], path: str) -> nn.Module:
    """The float network that the file names, without its values."""
    if document.architecture is None:
        msg = f"{path!r} does not say how to rebuild its network: pass it as load(path, model)"
        raise CheckpointError(msg)
    # Checked before memory is taken: a file of a few bytes may name a network of a terabyte.
    require_float_fit(_match_dtypes(create_skeleton(document.architecture), state), document, state)
    network = _match_dtypes(create(document.architecture), state)
    formats = {parameter.dtype for parameter in network.parameters()}
    if len(formats) == 1 and formats != {torch.get_default_dtype()}:
        network.to(formats.pop())  # for buffers that no state holds (positions, frequencies), which follow the model
    describe(network, document.pretrained_cfg)
    return network


def _convert_and_fill(
    network: nn.Module, document: Document, state: Mapping[str, Tensor], statistics: Mapping[str, Tensor]
) -> ConvertedModel:
    try:
        converted = apply_settings(network, document.settings, document.facts)
    except AnyprecError as error:
        msg = f"the checkpoint does not fit the network {type(network).__name__}: {error}"
        raise CheckpointError(msg) from error
    try:
        # What conversion adds is in its own number format; the saved model may have been moved to another one.
        _match_dtypes(converted, state, only=our_prefixes(converted, document.facts))
        _fill(converted, document, state, statistics)
    except BaseException:
        revert(network)
        raise
    return converted


def _fill(
    model: ConvertedModel, document: Document, state: Mapping[str, Tensor], statistics: Mapping[str, Tensor]
) -> None:
    """Copy the file's values and configurations; all is checked before."""
    require_state_fit(model, state)
    configs = fitting_configs(model, document)
    own = fitting_statistics(model, document, statistics)
    _set_floors(model, document)
    model.load_state_dict(state)
    model.set_bits(None)
    model.anyprec_record.statistics.clear()
    model.anyprec_record.statistics.update(own)
    model.configs.clear()
    model.configs.update(configs)


def _set_floors(model: ConvertedModel, document: Document) -> None:
    try:
        model.set_floors(document.floors)
    except BitsError as error:
        msg = f"the checkpoint's frozen candidates do not fit the network: {error}"
        raise CheckpointError(msg) from error


def _match_dtypes(network: nn.Module, state: Mapping[str, Tensor], *, only: tuple[str, ...] = ("",)) -> nn.Module:
    """Give the tensors of a network, of those whose names start with `only`, the number formats of the file."""
    chosen = {name: tensor for name, tensor in network.state_dict(keep_vars=True).items() if name.startswith(only)}
    for name, tensor in chosen.items():
        stored = state.get(name)
        if stored is not None and stored.dtype != tensor.dtype and stored.is_floating_point():
            tensor.data = tensor.data.to(stored.dtype)
    return network


def _present_facts(model: ConvertedModel) -> NetworkFacts:
    """The facts without layers that the network lost since its conversion (`reset_classifier(0)`)."""
    facts = model.anyprec_record.facts
    present = {row.path for row in model.coverage if holds_layer(model, facts.layers[row.path])}
    present |= model.quantized_layers.keys()  # raises if one was replaced: such a file could not be loaded
    return dataclasses.replace(
        facts,
        layers={path: layer for path, layer in facts.layers.items() if path in present},
        norms={path: feeding if feeding in present else None for path, feeding in facts.norms.items()},
    )


def _checked_configs(model: ConvertedModel, configs: Mapping[Any, Any]) -> dict[str, BitConfig]:
    checked: dict[str, BitConfig] = {}
    for name, config in configs.items():
        if not isinstance(name, str) or not isinstance(config, Mapping):
            msg = f"configuration {name!r} is {config!r}: name a BitConfig by a string, e.g. model.resolve_bits(4)"
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
    kept = {}
    for key, value in dict(config or {}).items():
        try:
            kept[str(key)] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue  # a custom loading function, for instance, says nothing about the weights
    return kept
