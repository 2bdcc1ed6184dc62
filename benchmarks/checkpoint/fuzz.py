"""Thousands of damaged and forged checkpoints, each loaded in a process of bounded memory.

    python -m benchmarks.checkpoint.fuzz --files 12000

*Damaged* files have bits flipped, bytes cut off, doubled or zeroed, headers edited, or sizes
declared huge, with the digests as they were. Each must load to the very same network or raise
`CheckpointError`.

*Forged* files have another document or other tensors, and digests that fit, as somebody would make
them who wants to do harm. Each must load to some network that runs, or raise `CheckpointError`.

Any other exception ends the run. So does memory over the limit, which the system enforces
(`RLIMIT_AS`): Python then raises `MemoryError`, which is no `CheckpointError`.

The seed of each file is its number, so `--first N --files 1` repeats one. The attacks themselves
are in `attacks.py`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import anyprec
from anyprec.runtime.storage import read_file, write_file
from benchmarks.checkpoint.attacks import DAMAGES, FORGERIES

MIB = 2**20
HEADROOM = 1536 * MIB
"""Bytes that the process may take beyond what it holds before the first file: room for torch."""


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        originals = make_originals(Path(folder))
        # Whatever loading imports or caches is there before the limit is set.
        for original in originals:
            judge(original, Path(folder) / original.name, forged=False)
        limit = bound_memory(HEADROOM)
        start, counts = time.perf_counter(), collections.Counter()
        for number in range(args.first, args.first + args.files):
            counts.update(try_one(number, originals, Path(folder) / "mutant"))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.perf_counter() - start
    print(
        f"{args.files} files in {seconds:.0f} s; limit {limit / MIB:.0f} MiB of address space, "
        f"peak {peak / MIB:.0f} MiB resident"
    )
    for outcome, count in sorted(counts.items()):
        print(f"{count:7d} {outcome}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=12_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    return parser.parse_args()


# --- What is attacked ---


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
    """A sound file: its bytes, tensors and document, and the state of the network that it holds."""

    def __init__(self, file: Path, *, model_given: bool) -> None:
        self.name = file.name
        self.content = file.read_bytes()
        self.tensors, document = read_file(file)
        self.document = json.loads(document)
        self.model_given = model_given
        state = self.load(file).state_dict()
        self.state = {name: tensor.clone() for name, tensor in state.items()}

    def load(self, file: Path) -> anyprec.ConvertedModel:
        """Load a file as this one is loaded: into a given network, or one that timm rebuilds."""
        return anyprec.load(file, network() if self.model_given else None)


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


# --- Judgement ---


def try_one(number: int, originals: list[Original], file: Path) -> list[str]:
    """Make the file of this number and load it; what was done, and what came of it."""
    draw = random.Random(number)
    original = originals[number % len(originals)]
    forged = draw.random() < 0.5
    attack = draw.choice(FORGERIES if forged else DAMAGES)
    if forged:
        write_forgery(original, attack, draw, file)
    else:
        file.write_bytes(attack(bytearray(original.content), draw))
    category = "forged" if forged else "damaged"
    try:
        outcome = judge(original, file, forged=forged)
    except Exception as error:
        repeat = f"repeat with --first {number} --files 1"
        error.add_note(f"file {number}: {original.name}, {attack.__name__}; {repeat}")
        raise
    return [f"{category}, {outcome}", f"{category} by {attack.__name__}"]


def write_forgery(original: Original, attack: Any, draw: random.Random, file: Path) -> None:
    """Change document and tensors once or twice, and write them with digests that fit."""
    document, tensors = json.loads(json.dumps(original.document)), dict(original.tensors)
    for _ in range(draw.randint(1, 2)):
        attack(document, tensors, draw)
    try:
        write_file(file, tensors, json.dumps(document))
    except anyprec.CheckpointError:
        # What anyprec refuses to write is written past its checks.
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(copies, file, metadata={"anyprec": "{}"})


@torch.no_grad()
def judge(original: Original, file: Path, *, forged: bool) -> str:
    """Load a file, and check what is promised of it.

    Raises:
        AssertionError: A damaged file loaded to another network.
    """
    with contextlib.suppress(anyprec.CheckpointError):
        anyprec.inspect(file)
    try:
        model = original.load(file)
    except anyprec.CheckpointError:
        return "refused"
    if forged:
        return run_forgery(original, model)
    for name, value in comparable(model.state_dict()).items():
        same = torch.equal(value, original.state[name])
        assert same, "a damaged file loaded to another network"
    return "loaded, identical"


def run_forgery(original: Original, model: anyprec.ConvertedModel) -> str:
    """Run a forged network, where its tensors still fit one another; what came of it."""
    state = comparable(model.state_dict())
    for name in state.keys() & original.state.keys():
        if state[name].dtype != original.state[name].dtype:
            return "loaded with other number formats"
    if model.is_packed and state.keys() <= original.state.keys():
        model(torch.zeros(original.document["example_shape"]))
        return "loaded and run"
    return "loaded"


def comparable(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that have values, and no NaN, which equals nothing."""
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
