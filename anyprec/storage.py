"""Reading and writing one safetensors file: atomic, checked, without pickle.

Checkpoints and the state of a training run are such files. The metadata holds one entry, the document, whose last field
is a digest over the rest of it and every tensor, so that a flipped bit is found although safetensors keeps no checksum.
The digest finds damage, not malice: what a file says is checked besides. One entry, because safetensors writes several in
random order: the same model makes the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anyprec.errors import CheckpointError

METADATA_KEY = "anyprec"
"""The entry of the metadata that holds a checkpoint's document."""

_SEAL = re.compile(r', "sha256": "([0-9a-f]{64})"\}\Z')


def write_file(path: Path, tensors: Mapping[str, Tensor], document: str, *, key: str = METADATA_KEY) -> None:
    """Write `tensors` and `document` to `path`: afterwards it holds all of them, or what it held before.

    Args:
        path: The file.
        tensors: Tensors on the CPU, none of which shares memory with another.
        document: A JSON object.
        key: The entry of the metadata for it.

    Raises:
        CheckpointError: The file cannot be written.
    """
    if not path.parent.is_dir():
        msg = f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}; create it first"
        raise CheckpointError(msg)
    temporary = path.with_name(f".anyprec-{uuid.uuid4().hex}.tmp")
    try:
        sealed = f'{document.removesuffix("}")}, "sha256": "{digest(tensors, document)}"}}'
        temporary.touch()
        mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
        save_file(dict(tensors), temporary, metadata={key: sealed})
        temporary.chmod(mode)  # safetensors writes a file that only its owner may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:  # the last two: numbers that it cannot hold
        msg = f"cannot write {str(path)!r} ({type(error).__name__}: {error}); what stood there before is unchanged"
        raise CheckpointError(msg) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def read_file(path: Path, *, key: str = METADATA_KEY) -> tuple[dict[str, Tensor], str, str]:
    """All tensors of `path`, on the CPU, its document, and the digest that it was written with (or nothing).

    Raises:
        CheckpointError: There is no such file, it is damaged, or anyprec did not write it.
    """
    if not path.is_file():
        msg = f"there is no file {str(path)!r}"
        raise CheckpointError(msg)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if key not in metadata:
                msg = f"{str(path)!r} was not written by anyprec (its metadata has no {key!r}): load float "
                msg += "weights into the network before converting it"
                raise CheckpointError(msg)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        msg = f"{str(path)!r} is damaged, or no safetensors file: {error}"
        raise CheckpointError(msg) from error
    sealed = metadata[key]
    seal = _SEAL.search(sealed)
    return (tensors, sealed, "") if seal is None else (tensors, f"{sealed[: seal.start()]}}}", seal[1])


def digest(tensors: Mapping[str, Tensor], document: str) -> str:
    """SHA-256 over the document and over name, type, shape and bytes of every tensor."""
    total = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        raw: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        total.update(raw)
    return total.hexdigest()


def stored_once(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, and for each tied one the name under which it is stored.

    Raises:
        CheckpointError: An entry is no tensor (a module's extra state).
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            msg = f"{name!r} in the network's state is a {type(tensor).__name__}: a checkpoint holds tensors only"
            raise CheckpointError(msg)
        if tensor.layout is not torch.strided or tensor.is_meta:
            kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
            msg = f"{name!r} in the network's state is {kind}: a checkpoint holds dense tensors with values"
            raise CheckpointError(msg)
        if hasattr(tensor, "full_tensor"):
            msg = f"{name!r} in the network's state is sharded over processes: gather it (tensor.full_tensor()) into a "
            msg += "converted network that is whole, and save that"
            raise CheckpointError(msg)
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and identity in seen:
            aliases[name] = seen[identity]
            continue
        seen[identity] = name
        # A copy, since safetensors refuses tensors that share memory in part.
        tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return tensors, aliases


def with_aliases(tensors: dict[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The full state of what `stored_once` split; a tied name holds the very tensor of its target.

    Raises:
        CheckpointError: An alias points to no tensor, or hides one.
    """
    for name, target in aliases.items():
        if target not in tensors or name in tensors:
            msg = f"the checkpoint says that {name!r:.80} is stored as {target!r:.80}, which is not so"
            raise CheckpointError(msg)
    return {**tensors, **{name: tensors[target] for name, target in aliases.items()}}


def _flush_folder(folder: Path) -> None:
    """Make the rename survive a power cut, where the system can: the file itself is in place already."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
