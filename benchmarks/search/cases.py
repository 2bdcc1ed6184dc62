"""What the benchmarks search: converted networks, and the images to search and to report on.

No image is in two of the parts. The seed chooses which images are which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, default_collate

import anyprec
from benchmarks.common.images import batches
from benchmarks.common.pretrained import efficientnet_lite0
from benchmarks.study.grid import TRACKS, Run
from benchmarks.study.methods import methods
from benchmarks.study.runs import Batches, Workspace, converted, start_network, train


@dataclass(frozen=True)
class Sources:
    """Where images are, and a folder for trained networks."""

    cifar10: Path | None = None
    imagenet: Path | None = None
    class_map: Path | None = None
    cache: Path = Path()


@dataclass(frozen=True)
class Case:
    """A converted network that is ready to be searched."""

    model: anyprec.ConvertedModel
    selection: Batches
    report: Batches


def lite0(sources: Sources, seed: int, *, size: int = 224, images: int = 64) -> Case:
    """EfficientNet-Lite0 with its ImageNet weights, calibrated only, on the ImageNet sample."""
    if sources.imagenet is None:
        msg = "lite0 needs --imagenet"
        raise SystemExit(msg)
    calibration, selection, report = imagenet_batches(
        sources, seed, size, (128, images, 500 - 128 - images)
    )
    model = anyprec.convert(efficientnet_lite0(), example_input=calibration[0][0][:1])
    anyprec.calibrate(model, calibration)
    return Case(model, selection, report)


def imagenet_batches(
    sources: Sources, seed: int, size: int, counts: tuple[int, ...]
) -> list[Batches]:
    """Disjoint parts of the sample, in batches of 32."""
    mean = (0.5, 0.5, 0.5)
    transform = create_transform(
        (3, size, size), mean=mean, std=mean, crop_pct=0.875, interpolation="bicubic"
    )
    dataset = create_dataset(
        "", root=str(sources.imagenet), class_map=str(sources.class_map), transform=transform
    )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    samples = []
    for count in counts:
        chosen, order = order[:count], order[count:]
        loader = DataLoader(
            Subset(dataset, chosen),
            batch_size=32,
            collate_fn=_stacked,
            generator=torch.Generator(),  # without one it would draw from the global generator
        )
        samples.append(list(loader))
    return samples


def _stacked(pairs: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    images, labels = default_collate(pairs)
    return images.contiguous(memory_format=torch.channels_last), labels


def one_shot(sources: Sources, seed: int, *, network: str = "mobile", images: int = 512) -> Case:
    """A small network trained one-shot on CIFAR-10: the study's, by its full method.

    It is trained once, and stored.
    """
    if sources.cifar10 is None:
        msg = "the CIFAR-10 networks need --cifar10"
        raise SystemExit(msg)
    track = TRACKS["S"]
    run = Run(track, network, methods(track.bits)["full"], 0)
    workspace = Workspace(sources.cifar10, sources.cache)
    data = workspace.images(track)
    file = sources.cache / f"search.{network}.safetensors"
    model = converted(start_network(run, workspace, data), run, data)
    if file.exists():
        model = anyprec.load(file, model)
    else:
        loader = batches(data.train, track.batch_size, training=True, seed=0)
        train(model, loader, run, file.with_suffix(".snapshot"))
        anyprec.save(model, file, rebuildable=False)
    pixels, labels = data.report
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    selection, report = order[:images], order[2_000:]
    return Case(
        model,
        list(batches((pixels[selection], labels[selection]), 128, training=False)),
        list(batches((pixels[report], labels[report]), 250, training=False)),
    )


def untrained(name: str, *, size: int = 64, images: int = 32) -> Case:
    """A timm network on noise, with random weights in every branch.

    For what a search computes, not for what it finds.
    """
    torch.manual_seed(0)
    noise = torch.randn(images, 3, size, size).contiguous(memory_format=torch.channels_last)
    held = [(noise, torch.randint(1000, (images,)))]
    network = timm.create_model(name).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # timm lets residual branches begin at zero
            nn.init.uniform_(module.weight, 0.5, 1.5)
    classifier = network.get_classifier()
    with torch.no_grad():
        network.train()(noise)
        network.eval()
        classifier.weight /= network(noise).std() / 3  # logits as far apart as a trained network's
    model = anyprec.convert(network, example_input=noise[:1])
    anyprec.calibrate(model, held)
    return Case(model, held, [])


CASES: dict[str, Callable[[Sources, int], Case]] = {
    "lite0": lite0,
    "lite0-128": lambda sources, seed: lite0(sources, seed, size=128, images=96),
    "cifar-mobile": one_shot,
    "cifar-resnet": lambda sources, seed: one_shot(sources, seed, network="resnet"),
}
