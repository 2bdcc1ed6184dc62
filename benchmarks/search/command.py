"""The search, measured: the work it saves, the frontiers it finds, and what other algorithms find.

    python -m benchmarks.search work                                       # layer executions saved
    python -m benchmarks.search frontier --case lite0 --imagenet val.tar --class-map synsets.txt
    python -m benchmarks.search frontier --case cifar-mobile --cifar10 CIFAR10
    python -m benchmarks.search compare --case cifar-mobile --cifar10 CIFAR10      # resumable
    python -m benchmarks.search render                                # its part of docs/results.md

A measurement is a line of JSON in `--results`; `compare` and `work` do not repeat those that are
there. Networks and images are made in `cases.py`, one algorithm is run in `single.py`, the page is
written in `page.py`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import anyprec
from anyprec.model.costing import cost_model
from benchmarks.common.images import accuracy
from benchmarks.common.records import ROOT, append, commit, machine, read
from benchmarks.search.cases import CASES, Case, Sources, untrained
from benchmarks.search.single import SearchNorms, divergences, search_once

RESULTS = ROOT / "benchmarks" / "results" / "search.jsonl"
WORK_NETWORKS = ("resnet18", "mobilenetv2_100")
WORK_ALGORITHMS = ("greedy", "lazy", "combined")
BUDGETS = ("W6A6", "W4A4", "W3A3")
ALGORITHMS = ("combined", "lazy", "program", "evolution", "random")
BASELINES = ("evolution", "random")
"""These take as many evaluations as the first algorithm did."""
SEEDS = (0, 1, 2)


# --- Work saved -----------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """Evaluations and layer executions of the paper's greedy search and of ours.

    On networks with random weights.
    """
    done = set()
    for record in read(args.results):
        if record["kind"] == "work":
            done.add((record["network"], record["algorithm"]))
    for name, algorithm in itertools.product(args.networks, WORK_ALGORITHMS):
        if (name, algorithm) not in done:
            case = untrained(name, size=args.size, images=args.images)
            setting = {
                "network": name,
                "budget": args.budget,
                "size": args.size,
                "images": args.images,
                "seed": 0,
            }
            counts = count_work(case, algorithm, args.budget)
            store(args.results, {"kind": "work", **setting, **counts})


def count_work(case: Case, algorithm: str, budget: str) -> dict[str, Any]:
    """One search with counters."""
    layers = cost_model(case.model).layers
    executions = dict.fromkeys(layers, 0)
    with counting(case.model, executions):
        outcome = search_once(case.model, case.selection, algorithm=algorithm, budget=budget)
    whole = sum(layer.macs for layer in layers.values())
    executed = sum(layers[path].macs * count for path, count in executions.items())
    return {
        "algorithm": algorithm,
        "score": outcome.score,
        "asked": outcome.asked,
        "evaluations": outcome.evaluations,
        "layers": len(case.model.candidates),
        "batches": len(case.selection),
        "layer_runs": outcome.layer_runs,
        "passes_of_macs": executed / whole / len(case.selection),
        "seconds": outcome.seconds,
    }


@contextmanager
def counting(model: anyprec.ConvertedModel, executions: dict[str, int]) -> Iterator[None]:
    """Count how often each quantized layer runs."""

    def count(path: str, *_: Any) -> None:
        executions[path] += 1

    handles = []
    for path, layer in model.quantized_layers.items():
        handles.append(layer.register_forward_hook(functools.partial(count, path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- Frontiers ------------------------------------------------------------------------------------


def frontier(args: argparse.Namespace) -> None:
    """The whole range of BitOPs in one search.

    Accuracy is on other images, of the best configuration at the cost of each uniform one.
    """
    case = CASES[args.case](args.sources, args.seed)
    model = case.model
    known_scores = len(read(args.resume)[1:]) if args.resume else 0
    start = time.perf_counter()
    result = anyprec.search(
        model, case.selection, objective="divergence", norms=args.norms, resume=args.resume
    )
    seconds = time.perf_counter() - start
    entry = {
        "kind": "frontier",
        "case": args.case,
        "seed": args.seed,
        "norms": args.norms,
        "images": image_count(case.selection),
        "report_images": image_count(case.report),
        "layers": len(model.candidates),
        "seconds": round(seconds, 1),
        "evaluations": result.evaluations,
        "known": known_scores,
        "layer_runs": result.layer_runs,
        "float": top1(case, None),
        "frontier": [[point.cost.bitops, point.score] for point in result.frontier],
    }
    store(args.results, entry | at_uniform_costs(case, result, args.norms))


def image_count(batches: Collection[Any]) -> int:
    """Images of all batches."""
    return sum(len(labels) for _, labels in batches)


def at_uniform_costs(
    case: Case, result: anyprec.SearchResult, norms: SearchNorms
) -> dict[str, list[list[float]]]:
    """The uniform configurations and the best that was found for at most the BitOPs of each.

    For each its BitOPs, its divergence on the images of the search, and divergence and top-1 on
    those of the report.
    """
    pairs = []
    for config in result.uniform:
        if config in result.evaluated:
            cost = anyprec.cost_of(case.model, config).bitops
            pairs.append((config, cost, result.at(anyprec.Budget(bitops=cost))))
    configs = [config for config, _, _ in pairs] + [best.config for _, _, best in pairs]
    held_out = divergences(case.model, case.report, configs, norms)

    uniform, searched = [], []
    for config, cost, best in pairs:
        scores = [held_out[config], top1(case, config)]
        uniform.append([cost, result.evaluated[config], *scores])
        scores = [held_out[best.config], top1(case, best.config)]
        searched.append([best.cost.bitops, best.score, *scores])
    return {"uniform": uniform, "searched": searched}


def top1(case: Case, config: anyprec.BitConfig | None) -> float:
    """Accuracy on the images of the report, in percent."""
    with case.model.using_bits(config):
        return accuracy(case.model, case.report)


# --- Algorithms -----------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> None:
    """What each algorithm finds with as many evaluations as the default takes.

    The seed chooses the images, and what evolution and random search draw.
    """
    done = {}
    for record in read(args.results):
        if record["kind"] == "compare":
            done[key(record)] = record
    for seed in args.seeds:
        case = None
        for budget, algorithm in itertools.product(args.budgets, args.algorithms):
            setting = {
                "case": args.case,
                "seed": seed,
                "budget": budget,
                "algorithm": algorithm,
                "norms": args.norms,
            }
            if key(setting) in done:
                continue
            case = case or CASES[args.case](args.sources, seed)
            default = done.get(key({**setting, "algorithm": ALGORITHMS[0]}))
            limit = default["evaluations"] if default and algorithm in BASELINES else None
            record = compared(case, setting, limit)
            done[key(record)] = record
            store(args.results, record)


def compared(case: Case, setting: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """One search."""
    outcome = search_once(
        case.model,
        case.selection,
        algorithm=setting["algorithm"],
        budget=setting["budget"],
        norms=setting["norms"],
        seed=setting["seed"],
        evaluations=limit,
    )
    return {
        "kind": "compare",
        **setting,
        "evaluations": outcome.evaluations,
        "score": outcome.score,
        "uniform": outcome.uniform_score,
        "trace": outcome.trace,
        "utilisation": outcome.utilisation,
        "top1": top1(case, outcome.config),
        "uniform_top1": top1(case, outcome.uniform),
        "seconds": outcome.seconds,
    }


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What distinguishes comparisons."""
    return tuple(record[name] for name in ("case", "seed", "budget", "algorithm", "norms"))


# --- Command line ---------------------------------------------------------------------------------


def store(file: Path, record: dict[str, Any]) -> None:
    """Write a finished measurement, and show it."""
    record |= {"machine": machine(), "commit": commit()}
    append(file, record)
    hidden = {"machine", "frontier", "trace"}
    shown = (f"{name}={value}" for name, value in record.items() if name not in hidden)
    print(*shown, flush=True)


def render(args: argparse.Namespace) -> None:
    """Write the search's part of the page, and its plots."""
    from benchmarks.search.page import write_page  # noqa: PLC0415 (matplotlib is slow to import)

    write_page(read(args.results), ROOT / "docs")


def main(arguments: list[str] | None = None) -> int:
    """Run one command."""
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    if hasattr(args, "cifar10"):
        args.sources = Sources(args.cifar10, args.imagenet, args.class_map, args.cache)
    args.command(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int)
    commands = parser.add_subparsers(required=True)

    add = commands.add_parser("work", help="layer executions saved")
    add.add_argument("--networks", nargs="+", default=WORK_NETWORKS)
    add.add_argument("--budget", default="W4A4")
    # What is counted depends neither on the size of the images nor on their number, in one batch.
    add.add_argument("--size", type=int, default=64, help="of an image")
    add.add_argument("--images", type=int, default=32)
    add.set_defaults(command=work)

    case = _case_options()
    add = commands.add_parser("frontier", help="one search of all budgets", parents=[case])
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--resume", type=Path, help="file that keeps every score")
    add.set_defaults(command=frontier)

    add = commands.add_parser("compare", help="algorithms at equal evaluations", parents=[case])
    add.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    add.add_argument("--budgets", nargs="+", default=BUDGETS)
    add.add_argument("--algorithms", nargs="+", default=ALGORITHMS)
    add.set_defaults(command=compare)

    commands.add_parser("render", help="write the page").set_defaults(command=render)
    return parser


def _case_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--norms", choices=("stored", "batch"), default="stored")
    parser.add_argument("--cifar10", type=Path, help="folder of train.tar and val.tar")
    parser.add_argument("--imagenet", type=Path, help="tar or folder of ImageNet images")
    parser.add_argument("--class-map", type=Path, help="class folders in the order of labels")
    parser.add_argument(
        "--cache", type=Path, default=RESULTS.parent, help="folder for trained networks"
    )
    return parser
