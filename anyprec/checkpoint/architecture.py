"""Rebuilding a float network from its timm name: which arguments it needs, and proof that they make the same one."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from anyprec.checkpoint.document import Architecture
from anyprec.errors import CheckpointError
from anyprec.model.converted import ConvertedModel
from anyprec.nn.matrices import Matrices, QuantizedParameter
from anyprec.nn.norm_bank import NormBank
from anyprec.nn.packed import PackedOperand
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer
from anyprec.nn.specialize import Specialized

FORBIDDEN_ARGUMENTS = {
    "model_name",
    *(
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_filter_fn",
        "pretrained_model_args",
    ),
    *("pretrained_strict", "checkpoint_path", "cache_dir", "pruned"),
    *("scriptable", "exportable", "no_jit"),
}
"""Arguments of `timm.create_model` that say where weights come from, or set switches for the whole process."""

_DESCRIPTION = (
    *("tag", "num_classes", "label_offset", "label_names", "label_descriptions"),
    *("input_size", "test_input_size", "min_input_size", "fixed_input_size"),
    *("interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean", "std"),
)
"""Entries of a pretrained_cfg that describe images and labels; none names a file or an address."""

_OUR_MODULES = (
    WeightQuantizer,
    InputQuantizer,
    PackedOperand,
    NormBank,
    Matrices,
    QuantizedParameter,
)
_RUNTIME_SETTINGS = {
    "training",
    "grad_checkpointing",
    "fused_attn",
    "functional_layers",
}
_Signature = dict[str, dict[str, str]]


def find_architecture(
    model: ConvertedModel, model_args: Mapping[str, Any] | None
) -> Architecture | None:
    """How timm makes this network, proven by making it (without memory) and comparing every module.

    Args:
        model: A converted model.
        model_args: What was passed to `timm.create_model` besides the name, as far as the user says.

    Returns:
        None if the network does not come from timm.

    Raises:
        CheckpointError: timm makes another network from the name and arguments.
    """
    name = timm_name(model)
    if name is None:
        if model_args:
            msg = f"model_args={dict(model_args)} was given, but {model.original_class.__name__} does not come from timm"
            raise CheckpointError(msg)
        return None
    expected = _signature(model)
    refused, differing = [], []
    for arguments in _attempts(model, _plain(dict(model_args or {}))):
        architecture = Architecture(name, arguments)
        try:
            rebuilt = create_skeleton(architecture)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        difference = _difference(expected, _signature(rebuilt))
        if difference is None:
            return architecture
        differing.append(f"{_call(architecture)} makes another one: {difference}")
    # The last attempt that ran knows the most of the network; one that timm refused says less than any that ran.
    reason = differing[-1] if differing else refused[0]
    msg = f"the network cannot be rebuilt from its timm name: {reason}. Pass the arguments that it was created with as "
    msg += "model_args={...}, or rebuildable=False for a file that load() takes only together with a network"
    raise CheckpointError(msg)


def create(architecture: Architecture) -> nn.Module:
    """Make the float network, without pretrained weights and without touching the global random state.

    Raises:
        CheckpointError: timm does not know the name or refuses the arguments, or they would make it read other files.
    """
    import timm  # noqa: PLC0415 (slow to import)

    # A plain registry name: "hf-hub:..." and "local-dir:..." would fetch another network from elsewhere.
    if not re.fullmatch(r"\w{1,200}", architecture.name, re.ASCII) or not timm.is_model(
        architecture.name
    ):
        name = reprlib.repr(architecture.name)
        msg = f"this timm ({timm.__version__}) has no model {name}: update timm, or load into a network that you pass"
        raise CheckpointError(msg)
    forbidden = sorted(FORBIDDEN_ARGUMENTS & architecture.arguments.keys())
    if forbidden:
        msg = f"{forbidden[0]!r} is no argument that a network is rebuilt with: it says where weights come from, or "
        msg += "sets a switch of the whole process. Leave it out"
        raise CheckpointError(msg)
    with torch.random.fork_rng(devices=[]):
        try:
            return timm.create_model(architecture.name, pretrained=False, **architecture.arguments)
        except Exception as error:  # arguments of a file or user meet the code of any network
            msg = f"{_call(architecture)} fails: {type(error).__name__}: {error}"
            raise CheckpointError(msg) from error


def create_skeleton(architecture: Architecture) -> nn.Module:
    """As `create`, without memory for the tensors, so that no argument can make it large."""
    with torch.device("meta"):
        return create(architecture)


def describe(network: nn.Module, pretrained_cfg: Mapping[str, Any]) -> None:
    """Give a rebuilt network the description of its images and labels that the saved one had.

    timm's own stands for the default weights of the name, whose normalisation may differ.
    """
    own = getattr(network, "pretrained_cfg", None)
    if isinstance(own, Mapping):
        known = {
            key: _as_tuple(pretrained_cfg[key]) for key in _DESCRIPTION if key in pretrained_cfg
        }
        vars(network)["pretrained_cfg"] = vars(network)["default_cfg"] = {**own, **known}


def timm_name(model: nn.Module) -> str | None:
    """The timm name of a network, or None."""
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    return name if isinstance(name, str) else None


def _attempts(model: ConvertedModel, model_args: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments to try: what the network says of itself wins over what it was created with."""
    shape = model.anyprec_record.facts.example_shape
    known: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        known["num_classes"] = model.num_classes
    if len(shape) == 4 and shape[1] != 3:
        known["in_chans"] = shape[1]
    size = {"img_size": list(shape[2:])}
    pool = getattr(model, "global_pool", None)
    own = {
        "drop_rate": getattr(model, "drop_rate", None),
        "global_pool": getattr(pool, "pool_type", pool),
    }
    own = {name: value for name, value in own.items() if isinstance(value, (str, float))}
    for guess in ({}, size, own, {**own, **size}):
        yield {**guess, **model_args, **known}


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments`, if the file can hold them."""
    try:
        return dict(json.loads(json.dumps(arguments, allow_nan=False)))
    except (TypeError, ValueError) as error:
        msg = f"model_args={arguments} cannot be written as JSON ({error}): name classes by strings, as timm allows, "
        msg += "or pass rebuildable=False"
        raise CheckpointError(msg) from error


def _signature(model: nn.Module) -> _Signature:
    """Everything that makes a float network what it is, but its values: a description of every module, by path."""
    ours = tuple(
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _OUR_MODULES)
    )
    signature: _Signature = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path not in ours:
            signature[path] = {"class": _original(module).__qualname__, **_settings(module)}
    first: dict[int, str] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        path, _, local = name.rpartition(".")
        if path in signature:
            tied = first.setdefault(id(tensor), name) if isinstance(tensor, nn.Parameter) else name
            signature[path][local] = (
                f"{tuple(tensor.shape)}{'' if tied == name else f' tied to {tied}'}"
            )
    return signature


def _settings(module: nn.Module) -> dict[str, str]:
    """What `print` shows, and every public attribute of a plain kind: pooling, dropout rates, numbers of heads."""
    settings = {
        name: repr(value) for name, value in vars(module).items() if _is_setting(name, value)
    }
    return {**settings, "settings": _original(module).extra_repr(module)}


def _is_setting(name: str, value: Any) -> bool:
    if name.startswith("_") or name in _RUNTIME_SETTINGS:
        return False
    entries = value if isinstance(value, (tuple, list)) else (value,)
    return all(entry is None or isinstance(entry, (bool, int, float, str)) for entry in entries)


def _original(module: nn.Module) -> type[nn.Module]:
    kind = type(module)
    while issubclass(kind, Specialized):
        kind = kind.original_class
    return kind


def _difference(expected: _Signature, found: _Signature) -> str | None:
    for path in (*expected, *found):
        where = repr(path) if path else "the network"
        if path not in found or path not in expected:
            return f"{where} is {'missing' if path in expected else 'new'}"
        for name in (*expected[path], *found[path]):
            here, there = expected[path].get(name), found[path].get(name)
            if here != there:
                return f"{name} of {where} is {there} instead of {here}"
    return None


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _call(architecture: Architecture) -> str:
    arguments = "".join(
        f", {name}={reprlib.repr(value)}" for name, value in architecture.arguments.items()
    )
    return f"timm.create_model({architecture.name!r}{arguments})"
