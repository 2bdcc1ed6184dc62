"""`save` and `load`: a converted model to one file and back, strictly.

What the file says is in `document.py`, how it is written and read in `file.py`, how a network is rebuilt from its
timm name in `architecture.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.bits import BitConfig, shorten
from anyprec.checkpoint.architecture import create, find_architecture
from anyprec.checkpoint.document import Document
from anyprec.checkpoint.file import read_file, stored_once, with_aliases, write_file
from anyprec.conversion import apply_settings
from anyprec.errors import AnyprecError, BitsError, CheckpointError
from anyprec.model import ConvertedModel, require_converted


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
        model: A converted model.
        path: Where to write; its folder must exist.
        configs: Named configurations, added to `model.configs`.
        model_args: Arguments that the network was created with, if `timm.create_model` needs any beyond
            `num_classes`, `in_chans` and `img_size`, which are found out.
        rebuildable: Refuse a timm network that cannot be rebuilt from its name and arguments; False writes a file
            that `load` takes only together with a network.

    Raises:
        ConversionError: `model` is not converted.
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
    named = {**model.configs, **_checked_configs(model, configs or {})}
    record = model.anyprec_record
    tensors, aliases = stored_once(model.state_dict())
    document = Document(
        version=version("anyprec"),
        architecture=find_architecture(model, model_args) if rebuildable else None,
        settings=record.settings,
        facts=record.facts,
        configs=named,
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
        model: The network to load into, float (it is converted in place) or converted with the same candidates;
            None rebuilds it with timm from what the file says.
        device: Where a rebuilt network goes; a given one stays where it is.

    Returns:
        The converted model, in floating point and, if rebuilt, in eval mode. Its outputs equal those of the saved
        model bit for bit at every precision, on the same device and memory format.

    Raises:
        CheckpointError: The file is missing, damaged, of another format or of another network; keys that do not
            match are named, and a given `model` is left as it was.
    """
    tensors, text = read_file(Path(path))
    document = Document.from_json(text)
    state = with_aliases(tensors, document.aliases)
    if model is None:
        if document.architecture is None:
            msg = f"{str(path)!r} does not say how to rebuild its network: pass it as load(path, model)"
            raise CheckpointError(msg)
        network = _match_dtypes(create(document.architecture), state).to(device).eval()
    else:
        network = model
    converted = _converted_like(network, document, state)
    _require_same_tensors(converted.state_dict(), state, "the checkpoint")
    converted.load_state_dict(state)
    converted.set_bits(None)
    converted.configs.update(_checked_configs(converted, document.configs, error=CheckpointError))
    return converted


def _converted_like(network: nn.Module, document: Document, state: Mapping[str, Tensor]) -> ConvertedModel:
    """`network`, converted as the file says; it is checked before it is changed."""
    if isinstance(network, ConvertedModel):
        if network.anyprec_record.settings != document.settings:
            msg = f"the network was converted with {network.anyprec_record.settings}, the checkpoint with "
            msg += f"{document.settings}: pass the float network, or convert with the same arguments"
            raise CheckpointError(msg)
        return network
    ours = tuple(
        f"{path}.{part}." for path in document.facts.layers for part in ("weight_quantizer", "input_quantizer")
    )
    ours += tuple(f"{path}.bank." for path in document.facts.norms)
    floats = {name: tensor for name, tensor in state.items() if not name.startswith(ours)}
    _require_same_tensors(network.state_dict(), floats, "the checkpoint")
    try:
        return apply_settings(network, document.settings, document.facts)
    except (AnyprecError, AttributeError) as error:
        msg = f"the checkpoint does not fit the network {type(network).__name__}: {error}"
        raise CheckpointError(msg) from error


def _require_same_tensors(own: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    """Compare names, shapes and kinds of number.

    Raises:
        CheckpointError: They differ; the message names the tensors.
    """
    missing = [name for name in own if name not in found]
    strange = [name for name in found if name not in own]
    other = [
        f"{name} {tuple(found[name].shape)} {found[name].dtype} instead of {tuple(own[name].shape)} {own[name].dtype}"
        for name in own
        if name in found and (own[name].shape != found[name].shape or own[name].dtype != found[name].dtype)
    ]
    if not (missing or strange or other):
        return
    parts = [f"{len(missing)} tensors are missing: {shorten(missing, 4)}"] if missing else []
    parts += [f"{len(strange)} are unknown to the network: {shorten(strange, 4)}"] if strange else []
    parts += [f"{len(other)} are of another shape or type: {shorten(other, 4)}"] if other else []
    msg = f"{source} does not match the network; {'; '.join(parts)}"
    raise CheckpointError(msg)


def _match_dtypes(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Give a fresh network the number formats of the file."""
    for name, tensor in network.state_dict(keep_vars=True).items():
        stored = state.get(name)
        if stored is not None and stored.dtype != tensor.dtype and stored.is_floating_point():
            tensor.data = tensor.data.to(stored.dtype)
    return network


def _checked_configs(
    model: ConvertedModel, configs: Mapping[str, BitConfig], *, error: type[AnyprecError] = BitsError
) -> dict[str, BitConfig]:
    checked: dict[str, BitConfig] = {}
    for name, config in configs.items():
        try:
            resolved = model.resolve_bits(BitConfig(config))
        except BitsError as cause:
            msg = f"configuration {name!r} does not fit the model: {cause}"
            raise error(msg) from cause
        if resolved is not None:
            checked[name] = resolved
    return checked


def _json_part(config: Any) -> dict[str, Any]:
    """The entries of a timm pretrained_cfg that JSON can hold."""
    kept = {}
    for key, value in dict(config or {}).items():
        try:
            kept[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue  # a custom loading function, for instance, says nothing about the weights
    return kept
