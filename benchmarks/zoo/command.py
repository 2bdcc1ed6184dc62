"""Does anyprec take every timm model? Convert all of them, and try every promise on each.

    python -m benchmarks.zoo run                  # all of timm; resumable; hours on two cores
    python -m benchmarks.zoo run 'resnet*' --again all
    python -m benchmarks.zoo beyond               # a few networks of torchvision and Hugging Face
    python -m benchmarks.zoo render               # docs/zoo.md from the results

Each model is looked at twice, in a process of its own with a time and memory limit:

- *Structure*, on the meta device, at the input size and depth that `timm.create_model(name)` gives:
  does `convert` take it, what is covered, do our MACs equal those of torch's counter; and as a
  feature extractor, where it is one.
- *Numbers*, with random weights, at the smallest input that the model takes: the checks of
  `anyprec.testing`. A model of more than `--largest` parameters has fewer blocks there, through
  timm's own arguments, and is marked so, as is one that was tried on another device
  (`--device cuda`), because it needs more memory than a small machine has.

A result is one line of JSON in `--results`. A model that failed, ran out of time or died is a
result too. One model is tried in `trials.py`, the page is made in `page.py`.
"""

from __future__ import annotations

import argparse
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import Progress

from benchmarks.common.records import ROOT, append, commit
from benchmarks.common.supervision import preload, supervised
from benchmarks.zoo import beyond
from benchmarks.zoo.page import write_page
from benchmarks.zoo.records import read_last, shortfalls
from benchmarks.zoo.trials import try_model

# --- One model, in a process of its own ---


def try_one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The record of a model."""
    if name in beyond.NETWORKS:
        return beyond.try_network(name)
    return try_model(name, options.largest, device=options.device, structure_only=options.structure)


# --- All models ---


def run(options: argparse.Namespace) -> None:
    """Try the models that wait for it."""
    try_all(waiting_models(options), options)


def run_beyond(options: argparse.Namespace) -> None:
    """Try the networks that are not timm's."""
    try_all(list(beyond.NETWORKS), options)


def render(options: argparse.Namespace) -> None:
    """Write docs/zoo.md."""
    write_page(options.page, read_last(options.results))


def waiting_models(options: argparse.Namespace) -> list[str]:
    """Names of the models to try: all, those that fell short, or those without a result."""
    names: list[str] = timm.list_models(options.patterns)
    results = read_last(options.results)
    if options.again == "failed":
        return [name for name in names if name in results and shortfalls(results[name])]
    if options.again is None:
        names = [name for name in names if _is_open(results.get(name), options)]
    random.Random(0).shuffle(names)  # so that the first results come from every family
    return names


def _is_open(record: dict[str, Any] | None, options: argparse.Namespace) -> bool:
    """Whether a model has no result, or its structure alone while more is asked for."""
    if record is None:
        return True
    return not options.structure and "died" not in record and record["numbers"] is None


def try_all(names: list[str], options: argparse.Namespace) -> None:
    """Try models side by side, and append their records."""
    stamp = {"commit": commit(), "timm": timm.__version__, "torch": torch.__version__}
    preload("timm", "torch", "anyprec.testing")
    with (
        Progress(disable=not sys.stdout.isatty()) as progress,
        ThreadPoolExecutor(options.workers) as pool,
    ):
        task = progress.add_task("models", total=len(names))
        for record in pool.map(lambda name: supervised(try_one, name, options), names):
            append(options.results, {**record, **stamp})
            progress.advance(task)
            for shortfall in shortfalls(record):
                print(f"{record['name']}: {shortfall}", flush=True)


# --- Command line ---


def main() -> None:
    """Command line."""
    options = make_parser().parse_args()
    options.command(options)


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results" / "zoo.jsonl"
    )
    commands = parser.add_subparsers(required=True)
    limits = argparse.ArgumentParser(add_help=False)
    limits.add_argument("--workers", type=int, default=2)
    limits.add_argument("--device", default="cpu", help="where numbers are tried")
    limits.add_argument("--seconds", type=float, default=600, help="for one model")
    limits.add_argument("--memory", type=float, default=10, help="GiB for one model; 0 is no limit")
    runner = commands.add_parser("run", help="try models", parents=[limits])
    runner.add_argument(
        "patterns", nargs="*", default=["*"], help="names of models, with wildcards"
    )
    runner.add_argument("--again", choices=("all", "failed"), help="also models that have a result")
    runner.add_argument(
        "--structure", action="store_true", help="the structure alone: minutes instead of hours"
    )
    runner.add_argument(
        "--largest",
        type=int,
        default=100_000_000,
        help="parameters of the largest model to try whole",
    )
    runner.set_defaults(command=run)
    beyond = commands.add_parser(
        "beyond", help="try a few networks that are not timm's", parents=[limits]
    )
    beyond.set_defaults(command=run_beyond)
    renderer = commands.add_parser("render", help="write the page")
    renderer.add_argument("--page", type=Path, default=ROOT / "docs" / "zoo.md")
    renderer.set_defaults(command=render)
    return parser
