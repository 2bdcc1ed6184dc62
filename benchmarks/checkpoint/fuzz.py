"""Thousands of damaged and forged checkpoints, each loaded in a process of bounded memory.

    python -m benchmarks.checkpoint.fuzz --files 12000

Two kinds. *Damaged*: bits flipped, bytes cut off, doubled or zeroed, headers edited, tensors swapped, sizes declared huge,
without touching the digests; each must load to the very same network or raise `CheckpointError`. *Forged*: the document or
the tensors changed and the digests computed anew, as somebody would who wants to do harm; each must load to some network
that runs, or raise `CheckpointError`. Any other exception ends the run, and so does memory over the limit, which the system
enforces (`RLIMIT_AS`): Python then raises `MemoryError`, which is no `CheckpointError`.

The seed of each file is its number, so `--first N --files 1` repeats one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import resource
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import anyprec
from anyprec.runtime.storage import read_file, write_file

HEADROOM = 1536 * 2**20
"""Bytes that the process may take beyond what it holds before the first file: room for torch's own allocations."""


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        originals = make_originals(Path(folder))
        for original in originals:  # whatever loading imports or caches is there before the limit
            judge(original, Path(folder) / original.name, forged=False)
        limit = bound_memory(HEADROOM)
        start, counts = time.perf_counter(), collections.Counter()
        for number in range(args.first, args.first + args.files):
            counts.update(try_one(number, originals, Path(folder) / "mutant"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{args.files} files in {time.perf_counter() - start:.0f} s; limit {limit / 2**20:.0f} MiB of address space, ",
        end="",
    )
    print(f"peak {peak / 2**20:.0f} MiB resident")
    for outcome, count in sorted(counts.items()):
        print(f"{count:7d} {outcome}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=12_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    return parser.parse_args()


# --- What is attacked ---------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    """Small, with a norm, a depthwise layer and a classifier, for 8x8 images."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 3),
    ).eval()


class Original:
    """A sound file, its content in parts, and the state of the network that it holds."""

    def __init__(self, path: Path, model_given: bool) -> None:  # noqa: FBT001
        self.name = path.name
        self.content = path.read_bytes()
        self.tensors, document = read_file(path)
        self.document = json.loads(document)
        self.make = network if model_given else lambda: None
        self.state = {name: tensor.clone() for name, tensor in self.load(path).state_dict().items()}

    def load(self, path: Path) -> anyprec.ConvertedModel:
        """Load a file as this one is loaded."""
        return anyprec.load(path, self.make())


def make_originals(folder: Path) -> list[Original]:
    """Every form, of a network that is given to `load` and of one that timm rebuilds."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    given = anyprec.convert(
        network(), bits=(2, 4, 8), first_last_bits=None, norm="shared", example_input=images[:1]
    )
    anyprec.calibrate(given, [images])
    anyprec.update_norms(given, [images], 4)
    import timm  # noqa: PLC0415 (slow to import)

    images = torch.randn(2, 3, 32, 32)
    rebuilt = timm.create_model("test_resnet", num_classes=4).eval()
    rebuilt = anyprec.convert(rebuilt, bits=(2, 4), example_input=images[:1])
    anyprec.calibrate(rebuilt, [images])
    forms = {"training": {}, "fixed": {"packed": True, "coding": "fixed"}, "zstd": {"packed": True}}
    originals = []
    for form, options in forms.items():
        anyprec.save(given, folder / form, configs={"four": given.resolve_bits(4)}, **options)
        originals.append(Original(folder / form, model_given=True))
    for form in ("training", "zstd"):
        anyprec.save(rebuilt, folder / f"timm {form}", **forms[form])
        originals.append(Original(folder / f"timm {form}", model_given=False))
    return originals


# --- Attacks ------------------------------------------------------------------------------------------------------


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
    flip_bits, flip_bits_of_header, cut_off, lengthen, overwrite, move_bytes, declare_length, edit_header,
]  # fmt: skip


def hostile_value(draw: random.Random) -> Any:
    return draw.choice((
        None, True, -1, 0, 1, 2, 5, 9, 2**31, 2**63 - 1, 2**63, 10**30, 0.5, 1e308, "", "x", "W4A4", "a" * 100, [], {}, [[]],
        [2**40], [1, 2**62], {"x": {}}, "float32", "uint8", "fixed", "zstd", "0", "1", "3",
    ))  # fmt: skip


def change_document(document: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    """One place, however deep, takes, loses or moves a value."""
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        inner = place[key]
        if not (isinstance(inner, (dict, list)) and inner and draw.random() < 0.7):
            break
        place = inner
    action = draw.randrange(4)
    if action == 0:
        del place[key]
    elif action == 1 and isinstance(place, dict):
        place[draw.choice(("x", "0", "4.weight", "packing", *tensors))] = place.pop(key)
    else:
        place[key] = hostile_value(draw)


def change_packing(document: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    """The packed form says something else of what is stored: huge sizes above all."""
    packing = document.setdefault(
        "packing", {"coding": "zstd", "layers": {}, "latent": {}, "compressed": {}}
    )
    records = packing[draw.choice(("layers", "compressed"))]
    known = [*records, *tensors, *(layer["path"] for layer in document["layers"])]
    shape = draw.choice(
        ([2**40], [2**20, 2**20], [0], [2**62, 2**62], [1], [4, 3, 3, 3], [2**31], [8, 4, 1, 1])
    )
    records[draw.choice(known)] = {
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
        {}, {"num_classes": 10**9}, {"num_classes": -1}, {"in_chans": 2**40}, {"pretrained": True}, {"embed_dim": 10**6},
        {"checkpoint_path": "x"}, {"num_classes": "x"}, {"drop_rate": []}, {"depth": 10},
    ))  # fmt: skip
    document["architecture"] = {"name": name, "arguments": arguments}


def change_tensor(_document: Any, tensors: dict[str, Tensor], draw: random.Random) -> None:
    """Other values, another shape or type, or no tensor at all."""
    name = draw.choice(list(tensors))
    tensor = tensors[name].clone()
    action = draw.randrange(7)
    if action == 0:
        del tensors[name]
    elif action == 1:
        tensors[
            draw.choice(("x", f"{name}x", "anyprec.packed.3.cells", "anyprec.packed.3.low"))
        ] = tensor
    elif action == 2 and tensor.numel():
        tensors[name], flat = tensor, tensor.view(-1)
        flat[draw.randrange(len(flat))] = (
            draw.choice((0, 1, 127)) if not tensor.is_floating_point() else float("nan")
        )
    elif action == 3:
        tensors[name] = tensor.reshape(-1)[: draw.randint(0, tensor.numel())].clone()
    elif action == 4:
        tensors[name] = tensor.to(
            draw.choice((torch.float64, torch.int8, torch.uint8, torch.int64, torch.bfloat16))
        )
    elif action == 5 and tensor.numel():
        tensors[name] = (
            torch.randint(0, 256, tensor.shape, dtype=torch.uint8)
            if tensor.dtype == torch.uint8
            else tensor * 1e30
        )
    else:
        tensors[name] = torch.frombuffer(bytearray(bomb(draw)), dtype=torch.uint8).clone()


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
    change_document, change_document, change_packing, change_architecture, change_tensor, change_tensor, swap_tensors,
]  # fmt: skip


# --- Judgement ----------------------------------------------------------------------------------------------------


def try_one(number: int, originals: list[Original], path: Path) -> list[str]:
    """Make the mutant of this number and load it; what was done, and what came of it."""
    draw = random.Random(number)
    original = originals[number % len(originals)]
    forged = draw.random() < 0.5
    attack = draw.choice(FORGERIES if forged else DAMAGES)
    if not forged:
        path.write_bytes(attack(bytearray(original.content), draw))
    else:
        document, tensors = json.loads(json.dumps(original.document)), dict(original.tensors)
        for _ in range(draw.randint(1, 2)):
            attack(document, tensors, draw)
        try:
            write_file(path, tensors, json.dumps(document))
        except anyprec.CheckpointError:  # what cannot even be written is written past our checks
            save_file(
                {name: tensor.clone() for name, tensor in tensors.items()},
                path,
                metadata={"anyprec": "{}"},
            )
    kind = "forged" if forged else "damaged"
    try:
        outcome = judge(original, path, forged=forged)
    except Exception as error:
        error.add_note(
            f"file {number}: {original.name}, {attack.__name__}; repeat with --first {number} --files 1"
        )
        raise
    return [f"{kind}, {outcome}", f"{kind} by {attack.__name__}"]


@torch.no_grad()
def judge(original: Original, path: Path, *, forged: bool) -> str:
    """Load a file, and check what is promised of it.

    Raises:
        AssertionError: A damaged file loaded to another network.
    """
    with contextlib.suppress(anyprec.CheckpointError):
        anyprec.inspect(path)
    try:
        model = original.load(path)
    except anyprec.CheckpointError:
        return "refused"
    if forged:
        state, shape = real(model.state_dict()), tuple(original.document["example_shape"])
        if any(
            value.dtype != original.state[name].dtype
            for name, value in state.items()
            if name in original.state
        ):
            return "loaded with other number formats"
        if model.is_packed and state.keys() <= original.state.keys():
            model(torch.zeros(shape))
            return "loaded and run"
        return "loaded"
    same = {
        name: torch.equal(value, original.state[name])
        for name, value in real(model.state_dict()).items()
    }
    assert all(same.values()), "a damaged file loaded to another network"
    return "loaded, identical"


def real(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that have values, with NaN made comparable."""
    return {
        name: value
        for name, value in state.items()
        if type(value) is Tensor and not value.isnan().any()
    }


def bound_memory(headroom: int) -> int:
    """Refuse this process more address space than it has now, and `headroom`."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = held + headroom
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return limit


if __name__ == "__main__":
    main()
