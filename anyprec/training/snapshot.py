"""The state of a training run in one file, so that a run that was killed goes on as if it had not.

A state is a tree of dicts, lists, tuples, numbers, texts and tensors, as optimizers have it. The
tree becomes JSON, the tensors are stored next to it. No pickle: a file from elsewhere can be wrong,
but cannot run code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from anyprec.errors import CheckpointError, TrainingError
from anyprec.runtime.storage import read_file, write_file

_KEY = "anyprec.training"


def write_snapshot(file: Path, state: Any) -> None:
    """Write a state; afterwards the file holds it, or what it held before.

    Raises:
        TrainingError: Something in the state is no plain value and no tensor.
        CheckpointError: The file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, tensors, "state")
    write_file(file, tensors, json.dumps({"state": tree}), key=_KEY)


def read_snapshot(file: Path) -> Any:
    """The state that was written to a file.

    Raises:
        CheckpointError: The file is missing, damaged or no snapshot.
    """
    tensors, text = read_file(file, key=_KEY, remedy="delete it to train from the beginning")
    try:
        return _unpack(json.loads(text)["state"], tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        msg = f"{str(file)!r} is no state of a training run: {type(error).__name__}: {error}"
        raise CheckpointError(msg) from error


def _pack(value: Any, tensors: dict[str, Tensor], position: str) -> Any:
    """JSON of a tree; containers are tagged with their type.

    So tuples, and keys that are no text, come back as they were.

    Args:
        value: The tree.
        tensors: Filled with the tensors of the tree, by their position.
        position: Of `value` in the whole tree, for names and messages.
    """
    if isinstance(value, Tensor):
        tensors[position] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": position}
    if isinstance(value, dict):
        pairs = []
        for key, entry in value.items():
            _require_plain(key, position)
            pairs.append([key, _pack(entry, tensors, f"{position}.{key}")])
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        tag = "list" if isinstance(value, list) else "tuple"
        return {tag: [_pack(entry, tensors, f"{position}.{i}") for i, entry in enumerate(value)]}
    _require_plain(value, position)
    return value


def _require_plain(value: Any, position: str) -> None:
    if value is None or isinstance(value, (bool, int, float, str)):
        return
    msg = f"the training state holds a {type(value).__name__} at {position!r}, "
    msg += "which cannot be written to a file"
    raise TrainingError(msg)


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "dict":
        return {key: _unpack(entry, tensors) for key, entry in content}
    entries = [_unpack(entry, tensors) for entry in content]
    return tuple(entries) if tag == "tuple" else entries
