"""The study: what one-shot training is worth, against dedicated networks, its own parts and its variants, with seeds.

    python -m benchmarks.study plan                        # the grid, and how long it takes on this machine
    python -m benchmarks.study run --data ../shared/data/cifar10 --workers 2     # resumable; hours
    python -m benchmarks.study run --data CIFAR10 --only 'S/mobile/*' --group core --minutes 60
    python -m benchmarks.study render                      # the study's part of docs/results.md, and its pictures

A finished run is one line of JSON in `--results`, and is not run again; a one-shot run that was killed goes on from
its snapshot; networks that are searched are kept beside the results, trained. `--only` takes patterns of
TRACK/NETWORK/METHOD/SEED, `--group` takes the question that a method answers. What is compared stands in
`grid.py`, how in `runs.py`, the page in `page.py`. `--seeds 1` takes about two thirds of the time.

Where page faults are dear (many virtual machines), glibc should keep freed memory: with MALLOC_MMAP_MAX_=0 and
MALLOC_TRIM_THRESHOLD_=100000000000 in the environment, two runs side by side took one to two thirds of the time here.

An accelerator waits for Python in these small networks: `--device cuda --workers 16` shares it (with NVIDIA's MPS daemon
running); 87 runs took an H200 12 minutes. Track A is for an accelerator and is only run when it is named (`--track A`).
"""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import nn

import anyprec
from benchmarks.common.records import ROOT, append, read
from benchmarks.study.grid import GROUPS, NETWORKS, TRACKS, Run, Track, grid, tiny
from benchmarks.study.runs import BUDGETS, CLASSES, Place, perform

RESULTS = ROOT / "benchmarks" / "results" / "study.jsonl"


# --- Running ------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Perform the runs that have no result yet; returns 1 if some of them failed."""
    waiting = unfinished(selected(options), options.results)
    print(f"{len(waiting)} runs to do", flush=True)
    if options.dry_run:
        for one in waiting:
            print(one.name)
        return 0
    place = Place(options.data, options.results.parent, options.device, starts_of_done(options))
    end = time.monotonic() + 60 * options.minutes
    failed = []
    for one, result in performed(waiting, place, options, until=lambda: time.monotonic() < end):
        if isinstance(result, BaseException):
            failed.append(one.name)
            print(f"{one.name} failed:\n{''.join(traceback.format_exception(result))}", flush=True)
        else:
            append(options.results, result)
            print(f"{one.name}: {in_short(result)}", flush=True)
    if failed:
        print(f"{len(failed)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def performed(
    waiting: Sequence[Run], place: Place, options: argparse.Namespace, *, until: Callable[[], bool]
) -> Iterator[tuple[Run, dict[str, Any] | BaseException]]:
    """Each run with its result or its error, as they end; none is begun once `until` says no.

    With no workers, in this process, where an error is raised at once.
    """
    if options.workers == 0:
        torch.set_num_threads(options.threads)
        for one in waiting:
            if not until():
                return
            yield one, perform(one, place)
        return
    queue = iter(waiting)
    pool = ProcessPoolExecutor(
        options.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_worker,
        initargs=(options.threads,),
    )
    with pool:
        running: dict[Future[dict[str, Any]], Run] = {}
        while True:
            while (
                len(running) < options.workers
                and until()
                and (following := next(queue, None)) is not None
            ):
                running[pool.submit(perform, following, place)] = following
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.exception() or future.result()


def _begin_worker(threads: int) -> None:
    """Set a worker's threads, and end it with its parent: one that trains on would slow whatever runs next."""
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def selected(options: argparse.Namespace) -> list[Run]:
    """The runs that the options ask for, in order."""
    groups = set(options.group or GROUPS)
    runs = [
        one for one in grid(tracks_of(options), seeds=options.seeds) if one.method.group in groups
    ]
    patterns = options.only or ["*"]
    found = [one for one in runs if any(fnmatch.fnmatch(one.name, pattern) for pattern in patterns)]
    if not found:
        msg = f"no run matches {patterns}: they are TRACK/NETWORK/METHOD/SEED, e.g. S/mobile/full/0"
        raise SystemExit(msg)
    return found


def tracks_of(options: argparse.Namespace) -> list[Track]:
    """The tracks that the options ask for."""
    names = options.track or ["S", "P"]
    return [tiny(TRACKS[name]) if options.tiny else TRACKS[name] for name in names]


def starts_of_done(options: argparse.Namespace) -> dict[str, float]:
    """Accuracy of the start networks of all runs that are done, by name."""
    done = finished(options.results)
    found = [(one.start_name, record_of(one, done)) for one in grid(tracks_of(options))]
    return {name: record["start"] for name, record in found if record is not None}


def unfinished(runs: Iterable[Run], results: Path) -> list[Run]:
    """Those that have no result of the same settings."""
    done = finished(results)
    return [one for one in runs if record_of(one, done) is None]


def finished(results: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of each run."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in read(results):
        found.setdefault(record["run"], []).append(record)
    return found


def record_of(one: Run, done: dict[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
    """The last record of a run that has its settings."""
    fitting = [record for record in done.get(one.name, ()) if record["settings"] == one.settings]
    return fitting[-1] if fitting else None


def in_short(record: dict[str, Any]) -> str:
    """A line for the terminal."""
    seconds = record["training"]["seconds"], record["evaluation"]["seconds"]
    times = f"trained in {seconds[0]:.0f} s, evaluated in {seconds[1]:.0f} s"
    if "float" in record:
        return f"{record['float']:.1f} % ({times})"
    parts = [
        f"{name}: {entry['stored']:.1f}/{entry['own']:.1f}"
        for name, entry in record["configs"].items()
    ]
    parts += [
        f"searched {name}: {entry['own']:.1f}"
        for name, entry in record["searched"].items()
        if entry["config"]
    ]
    return f"{', '.join(parts)} ({times})"


# --- Planning -----------------------------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> int:
    """Print the grid and how long it takes, from the runs that are done or else from a few steps on this machine.

    In time of a processor that has no other work.
    """
    torch.set_num_threads(options.threads)
    runs = selected(options)
    waiting = {one.name for one in unfinished(runs, options.results)}
    done = finished(options.results)
    speeds = {
        key: measured_speed(*key, device=options.device)
        for key in sorted({(one.track.name, one.network) for one in runs})
    }
    for (track, network), speed in speeds.items():
        print(
            f"{track}/{network}: images/s {', '.join(f'{name} {1 / value:.0f}' for name, value in speed.items())}"
        )
    totals: dict[str, list[float]] = {}
    for one in runs:
        record = record_of(one, done)
        speed = speeds[one.track.name, one.network]
        seconds = (
            estimate(one, speed)
            if record is None
            else sum(record[part]["cpu_seconds"] for part in PARTS)
        )
        group = f"{one.track.name}/{one.network}, {one.method.group}"
        totals.setdefault(group, [0, 0, 0.0])
        totals[group][0] += 1
        totals[group][1] += one.name in waiting
        totals[group][2] += seconds
    for group, (count, open_runs, seconds) in totals.items():
        print(f"{group}: {count:.0f} runs, {open_runs:.0f} to do, {seconds / 3600:.2f} h")
    hours = sum(seconds for _, _, seconds in totals.values()) / 3600
    left = (
        sum(
            estimate(one, speeds[one.track.name, one.network])
            for one in runs
            if one.name in waiting
        )
        / 3600
    )
    workers = max(1, options.workers)
    print(
        f"{len(runs)} runs, {hours:.1f} h; left {len(waiting)}, {left / workers:.1f} h with {workers} workers"
    )
    return 0


PARTS = ("training", "evaluation")
OVERHEAD = 1.2
"""Of a step over its forward-backward passes: optimizer, clipping, images, distillation, features."""


def estimate(one: Run, speed: dict[str, float]) -> float:
    """Seconds of a run, without those of the start network that it may have to train first."""
    track, method = one.track, one.method
    path = speed["float" if method.kind == "float" else "quantized"]
    seconds = OVERHEAD * track.steps * track.batch_size * method.passes * path
    statistics = track.norm_batches * track.batch_size
    configs = len(method.widths)
    looked_at = len(method.widths) ** 2 * statistics
    if method.is_whole(track):
        configs += 3
        looked_at += track.mixed * (statistics + 2 * track.mixed_images)
    if method.searches(track):
        looked_at += len(BUDGETS) * (
            track.search_evaluations * track.search_images + statistics + 2 * track.report_images
        )
    looked_at += configs * (statistics + 2 * track.report_images) + track.report_images
    return seconds + looked_at * speed["evaluation"]


def measured_speed(track: str, network: str, *, device: str) -> dict[str, float]:
    """Seconds for one image: a float training pass, a quantized one, and a quantized forward pass."""
    settings = TRACKS[track]
    model = NETWORKS[network](CLASSES).to(device).to(memory_format=torch.channels_last)
    shape = settings.batch_size, 3, settings.size, settings.size
    images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(settings.batch_size, dtype=torch.int64, device=device)

    def trained() -> None:
        model.train()
        nn.functional.cross_entropy(model(images), labels).backward()
        model.zero_grad()

    @torch.no_grad()
    def evaluated() -> None:
        model.eval()
        model(images)

    found = {"float": _seconds(trained, device) / len(images)}
    converted = anyprec.convert(model, settings.bits, example_input=images[:1])
    anyprec.calibrate(converted, [images])
    converted.set_bits(4)
    return {
        **found,
        "quantized": _seconds(trained, device) / len(images),
        "evaluation": _seconds(evaluated, device) / len(images),
    }


def _seconds(call: Callable[[], None], device: str, *, times: int = 5) -> float:
    """Of one call: of the processor, which other work on it hardly changes; on another device of the wall."""
    on_cpu = device == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    call()
    taken = []
    for _ in range(times):
        start = clock()
        call()
        if not on_cpu:
            torch.cuda.synchronize()
        taken.append(clock() - start)
    return sorted(taken)[times // 2] / (torch.get_num_threads() if on_cpu else 1)


# --- Command line -------------------------------------------------------------------------------------------------


def render(options: argparse.Namespace) -> int:
    """Write the study's part of the page, and its pictures."""
    from benchmarks.study.page import write_page  # noqa: PLC0415 (matplotlib is slow to import)

    write_page(read(options.results), TRACKS, page=options.page, pictures=options.pictures)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    results = argparse.ArgumentParser(add_help=False)
    results.add_argument("--results", type=Path, default=RESULTS)
    choice = argparse.ArgumentParser(add_help=False)
    choice.add_argument(
        "--track", action="append", choices=sorted(TRACKS), help="S and P by default"
    )
    choice.add_argument(
        "--group", action="append", choices=GROUPS, help="methods of this group; may be repeated"
    )
    choice.add_argument(
        "--only", action="append", help="a pattern of TRACK/NETWORK/METHOD/SEED; may be repeated"
    )
    choice.add_argument("--seeds", type=int, help="at most so many of each group")
    choice.add_argument(
        "--workers", type=int, default=2, help="runs side by side; 0 runs in this process"
    )
    choice.add_argument("--threads", type=int, default=1, help="of each worker")
    choice.add_argument("--device", default="cpu")
    choice.add_argument(
        "--tiny", action="store_true", help="hardly any images, to try the commands"
    )
    runner = commands.add_parser(
        "run", help="perform what has no result yet", parents=[results, choice]
    )
    runner.add_argument(
        "--data", type=Path, required=True, help="folder with CIFAR-10 as train.tar and val.tar"
    )
    runner.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no run after so many"
    )
    runner.add_argument(
        "--dry-run", action="store_true", help="list the runs that would be performed"
    )
    runner.set_defaults(command=run)
    planner = commands.add_parser("plan", help="how long the grid takes", parents=[results, choice])
    planner.set_defaults(command=plan)
    renderer = commands.add_parser("render", help="write the page", parents=[results])
    renderer.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    renderer.add_argument("--pictures", type=Path, default=ROOT / "docs" / "images")
    renderer.set_defaults(command=render)
    options = parser.parse_args(arguments)
    if getattr(options, "tiny", False) and options.results == RESULTS:
        parser.error("--tiny needs --results: its numbers do not belong among the study's")
    status: int = options.command(options)
    return status
