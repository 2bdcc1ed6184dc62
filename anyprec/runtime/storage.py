"""Reading and writing one safetensors file: atomic, checked, without pickle.

Checkpoints and the state of a training run are such files. The metadata holds one entry, the document, whose last two fields
are a digest of every tensor and one of the document with these digests: a flipped bit is found although safetensors keeps no
checksum, also where only some of the tensors are read. Digests find damage, not malice: what a file says is checked besides.
One entry, because safetensors writes several in random order: the same model makes the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anyprec.errors import CheckpointError

METADATA_KEY = "anyprec"
"""The entry of the metadata that holds a checkpoint's document."""

LARGEST_HEADER = 2**25
"""Bytes that the header of a file may have, with the document in it."""

MOST_TENSORS = 100_000
"""Tensors that a file may have."""

_SEAL = re.compile(r', "sha256": "([0-9a-f]{64})"\}\Z')
_DIGESTS = ', "digests": {'  # in a JSON text its quotes stand nowhere within a string
_REMEDY = "copy it again from its source"


def write_file(
    path: Path, tensors: Mapping[str, Tensor], document: str, *, key: str = METADATA_KEY
) -> None:
    """Write `tensors` and `document` to `path`: afterwards it holds all of them, or what it held before.

    Args:
        path: The file.
        tensors: Tensors on the CPU, none of which shares memory with another.
        document: A JSON object.
        key: The entry of the metadata for it.

    Raises:
        CheckpointError: The file cannot be written, or could not be read again because of its size.
    """
    if not path.parent.is_dir():
        msg = (
            f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}; create it first"
        )
        raise CheckpointError(msg)
    try:
        sealed = _sealed(
            document, {name: _tensor_digest(tensor) for name, tensor in tensors.items()}
        )
        _require_small(len(json.dumps(sealed)), len(tensors))
        with replacing(path) as temporary:
            save_file(dict(tensors), temporary, metadata={key: sealed})
    except (
        OSError,
        SafetensorError,
        ValueError,
        KeyError,
    ) as error:  # the last two: numbers that it cannot hold
        msg = f"cannot write {str(path)!r} ({type(error).__name__}: {error}); what stood there before is unchanged"
        raise CheckpointError(msg) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place, whole, when the `with` block ends without an exception.

    Raises:
        OSError: It cannot be written; `path` is unchanged.
    """
    temporary = path.with_name(f".anyprec-{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = stat.S_IMODE((path if path.exists() else temporary).stat().st_mode)
        yield temporary
        temporary.chmod(mode)  # safetensors writes a file that only its owner may read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


class StoredFile:
    """An open file: its document, which has been checked for damage, and its tensors, each of which is when it is read.

    Attributes:
        document: The JSON object that was written.
        shapes: Type (as safetensors names it) and shape of every tensor, by name.
    """

    def __init__(self, path: Path, file: Any, sealed: str, remedy: str) -> None:
        self._path = path
        self._remedy = remedy
        self._file = file
        self.shapes = {name: _kind_and_shape(file, name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        self.document, self._digests = self._unsealed(sealed)

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Tensors of these names, or all, on the CPU.

        Raises:
            CheckpointError: One is damaged.
        """
        found = {}
        for name in self.shapes if names is None else names:
            found[name] = self._file.get_tensor(name)
            if self._digests is not None and _tensor_digest(found[name]) != self._digests[name]:
                raise self._damage()
        return found

    def _unsealed(self, sealed: str) -> tuple[str, dict[str, str] | None]:
        seal = _SEAL.search(sealed)
        if seal is None:
            raise self._damage()
        text = sealed[: seal.start()]
        start = text.rfind(_DIGESTS)
        if start < 0:  # as the first files were, with one digest over all
            document = f"{text}}}"
            if _digest_of_all(self._file, self.shapes, document) != seal[1]:
                raise self._damage()
            return document, None
        document = f"{text[:start]}}}"
        try:
            table = json.loads(text[start + len(_DIGESTS) - 1 :])
        except (ValueError, RecursionError) as error:
            raise self._damage() from error
        if table.keys() != self.shapes.keys() or _sealed(document, table) != sealed:
            raise self._damage()
        return document, table

    def _damage(self) -> CheckpointError:
        msg = (
            f"{str(self._path)!r} is damaged: its content does not match its digest; {self._remedy}"
        )
        return CheckpointError(msg)


@contextlib.contextmanager
def opened(path: Path, *, key: str = METADATA_KEY, remedy: str = _REMEDY) -> Iterator[StoredFile]:
    """Open a file for reading; nothing is read but its header.

    Args:
        path: The file.
        key: The entry of the metadata that holds its document.
        remedy: What a message about damage recommends.

    Raises:
        CheckpointError: There is no such file, it is damaged, or anyprec did not write it.
    """
    if not path.is_file():
        msg = f"there is no file {str(path)!r}"
        raise CheckpointError(msg)
    try:
        _require_readable_header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            _require_small(0, len(file.keys()))
            metadata = file.metadata() or {}
            if key not in metadata:
                msg = f"{str(path)!r} was not written by anyprec (its metadata has no {key!r}): load float "
                msg += "weights into the network before converting it"
                raise CheckpointError(msg)
            yield StoredFile(path, file, metadata[key], remedy)
    except (OSError, SafetensorError) as error:
        msg = f"{str(path)!r} is damaged, or no safetensors file: {error}"
        raise CheckpointError(msg) from error


def read_file(
    path: Path, *, key: str = METADATA_KEY, remedy: str = _REMEDY
) -> tuple[dict[str, Tensor], str]:
    """All tensors of `path`, on the CPU, and its document; arguments as those of `opened`.

    Raises:
        CheckpointError: There is no such file, it is damaged, or anyprec did not write it.
    """
    with opened(path, key=key, remedy=remedy) as file:
        return file.read(), file.document


def _require_readable_header(path: Path) -> None:
    """Refuse a length that the file does not have, or that no file of ours has, before anything parses the header."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(LARGEST_HEADER, path.stat().st_size - 8):
            msg = f"its header claims {length:,} bytes of {path.stat().st_size:,}, expected at most {LARGEST_HEADER:,}"
            raise SafetensorError(msg)


def _require_small(header: int, tensors: int) -> None:
    if header > LARGEST_HEADER or tensors > MOST_TENSORS:
        msg = f"{tensors:,} tensors with a header of {header:,} bytes, expected at most {MOST_TENSORS:,} and "
        msg += f"{LARGEST_HEADER:,}"
        raise SafetensorError(msg)


def _sealed(document: str, digests: Mapping[str, str]) -> str:
    text = f'{document.removesuffix("}")}, "digests": {json.dumps(dict(sorted(digests.items())))}'
    return f'{text}, "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"}}'


def _tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over type, shape and bytes, shortened to 128 bits: against damage that is plenty, and a header is small."""
    total = hashlib.sha256(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    total.update(_raw(tensor))
    return total.hexdigest()[:32]


def _digest_of_all(file: Any, names: Iterable[str], document: str) -> str:
    """The digest of the first files: over the document and over name, type, shape and bytes of every tensor."""
    total = hashlib.sha256(document.encode())
    for name in sorted(names):
        tensor = file.get_tensor(name)
        total.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(_raw(tensor))
    return total.hexdigest()


def _raw(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _kind_and_shape(file: Any, name: str) -> tuple[str, tuple[int, ...]]:
    entry = file.get_slice(name)
    return entry.get_dtype(), tuple(entry.get_shape())


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
        identity = (
            tensor.device,
            tensor.data_ptr(),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
        )
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
