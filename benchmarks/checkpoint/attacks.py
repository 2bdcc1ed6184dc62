"""Attacks on checkpoint files: damage to their bytes, and forgeries with digests of their own.

A damage changes the bytes of a file. A forgery changes its document and tensors in place, which are
then written with digests that fit. Both draw from a generator that is passed to them.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# --- Damages ---


def flip_bits(content: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.randint(1, 8)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


def flip_bits_of_header(content: bytearray, draw: random.Random) -> bytearray:
    length = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(length)] ^= 1 << draw.randrange(8)
    return content


def cut_off(content: bytearray, draw: random.Random) -> bytearray:
    return content[: draw.randrange(len(content))]


def lengthen(content: bytearray, draw: random.Random) -> bytearray:
    return content + draw.randbytes(draw.randint(1, 64))


def overwrite(content: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(content))
    length = min(draw.randint(1, 256), len(content) - start)
    content[start : start + length] = draw.choice(
        (bytes(length), b"\xff" * length, draw.randbytes(length))
    )
    return content


def move_bytes(content: bytearray, draw: random.Random) -> bytearray:
    first, second = sorted(draw.randrange(len(content)) for _ in range(2))
    return content[:first] + content[second:] + content[first:second]


def declare_length(content: bytearray, draw: random.Random) -> bytearray:
    length = draw.choice(
        (0, 1, len(content), 2**25, 2**31, 2**40, 2**63, 2**64 - 1, draw.randrange(2**64))
    )
    content[:8] = struct.pack("<Q", length)
    return content


def edit_header(content: bytearray, draw: random.Random) -> bytearray:
    """Another shape, type or place of a tensor in safetensors' own header."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    entry = header[draw.choice([name for name in header if name != "__metadata__"])]
    number = draw.choice((0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1, -1))
    action = draw.randrange(4)
    if action == 0:
        entry["shape"] = [*entry["shape"], number]
    elif action == 1 and entry["shape"]:
        entry["shape"][draw.randrange(len(entry["shape"]))] = number
    elif action == 2:
        entry["dtype"] = draw.choice(
            ("F64", "F16", "U8", "BOOL", "I64", "F8_E4M3", "C64", "F4", "X")
        )
    else:
        entry["data_offsets"][draw.randrange(2)] = number
    raw = json.dumps(header).encode()
    return bytearray(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


DAMAGES: list[Callable[[bytearray, random.Random], bytearray]] = [
    flip_bits,
    flip_bits_of_header,
    cut_off,
    lengthen,
    overwrite,
    move_bytes,
    declare_length,
    edit_header,
]


# --- Forgeries ---


def hostile_value(draw: random.Random) -> Any:
    return draw.choice((
        None, True, -1, 0, 1, 2, 5, 9, 2**31, 2**63 - 1, 2**63, 10**30, 0.5, 1e308,
        "", "x", "W4A4", "a" * 100, [], {}, [[]], [2**40], [1, 2**62], {"x": {}},
        "float32", "uint8", "fixed", "zstd", "0", "1", "3",
    ))  # fmt: skip


def change_document(document: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    """One entry, however deep, takes, loses or moves a value."""
    container = document
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        key = draw.choice(keys)
        inner = container[key]
        if not (isinstance(inner, (dict, list)) and inner and draw.random() < 0.7):
            break
        container = inner
    action = draw.randrange(4)
    if action == 0:
        del container[key]
    elif action == 1 and isinstance(container, dict):
        new_key = draw.choice(("x", "0", "4.weight", "packing", *tensors))
        container[new_key] = container.pop(key)
    else:
        container[key] = hostile_value(draw)


def change_packing(document: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    """The packed form says something else of what is stored: huge sizes above all."""
    packing = document.setdefault(
        "packing", {"coding": "zstd", "layers": {}, "latent": {}, "compressed": {}}
    )
    records = packing[draw.choice(("layers", "compressed"))]
    names = [*records, *tensors, *(layer["path"] for layer in document["layers"])]
    shape = draw.choice(
        ([2**40], [2**20, 2**20], [0], [2**62, 2**62], [1], [4, 3, 3, 3], [2**31], [8, 4, 1, 1])
    )
    records[draw.choice(names)] = {
        "dtype": draw.choice(("float32", "float64", "uint8", "bool")),
        "shape": shape,
    }
    if draw.random() < 0.3:
        packing["coding"] = draw.choice(("zstd", "fixed"))


def change_architecture(document: Any, _tensors: dict[str, Tensor], draw: random.Random) -> None:
    """Another network, or one far too large."""
    name = draw.choice(
        ("test_resnet", "test_vit", "resnet18", "vit_giant_patch14_224", "hf-hub:x/y", "../x", "")
    )
    arguments = draw.choice((
        {}, {"num_classes": 10**9}, {"num_classes": -1}, {"in_chans": 2**40}, {"pretrained": True},
        {"embed_dim": 10**6}, {"checkpoint_path": "x"}, {"num_classes": "x"}, {"drop_rate": []},
        {"depth": 10},
    ))  # fmt: skip
    document["architecture"] = {"name": name, "arguments": arguments}


def change_tensor(_document: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    """Other values, another shape or dtype, or no tensor at all."""
    name = draw.choice(list(tensors))
    tensor = tensors[name].clone()
    action = draw.randrange(7)
    if action == 0:
        del tensors[name]
    elif action == 1:
        names = ("x", f"{name}x", "anyprec.packed.3.cells", "anyprec.packed.3.low")
        tensors[draw.choice(names)] = tensor
    elif action == 2 and tensor.numel():
        tensors[name] = with_another_value(tensor, draw)
    elif action == 3:
        tensors[name] = tensor.reshape(-1)[: draw.randint(0, tensor.numel())].clone()
    elif action == 4:
        dtypes = (torch.float64, torch.int8, torch.uint8, torch.int64, torch.bfloat16)
        tensors[name] = tensor.to(draw.choice(dtypes))
    elif action == 5 and tensor.numel():
        tensors[name] = with_other_values(tensor)
    else:
        tensors[name] = torch.frombuffer(bytearray(bomb(draw)), dtype=torch.uint8).clone()


def with_another_value(tensor: Tensor, draw: random.Random) -> Tensor:
    """A copy of `tensor` with NaN, or another integer, in one element."""
    # The value is drawn before the element: the number of a file must keep giving the same file.
    value = float("nan") if tensor.is_floating_point() else draw.choice((0, 1, 127))
    changed = tensor.clone()
    changed.view(-1)[draw.randrange(changed.numel())] = value
    return changed


def with_other_values(tensor: Tensor) -> Tensor:
    """Random bytes, or huge values."""
    if tensor.dtype == torch.uint8:
        return torch.randint(0, 256, tensor.shape, dtype=torch.uint8)
    return tensor * 1e30


def swap_tensors(_document: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    first, second = draw.sample(list(tensors), 2)
    tensors[first], tensors[second] = tensors[second], tensors[first]


def bomb(draw: random.Random) -> bytes:
    """A frame of a few bytes that says, truly or not, that it holds very many."""
    import zstandard  # noqa: PLC0415

    size = draw.choice((2**10, 2**20, 2**26))
    frame = bytearray(zstandard.ZstdCompressor(level=1).compress(bytes(size)))
    if draw.random() < 0.5:
        frame[5:9] = struct.pack("<I", draw.randrange(2**32))
    return bytes(frame)


FORGERIES: list[Callable[[Any, dict[str, Tensor], random.Random], None]] = [
    change_document,
    change_document,
    change_packing,
    change_architecture,
    change_tensor,
    change_tensor,
    swap_tensors,
]
"""The same entry twice is drawn twice as often."""
