"""How long the study takes: from the runs that are done, or else from a few steps here."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

import anyprec
from benchmarks.study.grid import Run, Track
from benchmarks.study.networks import NETWORKS
from benchmarks.study.runs import BUDGETS, CLASSES

OVERHEAD = 1.2
"""Of a step over its forward-backward passes: optimizer, clipping, images, distillation."""


def show_plan(
    runs: Sequence[Run], done: Mapping[str, dict[str, Any]], options: argparse.Namespace
) -> None:
    """Print the runs and their hours, in time of a processor that has no other work.

    Args:
        runs: Those that were selected.
        done: Records of the finished ones, by name.
        options: Of the command line.
    """
    torch.set_num_threads(options.threads)
    speeds: dict[tuple[str, str], dict[str, float]] = {}
    rows = []
    for run in runs:
        key = run.track.name, run.network
        if key not in speeds:
            speeds[key] = measured_speed(run.track, run.network, device=options.device)
            shown = (f"{name} {1 / seconds:.0f}" for name, seconds in speeds[key].items())
            print(f"{'/'.join(key)}: images/s {', '.join(shown)}", flush=True)
        if run.name in done:
            record = done[run.name]
            hours = record["training"]["cpu_seconds"] + record["evaluation"]["cpu_seconds"]
        else:
            hours = estimate(run, speeds[key])
        group = f"{'/'.join(key)}, {run.method.group}"
        rows.append((group, hours / 3600, run.name not in done))
    plan = pd.DataFrame(rows, columns=["group", "hours", "waits"])
    for group, of_group in plan.groupby("group", sort=False):
        count, waiting, hours = len(of_group), of_group["waits"].sum(), of_group["hours"].sum()
        print(f"{group}: {count} runs, {waiting} to do, {hours:.2f} h")
    workers = max(1, options.workers)
    left = plan.loc[plan["waits"], "hours"]
    print(
        f"{len(plan)} runs, {plan['hours'].sum():.1f} h; "
        f"left {len(left)}, {left.sum() / workers:.1f} h with {workers} workers"
    )


def estimate(run: Run, speed: Mapping[str, float]) -> float:
    """Seconds of a run, without those of the start network that it may have to train first."""
    track, method = run.track, run.method
    one_pass = speed["float"] if method.kind == "float" else speed["quantized"]
    seconds = OVERHEAD * track.steps * track.batch_size * method.passes * one_pass
    # Images that pass forward, in eval mode: for norm statistics, for the report, in the search.
    norm_images = track.norm_batches * track.batch_size
    configs = len(method.widths)
    images = len(method.widths) ** 2 * norm_images
    if track.serves_all(method):
        configs += 3
        images += track.mixed * (norm_images + 2 * track.mixed_images)
    if track.searches_for(method):
        search_images = track.search_evaluations * track.search_images
        images += len(BUDGETS) * (search_images + norm_images + 2 * track.report_images)
    images += configs * (norm_images + 2 * track.report_images) + track.report_images
    return seconds + images * speed["evaluation"]


def measured_speed(track: Track, network: str, *, device: str) -> dict[str, float]:
    """Seconds for an image: a float training pass, a quantized one, a quantized forward pass."""
    model = NETWORKS[network](CLASSES).to(device).to(memory_format=torch.channels_last)
    shape = track.batch_size, 3, track.size, track.size
    images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(track.batch_size, dtype=torch.int64, device=device)

    def train() -> None:
        model.train()
        nn.functional.cross_entropy(model(images), labels).backward()
        model.zero_grad()

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()
        model(images)

    speed = {"float": _seconds(train, device) / len(images)}
    converted = anyprec.convert(model, track.bits, example_input=images[:1])
    anyprec.calibrate(converted, [images])
    converted.set_bits(4)
    speed["quantized"] = _seconds(train, device) / len(images)
    speed["evaluation"] = _seconds(evaluate, device) / len(images)
    return speed


def _seconds(call: Callable[[], None], device: str, *, times: int = 5) -> float:
    """The median of several calls.

    On a CPU in time of the processor, which other work on it hardly changes.
    """
    on_cpu = device == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    call()
    measured = []
    for _ in range(times):
        start = clock()
        call()
        if not on_cpu:
            torch.cuda.synchronize()
        measured.append(clock() - start)
    median = statistics.median(measured)
    return median / torch.get_num_threads() if on_cpu else median
