"""The study: what one-shot training is worth, with seeds.

It is compared with dedicated networks, with its own parts and with variants.

    python -m benchmarks.study plan                    # the grid, and how long it takes here
    python -m benchmarks.study run --data CIFAR10 --workers 2          # resumable; hours
    python -m benchmarks.study run --data CIFAR10 --only 'S/mobile/*' --group core --minutes 60
    python -m benchmarks.study render                  # its part of docs/results.md, and its plots

CIFAR10 is a folder with train.tar and val.tar. A finished run is one line of JSON in `--results`
and is not run again. A one-shot run that was killed goes on from its snapshot. Networks that are
searched are stored beside the results. `--only` takes patterns of TRACK/NETWORK/METHOD/SEED,
`--group` the question that a method answers. What is compared stands in `grid.py` and
`methods.py`, how in `runs.py`, the page in `page.py`. `--seeds 1` takes about two thirds of the
time.

Where page faults are slow (many virtual machines), glibc should keep freed memory. With
MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=100000000000 in the environment, two runs side by
side took one to two thirds of the time.

An accelerator waits for Python in these small networks: `--device cuda --workers 16` shares it,
with NVIDIA's MPS daemon running. 87 runs took an H200 12 minutes. Track A is for an accelerator
and is only run when it is named (`--track A`).
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.records import ROOT, append, read
from benchmarks.study.grid import TRACKS, Run, Track, grid, tiny
from benchmarks.study.methods import GROUPS
from benchmarks.study.runs import Workspace, perform
from benchmarks.study.workers import begin_worker

RESULTS = ROOT / "benchmarks" / "results" / "study.jsonl"


# --- Running --------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Perform the runs that have no result yet; returns 1 if some of them failed."""
    waiting = unfinished(selected(options), options.results)
    print(f"{len(waiting)} runs to do", flush=True)
    if options.dry_run:
        for listed in waiting:
            print(listed.name)
        return 0
    starts = starts_of_done(options)
    workspace = Workspace(options.data, options.results.parent, options.device, starts)
    end = time.monotonic() + 60 * options.minutes
    failed = []
    results = performed(waiting, workspace, options, until=lambda: time.monotonic() < end)
    for finished, result in results:
        if isinstance(result, BaseException):
            failed.append(finished.name)
            error = "".join(traceback.format_exception(result))
            print(f"{finished.name} failed:\n{error}", flush=True)
        else:
            append(options.results, result)
            print(f"{finished.name}: {in_short(result)}", flush=True)
    if failed:
        print(f"{len(failed)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def performed(
    waiting: Sequence[Run],
    workspace: Workspace,
    options: argparse.Namespace,
    *,
    until: Callable[[], bool],
) -> Iterator[tuple[Run, dict[str, Any] | BaseException]]:
    """Each run with its result or its error, as they end; none is begun once `until` is false.

    With no workers, in this process, where an error is raised at once.
    """
    queue = itertools.takewhile(lambda _: until(), waiting)
    if options.workers == 0:
        torch.set_num_threads(options.threads)
        for following in queue:
            yield following, perform(following, workspace)
        return
    pool = ProcessPoolExecutor(
        options.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=begin_worker,
        initargs=(options.threads,),
    )
    with pool:
        running: dict[Future[dict[str, Any]], Run] = {}
        while True:
            for following in itertools.islice(queue, options.workers - len(running)):
                running[pool.submit(perform, following, workspace)] = following
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.exception() or future.result()


def in_short(record: dict[str, Any]) -> str:
    """A line for the terminal."""
    trained, evaluated = record["training"]["seconds"], record["evaluation"]["seconds"]
    times = f"trained in {trained:.0f} s, evaluated in {evaluated:.0f} s"
    if "float" in record:
        return f"{record['float']:.1f} % ({times})"
    figures = []
    for name, entry in record["configs"].items():
        figures.append(f"{name}: {entry['stored']:.1f}/{entry['own']:.1f}")
    for name, entry in record["searched"].items():
        if entry["config"]:
            figures.append(f"searched {name}: {entry['own']:.1f}")
    return f"{', '.join(figures)} ({times})"


# --- Runs and their records -----------------------------------------------------------------------


def selected(options: argparse.Namespace) -> list[Run]:
    """The runs that the options ask for, in order."""
    groups = options.group or GROUPS
    patterns = options.only or ["*"]
    runs = []
    for candidate in grid(tracks_of(options), seeds=options.seeds):
        matches = any(fnmatch.fnmatch(candidate.name, pattern) for pattern in patterns)
        if candidate.method.group in groups and matches:
            runs.append(candidate)
    if not runs:
        msg = f"no run matches {patterns}: they are TRACK/NETWORK/METHOD/SEED, e.g. S/mobile/full/0"
        raise SystemExit(msg)
    return runs


def tracks_of(options: argparse.Namespace) -> list[Track]:
    """The tracks that the options ask for."""
    tracks = [TRACKS[name] for name in options.track or ("S", "P")]
    return list(map(tiny, tracks)) if options.tiny else tracks


def unfinished(runs: Iterable[Run], results: Path) -> list[Run]:
    """Those that have no result of the same settings."""
    runs = list(runs)
    done = finished_of(runs, results)
    return [candidate for candidate in runs if candidate.name not in done]


def finished_of(runs: Iterable[Run], results: Path) -> dict[str, dict[str, Any]]:
    """The last record of each run that has its settings, by name."""
    by_name = {candidate.name: candidate for candidate in runs}
    records = {}
    for record in read(results):
        candidate = by_name.get(record["run"])
        if candidate is not None and record["settings"] == candidate.settings:
            records[candidate.name] = record
    return records


def starts_of_done(options: argparse.Namespace) -> dict[str, float]:
    """Accuracy of the start networks of all runs that are done, by name."""
    runs = grid(tracks_of(options))
    done = finished_of(runs, options.results)
    starts = {}
    for candidate in runs:
        if candidate.name in done:
            starts[candidate.start_name] = done[candidate.name]["start"]
    return starts


# --- Command line ---------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> int:
    """Print the grid and how long it takes."""
    from benchmarks.study.planning import show_plan  # noqa: PLC0415 (pandas, for this command)

    runs = selected(options)
    show_plan(runs, finished_of(runs, options.results), options)
    return 0


def render(options: argparse.Namespace) -> int:
    """Write the study's part of the page, and its plots."""
    from benchmarks.study.page import write_page  # noqa: PLC0415 (matplotlib is slow to import)

    write_page(read(options.results), TRACKS, page=options.page, pictures=options.pictures)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if getattr(options, "tiny", False) and options.results == RESULTS:
        parser.error("--tiny needs --results: its numbers do not belong among the study's")
    status: int = options.command(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    results = argparse.ArgumentParser(add_help=False)
    results.add_argument("--results", type=Path, default=RESULTS)
    choice = _selection()

    add = commands.add_parser(
        "run", help="perform what has no result yet", parents=[results, choice]
    )
    add.add_argument("--data", type=Path, required=True, help="folder of train.tar and val.tar")
    add.add_argument("--minutes", type=float, default=float("inf"), help="then begin no run")
    add.add_argument("--dry-run", action="store_true", help="list the runs that are to do")
    add.set_defaults(command=run)

    add = commands.add_parser("plan", help="how long the grid takes", parents=[results, choice])
    add.set_defaults(command=plan)

    add = commands.add_parser("render", help="write the page", parents=[results])
    add.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    add.add_argument("--pictures", type=Path, default=ROOT / "docs" / "images")
    add.set_defaults(command=render)
    return parser


def _selection() -> argparse.ArgumentParser:
    """The options that select runs, and say where they are performed."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--track", action="append", choices=sorted(TRACKS), help="S and P by default")
    add("--group", action="append", choices=GROUPS, help="of methods; may be repeated")
    add("--only", action="append", help="pattern of TRACK/NETWORK/METHOD/SEED; may be repeated")
    add("--seeds", type=int, help="at most so many of each group")
    add("--workers", type=int, default=2, help="runs side by side; 0 runs in this process")
    add("--threads", type=int, default=1, help="of each worker")
    add("--device", default="cpu")
    add("--tiny", action="store_true", help="hardly any images, to try the commands")
    return parser
