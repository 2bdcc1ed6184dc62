"""Top-1 of EfficientNet-Lite0 at all precisions, calibrated and reconstructed on unlabelled images.

    python -m benchmarks.calibration --data FOLDER [--splits 0 1 2] [--steps 300] [--size 224]

`FOLDER` holds a sample of ImageNet: `val.tar` and `synsets.txt`, the class of each label in its
line. For each split, one half of the images calibrates and reconstructs, and the other half is
reported on. Mixed configurations are drawn at random within a bit of 4. Adds a line of JSON for
each split to `benchmarks/results/calibration.jsonl`; `python -m benchmarks.calibration.page`
renders them in docs/calibration.md.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_transform
from torch import Tensor
from torch.utils.data import default_collate

import anyprec
from benchmarks.calibration import page
from benchmarks.common import records
from benchmarks.common.pretrained import efficientnet_lite0

UNIFORM: tuple[Any, ...] = (8, 6, 5, 4, 3, 2, (4, 8), (3, 8))
MIXES = 4
BATCH = 25


def main() -> None:
    """Measure each split."""
    options = make_parser().parse_args()
    images, labels = read_sample(options.data, options.size)
    for split in options.splits:
        record = measure(images, labels, split, options)
        print(page.line_of(record), flush=True)
        if not options.dry_run:
            records.append(options.results, record)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--splits", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--norm", default="shared-affine", help="as convert has it")
    parser.add_argument("--results", type=Path, default=page.RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    return parser


def read_sample(folder: Path, size: int) -> tuple[Tensor, Tensor]:
    """All images of the sample, normalised for EfficientNet-Lite, and their labels."""
    transform = create_transform(
        (3, size, size), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875
    )
    dataset = create_dataset(
        "",
        root=str(folder / "val.tar"),
        class_map=str(folder / "synsets.txt"),
        transform=transform,
    )
    images, labels = default_collate([dataset[number] for number in range(len(dataset))])
    return images.contiguous(memory_format=torch.channels_last), labels


def measure(
    images: Tensor, labels: Tensor, split: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Top-1 of one split, before and after reconstruction."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(split))
    used, held = order.chunk(2)
    network = efficientnet_lite0().eval().to(memory_format=torch.channels_last)
    model = anyprec.convert(network, example_input=images[:1], norm=options.norm)
    loader = list(images[used].split(BATCH))
    configs: list[Any] = [None, *UNIFORM, *mixes_of(model, split)]
    start = time.perf_counter()
    anyprec.calibrate(model, loader, batches=10, norm_batches=5)
    calibrated_in = time.perf_counter() - start
    calibrated = accuracies(model, configs, images[held], labels[held])
    start = time.perf_counter()
    anyprec.reconstruct(model, loader, steps=options.steps, seed=split)
    reconstructed_in = time.perf_counter() - start
    reconstructed = accuracies(model, configs, images[held], labels[held])
    return {
        "kind": "lite0",
        "split": split,
        "steps": options.steps,
        "size": options.size,
        "norm": options.norm,
        "images": len(used),
        "calibrated": calibrated,
        "reconstructed": reconstructed,
        "seconds": [calibrated_in, reconstructed_in],
        "commit": records.commit(),
        "machine": records.machine(),
    }


def mixes_of(model: anyprec.ConvertedModel, seed: int) -> list[anyprec.BitConfig]:
    """Configurations of 3, 4 and 5 bits, drawn for each layer and operand."""
    generator = random.Random(seed)
    configs = []
    for _ in range(MIXES):
        chosen = {}
        for path, layer in model.candidates.items():
            wanted = anyprec.Bits(*(generator.choice((3, 4, 5)) for _ in range(2)))
            chosen[path] = layer.at_least(wanted)
        configs.append(anyprec.BitConfig(chosen))
    return configs


@torch.no_grad()
def accuracies(
    model: anyprec.ConvertedModel, configs: Iterable[Any], images: Tensor, labels: Tensor
) -> list[float]:
    """Top-1 in percent at each configuration."""
    model.eval()
    found = []
    for config in configs:
        with model.using_bits(config):
            logits = torch.cat([model(batch) for batch in images.split(BATCH)])
        found.append(100 * float((logits.argmax(dim=1) == labels).float().mean()))
    return found


if __name__ == "__main__":
    main()
