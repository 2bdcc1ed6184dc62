"""Files that are no checkpoint are named for what they are, and nothing in them is run."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from safetensors.torch import save_file

import anyprec
from anyprec.errors import CheckpointError


class Trap:
    """Fails the test when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return pytest.fail, ("it was unpickled",)


def saved(value: object, **options: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def scripted() -> bytes:
    """The names in a file of torch.jit.save."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("net/data.pkl", "net/code/__torch__.py", "net/constants.pkl"):
            archive.writestr(name, b"")
    return stream.getvalue()


def arrays(save: Callable[..., None]) -> bytes:
    stream = io.BytesIO()
    save(stream, np.ones(3))
    return stream.getvalue()


ONNX = b"\x08\x07\x12\x07pytorch\x1a\x052.4.0:\x80\x01" + b"\x0a" * 50

FILES = {
    "zip of torch.save": (
        lambda: saved({"a": torch.ones(2)}),
        r"a file of torch\.save: .*torch\.load",
    ),
    "a trap": (lambda: saved(Trap()), r"a file of torch\.save"),
    "old torch.save": (
        lambda: saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False),
        r"a file of torch\.save \(in its old format\): .*load_state_dict",
    ),
    "pickle": (lambda: pickle.dumps(Trap()), "a Python pickle, which can run any code"),
    "pickle of protocol 2": (lambda: pickle.dumps([1], protocol=2), "a Python pickle"),
    "TorchScript": (scripted, r"a TorchScript network.*torch\.jit\.load"),
    "npz": (lambda: arrays(np.savez), "an archive of NumPy arrays"),
    "npy": (lambda: arrays(np.save), r"an array of NumPy.*numpy\.load"),
    "gzip": (lambda: gzip.compress(b"x" * 99), "compressed by gzip: decompress it first"),
    "bzip2": (lambda: bz2.compress(b"x" * 99), "compressed by bzip2"),
    "xz": (lambda: lzma.compress(b"x" * 99), "compressed by xz"),
    "zstd": (lambda: zstandard.compress(b"x" * 99), "compressed by Zstandard"),
    "ONNX": (lambda: ONNX, "a network of ONNX"),
    "GGUF": (lambda: b"GGUF\x03\0\0\0" + b"\0" * 40, "a GGUF file"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + b"\0" * 40, "a HDF5 file"),
    "TFLite": (lambda: b"\x1c\0\0\0TFL3" + b"\0" * 40, "TensorFlow Lite"),
    "pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\nsize 12345\n",
        "a pointer of Git LFS, without the content: .*git lfs pull",
    ),
    "web page": (lambda: b"\n<!DOCTYPE html><html>404</html>", "a web page.*download it again"),
    "error in XML": (lambda: b"<?xml version='1.0'?><Error/>", "a web page"),
    "JSON": (lambda: b'{"model_type": "vit"}', "a text in JSON"),
    "search result": (
        lambda: json.dumps({"format": "anyprec-search-result-1"}).encode(),
        "a search result or a search file: .*SearchResult.load",
    ),
    "empty": (lambda: b"", "is empty: copy it again"),
    "other bytes": (lambda: b"garbage" * 20, "is damaged, or no safetensors file"),
}


@pytest.mark.parametrize("read", [anyprec.load, anyprec.inspect])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_named(
    name: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    make, text = FILES[name]
    (tmp_path / "net.pt").write_bytes(make())
    with pytest.raises(CheckpointError, match=rf"net\.pt' .*{text}"):
        read(tmp_path / "net.pt")


def test_a_folder_says_which_file_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder without a .safetensors file"):
        anyprec.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is a folder: name the file in it, e.g. '.*/model"):
        anyprec.load(tmp_path)


def test_our_own_files_of_another_purpose_are_named(
    net: anyprec.ConvertedModel, tmp_path: Path, loader: list
) -> None:
    anyprec.fit(
        net, loader, epochs=1, snapshot=tmp_path / "run", show_progress=False, norm_batches=0
    )
    with pytest.raises(CheckpointError, match=r"the snapshot of a training run: .*snapshot="):
        anyprec.load(tmp_path / "run")


@pytest.mark.parametrize(
    "start",
    [
        b"\x1f\x8b\x01\0",
        b"BZh\0",
        b"\x80\x02\x01\0",
        b"\x7b\0\0\0",
        b"PK\x03\x04",
        b"\x08\x07\x12\0",
    ],
)
def test_a_header_of_any_length_is_read(start: bytes, tmp_path: Path) -> None:
    """The length is what a safetensors file begins with, so it may look like any other kind."""
    length = struct.unpack("<I", start)[0] % 2**24
    start = struct.pack("<I", length)
    file = tmp_path / "net"
    file.write_bytes(start + b"\0\0\0\0{}" + b" " * (length - 2))
    with pytest.raises(CheckpointError, match="was not written by anyprec"):
        anyprec.load(file)


def test_a_file_of_the_first_format_is_too_old(tmp_path: Path) -> None:
    document = json.dumps({"format": 1, "version": "0.0.9", "sha256": "0" * 64})
    save_file({"a": torch.ones(1)}, tmp_path / "net", metadata={"anyprec": document})
    with pytest.raises(CheckpointError, match="has format 1, which is too old: save the network"):
        anyprec.load(tmp_path / "net")
