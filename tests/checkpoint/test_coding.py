"""Bit fields and frames: what goes in comes out, and what claims to be huge is not opened."""

from __future__ import annotations

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from anyprec.checkpoint.coding import (
    bits_needed,
    compress,
    decompress,
    fixed_size,
    from_fixed,
    from_planes,
    to_fixed,
    to_planes,
)
from anyprec.errors import CheckpointError


@settings(max_examples=100, deadline=None, derandomize=True)
@given(width=st.integers(1, 12), count=st.integers(0, 50), seed=st.integers(0, 1000))
def test_fields_come_back_and_stand_where_the_format_says(width, count, seed):
    values = torch.randint(
        0, 2**width, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int16
    )
    stored = to_fixed(values, width)
    assert stored.dtype == torch.uint8
    assert stored.numel() == fixed_size(count, width)
    assert torch.equal(from_fixed(stored, count, width), values)
    number = int.from_bytes(
        bytes(stored.tolist()), "little"
    )  # the whole as one number: field i at bit i * width
    assert [(number >> (place * width)) % 2**width for place in range(count)] == values.tolist()


@pytest.mark.parametrize(
    ("count", "bits"), [(1, 1), (2, 1), (3, 2), (4, 2), (120, 7), (128, 7), (256, 8), (375, 9)]
)
def test_bits_of_a_field(count, bits):
    assert bits_needed(count) == bits


def test_a_frame_gives_back_its_bytes():
    raw = bytes(torch.randint(0, 3, (10_000,), generator=torch.Generator().manual_seed(0)).tolist())
    frame = compress(raw)
    assert frame.numel() < len(raw)
    assert decompress(frame, len(raw), "it") == raw


@pytest.mark.parametrize(
    "raw", [b"", b"x", bytes(range(256)), bytes(2**20)], ids=["none", "one", "random", "endless"]
)
def test_what_gains_nothing_or_would_be_refused_is_not_compressed(raw):
    assert compress(raw) is None


BOMB = zstandard.ZstdCompressor().compress(bytes(2**26))


@pytest.mark.parametrize(
    ("frame", "size", "message"),
    [
        (
            BOMB,
            2**26,
            r"it declares 67108864 bytes in .* \d+, expected 67108864 and at most 256 for one",
        ),
        (BOMB, 100, "it declares 67108864 bytes .* expected 100 and"),
        (
            zstandard.ZstdCompressor().compress(b"abc" * 50),
            2**40,
            "declares 150 bytes in .*, expected 1099511627776",
        ),
        (
            zstandard.ZstdCompressor(write_content_size=False).compress(b"abc" * 50),
            150,
            "declares -1 bytes",
        ),
        (zstandard.ZstdCompressor().compress(b"abc" * 50)[:-3], 150, "it is damaged"),
        (b"no frame at all", 15, "it is damaged"),
        (b"", 0, "it is damaged"),
    ],
)
def test_a_frame_of_another_size_or_none_is_refused_before_it_is_opened(
    frame, size, message, monkeypatch
):
    stored = (
        torch.frombuffer(bytearray(frame), dtype=torch.uint8)
        if frame
        else torch.empty(0, dtype=torch.uint8)
    )
    with pytest.raises(CheckpointError, match=message):
        decompress(stored, size, "it")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0,)])
def test_planes_come_back(dtype, shape):
    tensor = torch.randint(0, 2, shape).to(dtype)
    raw = to_planes(tensor)
    assert len(raw) == tensor.numel() * tensor.element_size()
    assert torch.equal(from_planes(raw, dtype, shape), tensor)


def test_planes_stand_first_bytes_first():
    assert to_planes(torch.tensor([0x0201, 0x0403], dtype=torch.int16)) == b"\x01\x03\x02\x04"
