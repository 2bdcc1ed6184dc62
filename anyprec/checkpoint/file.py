"""Reading and writing one safetensors file: atomic, checked, without pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anyprec.checkpoint.document import METADATA_KEY
from anyprec.errors import CheckpointError


def write_file(path: Path, tensors: Mapping[str, Tensor], document: str) -> None:
    """Write `tensors` and `document` to `path`: afterwards it holds all of them, or what it held before.

    Raises:
        CheckpointError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(dict(tensors), temporary, metadata={METADATA_KEY: document})
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        msg = f"cannot write {str(path)!r}: {error}; what stood there before is unchanged"
        raise CheckpointError(msg) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors of `path`, on the CPU, and its document.

    Raises:
        CheckpointError: There is no such file, it is damaged, or anyprec did not write it.
    """
    if not path.is_file():
        msg = f"there is no file {str(path)!r}"
        raise CheckpointError(msg)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if METADATA_KEY not in metadata:
                msg = f"{str(path)!r} was not written by anyprec (its metadata has no {METADATA_KEY!r}): load float "
                msg += "weights into the network before converting it"
                raise CheckpointError(msg)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        msg = f"{str(path)!r} is damaged, or no safetensors file: {error}"
        raise CheckpointError(msg) from error
    return tensors, metadata[METADATA_KEY]


def stored_once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, and for each tied one the name under which it is stored."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and identity in seen:
            aliases[name] = seen[identity]
            continue
        seen[identity] = name
        # A copy, since safetensors refuses tensors that share memory in part.
        tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return tensors, aliases


def with_aliases(tensors: dict[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The full state of what `stored_once` split.

    Raises:
        CheckpointError: An alias points to no tensor, or hides one.
    """
    for name, target in aliases.items():
        if target not in tensors or name in tensors:
            msg = f"the checkpoint says that {name!r:.80} is stored as {target!r:.80}, which is not so"
            raise CheckpointError(msg)
    return {**tensors, **{name: tensors[target] for name, target in aliases.items()}}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
