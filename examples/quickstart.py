"""The whole story on real images: one set of weights, every bit-width, any budget, one file.

A timm network is trained in floating point, converted, calibrated, trained once for all bit-widths,
searched for several budgets, saved to one file and loaded again in a new process. By default it
runs on scikit-learn's digits in a few minutes on two CPU cores; with options, on any images:

    python examples/quickstart.py
    python examples/quickstart.py --data folder/with/train/and/val \
        --model mobilenetv3_small_100 --img-size 128
    python examples/quickstart.py --data train.tar --val-data val.tar \
        --model tf_efficientnet_lite0 --img-size 64 --weights lite0.safetensors --epochs 3
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import rich
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import anyprec
from anyprec.report.plots import plot_accuracy
from anyprec.report.results import Result
from anyprec.report.tables import results_markdown, results_table
from anyprec.runtime.progress import progress_bar

CHECKED_BITS = (8, 4, (4, 8))
"""Configurations that are compared between this process and a new one."""


class Digits(Dataset[tuple[Any, int]]):
    """scikit-learn's digits (1,797 images of 8x8), as PIL images."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # noqa: PLC0415 (only this data needs it)

        data = load_digits()
        levels = (data.images * 15.9375).astype("uint8")  # from 0 to 16 in the data
        self.images = [Image.fromarray(image).convert("RGB") for image in levels]
        self.labels = data.target.tolist()
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.labels[index]


def main() -> None:
    """Run the story, or with `--check FILE` only load a file and print what it answers."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    random.seed(args.seed)  # timm's augmentation draws from it
    if args.check:
        print(answers(anyprec.load(args.check), args.img_size))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    train, search_images, held_out = load_data(args)
    results = run(args, train, search_images, held_out)
    markdown = results_markdown(results)
    (args.output / "results.md").write_text(markdown + "\n")
    plot_accuracy(results, args.output / "accuracy.png", title=f"{args.model}: one set of weights")
    print(f"wrote {args.output}/accuracy.png and {args.output}/results.md")


def run(
    args: argparse.Namespace, train: DataLoader, search_images: DataLoader, held_out: DataLoader
) -> list[Result]:
    """Train, convert, search, save and load; returns what was measured on the held-out images."""
    network = create_network(args)
    start = time.perf_counter()
    train_float(network, train, epochs=args.float_epochs, lr=args.float_lr, args=args)
    seconds = time.perf_counter() - start
    float_accuracy = accuracy(network, held_out)
    print(f"float network: {float_accuracy:.1f} % after {seconds:.0f} s of training")
    control = copy.deepcopy(network)

    model = convert(network, train, held_out, args)
    train_all_bit_widths(model, train, args)

    float_cost = anyprec.cost_of(model, None)
    results = [Result("float", "float", float_accuracy, float_cost)]
    if args.control:
        train_float(control, train, epochs=args.epochs, lr=args.float_lr / 2, args=args)
        control_accuracy = accuracy(control, held_out)
        results.append(Result("float, trained as long", "float", control_accuracy, float_cost))
    for bits in args.bits:
        value = accuracy(model, held_out, bits=bits)
        results.append(Result(f"W{bits}A{bits}", "uniform", value, anyprec.cost_of(model, bits)))
    for budget in args.budgets:
        result = search(model, search_images, budget, args)
        value = accuracy(model, held_out, bits=result.config)
        results.append(Result(f"searched {budget}", "searched", value, result.cost))
    title = f"{args.model}, one set of weights, {len(held_out.dataset)} held-out images"
    rich.print(results_table(results, title=title))

    save_and_check(model, args)
    return results


def convert(
    network: nn.Module, train: DataLoader, held_out: DataLoader, args: argparse.Namespace
) -> anyprec.ConvertedModel:
    """The network for all bit-widths, calibrated: usable at once, without training."""
    example = torch.zeros(1, 3, args.img_size, args.img_size)
    example = example.contiguous(memory_format=layout(args))
    model = anyprec.convert(network, bits=args.bits, example_input=example)
    quantized = sum(row.status == "quantized" for row in model.coverage)
    print(f"converted: {quantized} of {len(model.coverage)} layers")
    start = time.perf_counter()
    anyprec.calibrate(model, train)
    print(f"calibrated in {time.perf_counter() - start:.0f} s")
    accuracies = {bits: accuracy(model, held_out, bits=bits) for bits in args.bits}
    texts = [f"W{bits}A{bits} {value:.1f} %" for bits, value in accuracies.items()]
    print(f"calibrated only: {', '.join(texts)}")
    return model


def train_all_bit_widths(
    model: anyprec.ConvertedModel, train: DataLoader, args: argparse.Namespace
) -> None:
    """Train once for all bit-widths."""
    start = time.perf_counter()
    history = anyprec.fit(
        model, train, epochs=args.epochs, lr=args.lr, seed=args.seed, on_epoch_end=report_epoch
    )
    seconds = time.perf_counter() - start
    paths = len(history[0].losses)
    print(f"trained once for all bit-widths in {seconds:.0f} s ({paths} paths a step)")


def search(
    model: anyprec.ConvertedModel, images: DataLoader, budget: str, args: argparse.Namespace
) -> anyprec.SearchResult:
    """The best configuration for a budget; the model keeps it under the budget's name."""
    start = time.perf_counter()
    result = anyprec.search(
        model,
        images,
        budget,
        objective=args.objective,
        max_evaluations=args.max_evaluations,
    )
    print(f"search {budget}: {result} in {time.perf_counter() - start:.0f} s")
    model.configs[budget] = result.config
    return result


def save_and_check(model: anyprec.ConvertedModel, args: argparse.Namespace) -> None:
    """Write the file, and compare what a new process answers from it."""
    file = args.output / f"{args.model}.safetensors"
    # A file is loaded in the default memory layout, so that is what the answers are compared in.
    model.to(memory_format=torch.contiguous_format)
    anyprec.save(model, file)
    command = [sys.executable, __file__, "--check", str(file), "--img-size", str(args.img_size)]
    answer = subprocess.check_output(command, text=True).strip()  # noqa: S603 (our own file)
    if answer != answers(model, args.img_size):
        sys.exit(f"a new process answers differently from {file}: {answer}")
    size = file.stat().st_size / 2**20
    print(f"wrote {file} ({size:.1f} MiB); a new process gives bit-identical logits from it")


def answers(model: anyprec.ConvertedModel, img_size: int) -> str:
    """A fingerprint of the logits at each of `CHECKED_BITS`, for a fixed random batch."""
    images = torch.randn(4, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
    model.eval()
    fingerprints = {}
    for bits in CHECKED_BITS:
        with model.using_bits(bits), torch.no_grad():
            logits = model(images).numpy()
        fingerprints[str(bits)] = hashlib.sha256(logits.tobytes()).hexdigest()[:16]
    return json.dumps(fingerprints)


def accuracy(model: nn.Module, loader: DataLoader, *, bits: Any = None) -> float:
    """Top-1 in percent; `bits` is what `set_bits` takes."""
    model.eval()
    if isinstance(model, anyprec.ConvertedModel):
        with model.using_bits(bits):
            return count_correct(model, loader)
    return count_correct(model, loader)


@torch.no_grad()
def count_correct(model: nn.Module, loader: DataLoader) -> float:
    correct = total = 0
    for images, labels in loader:
        correct += int((model(images).argmax(dim=1) == labels).sum())
        total += len(labels)
    return 100 * correct / total


def train_float(
    network: nn.Module, loader: DataLoader, *, epochs: int, lr: float, args: argparse.Namespace
) -> None:
    """Plain training of the float network, with the optimizer and schedule of `anyprec.fit`."""
    if epochs == 0:
        return
    steps = len(loader) * epochs
    parameters = param_groups_weight_decay(network, args.weight_decay)
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    network.train()
    with progress_bar("float training", steps, show=True) as bar:
        for _ in range(epochs):
            for images, labels in loader:
                loss = nn.functional.cross_entropy(network(images), labels)
                loss.backward()
                nn.utils.clip_grad_value_(network.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.advance(note=f"loss {float(loss.detach()):.3f}")
    network.eval()


def report_epoch(record: anyprec.EpochRecord) -> None:
    """One line per epoch: the loss of each path."""
    losses = ", ".join(f"{loss:.3f}" for loss in record.losses)
    speed = f"{record.images_per_second:.0f} images/s"
    print(f"  epoch {record.epoch + 1}: losses {losses} (max path first), {speed}")


def create_network(args: argparse.Namespace) -> nn.Module:
    """The float network, with weights from `--weights` or `--pretrained` if asked for."""
    options: dict[str, Any] = {"num_classes": args.num_classes, **args.model_args}
    if args.weights is not None:
        options["pretrained_cfg_overlay"] = {"file": str(args.weights)}
    pretrained = args.pretrained or args.weights is not None
    network = timm.create_model(args.model, pretrained=pretrained, **options)
    if pretrained and isinstance(network.get_classifier(), nn.Linear):
        # On trained features a new classifier starts at zero: random logits are unlearned first.
        nn.init.zeros_(network.get_classifier().weight)
    return network.to(memory_format=layout(args))


def layout(args: argparse.Namespace) -> torch.memory_format:
    """channels_last is several times faster for dense convolutions on a CPU."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def load_data(args: argparse.Namespace) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Training images, images that the search may look at, and held-out images."""
    train_set, eval_set, held_out_set = open_datasets(args)
    order = shuffled(len(train_set))
    search_part, rest = order[: args.search_images], order[args.search_images :]
    if held_out_set is None:
        quarter = len(rest) // 4
        held_out_set, rest = Subset(eval_set, rest[:quarter]), rest[quarter:]
    held_out_part = shuffled(len(held_out_set))[: args.held_out_images]
    return (
        make_loader(train_set, rest[: args.train_images], args, training=True),
        make_loader(eval_set, search_part, args, training=False),
        make_loader(held_out_set, held_out_part, args, training=False),
    )


def open_datasets(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The training images twice, with and without augmentation, and held-out images or None.

    Held out is `--val-data`, else the validation split of a named or split dataset, else None.
    """
    if args.data == "digits":
        return Digits(), Digits(), None
    name, root, download = "", Path(args.data), {}
    if not root.exists():
        name, root, download = args.data, args.output / "data", {"download": True}
    train_set = create_dataset(name, root=root, split="train", is_training=True, **download)
    eval_set = create_dataset(name, root=root, split="train", **download)
    if args.val_data is not None:
        return train_set, eval_set, create_dataset("", root=args.val_data)
    if name or (root / "val").is_dir() or (root / "validation").is_dir():
        held_out_set = create_dataset(name, root=root, split="validation", **download)
        return train_set, eval_set, held_out_set
    return train_set, eval_set, None


def shuffled(count: int) -> list[int]:
    """The same order in every run, so that a resumed experiment holds out the same images."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


def make_loader(
    dataset: Any, part: list[int], args: argparse.Namespace, *, training: bool
) -> DataLoader:
    """Batches of a part of `dataset`, through timm's transforms."""
    augmentation: dict[str, Any] = {}
    if training:
        # Mild cropping, since digits and CIFAR are no photographs, and no flip of digits, which
        # would change the label.
        flips = 0.0 if args.data == "digits" else 0.5
        augmentation = {"scale": (0.7, 1.0), "ratio": (0.9, 1.1), "hflip": flips}
    base = dataset
    while isinstance(base, Subset):
        base = base.dataset
    base.transform = create_transform(
        (3, args.img_size, args.img_size),
        is_training=training,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        crop_pct=1.0,
        color_jitter=None,
        **augmentation,
    )
    return DataLoader(
        Subset(dataset, part),
        batch_size=args.batch_size,
        shuffle=training,
        drop_last=training,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        collate_fn=functools.partial(collate, memory_format=layout(args)),
        generator=torch.Generator().manual_seed(args.seed) if training else None,
    )


def collate(
    pairs: list[tuple[Tensor, int]], memory_format: torch.memory_format
) -> tuple[Tensor, Tensor]:
    images = torch.stack([image for image, _ in pairs]).contiguous(memory_format=memory_format)
    return images, torch.tensor([label for _, label in pairs])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits, a timm dataset, a folder or a tar of images")
    add("--val-data", help="held-out images, if --data has no validation split of its own")
    add("--search-images", type=int, default=256)
    add("--train-images", type=int, help="at most so many training images")
    add("--held-out-images", type=int, help="report on at most so many held-out images")
    add("--img-size", type=int, default=32)
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=0)
    add("--model", default="resnet10t", help="any timm model")
    add("--model-args", type=json.loads, default={}, help="JSON arguments of timm.create_model")
    add("--weights", type=Path, help="file of float weights for the model")
    add("--pretrained", action="store_true", help="start from timm's pretrained weights")
    add("--num-classes", type=int, default=10)
    add("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    add("--epochs", type=int, default=6, help="epochs of one-shot training")
    add("--lr", type=float, default=0.02, help="learning rate of one-shot training")
    add("--float-epochs", type=int, default=6, help="epochs of float training before")
    add("--float-lr", type=float, default=0.05)
    add("--weight-decay", type=float, default=2.5e-5)
    add("--control", action="store_true", help="also train the float network for as long")
    add("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 8])
    add("--budgets", nargs="+", default=["W4A4", "W3A3", "20% of W8A8"])
    add("--objective", default="loss", choices=["loss", "divergence"])
    add("--max-evaluations", type=int, default=None, help="of each search")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("quickstart-output"))
    add("--check", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
