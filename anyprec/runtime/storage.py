"""Reading and writing one safetensors file: atomic, checked, without pickle.

Checkpoints and the state of a training run are such files. The metadata holds one entry, the
document, whose last two fields are a digest of every tensor, and one of the document with these
digests. So a flipped bit is found although safetensors keeps no checksum, also where only some of
the tensors are read. Digests find damage, not malice: who reads a document checks what it says.

The document is one entry because safetensors writes several in random order, and the same model
must make the same bytes.
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
from anyprec.runtime.foreign_files import is_format_1, of_another_program, require_safetensors

METADATA_KEY = "anyprec"
"""The entry of the metadata that holds a checkpoint's document."""

LARGEST_HEADER = 2**25
"""Bytes that the header of a file may have, with the document in it."""

MOST_TENSORS = 100_000
"""Tensors that a file may have."""

_DIGESTS = ', "digests": '
"""What comes before the digests. It is within no JSON string, where quotes are escaped."""

_SEAL = re.compile(r', "sha256": "[0-9a-f]{64}"\}\Z')
"""The end of a document with digests."""

_REMEDY = "copy it again from its source"


def write_file(
    path: Path, tensors: Mapping[str, Tensor], document: str, *, key: str = METADATA_KEY
) -> None:
    """Write `tensors` and `document`; afterwards the file holds all of them, or is as it was.

    Args:
        path: The file.
        tensors: Tensors on the CPU, none of which shares memory with another.
        document: A JSON object.
        key: The entry of the metadata for it.

    Raises:
        CheckpointError: The file cannot be written, or could not be read again because of its size.
    """
    if not path.parent.is_dir():
        msg = f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}; "
        msg += "create it first"
        raise CheckpointError(msg)
    try:
        digests = {name: _tensor_digest(tensor) for name, tensor in tensors.items()}
        sealed = _sealed(document, digests)
        _require_readable_size(len(json.dumps(sealed)), len(tensors))
        with replacing(path) as temporary:
            save_file(dict(tensors), temporary, metadata={key: sealed})
    # safetensors has a ValueError or KeyError for dtypes that it cannot hold.
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        msg = f"cannot write {str(path)!r} ({type(error).__name__}: {error}); what stood there "
        msg += "before is unchanged"
        raise CheckpointError(msg) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which replaces it when the `with` block ends.

    If the block raises, the temporary file is gone and `path` is unchanged.

    Raises:
        OSError: It cannot be written; `path` is unchanged.
    """
    # In the same folder, since a rename is atomic only within one file system.
    temporary = path.with_name(f".anyprec-{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()  # with the mode that a new file gets here
        existing = path if path.exists() else temporary
        mode = stat.S_IMODE(existing.stat().st_mode)
        yield temporary
        # safetensors writes a file that only its owner may read.
        temporary.chmod(mode)
        # The content must be on the disk before the rename is, or a power cut leaves an empty file.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


class StoredFile:
    """An open file: its document and its tensors.

    The document has been checked for damage. Each tensor is checked when it is read.

    Attributes:
        document: The JSON object that was written.
        shapes: Dtype (as safetensors names it) and shape of every tensor, by name.
    """

    def __init__(self, path: Path, file: Any, sealed: str, remedy: str) -> None:
        self._path = path
        self._remedy = remedy
        self._file = file
        names = file.keys()  # safetensors' file is no mapping, which could be iterated over
        self.shapes = {name: _dtype_and_shape(file, name) for name in names}
        self.document, self._digests = self._unsealed(sealed)

    def read(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Tensors of these names, or all, on the CPU.

        Raises:
            CheckpointError: One is damaged.
        """
        tensors = {}
        for name in self.shapes if names is None else names:
            tensor = self._file.get_tensor(name)
            if _tensor_digest(tensor) != self._digests[name]:
                raise self._damage()
            tensors[name] = tensor
        return tensors

    def _unsealed(self, sealed: str) -> tuple[str, dict[str, str]]:
        """The document and the digests of the tensors: the inverse of `_sealed`."""
        seal = _SEAL.search(sealed)
        digests_start = sealed.rfind(_DIGESTS)
        if digests_start < 0 and is_format_1(sealed):
            msg = f"{str(self._path)!r} has format 1, which is too old: save the network again"
            raise CheckpointError(msg)
        if seal is None or digests_start < 0:
            raise self._damage()
        document = f"{sealed[:digests_start]}}}"
        try:
            digests = json.loads(sealed[digests_start + len(_DIGESTS) : seal.start()])
        except (ValueError, RecursionError) as error:
            raise self._damage() from error
        # Sealing again compares the digest of the document, and refuses any other way to write it.
        is_intact = (
            isinstance(digests, dict)
            and digests.keys() == self.shapes.keys()
            and _sealed(document, digests) == sealed
        )
        if not is_intact:
            raise self._damage()
        return document, digests

    def _damage(self) -> CheckpointError:
        msg = f"{str(self._path)!r} is damaged: its content does not match its digest; "
        return CheckpointError(msg + self._remedy)


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
    if not path.exists():
        msg = f"there is no file {str(path)!r}"
        raise CheckpointError(msg)
    try:
        require_safetensors(path)
        _require_readable_header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            _require_readable_size(0, len(file.keys()))
            metadata = file.metadata() or {}
            if key not in metadata:
                raise of_another_program(path, key, metadata)
            yield StoredFile(path, file, metadata[key], remedy)
    except SafetensorError as error:
        msg = f"{str(path)!r} is damaged, or no safetensors file: {error}"
        raise CheckpointError(msg) from error
    except OSError as error:
        msg = f"{str(path)!r} cannot be read: {error}"
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
    """Refuse a header of impossible length before anything allocates memory for it or parses it."""
    with path.open("rb") as file:
        prefix = file.read(8)
    # A safetensors file starts with the length of its JSON header, which is at least "{}".
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    size = path.stat().st_size
    if not 2 <= length <= min(LARGEST_HEADER, size - 8):
        msg = f"its header claims {length:,} bytes of {size:,}, expected at most "
        msg += f"{LARGEST_HEADER:,}"
        raise SafetensorError(msg)


def _require_readable_size(header: int, tensors: int) -> None:
    if header > LARGEST_HEADER or tensors > MOST_TENSORS:
        msg = f"{tensors:,} tensors with a header of {header:,} bytes, expected at most "
        msg += f"{MOST_TENSORS:,} and {LARGEST_HEADER:,}"
        raise SafetensorError(msg)


def _sealed(document: str, digests: Mapping[str, str]) -> str:
    """The document with the digests of the tensors and its own digest as last fields."""
    text = f"{document.removesuffix('}')}{_DIGESTS}{json.dumps(dict(sorted(digests.items())))}"
    return f'{text}, "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"}}'


def _tensor_digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes, shortened to 128 bits.

    Against damage that is plenty, and it keeps the header small.
    """
    digest = hashlib.sha256(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(content)
    return digest.hexdigest()[:32]


def _dtype_and_shape(file: Any, name: str) -> tuple[str, tuple[int, ...]]:
    entry = file.get_slice(name)
    return entry.get_dtype(), tuple(entry.get_shape())


def stored_once(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, and for each tied one the name under which it is stored.

    Raises:
        CheckpointError: An entry is no tensor (a module's extra state).
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        _require_storable(name, tensor)
        # Two state entries are tied if they are the same view of the same memory.
        memory = (tensor.device, tensor.data_ptr())
        identity = (*memory, tensor.dtype, tuple(tensor.shape), tensor.stride())
        # Tensors without elements have no memory, so all of them would seem tied.
        if tensor.numel() and identity in names:
            aliases[name] = names[identity]
            continue
        names[identity] = name
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
            msg = f"the checkpoint says that {name!r:.80} is stored as {target!r:.80}, which is "
            msg += "not so"
            raise CheckpointError(msg)
    return {**tensors, **{name: tensors[target] for name, target in aliases.items()}}


def _require_storable(name: str, tensor: Any) -> None:
    msg = f"{name!r} in the network's state is "
    if not isinstance(tensor, Tensor):
        msg += f"a {type(tensor).__name__}: a checkpoint holds tensors only"
        raise CheckpointError(msg)
    if tensor.is_meta:
        msg += "on the meta device: a checkpoint holds tensors with values"
        raise CheckpointError(msg)
    if tensor.layout is not torch.strided:
        msg += f"of layout {tensor.layout}: a checkpoint holds dense tensors"
        raise CheckpointError(msg)
    if hasattr(tensor, "full_tensor"):  # a DTensor
        msg += "sharded over processes: gather it (tensor.full_tensor()) into a converted network "
        msg += "that is whole, and save that"
        raise CheckpointError(msg)


def _flush_folder(folder: Path) -> None:
    """Make the rename survive a power cut, where the system can; the file is in place already."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
