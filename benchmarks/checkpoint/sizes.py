"""What a checkpoint weighs in each form, how long loading takes, and what a switch of precision costs.

    python -m benchmarks.checkpoint.sizes --output benchmarks/results/checkpoint_sizes
    python -m benchmarks.checkpoint.sizes --data val.tar --class-map synsets.txt   # calibrate on real images

EfficientNet-Lite0 has its ImageNet weights (see `common/pretrained.py`), the others those that timm draws: no model hub
is asked. Every file is really written: "separate" are files of one bit-width each, made by `load(path, bits=b)` and `save`.
Before anything is measured, the packed network's logits are compared with the saved one's at every uniform bit-width.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        for norm in ("per-pair", "shared") if has_batch_norm(name) else ("per-pair",):
            rows.append(measure(name, norm, tuple(args.bits), images))
            print(json.dumps(rows[-1]), flush=True)
    text = "\n\n".join((size_table(rows), time_table(rows))) + "\n"
    print(text)
    if args.output:
        Path(f"{args.output}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        Path(f"{args.output}.md").write_text(text)


def measure(name: str, norm: Any, bits: tuple[int, ...], images: Tensor) -> dict[str, Any]:
    network = make(name)
    image = images[:1]
    row: dict[str, Any] = {
        "network": name,
        "norm": norm,
        "bits": bits,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_model(network, str(place / "float"))
        model = anyprec.convert(network, bits=bits, norm=norm)
        anyprec.calibrate(model, images.split(16))
        anyprec.save(model, place / "training")
        anyprec.save(model, place / "fixed", packed=True, coding="fixed")
        anyprec.save(model, place / "zstd", packed=True)
        row["weights"] = anyprec.cost_of(model, None).model.weights
        row["identical"] = same_logits(model, anyprec.load(place / "zstd"), bits, image)
        for width in bits:
            single = anyprec.load(place / "fixed", bits=width)
            anyprec.save(single, place / f"only {width}", packed=True, coding="fixed")
        row["bytes"] = {file.name: file.stat().st_size for file in sorted(place.iterdir())}
        row["cell_bytes"] = {
            form: cell_bytes(place / form)
            for form in ("fixed", "zstd", *(f"only {b}" for b in bits))
        }
        row["load_seconds"] = load_times(name, place)
        row.update(switching(anyprec.load(place / "zstd"), image))
        row["latent_first_over_normal"] = switching(anyprec.load(place / "training"), image)[
            "first_over_normal"
        ]
    return row


def make(name: str) -> nn.Module:
    return (
        efficientnet_lite0() if name == "tf_efficientnet_lite0" else timm.create_model(name)
    ).eval()


def has_batch_norm(name: str) -> bool:
    with torch.device("meta"):
        return any(
            isinstance(module, nn.BatchNorm2d) for module in timm.create_model(name).modules()
        )


@torch.no_grad()
def same_logits(saved: Any, loaded: Any, bits: tuple[int, ...], image: Tensor) -> bool:
    same = True
    for width in bits:
        saved.set_bits(width)
        loaded.set_bits(width)
        same &= torch.equal(saved(image), loaded(image))
    return same


def cell_bytes(path: Path) -> int:
    """Bytes of the integer codes of all weights."""
    with opened(path) as file:
        return sum(
            shape[0]
            for name, (_, shape) in file.shapes.items()
            if name.startswith(PREFIX) and name.endswith((".cells", ".low"))
        )


def load_times(name: str, place: Path) -> dict[str, float]:
    """Seconds, the best of three each; the files are in the system's cache."""

    def load_float() -> None:
        timm.create_model(name).load_state_dict(load_file(place / "float"), strict=False)

    loaders: dict[str, Callable[[], Any]] = {"float": load_float}
    for form in ("training", "fixed", "zstd"):
        loaders[form] = lambda form=form: anyprec.load(place / form)
    loaders["zstd, bits=4"] = lambda: anyprec.load(place / "zstd", bits=4)
    return {form: round(min(seconds(load) for _ in range(3)), 3) for form, load in loaders.items()}


@torch.no_grad()
def switching(model: Any, image: Tensor) -> dict[str, Any]:
    """Time of `set_bits`, and of the first and second forward pass after it, at batch size 1; medians."""
    memory = held(model)
    for width in (4, 6):
        model.set_bits(width)
        model(image)
    switch, first, normal = [], [], []
    for number in range(SWITCHES):
        # A latent network keeps the weights of every bit-width that it ran at; here each switch is to be a first one.
        for layer in model.quantized_layers.values():
            layer.forget_weights()
        switch.append(seconds(lambda number=number: model.set_bits((4, 6)[number % 2])))
        first.append(seconds(lambda: model(image)))
        normal.append(seconds(lambda: model(image)))
    return {
        "set_bits_ms": round(1e3 * statistics.median(switch), 3),
        "first_ms": round(1e3 * statistics.median(first), 2),
        "normal_ms": round(1e3 * statistics.median(normal), 2),
        "first_over_normal": round(statistics.median(first) / statistics.median(normal), 3),
        "held_bytes": memory,
    }


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers that have memory."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    real = [tensor for tensor in tensors.values() if type(tensor) in {Tensor, nn.Parameter}]
    return sum(tensor.numel() * tensor.element_size() for tensor in real)


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def size_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| network | norm copies | FP32 | training form | packed, fixed | packed, zstd | largest alone | separate | "
        "cells, fixed | cells, zstd | bits per weight, zstd |",
        "| --- | --- " + "| ---: " * 9 + "|",
    ]
    for row in rows:
        size, cells = row["bytes"], row["cell_bytes"]
        separate = sum(size[f"only {width}"] for width in row["bits"])
        whole = [
            size["float"],
            size["training"],
            size["fixed"],
            size["zstd"],
            size[f"only {max(row['bits'])}"],
            separate,
        ]
        numbers = " | ".join(
            f"{number / 1e6:.2f}" for number in (*whole, cells["fixed"], cells["zstd"])
        )
        lines.append(
            f"| {row['network']} | {row['norm']} | {numbers} | {8 * cells['zstd'] / row['weights']:.2f} |"
        )
    return "\n".join(lines)


def time_table(rows: list[dict[str, Any]]) -> str:
    loads = list(rows[0]["load_seconds"])
    lines = [
        f"| network | norm copies | {' | '.join(f'load {form}' for form in loads)} | `set_bits` | normal forward | "
        "first forward after a switch | in memory |",
        "| --- | --- " + "| ---: " * (len(loads) + 4) + "|",
    ]
    for row in rows:
        times = " | ".join(f"{row['load_seconds'][form]:.2f} s" for form in loads)
        lines.append(
            f"| {row['network']} | {row['norm']} | {times} | {row['set_bits_ms']:.2f} ms | {row['normal_ms']:.0f} ms | "
            f"{row['first_ms']:.0f} ms ({row['first_over_normal']:.2f}x) | {row['held_bytes'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def calibration_images(args: argparse.Namespace) -> Tensor:
    if args.data is None:
        return torch.randn(args.images, 3, 224, 224)
    dataset = create_dataset("", root=args.data, class_map=args.class_map)
    dataset.transform = create_transform((3, 224, 224), mean=(0.5,) * 3, std=(0.5,) * 3)
    return torch.stack(
        [dataset[index * len(dataset) // args.images][0] for index in range(args.images)]
    )


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
