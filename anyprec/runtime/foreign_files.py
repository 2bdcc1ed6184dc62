"""What a file is that somebody takes for one of ours, by its first bytes, and what to do with it.

Nothing is unpickled, decompressed or executed: of an archive only the names in it are read.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

from anyprec.errors import CheckpointError

_TORCH_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""What torch.save begins with in its old format: its magic number, as pickle writes it."""

_LOAD_WEIGHTS = (
    "load float weights with torch.load(file, weights_only=True) and model.load_state_dict before "
    "anyprec.convert"
)

_STARTS: dict[bytes, tuple[str, str]] = {
    _TORCH_PICKLE: ("a file of torch.save (in its old format)", _LOAD_WEIGHTS),
    b"\x1f\x8b": ("compressed by gzip", "decompress it first"),
    b"BZh": ("compressed by bzip2", "decompress it first"),
    b"\xfd7zXZ\x00": ("compressed by xz", "decompress it first"),
    b"\x28\xb5\x2f\xfd": ("compressed by Zstandard", "decompress it first"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it first"),
    b"\x89HDF\r\n\x1a\n": ("a HDF5 file (of Keras, for instance)", "export its weights to torch"),
    b"GGUF": ("a GGUF file", "export its weights to torch"),
    b"\x93NUMPY": ("an array of NumPy", "load it with numpy.load"),
    b"version https://git-lfs": (
        "a pointer of Git LFS, without the content",
        "fetch the content with `git lfs pull`",
    ),
}
"""What files of a kind begin with, to what they are and what to do."""

_MOST_READ = 1024
"""Bytes of the beginning that are looked at."""

_MOST_NAMES = 100_000
"""Entries of an archive that are looked at."""


def require_safetensors(path: Path) -> None:
    """Refuse what is recognised as something else, which a message about damage would not name.

    Raises:
        CheckpointError: It is a folder, empty, or a file of another kind.
        OSError: It cannot be read.
    """
    kind = _folder(path) if path.is_dir() else _kind(path)
    if kind is not None:
        msg = f"{str(path)!r} {kind}"
        raise CheckpointError(msg)


def _kind(path: Path) -> str | None:
    """What a file is and what to do with it, if it is recognised as no safetensors file."""
    with path.open("rb") as file:
        start = file.read(_MOST_READ)
    if not start:
        return "is empty: copy it again from its source"
    # First of all, since the length of a header may have any first bytes.
    if start[4:9] == b"\0\0\0\0{":
        return None
    for beginning, (kind, remedy) in _STARTS.items():
        if start.startswith(beginning):
            return f"is {kind}: {remedy}"
    if start.startswith(b"PK\x03\x04") and zipfile.is_zipfile(path):
        return _archive(path)
    if start[4:8] == b"TFL3":
        return "is a network of TensorFlow Lite: export its weights to torch"
    return _pickle(start) or _text(start) or _onnx(start)


def _pickle(start: bytes) -> str | None:
    # Protocols 2 to 5 name themselves.
    if start[0] != 0x80 or start[1:2] not in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return None
    kind = "is a Python pickle, which can run any code and is not read: if you trust its source, "
    return kind + _LOAD_WEIGHTS


def _folder(path: Path) -> str:
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if files:
        return f"is a folder: name the file in it, e.g. {str(path / files[0])!r}"
    return "is a folder without a .safetensors file: name the file that anyprec.save wrote"


def _archive(path: Path) -> str:
    """What a zip archive holds, by the names in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [Path(name).name for name in archive.namelist()[:_MOST_NAMES]]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        return f"is a damaged zip archive ({error}): copy it again from its source"
    if "data.pkl" in names and "constants.pkl" in names:
        return "is a TorchScript network: take its weights by torch.jit.load(file).state_dict()"
    if "data.pkl" in names:
        return f"is a file of torch.save: {_LOAD_WEIGHTS}"
    if any(name.endswith(".npy") for name in names):
        return "is an archive of NumPy arrays: load it with numpy.load"
    return "is a zip archive: unpack it first"


def _text(start: bytes) -> str | None:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "is a web page, perhaps an error of the server: download it again"
    if text.startswith((b"{", b"[")):
        return _json(start)
    return None


def _json(start: bytes) -> str:
    if b"anyprec-search" in start:
        read = "anyprec.SearchResult.load, or pass it as search(..., resume=)"
        return f"is a search result or a search file: read it with {read}"
    return "is a text in JSON: name the file that anyprec.save wrote"


def _onnx(start: bytes) -> str | None:
    # A protocol buffer: the version of the format, then the name of the producer.
    is_model = start[0] == 0x08 and start[2:3] == b"\x12" and start[8:9] != b"{"
    if is_model and start[4 : 4 + start[3]].isascii():
        return "is a network of ONNX: create it in torch and load its weights there"
    return None


def of_another_program(path: Path, key: str, metadata: Iterable[str]) -> CheckpointError:
    """Why a safetensors file is refused that has no document under `key`.

    Args:
        path: The file.
        key: The entry of the metadata that is missing.
        metadata: The entries that are there.
    """
    ours = sorted(name for name in metadata if name.partition(".")[0] == "anyprec")
    msg = f"{str(path)!r} was not written by anyprec (its metadata has no {key!r}): "
    msg += "load float weights into the network before converting it"
    if ours == ["anyprec"]:
        msg = f"{str(path)!r} is a network that anyprec.save wrote: read it with anyprec.load"
    elif ours:
        msg = f"{str(path)!r} is the snapshot of a training run: pass it as fit(..., snapshot=)"
    return CheckpointError(msg)


def is_format_1(document: str) -> bool:
    """Whether a document of ours is of the first format, in which tensors had no digests."""
    try:
        return bool(json.loads(document)["format"] == 1)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
