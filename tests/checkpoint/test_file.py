"""The file itself: damage of every kind is found, and a failed write leaves what stood there."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import anyprec
from anyprec.runtime import storage as file_module
from anyprec.runtime.storage import opened, read_file, stored_once, with_aliases, write_file


def _header_length(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


@pytest.mark.parametrize(
    "where", [1, 7, 8, "in the header", "after the header", "in the data", "one byte short"]
)
def test_a_truncated_file_is_refused(path, plain, photograph, where):
    content = path.read_bytes()
    header = _header_length(content)
    places = {
        "in the header": header // 2,
        "after the header": header,
        "in the data": (header + len(content)) // 2,
        "one byte short": len(content) - 1,
    }
    path.write_bytes(content[: places.get(where, where)])
    network = plain()
    check = photograph(network)
    with pytest.raises(
        anyprec.CheckpointError, match=r"net.safetensors' is damaged, or no safetensors file"
    ):
        anyprec.load(path, network)
    check()


@pytest.mark.parametrize(
    "content",
    [
        b"garbage" * 100,
        b"\xff" * 64,
        b"\x00" * 64,
        b"PK\x03\x04 a pickle in a zip",
        b"\x02" + b"\0" * 7 + b"{}",
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, plain, content):
    (tmp_path / "net").write_bytes(content)
    with pytest.raises(
        anyprec.CheckpointError, match=r"is damaged, or no safetensors|was not written by anyprec"
    ):
        anyprec.load(tmp_path / "net", plain())


def test_a_longer_file_is_refused(path, plain):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(anyprec.CheckpointError, match=r"is damaged, or no safetensors file"):
        anyprec.load(path, plain())


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_a_file_of_another_program_is_refused(tmp_path, plain, metadata):
    save_file({"a": torch.zeros(1)}, tmp_path / "net", metadata=metadata)
    with pytest.raises(
        anyprec.CheckpointError,
        match=r"was not written by anyprec .*has no 'anyprec'.*load float weights",
    ):
        anyprec.load(tmp_path / "net", plain())


def test_a_file_that_is_not_there_is_named(tmp_path, plain):
    with pytest.raises(anyprec.CheckpointError, match=r"there is no file '.*"):
        anyprec.load(tmp_path / "nothing", plain())


def test_one_flipped_bit_in_the_data_is_found(path, plain):
    content = bytearray(path.read_bytes())
    content[_header_length(content) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        anyprec.CheckpointError,
        match=r"is damaged: its content does not match its digest; copy it again",
    ):
        anyprec.load(path, plain())


def test_a_file_without_its_digest_is_refused(path, plain):
    tensors, text = read_file(path)
    save_file(tensors, path, metadata={"anyprec": text})
    with pytest.raises(anyprec.CheckpointError, match=r"does not match its digest"):
        anyprec.load(path, plain())


def _sealed(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()["anyprec"]


def test_every_part_of_a_tensor_counts_in_the_digest(tmp_path):
    tensor = torch.arange(4, dtype=torch.int32)
    write_file(tmp_path / "x", {"a": tensor}, '{"x": 1}')
    sealed = _sealed(tmp_path / "x")
    others = [
        {"b": tensor},
        {"a": tensor.reshape(2, 2)},
        {"a": tensor.view(torch.float32)},
        {"a": tensor + 1},
        {"a": tensor, "b": tensor},
        {},
    ]
    for other in others:
        save_file(
            {name: tensor.clone() for name, tensor in other.items()},
            tmp_path / "x",
            metadata={"anyprec": sealed},
        )
        with pytest.raises(anyprec.CheckpointError, match="does not match its digest"):
            read_file(tmp_path / "x")
    save_file(
        {"a": tensor}, tmp_path / "x", metadata={"anyprec": sealed.replace('"x": 1', '"x": 2')}
    )
    with pytest.raises(anyprec.CheckpointError, match="does not match its digest"):
        read_file(tmp_path / "x")


def test_a_damaged_tensor_is_found_when_it_is_read_and_no_sooner(tmp_path):
    write_file(tmp_path / "x", {"a": torch.zeros(4), "b": torch.ones(4)}, "{}")
    content = bytearray((tmp_path / "x").read_bytes())
    content[-1] ^= 1  # the last byte of "b"
    (tmp_path / "x").write_bytes(content)
    with opened(tmp_path / "x") as file:
        assert torch.equal(file.read(["a"])["a"], torch.zeros(4))
        with pytest.raises(anyprec.CheckpointError, match="does not match its digest"):
            file.read(["b"])


@pytest.mark.parametrize("length", [2**25 + 1, 2**40, 2**63, 1])
def test_a_header_that_claims_too_much_is_refused_before_it_is_read(tmp_path, plain, length):
    (tmp_path / "net").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(
        anyprec.CheckpointError,
        match=r"its header claims [\d,]+ bytes of 10, expected at most 33,554,432",
    ):
        anyprec.load(tmp_path / "net", plain())


def test_what_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(file_module, "MOST_TENSORS", 1)
    with pytest.raises(anyprec.CheckpointError, match="cannot write .*2 tensors with a header of"):
        write_file(tmp_path / "x", {"a": torch.zeros(1), "b": torch.zeros(1)}, "{}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.int8,
        torch.bool,
        torch.complex64,
        torch.uint8,
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_every_kind_of_tensor_comes_back(tmp_path, dtype, shape, same_state):
    tensors = {"a": torch.ones(shape).to(dtype)}
    write_file(tmp_path / "x", tensors, '{"x": 1}')
    read, text = read_file(tmp_path / "x")
    assert same_state(read, tensors)
    assert text == '{"x": 1}'


def test_transposed_and_overlapping_tensors_come_back(tmp_path, same_state):
    base = torch.arange(6.0).reshape(2, 3)
    state = {"whole": base, "turned": base.t(), "part": base[0], "again": base}
    tensors, aliases = stored_once(state)
    assert aliases == {"again": "whole"}
    write_file(tmp_path / "x", tensors, "{}")
    assert same_state(with_aliases(read_file(tmp_path / "x")[0], aliases), state)


# --- Writing --------------------------------------------------------------------------------------


def _raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("no"), KeyError("dtype")]
)
@pytest.mark.parametrize("step", ["save_file", "replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, model, monkeypatch, step, error):
    before = path.read_bytes()
    target = {"save_file": file_module, "replace": Path, "fsync": os}[step]
    monkeypatch.setattr(target, step, _raising(error))
    with pytest.raises(
        anyprec.CheckpointError,
        match=r"cannot write '.*net.safetensors' .*; what stood there .* unchanged",
    ):
        anyprec.save(model, path, configs={"new": model.resolve_bits(4)})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]  # noqa: PTH208 (hidden files too)
    assert list(model.configs) == ["small"]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(path, model, monkeypatch):
    before = path.read_bytes()

    def write_half(tensors, temporary, metadata):
        Path(temporary).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(file_module, "save_file", write_half)
    with pytest.raises(KeyboardInterrupt):
        anyprec.save(model, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_named(tmp_path, model):
    with pytest.raises(
        anyprec.CheckpointError,
        match=r"cannot write .*: there is no folder '.*nowhere'; create it first",
    ):
        anyprec.save(model, tmp_path / "nowhere" / "net")


def test_a_file_in_place_of_the_folder_is_named(path, model):
    with pytest.raises(anyprec.CheckpointError, match=r"there is no folder '.*net.safetensors'"):
        anyprec.save(model, path / "net")


def test_a_folder_in_place_of_the_file_is_left(tmp_path, model):
    (tmp_path / "net").mkdir()
    with pytest.raises(anyprec.CheckpointError, match=r"cannot write"):
        anyprec.save(model, tmp_path / "net")
    assert list(tmp_path.iterdir()) == [tmp_path / "net"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere"
)
def test_a_folder_without_write_permission_is_named(path, model):
    path.parent.chmod(0o500)
    try:
        with pytest.raises(anyprec.CheckpointError, match=r"cannot write .*PermissionError"):
            anyprec.save(model, path)
    finally:
        path.parent.chmod(0o700)


def test_a_tensor_that_safetensors_cannot_hold_is_named(tmp_path):
    with pytest.raises(anyprec.CheckpointError, match=r"cannot write .*complex128"):
        write_file(tmp_path / "net", {"a": torch.zeros(1, dtype=torch.complex128)}, "{}")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_flushed_is_no_failure(tmp_path, model, monkeypatch):
    real = os.open

    def open_files_only(name, *args, **kwargs):
        if Path(name).is_dir():
            raise PermissionError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_files_only)
    anyprec.save(model, tmp_path / "net")
    assert (tmp_path / "net").is_file()


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_a_file_may_be_read_by_whom_the_folder_allows(path, model):
    path.with_name("ordinary").touch()
    assert path.stat().st_mode == path.with_name("ordinary").stat().st_mode
    path.chmod(0o640)
    anyprec.save(model, path)
    assert path.stat().st_mode & 0o777 == 0o640


# --- Random damage --------------------------------------------------------------------------------


def _tiny():
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, bytes]:
    torch.manual_seed(0)
    model = anyprec.convert(
        _tiny(), bits=(2, 4), first_last_bits=None, example_input=torch.randn(1, 1, 2, 2)
    )
    file = tmp_path_factory.mktemp("fuzz") / "net"
    anyprec.save(model, file, configs={"low": model.resolve_bits(2)})
    return file, file.read_bytes()


_FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=4)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(flips=_FLIPS, kept=st.just(1.0) | st.floats(0, 1))
def test_random_damage_is_refused_or_harmless(tiny, same_state, flips, kept):
    file, content = tiny
    file.write_bytes(content)
    expected = anyprec.load(file, _tiny())
    damaged = bytearray(content)
    for place, mask in flips:
        damaged[int(place * len(damaged))] ^= mask
    file.write_bytes(damaged[: round(kept * len(damaged))])
    network = _tiny()
    try:
        loaded = anyprec.load(file, network)
    except anyprec.CheckpointError:
        assert not isinstance(network, anyprec.ConvertedModel)
    else:
        assert same_state(loaded.state_dict(), expected.state_dict())
        assert loaded.anyprec_record == expected.anyprec_record
