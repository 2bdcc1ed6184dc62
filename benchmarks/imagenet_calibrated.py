"""Calibration alone, without training: EfficientNet-Lite0 with its real ImageNet weights on an ImageNet sample.

    python benchmarks/imagenet_calibrated.py --data val.tar --class-map synsets.txt

The images are split into three disjoint parts: calibration (no labels used), search (no labels used), and report.
Prints a table of uniform and searched configurations; `docs/results.md` holds a copy.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from pretrained import efficientnet_lite0
from timm.data import create_dataset, create_transform
from torch import Tensor, nn

import anyprec
from anyprec.report.results import Result
from anyprec.report.tables import results_markdown


def main() -> None:
    """Calibrate, search, and print the table."""
    args = parse_arguments()
    calibration, selection, report = load_batches(args)
    model = efficientnet_lite0().eval().to(memory_format=torch.channels_last)
    float_accuracy = accuracy(model, report)
    example = torch.zeros(1, 3, args.img_size, args.img_size).contiguous(memory_format=torch.channels_last)
    converted = anyprec.convert(model, example_input=example)
    start = time.perf_counter()
    anyprec.calibrate(converted, calibration)
    print(f"calibrated in {time.perf_counter() - start:.0f} s", flush=True)
    results = [Result("float", "float", float_accuracy, anyprec.cost_of(converted, None))]
    for bits in args.bits:
        with converted.using_bits(bits):
            name = f"W{bits}A{bits}"
            results.append(Result(name, "uniform", accuracy(converted, report), anyprec.cost_of(converted)))
        print(f"{name}: {results[-1].accuracy:.1f} %", flush=True)
    for budget in args.budgets:
        start = time.perf_counter()
        found = anyprec.search(
            converted, selection, budget, objective="divergence", max_evaluations=args.max_evaluations
        )
        with converted.using_bits(found.config):
            results.append(Result(f"searched {budget}", "searched", accuracy(converted, report), found.cost))
        print(f"{found}: {results[-1].accuracy:.1f} % in {time.perf_counter() - start:.0f} s", flush=True)
    print(results_markdown(results))


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Top-1 in percent."""
    model.eval()
    correct = sum(int((model(images).argmax(dim=1) == labels).sum()) for images, labels in batches)
    return 100 * correct / sum(len(labels) for _, labels in batches)


def load_batches(args: argparse.Namespace) -> tuple[list[Any], list[Any], list[Any]]:
    """Batches for calibration, search and report, from disjoint images."""
    dataset = create_dataset("", root=args.data, class_map=args.class_map)
    size = (3, args.img_size, args.img_size)
    mean = (0.5, 0.5, 0.5)
    dataset.transform = create_transform(size, mean=mean, std=mean, crop_pct=0.875, interpolation="bicubic")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed)).tolist()
    parts = []
    for count in (args.calibration_images, args.search_images, args.report_images):
        chosen, order = order[:count], order[count:]
        pairs = [dataset[index] for index in chosen]
        parts.append([stack(pairs[at : at + args.batch_size]) for at in range(0, len(pairs), args.batch_size)])
    return parts[0], parts[1], parts[2]


def stack(pairs: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """A batch of images and labels."""
    images = torch.stack([image for image, _ in pairs]).contiguous(memory_format=torch.channels_last)
    return images, torch.tensor([label for _, label in pairs])


def parse_arguments() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="tar or folder of ImageNet images")
    parser.add_argument("--class-map", help="file that lists the class folders in label order")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4])
    parser.add_argument("--budgets", nargs="*", default=["W6A6", "W5A5"])
    parser.add_argument("--calibration-images", type=int, default=128)
    parser.add_argument("--search-images", type=int, default=64)
    parser.add_argument("--report-images", type=int, default=300)
    parser.add_argument("--max-evaluations", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
