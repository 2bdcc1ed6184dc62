"""The search, measured: the work it saves, the frontiers it finds, and what other algorithms find with as many evaluations.

    python -m benchmarks.search work                                               # layer executions saved
    python -m benchmarks.search frontier --case lite0 --imagenet val.tar --class-map synsets.txt
    python -m benchmarks.search frontier --case cifar-mobile --cifar10 CIFAR10
    python -m benchmarks.search compare --case cifar-mobile --cifar10 CIFAR10      # resumable
    python -m benchmarks.search render                                             # its part of docs/results.md

A measurement is a line of JSON in `--results`; `compare` and `work` do not repeat those that are there. Networks and images
are made in `cases.py`, the page in `page.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

import anyprec
from anyprec.model.costing import cost_model
from anyprec.runtime.modes import evaluating
from anyprec.searching.algorithms import Answer, Question, Settings, make_space, run_search
from anyprec.searching.algorithms.problem import Problem
from anyprec.searching.budget import parse_budgets
from anyprec.searching.measuring.evaluator import Evaluator
from benchmarks.common.images import accuracy
from benchmarks.common.records import ROOT, append, commit, machine, read
from benchmarks.search.cases import CASES, Case, Sources, untrained
from benchmarks.search.page import write_page

RESULTS = ROOT / "benchmarks" / "results" / "search.jsonl"
WORK_NETWORKS = ("resnet18", "mobilenetv2_100")
BUDGETS = ("W6A6", "W4A4", "W3A3")
ALGORITHMS = ("combined", "lazy", "program", "evolution", "random")
BASELINES = ("evolution", "random")
"""These take as many evaluations as the first algorithm did."""
SEEDS = (0, 1, 2)


# --- Work saved ---------------------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """The paper's greedy search and the lazy one, on networks with random weights: evaluations and layer executions."""
    done = {
        (record["network"], record["algorithm"])
        for record in read(args.results)
        if record["kind"] == "work"
    }
    for name in args.networks:
        for algorithm in ("greedy", "lazy", "combined"):
            if (name, algorithm) not in done:
                case = untrained(name, size=args.size, images=args.images)
                record = count_work(case, algorithm, args.budget)
                setting = {
                    "network": name,
                    "budget": args.budget,
                    "size": args.size,
                    "images": args.images,
                    "seed": 0,
                }
                keep(args.results, {"kind": "work", **setting, **record})


def count_work(case: Case, algorithm: str, budget: str) -> dict[str, Any]:
    """One search with counters."""
    macs = {path: layer.macs for path, layer in cost_model(case.model).layers.items()}
    done = dict.fromkeys(macs, 0)
    with counting(case.model, done):
        answer, evaluator, seconds = searched(case, algorithm, budget)
    assert answer.best is not None
    whole = sum(macs.values())
    return {
        "algorithm": algorithm,
        "score": answer.losses[answer.best],
        "asked": answer.moves_asked,
        "evaluations": len(answer.losses),
        "layers": len(case.model.candidates),
        "batches": len(case.selection),
        "layer_runs": evaluator.layer_runs,
        "passes_of_macs": sum(macs[path] * count for path, count in done.items())
        / whole
        / len(case.selection),
        "seconds": round(seconds, 1),
    }


@contextmanager
def counting(model: anyprec.ConvertedModel, done: dict[str, int]) -> Iterator[None]:
    """Count how often each quantized layer runs."""

    def count(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            done[path] += 1

        return hook

    handles = [
        layer.register_forward_hook(count(path)) for path, layer in model.quantized_layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def searched(
    case: Case,
    algorithm: str,
    budget: str,
    *,
    norms: Literal["stored", "batch"] = "stored",
    settings: Settings | None = None,
) -> tuple[Answer, Evaluator, float]:
    """One algorithm below one budget, as `anyprec.search` runs it; the seconds that it took."""
    model = case.model
    costs = cost_model(model)
    question = Question(
        space=make_space(model.current_candidates),
        costs=costs,
        budgets=parse_budgets(budget, costs),
        algorithm=algorithm,
        settings=settings or Settings(),
        whole_frontier=False,
    )
    start = time.perf_counter()
    with evaluating(model), model.using_bits(model.bits):
        evaluator = Evaluator(model, case.selection, "divergence", norms=norms)
        answer = run_search(question, evaluator, set_anchor=evaluator.set_anchor)
    if answer.stopped != "finished":
        raise KeyboardInterrupt
    return answer, evaluator, time.perf_counter() - start


# --- Frontiers ----------------------------------------------------------------------------------------------------


def frontier(args: argparse.Namespace) -> None:
    """The whole range of BitOPs in one search; accuracy on other images of the best at the cost of each uniform precision."""
    case = CASES[args.case](args.sources, args.seed)
    model = case.model
    known = len(read(args.resume)[1:]) if args.resume else 0
    start = time.perf_counter()
    result = anyprec.search(
        model, case.selection, objective="divergence", norms=args.norms, resume=args.resume
    )
    seconds = time.perf_counter() - start
    uniform = [config for config in result.uniform if config in result.evaluated]
    costs = [anyprec.cost_of(model, config).bitops for config in uniform]
    best = [result.at(anyprec.Budget(bitops=cost)) for cost in costs]
    held_out = held_out_figures(case, [*uniform, *(found.config for found in best)], args.norms)
    entry = {
        "kind": "frontier",
        "case": args.case,
        "seed": args.seed,
        "norms": args.norms,
        "images": sum(len(labels) for _, labels in case.selection),
        "report_images": sum(len(labels) for _, labels in case.report),
        "layers": len(model.candidates),
        "seconds": round(seconds, 1),
        "evaluations": result.evaluations,
        "known": known,
        "layer_runs": result.layer_runs,
        "float": top1(model, None, case),
        "frontier": [[found.cost.bitops, found.score] for found in result.frontier],
        "uniform": [
            [cost, result.evaluated[config], *held_out[config]]
            for cost, config in zip(costs, uniform, strict=True)
        ],
        "searched": [[found.cost.bitops, found.score, *held_out[found.config]] for found in best],
    }
    keep(args.results, entry)


def held_out_figures(
    case: Case, configs: Iterable[anyprec.BitConfig], norms: Literal["stored", "batch"]
) -> dict[anyprec.BitConfig, tuple[float, float]]:
    """Divergence and top-1 on the images of the report."""
    with evaluating(case.model), case.model.using_bits(case.model.bits):
        divergence = Evaluator(case.model, case.report, "divergence", norms=norms, reuse=False)
        return {
            config: (divergence(config), top1(case.model, config, case))
            for config in dict.fromkeys(configs)
        }


def top1(model: anyprec.ConvertedModel, config: anyprec.BitConfig | None, case: Case) -> float:
    """Accuracy on the images of the report, in percent."""
    with model.using_bits(config):
        return accuracy(model, case.report)


# --- Algorithms ---------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> None:
    """What each algorithm finds with as many evaluations as the default takes, for several budgets and seeds.

    The seed chooses the images, and what evolution and random search draw.
    """
    known = {key(record): record for record in read(args.results) if record["kind"] == "compare"}
    for seed in args.seeds:
        case = None
        for budget in args.budgets:
            for algorithm in args.algorithms:
                wanted = {
                    "case": args.case,
                    "seed": seed,
                    "budget": budget,
                    "algorithm": algorithm,
                    "norms": args.norms,
                }
                if key(wanted) in known:
                    continue
                case = case or CASES[args.case](args.sources, seed)
                default = known.get(key({**wanted, "algorithm": ALGORITHMS[0]}))
                limit = default["evaluations"] if default and algorithm in BASELINES else None
                record = compared(case, wanted, limit)
                known[key(record)] = record
                keep(args.results, record)


def compared(case: Case, wanted: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """One search."""
    settings = Settings(seed=wanted["seed"])
    if limit is not None:
        settings = dataclasses.replace(settings, evaluations=limit)
    answer, _, seconds = searched(
        case, wanted["algorithm"], wanted["budget"], norms=wanted["norms"], settings=settings
    )
    losses, problem, config = answer.losses, answer.problem, answer.best
    assert config is not None
    uniform = min(problem.fitting_uniform, key=losses.__getitem__)
    return {
        "kind": "compare",
        **wanted,
        "evaluations": len(losses),
        "score": losses[config],
        "uniform": losses[uniform],
        "trace": trace(losses, problem),
        "utilisation": problem.utilisation(config),
        "top1": top1(case.model, config, case),
        "uniform_top1": top1(case.model, uniform, case),
        "seconds": round(seconds, 1),
    }


def trace(losses: Mapping[anyprec.BitConfig, float], problem: Problem) -> list[list[float]]:
    """After how many evaluations the best that fits became better, and how good it was."""
    found, best = [], math.inf
    for count, (config, loss) in enumerate(losses.items(), 1):
        if loss < best and problem.fits(config):
            best = loss
            found.append([count, loss])
    return found


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one comparison from another."""
    return tuple(record[name] for name in ("case", "seed", "budget", "algorithm", "norms"))


# --- Command line -------------------------------------------------------------------------------------------------


def keep(path: Path, record: dict[str, Any]) -> None:
    """Write a finished measurement, and show it."""
    record |= {"machine": machine(), "commit": commit()}
    append(path, record)
    shown = {
        name: value
        for name, value in record.items()
        if name not in ("machine", "frontier", "trace")
    }
    print(" ".join(f"{name}={value}" for name, value in shown.items()), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int)
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("work")
    add.add_argument("--networks", nargs="+", default=WORK_NETWORKS)
    add.add_argument("--budget", default="W4A4")
    add.add_argument(
        "--size", type=int, default=64, help="of an image; what is counted does not depend on it"
    )
    add.add_argument("--images", type=int, default=32, help="nor on their number, in one batch")
    add.set_defaults(command=work)
    for name, command in (("frontier", frontier), ("compare", compare)):
        add = commands.add_parser(name)
        add.add_argument("--case", choices=CASES, required=True)
        add.add_argument("--norms", choices=("stored", "batch"), default="stored")
        add.add_argument("--cifar10", type=Path, help="folder of train.tar and val.tar")
        add.add_argument("--imagenet", type=Path, help="tar or folder of ImageNet images")
        add.add_argument(
            "--class-map", type=Path, help="file that lists the class folders in label order"
        )
        add.add_argument(
            "--kept", type=Path, default=RESULTS.parent, help="folder for trained networks"
        )
        add.set_defaults(command=command)
        if command is frontier:
            add.add_argument("--seed", type=int, default=0)
            add.add_argument("--resume", type=Path, help="file that keeps every score")
        else:
            add.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
            add.add_argument("--budgets", nargs="+", default=BUDGETS)
            add.add_argument("--algorithms", nargs="+", default=ALGORITHMS)
    commands.add_parser("render").set_defaults(
        command=lambda args: write_page(read(args.results), ROOT / "docs")
    )
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    if hasattr(args, "cifar10"):
        args.sources = Sources(args.cifar10, args.imagenet, args.class_map, args.kept)
    args.command(args)
    return 0
