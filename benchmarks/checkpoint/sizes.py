"""What a checkpoint weighs in each form, how long it loads, and what a switch of precision costs.

    python -m benchmarks.checkpoint.sizes --output benchmarks/results/checkpoint_sizes
    python -m benchmarks.checkpoint.sizes --data val.tar --class-map synsets.txt

EfficientNet-Lite0 has its ImageNet weights (see `common/pretrained.py`), the others those that timm
draws: no model hub is asked. Every file is really written: "separate" are files of one bit-width
each, made by `load(file, bits=b)` and `save`. Before anything is measured, the packed network's
logits are compared with the saved one's at every uniform bit-width. With `--data` the networks are
calibrated on real images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from safetensors.torch import load_file, save_model
from timm.data import create_dataset, create_transform
from torch import Tensor, nn

import anyprec
from anyprec.checkpoint.packed_tensors import PREFIX
from anyprec.runtime.storage import opened
from benchmarks.common.pretrained import efficientnet_lite0

NETWORKS = ("resnet18", "mobilenetv2_100", "tf_efficientnet_lite0", "vit_small_patch16_224")
SWITCHES = 15


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = calibration_images(args)
    rows = []
    for name in args.networks:
        norms = ("per-pair", "shared") if has_batch_norm(name) else ("per-pair",)
        for norm in norms:
            rows.append(measure(name, norm, tuple(args.bits), images))
            print(json.dumps(rows[-1]), flush=True)
    text = "\n\n".join((size_table(rows), time_table(rows))) + "\n"
    print(text)
    if args.output:
        Path(f"{args.output}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        Path(f"{args.output}.md").write_text(text)


def measure(name: str, norm: Any, bits: tuple[int, ...], images: Tensor) -> dict[str, Any]:
    """Everything about one network, as a row of the results."""
    network = make(name)
    image = images[:1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(network, str(folder / "float"))
        model = anyprec.convert(network, bits=bits, norm=norm)
        anyprec.calibrate(model, images.split(16))
        write_forms(model, folder, bits)
        zstd = anyprec.load(folder / "zstd")
        latent = anyprec.load(folder / "training")
        packed_forms = ("fixed", "zstd", *map(alone, bits))
        return {
            "network": name,
            "norm": norm,
            "bits": bits,
            "threads": torch.get_num_threads(),
            "weights": anyprec.cost_of(model, None).model.weights,
            "identical": same_logits(model, zstd, bits, image),
            "bytes": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
            "cell_bytes": {form: cell_bytes(folder / form) for form in packed_forms},
            "load_seconds": load_times(name, folder),
            **switching(anyprec.load(folder / "zstd"), image),
            "latent_first_over_normal": switching(latent, image)["first_over_normal"],
        }


def write_forms(model: anyprec.ConvertedModel, folder: Path, bits: tuple[int, ...]) -> None:
    """Write the network in each form, and one file for each bit-width alone."""
    anyprec.save(model, folder / "training")
    anyprec.save(model, folder / "fixed", packed=True, coding="fixed")
    anyprec.save(model, folder / "zstd", packed=True)
    for width in bits:
        single = anyprec.load(folder / "fixed", bits=width)
        anyprec.save(single, folder / alone(width), packed=True, coding="fixed")


def alone(width: int) -> str:
    """Name of the file that holds this bit-width alone."""
    return f"only {width}"


def make(name: str) -> nn.Module:
    """A float network in eval mode."""
    if name == "tf_efficientnet_lite0":
        return efficientnet_lite0().eval()
    return timm.create_model(name).eval()


def has_batch_norm(name: str) -> bool:
    """Whether copies of norms make a difference."""
    with torch.device("meta"):
        modules = timm.create_model(name).modules()
    return any(isinstance(module, nn.BatchNorm2d) for module in modules)


@torch.no_grad()
def same_logits(saved: Any, loaded: Any, bits: tuple[int, ...], image: Tensor) -> bool:
    """Whether two networks give the same output at every uniform bit-width."""
    same = True
    for width in bits:
        saved.set_bits(width)
        loaded.set_bits(width)
        same &= torch.equal(saved(image), loaded(image))
    return same


def cell_bytes(path: Path) -> int:
    """Bytes of the integer codes of all weights."""
    total = 0
    with opened(path) as file:
        for name, (_, shape) in file.shapes.items():
            if name.startswith(PREFIX) and name.endswith((".cells", ".low")):
                total += shape[0]
    return total


def load_times(name: str, folder: Path) -> dict[str, float]:
    """Seconds, the best of three each; the files are in the system's cache."""

    def load_float() -> None:
        timm.create_model(name).load_state_dict(load_file(folder / "float"), strict=False)

    loaders: dict[str, Callable[[], Any]] = {
        "float": load_float,
        "training": partial(anyprec.load, folder / "training"),
        "fixed": partial(anyprec.load, folder / "fixed"),
        "zstd": partial(anyprec.load, folder / "zstd"),
        "zstd, bits=4": partial(anyprec.load, folder / "zstd", bits=4),
    }
    times = {}
    for form, load in loaders.items():
        best = min(seconds(load) for _ in range(3))
        times[form] = round(best, 3)
    return times


@torch.no_grad()
def switching(model: Any, image: Tensor) -> dict[str, Any]:
    """Time of `set_bits`, and of the first and second forward pass after it.

    Medians, at batch size 1.
    """
    memory = bytes_in_memory(model)
    for width in (4, 6):
        model.set_bits(width)
        model(image)
    switch, first, normal = [], [], []
    for number in range(SWITCHES):
        # A latent network caches the weights of the bit-widths that it ran at. Each switch here is
        # to be a first one.
        for layer in model.quantized_layers.values():
            layer.weight_source.forget()
        switch.append(seconds(partial(model.set_bits, (4, 6)[number % 2])))
        first.append(seconds(partial(model, image)))
        normal.append(seconds(partial(model, image)))
    first_time, normal_time = statistics.median(first), statistics.median(normal)
    return {
        "set_bits_ms": round(1e3 * statistics.median(switch), 3),
        "first_ms": round(1e3 * first_time, 2),
        "normal_ms": round(1e3 * normal_time, 2),
        "first_over_normal": round(first_time / normal_time, 3),
        "held_bytes": memory,
    }


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes of parameters and buffers that have memory."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    # A packed network has placeholders without memory where the latent weights were.
    real = [tensor for tensor in tensors.values() if type(tensor) in {Tensor, nn.Parameter}]
    return sum(tensor.numel() * tensor.element_size() for tensor in real)


def seconds(action: Callable[[], Any]) -> float:
    """Time that a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def size_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: sizes in MB."""
    lines = []
    for row in rows:
        size, cells = row["bytes"], row["cell_bytes"]
        line = {"network": row["network"], "norm copies": row["norm"]}
        sizes = {
            "FP32": size["float"],
            "training form": size["training"],
            "packed, fixed": size["fixed"],
            "packed, zstd": size["zstd"],
            "largest alone": size[alone(max(row["bits"]))],
            "separate": sum(size[alone(width)] for width in row["bits"]),
            "cells, fixed": cells["fixed"],
            "cells, zstd": cells["zstd"],
        }
        for label, number in sizes.items():
            line[label] = f"{number / 1e6:.2f}"
        line["bits per weight, zstd"] = f"{8 * cells['zstd'] / row['weights']:.2f}"
        lines.append(line)
    return markdown(lines)


def time_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: times of loading, of switching and of the first forward pass after it."""
    lines = []
    for row in rows:
        line = {"network": row["network"], "norm copies": row["norm"]}
        for form, time_ in row["load_seconds"].items():
            line[f"load {form}"] = f"{time_:.2f} s"
        line["`set_bits`"] = f"{row['set_bits_ms']:.2f} ms"
        line["normal forward"] = f"{row['normal_ms']:.0f} ms"
        first, ratio = row["first_ms"], row["first_over_normal"]
        line["first forward after a switch"] = f"{first:.0f} ms ({ratio:.2f}x)"
        line["in memory"] = f"{row['held_bytes'] / 1e6:.1f} MB"
        lines.append(line)
    return markdown(lines)


def markdown(lines: list[dict[str, str]]) -> str:
    """A table of texts; all columns but the first two are aligned to the right."""
    aligned = ["left", "left", *["right"] * (len(lines[0]) - 2)]
    table = pd.DataFrame(lines)
    return table.to_markdown(index=False, disable_numparse=True, colalign=aligned)


def calibration_images(args: argparse.Namespace) -> Tensor:
    """Images of the data set, spread evenly over it; random ones without a data set."""
    if args.data is None:
        return torch.randn(args.images, 3, 224, 224)
    dataset = create_dataset("", root=args.data, class_map=args.class_map)
    dataset.transform = create_transform((3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
    indices = [number * len(dataset) // args.images for number in range(args.images)]
    return torch.stack([dataset[index][0] for index in indices])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--bits", nargs="+", type=int, default=(2, 3, 4, 5, 6, 8))
    parser.add_argument("--images", type=int, default=32, help="for calibration")
    parser.add_argument("--data", help="a folder or tar of images; without it, random ones")
    parser.add_argument("--class-map", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", help="writes OUTPUT.jsonl and OUTPUT.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
