"""The state of a training run in one file, so that a run that was killed goes on as if it had not been.

A state is a tree of dicts, lists, tuples, numbers, texts and tensors, as optimizers have it; the tree becomes JSON, the
tensors stand beside it. No pickle: a file from elsewhere can be wrong, but cannot run code.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyprec.errors import CheckpointError, TrainingError
from anyprec.runtime.storage import read_file, write_file

_KEY = "anyprec.training"


def write_snapshot(path: Path, state: Any) -> None:
    """Write a state; afterwards the file holds it, or what it held before.

    Raises:
        TrainingError: Something in the state is no plain value and no tensor.
        CheckpointError: The file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    write_file(path, tensors, json.dumps({"state": _pack(state, tensors, "state")}), key=_KEY)


def read_snapshot(path: Path) -> Any:
    """The state that was written to a file.

    Raises:
        CheckpointError: The file is missing, damaged or no snapshot.
    """
    tensors, text = read_file(path, key=_KEY, remedy="delete it to train from the beginning")
    try:
        return _unpack(json.loads(text)["state"], tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        msg = f"{str(path)!r} is no state of a training run: {type(error).__name__}: {error}"
        raise CheckpointError(msg) from error


def capture_randomness(generators: Iterable[torch.Generator]) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, and of others in this order."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    cuda = (
        [state.cpu() for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else []
    )
    return {
        "python": (version, internal, gauss),
        "numpy": (
            name,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            position,
            has_gauss,
            cached,
        ),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "others": [generator.get_state() for generator in generators],
    }


def restore_randomness(state: dict[str, Any], generators: Iterable[torch.Generator]) -> None:
    """Put all generators back to where `capture_randomness` found them."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    for generator, one in zip(generators, state["others"], strict=True):
        generator.set_state(one)


def _pack(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """JSON of a tree: containers are tagged, so that tuples and keys that are no text come back as they were."""
    if isinstance(value, Tensor):
        tensors[where] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": where}
    if isinstance(value, dict):
        return {
            "dict": [
                [key, _pack(inner, tensors, f"{where}.{key}")]
                for key, inner in value.items()
                if _is_plain(key, where)
            ]
        }
    if isinstance(value, (list, tuple)):
        inner = [_pack(entry, tensors, f"{where}.{index}") for index, entry in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": inner}
    _is_plain(value, where)
    return value


def _is_plain(value: Any, where: str) -> bool:
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    msg = f"the training state holds a {type(value).__name__} at {where!r}, which cannot be written to a file"
    raise TrainingError(msg)


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {key: _unpack(entry, tensors) for key, entry in inner}
    entries = [_unpack(entry, tensors) for entry in inner]
    return tuple(entries) if kind == "tuple" else entries
