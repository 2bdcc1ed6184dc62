"""Every option of one-shot training, run once on real images: does each train, what does it cost, where does it end?

    python benchmarks/training_options.py run --data ../shared/data/cifar10 [NAME ...]
    python benchmarks/training_options.py table

One float network is trained first, and every option starts from it: the same images, steps and seed. A finished run is one
line of JSON in `--results`, and is not run again. One seed: differences of a point or two are noise; what each part is
worth is for a study with several.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from images import Images, accuracy, batches, load
from records import ROOT, append, read
from timm.data import Mixup
from torch import nn

import anyprec

WIDTHS = (8, 6, 4, 3, 2)
SCHEDULER = anyprec.BitWidthScheduler()
FULL = {"scheduler": SCHEDULER, "feature_weight": 0.01, "error_weight": 0.1}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scheduler": {"recipe": {"scheduler": SCHEDULER}},
    "scheduler, activations too": {"recipe": {"scheduler": anyprec.BitWidthScheduler(activations=True)}},
    "distortion mitigation": {"recipe": {"feature_weight": 0.01}},
    "quantization error": {"recipe": {"error_weight": 0.1}},
    "full method": {"recipe": FULL},
    "full method, spared decay": {"recipe": {**FULL, "spare_decay": True}},
    "paper": {"paper": True},
    "one random path": {"recipe": {"random_paths": 1}},
    "uniform sampler": {"recipe": {"sampler": "uniform"}},
    "instability sampler": {"recipe": {"sampler": "instability"}},
    "norm per pair": {"convert": {"norm": "per-pair"}},
    "norm per width": {"convert": {"norm": "per-width"}},
    "shared norm": {"convert": {"norm": "shared"}},
    "weights per tensor": {"convert": {"per_channel": False}},
    "no distillation": {"recipe": {"distillation": 0.0}},
    "teacher": {"teacher": True},
    "moving average": {"recipe": {"ema_decay": 0.99}},
    "bfloat16": {"fit": {"autocast": torch.bfloat16}},
    "compiled": {"fit": {"compiled": True}},
    "mixup": {"mixup": True},
    "accumulation": {"fit": {"accumulation": 2}},
    "norm of gradients clipped": {"recipe": {"clip_value": None, "clip_norm": 1.0}},
}


def run(args: argparse.Namespace) -> None:
    """Train what has no result yet."""
    torch.manual_seed(0)
    train = load(args.data / "train.tar", args.images)
    held_out = list(batches(load(args.data / "val.tar", args.held_out), 250, training=False))
    network = float_network(args, train)
    top1 = accuracy(network, held_out)
    print(f"float: {top1:.1f}", flush=True)
    done = {record["name"] for record in read(args.results)}
    for name in args.names or OPTIONS:
        if name not in done:
            record = {
                "name": name,
                "float": top1,
                "seed": args.seed,
                **train_option(name, args, network, train, held_out),
            }
            append(args.results, record)
            print(json.dumps(record), flush=True)


def train_option(
    name: str, args: argparse.Namespace, network: nn.Module, train: Images, held_out: Any
) -> dict[str, Any]:
    """Train one option from the float network, and measure it at every uniform bit-width."""
    option = OPTIONS[name]
    recipe = anyprec.paper().changed(step_lr=1e-4) if option.get("paper") else anyprec.Recipe()
    recipe = recipe.changed(lr=args.lr, **option.get("recipe", {}))
    conversion = {**recipe.conversion, **option.get("convert", {})}
    example = torch.zeros(1, *train[0].shape[1:])
    model = anyprec.convert(copy.deepcopy(network), example_input=example, **conversion)
    loader = batches(train, args.batch_size, training=True, seed=args.seed)
    anyprec.calibrate(model, loader)
    more: dict[str, Any] = dict(option.get("fit", {}))
    if option.get("teacher"):
        more["teacher"] = network
    if option.get("mixup"):
        more["mixup"] = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=10)
    start = time.perf_counter()
    history = anyprec.fit(model, loader, epochs=args.epochs, recipe=recipe, seed=args.seed, **more)
    minutes = (time.perf_counter() - start) / 60
    found = {}
    for width in WIDTHS:
        with model.using_bits(width):
            found[f"W{width}"] = accuracy(model, held_out)
    mixed = anyprec.OneShot(model, total_steps=1, seed=123).random_configs(5)
    found["mixed"] = sum(accuracy_at(model, held_out, config) for config in mixed) / len(mixed)
    own = 0.0
    for config in mixed:
        anyprec.recalibrate(model, loader, config, batches=8)
        own += accuracy_at(model, held_out, config) / len(mixed)
    frozen = len(model.floors)
    return {**found, "mixed, own norms": own, "minutes": minutes, "frozen": frozen, "loss": history[-1].losses}


def accuracy_at(model: anyprec.ConvertedModel, held_out: Any, config: anyprec.BitConfig) -> float:
    """Top-1 of a configuration, in percent."""
    with model.using_bits(config):
        return accuracy(model, held_out)


def float_network(args: argparse.Namespace, train: Images) -> nn.Module:
    """The network that all options start from, trained once and kept beside the results."""
    network = timm.create_model(args.model, num_classes=10).to(memory_format=torch.channels_last)
    kept = args.results.with_suffix(f".{args.model}.pt")
    if kept.exists():
        network.load_state_dict(torch.load(kept, weights_only=True))
        return network
    epochs = args.float_epochs
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loader = batches(train, args.batch_size, training=True, seed=args.seed)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=epochs * len(loader))
    network.train()
    for _ in range(epochs):
        for images, labels in loader:
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), kept)
    return network


def table(args: argparse.Namespace) -> None:
    """Print a Markdown table of the results."""
    columns = [*(f"W{width}" for width in WIDTHS), "mixed", "mixed, own norms", "minutes"]
    print(f"| option | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    for record in read(args.results):
        print(f"| {record['name']} | {' | '.join(f'{record[column]:.1f}' for column in columns)} |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "training_options.jsonl")
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="train what has no result yet")
    runner.add_argument("names", nargs="*", help="options; all by default")
    runner.add_argument("--data", type=Path, required=True, help="folder with train.tar and val.tar")
    runner.add_argument("--model", default="test_resnet")
    runner.add_argument("--images", type=int, default=10_000)
    runner.add_argument("--held-out", type=int, default=2_500)
    runner.add_argument("--float-epochs", type=int, default=10)
    runner.add_argument("--epochs", type=int, default=4)
    runner.add_argument("--batch-size", type=int, default=100)
    runner.add_argument("--lr", type=float, default=0.05)
    runner.add_argument("--seed", type=int, default=0)
    runner.set_defaults(command=run)
    printer = commands.add_parser("table", help="print the results")
    printer.set_defaults(command=table)
    options = parser.parse_args()
    command: Callable[[argparse.Namespace], None] = options.command
    command(options)


if __name__ == "__main__":
    main()
