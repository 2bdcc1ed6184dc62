"""Exported networks, held against the networks that they were made from.

    python -m benchmarks.deployment families      # a network of each family of timm, to ONNX
    python -m benchmarks.deployment equality       # integer() against onnxruntime, bit for bit
    python -m benchmarks.deployment speed          # time and size against float32, interleaved
    python -m benchmarks.deployment accuracy --data IMAGENET  # EfficientNet-Lite0 on real images
    python -m benchmarks.deployment trained --data CIFAR10    # one-shot, with integer placement
    python -m benchmarks.deployment render         # docs/deployment-results.md

Each finished measurement is a line of JSON in `--results`; a run that was interrupted goes on where
it stopped. They need onnxruntime, onnx and openvino: `pip install 'anyprec[openvino]' onnxruntime`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common import records
from benchmarks.common.supervision import preload, supervised
from benchmarks.deployment import accuracy, equality, families, page, speed, trained

RESULTS = records.ROOT / "benchmarks" / "results" / "deployment.jsonl"
ZOO = records.ROOT / "benchmarks" / "results" / "zoo.jsonl"


def run_families(options: argparse.Namespace) -> None:
    """Export a network of each family that has no result."""
    done = {
        record["name"]
        for record in records.read(options.results)
        if record["kind"] == "family" and not ("died" in record and options.again)
    }
    preload("timm", "torch", "anyprec", "onnxruntime")
    networks = families.networks_of_families(options.zoo)
    order = {name: family for family, name in networks.items()}
    for name in options.only or list(order):
        family = order[name]
        if name in done:
            continue
        record = supervised(families.try_export, name, options)
        stamp = {"kind": "family", "family": family, "commit": records.commit()}
        records.append(options.results, {**stamp, **record, "machine": records.machine()})
        print(name, {k: v for k, v in record.items() if k != "name"}, flush=True)


def run_equality(options: argparse.Namespace) -> None:
    """Compare integer networks with onnxruntime."""
    for name in options.networks:
        for record in equality.compare(name, options):
            stamp = {"kind": "equality", "commit": records.commit(), "machine": records.machine()}
            records.append(options.results, {**stamp, **record})
            print(record, flush=True)


def run_speed(options: argparse.Namespace) -> None:
    """Time networks in their runtimes."""
    for name in options.networks:
        for record in speed.measure(name, options):
            stamp = {"kind": "speed", "commit": records.commit(), "machine": records.machine()}
            records.append(options.results, {**stamp, **record})
            print(record, flush=True)


def run_accuracy(options: argparse.Namespace) -> None:
    """Hold the files of a network with real weights against it, on real images."""
    for record in accuracy.measure(options):
        stamp = {"kind": "accuracy", "commit": records.commit(), "machine": records.machine()}
        records.append(options.results, {**stamp, **record})
        print(record, flush=True)


def run_trained(options: argparse.Namespace) -> None:
    """Train networks with integer placement, and hold their files against them."""
    for record in trained.measure(options):
        stamp = {"kind": "trained", "commit": records.commit(), "machine": records.machine()}
        records.append(options.results, {**stamp, **record})
        print(record, flush=True)


def render(options: argparse.Namespace) -> None:
    """Write the page from the records."""
    page.write_page(options.page, records.read(options.results))


def main() -> None:
    """Command line."""
    options = make_parser().parse_args()
    options.command(options)


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    commands = parser.add_subparsers(required=True)
    each = commands.add_parser("families", help="export a network of each family")
    each.add_argument("only", nargs="*", help="names of networks")
    each.add_argument("--zoo", type=Path, default=ZOO, help="results of benchmarks.zoo")
    each.add_argument("--seconds", type=float, default=900, help="for one network")
    each.add_argument("--memory", type=float, default=12, help="GiB for one; 0 is no limit")
    each.add_argument("--again", action="store_true", help="also those that died")
    each.set_defaults(command=run_families)
    comparing = commands.add_parser("equality", help="integer networks against onnxruntime")
    comparing.add_argument("networks", nargs="*", default=list(equality.NETWORKS))
    comparing.add_argument("--img-size", type=int, default=64)
    comparing.set_defaults(command=run_equality)
    timing = commands.add_parser("speed", help="time networks in their runtimes")
    timing.add_argument("networks", nargs="*", default=list(speed.NETWORKS))
    timing.add_argument("--rounds", type=int, default=30)
    timing.add_argument("--threads", type=int, default=1)
    timing.add_argument("--img-size", type=int, default=224)
    timing.set_defaults(command=run_speed)
    agreement = commands.add_parser("accuracy", help="EfficientNet-Lite0 on real images")
    agreement.add_argument(
        "--data", type=Path, required=True, help="folder of val.tar, synsets.txt"
    )
    agreement.add_argument("--placements", nargs="+", default=["layers", "integer"])
    agreement.add_argument("--count", type=int, default=500, help="half calibrate, half report")
    agreement.set_defaults(command=run_accuracy)
    training = commands.add_parser("trained", help="one-shot with integer placement, CIFAR-10")
    training.add_argument("networks", nargs="*", default=["resnet", "mobile"])
    training.add_argument("--data", type=Path, required=True, help="folder of train.tar, val.tar")
    training.add_argument("--cache", type=Path, required=True, help="folder for trained networks")
    training.add_argument("--seeds", type=int, nargs="+", default=[0])
    training.add_argument("--tiny", action="store_true", help="try the command: no real figures")
    training.set_defaults(command=run_trained)
    rendering = commands.add_parser("render", help="write the page")
    rendering.add_argument(
        "--page", type=Path, default=records.ROOT / "docs" / "deployment-results.md"
    )
    rendering.set_defaults(command=render)
    return parser
