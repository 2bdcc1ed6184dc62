"""`load`: a converted model from one file, strictly.

The document is read in `document.py`, the tensors in `content.py`. `rebuilding.py` makes the
network that a file names, and `matching.py` checks that file and network fit.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anyprec.bits import BitConfig, highest_config, shorten
from anyprec.checkpoint.content import Content
from anyprec.checkpoint.document import Document
from anyprec.checkpoint.matching import (
    added_prefixes,
    fitting_configs,
    require_converted_fit,
    require_float_fit,
    require_state_fit,
)
from anyprec.checkpoint.narrowing import narrow
from anyprec.checkpoint.packing import install, pack
from anyprec.checkpoint.rebuilding import (
    create,
    create_skeleton,
    describe,
    has_all_tensors_in,
    materialize,
)
from anyprec.checkpoint.statistics import fitting_statistics
from anyprec.errors import AnyprecError, BitsError, CheckpointError, NotCalibratedError
from anyprec.model.conversion import apply_settings, revert
from anyprec.model.converted import BitsRequest, ConvertedModel
from anyprec.model.intact import output_quantizers
from anyprec.nn.layers import QuantizedLayer
from anyprec.runtime.batches import device_of
from anyprec.runtime.storage import opened


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    bits: BitsRequest = None,
    device: str | torch.device = "cpu",
) -> ConvertedModel:
    """Read a converted model from a file that `save` wrote.

    Args:
        path: The file.
        model: The network to load into, float (it is converted in place) or converted with the same
            arguments; None rebuilds with timm the network that the file names.
        bits: Load this configuration alone: the name of a stored one, or whatever `set_bits` takes.
            The network then has no other precision, and holds one small integer for each weight.
            None loads them all.
        device: Where a rebuilt network goes; a given one stays where it is.

    Returns:
        The converted model, with the file's named configurations in place of its own and, if
        rebuilt, in eval mode. From a training file it is in floating point. From a packed one it is
        at its highest precision, holds no latent weights, and raises `PackedError` when asked for
        them. With `bits` it is at these. Its outputs equal those of the saved model bit for bit at
        every precision, on the same device and memory format.

    Raises:
        CheckpointError: The file is missing, damaged, of another format or of another network; keys
            that do not match are named, and a given `model` is left as it was.
        ConversionError: A layer of a given converted `model` was replaced since its conversion.
        BitsError: `bits` is no configuration of the network, or a converted `model` was given with
            it.
        NotCalibratedError: `bits` were asked of a file that was saved before calibration.

    Example:
        >>> import tempfile, timm, torch, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet"))
        >>> anyprec.calibrate(model, [torch.randn(8, 3, 160, 160)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     anyprec.save(model, f"{folder}/net.safetensors", packed=True)
        ...     again = anyprec.load(f"{folder}/net.safetensors")
        ...     four = anyprec.load(f"{folder}/net.safetensors", bits=4)
        >>> again.is_packed, four.candidates["layer1.0.conv1"]
        (True, LayerCandidates(weight=(4,), activation=(4,)))
    """
    _require_loadable(model, bits)
    with opened(Path(path)) as file:
        document = Document.from_json(file.document)
        content = Content(file, document)
        if isinstance(model, ConvertedModel):
            require_converted_fit(model, document)
            return _filled(model, content, None, device_of(model))
        if model is None:
            target = torch.device(device)
            model = _rebuilt(content, str(path), target)
        else:
            target = device_of(model)
        require_float_fit(model, document, content.state, content.omitted(model))
        return _converted(model, content, bits, target)


def _require_loadable(model: Any, bits: BitsRequest) -> None:
    if model is None:
        return
    if not isinstance(model, nn.Module):
        msg = f"load takes a torch.nn.Module to load into, got {type(model).__name__}"
        raise CheckpointError(msg)
    if isinstance(model, ConvertedModel) and model.is_packed:
        msg = "load takes a network with latent weights to load into, got a packed one: "
        msg += "pass a float network, or none"
        raise CheckpointError(msg)
    if isinstance(model, ConvertedModel) and bits is not None:
        msg = "load takes a float network, or none, when bits are given: a converted one has other "
        msg += "candidates"
        raise BitsError(msg)


def _rebuilt(content: Content, path: str, device: torch.device) -> nn.Module:
    """The float network that the file names, without values and, if possible, memory for them."""
    document, state = content.document, content.state
    if document.architecture is None:
        msg = f"{path!r} does not say how to rebuild its network: pass it as load(path, model)"
        raise CheckpointError(msg)
    # Checked before memory is taken: a file of a few bytes may name a network of a terabyte.
    network = create_skeleton(document.architecture)
    _match_dtypes(network, content)
    require_float_fit(network, document, state, content.omitted(network))
    if not has_all_tensors_in(network, state.keys() | content.omitted(network)):
        network = create(document.architecture)
        _match_dtypes(network, content)
        # Buffers that no state holds (positions, frequencies) follow the dtype of the model.
        dtypes = {parameter.dtype for parameter in network.parameters()}
        if len(dtypes) == 1 and dtypes != {torch.get_default_dtype()}:
            network.to(dtypes.pop())
        network.to(device)
    describe(network, document.pretrained_cfg)
    return network.eval()


def _converted(
    network: nn.Module, content: Content, bits: BitsRequest, device: torch.device
) -> ConvertedModel:
    document = content.document
    try:
        model = apply_settings(network, document.convert_settings, document.facts)
    except AnyprecError as error:
        msg = f"the checkpoint does not fit the network {type(network).__name__}: {error}"
        raise CheckpointError(msg) from error
    try:
        # What conversion adds has the network's dtype; the saved model may have been moved to
        # another.
        _match_dtypes(model, content, only=added_prefixes(model, document.facts))
        return _filled(model, content, bits, device)
    except BaseException:
        revert(network)
        raise


def _filled(
    model: ConvertedModel, content: Content, bits: BitsRequest, device: torch.device
) -> ConvertedModel:
    """Copy the file's values and configurations; all is checked before anything is changed."""
    document, omitted = content.document, content.omitted(model)
    require_state_fit(model, content.state, omitted)
    configs = fitting_configs(model, document)
    config = _requested(model, bits, configs)
    _require_calibrated(model, content, wanted=config is not None)
    statistics = fitting_statistics(model, document, content.statistics(config), only=config)
    packed = _packed_layers(model, document)
    cells = {path: content.cells(path, layer) for path, layer in packed.items()}
    # Freezing checks what it is given before it changes the model. Nothing after it can fail.
    _freeze(model, document)
    materialize(model, device, besides=omitted)
    model.load_state_dict({**model.state_dict(), **content.state})
    for path, layer in packed.items():
        derives = document.facts.layers[path].derived
        install(layer, cells[path], content.record(path), device=device, derives=derives)
    record = model.anyprec_record
    record.take_over(configs=configs, notes=document.config_notes, statistics=statistics)
    _start(model, config)
    return model


def _packed_layers(model: ConvertedModel, document: Document) -> dict[str, QuantizedLayer]:
    """The layers that the file has codes of.

    Raises:
        CheckpointError: The network has no such layer.
    """
    if document.packing is None:
        return {}
    layers = model.quantized_layers
    strange = document.packing.layers.keys() - layers.keys()
    if strange:
        msg = f"the checkpoint holds codes of {len(strange)} layers that the network has not, e.g. "
        msg += f"{min(strange)!r:.80}"
        raise CheckpointError(msg)
    return {path: layers[path] for path in document.packing.layers}


def _requested(
    model: ConvertedModel, bits: BitsRequest, configs: dict[str, BitConfig]
) -> BitConfig | None:
    """The configuration that is asked for: a named one of the file, or any other."""
    if isinstance(bits, str) and bits in configs:
        return configs[bits]
    try:
        return model.resolve_bits(bits)
    except BitsError as error:
        msg = f"{error}; the file names {shorten(configs)}" if configs else str(error)
        raise BitsError(msg) from error


def _require_calibrated(model: ConvertedModel, content: Content, *, wanted: bool) -> None:
    """Refuse to start a network at a precision whose step sizes the file does not have.

    Raises:
        CheckpointError: The file is packed, so it was calibrated when it was saved.
        NotCalibratedError: It is a training file, and a precision is wanted.
    """
    packed = content.document.packing is not None
    if not packed and not wanted:
        return
    names = {path: f"{path}.input_quantizer.step" for path in model.quantized_layers}
    names |= {path: f"{path}.step" for path in output_quantizers(model)}
    missing = []
    for path, name in names.items():
        if not torch.isfinite(content.state[name]).all():
            missing.append(path)
    if missing:
        msg = f"the checkpoint has no step sizes for the inputs of {len(missing)} layers "
        msg += f"({shorten(missing, 3)})"
        if packed:
            raise CheckpointError(msg)
        msg += ": load it without bits, and call anyprec.calibrate"
        raise NotCalibratedError(msg)


def _freeze(model: ConvertedModel, document: Document) -> None:
    try:
        model.freeze(document.frozen)
    except BitsError as error:
        msg = f"the checkpoint's frozen candidates do not fit the network: {error}"
        raise CheckpointError(msg) from error


def _match_dtypes(network: nn.Module, content: Content, *, only: tuple[str, ...] = ("",)) -> None:
    """Give floating-point tensors the dtypes of the file, if their names start with `only`."""
    for name, tensor in network.state_dict(keep_vars=True).items():
        stored = content.dtype_of(name) if name.startswith(only) else None
        if stored is not None and stored != tensor.dtype and stored.is_floating_point:
            tensor.data = tensor.data.to(stored)


def _start(model: ConvertedModel, config: BitConfig | None) -> None:
    """Set the precision that a network has after loading."""
    if config is not None:
        # Of a training file: a single configuration needs no latent weights.
        if not model.is_packed:
            pack(model)
        narrow(model, config)
        model.set_bits(config)
    elif model.is_packed:
        model.set_bits(highest_config(model.candidates))
    else:
        model.set_bits(None)
