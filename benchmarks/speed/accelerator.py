"""What fake quantization costs on a GPU: ratios to the float network, gaps, and waits.

    python -m benchmarks.speed.accelerator [--device cuda] [--networks NAME ...] [--dry-run]
    python -m benchmarks.speed.accelerator --device cpu --tiny   # tries the command; no figures

For each network and each arithmetic (float32, TF32, bfloat16): a training step of one path and an
eval forward of the network at W4A4, over those of the float network, in turn. Variants: eager, with
the naive chain of elementary operations, through `torch.compile` (by default, and with one CUDA
graph for all configurations, `reduce-overhead`, each over the float network compiled likewise; only
in the first arithmetic, since compiling takes minutes), and ModelOpt where it is installed.

`step` and `eval` are ratios of the time that passes, `step on device` and `eval on device` of the
time in which the device runs something: the first is above the second where the host is slower.

Before that, a one-shot step and `fit` run while each wait of the host for the device is an error,
and a profile prints the ten longest gaps between two kernels, with what is before and after them,
and the kernels that take longest.
What needs CUDA is left out elsewhere, with a word. Adds a line of JSON to
`benchmarks/results/speed.jsonl`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from torch import Tensor, nn

import anyprec
from benchmarks.common import pages, records
from benchmarks.speed import page
from benchmarks.speed.host_times import oneshot_step
from benchmarks.speed.small_networks import Pair
from benchmarks.speed.step_cost import modelopt, naive_chain, train_step

NETWORKS = ("resnet18", "mobilenetv2_100", "vit_small_patch16_224", "convnext_tiny")
TINY = ("test_resnet", "test_vit")
CLASSES = 100
GAPS = 10
KERNELS = 12
COMPILATIONS: dict[str, dict[str, Any]] = {
    "compiled": {},
    "compiled, reduce-overhead": {"mode": "reduce-overhead"},
}


@dataclass(frozen=True)
class Variant:
    """A network to time, and the one that its times are divided by.

    Attributes:
        module: What runs.
        base: The float network, compiled likewise.
        context: In which both run.
    """

    module: nn.Module
    base: nn.Module
    context: Callable[[], AbstractContextManager[None]] = nullcontext


def main() -> None:
    """Measure, print and record."""
    options = make_parser().parse_args()
    warnings.simplefilter("ignore")
    if options.tiny:
        options.networks, options.batch_size, options.img_size, options.rounds = TINY, 2, 32, 1
    ratios: list[dict[str, Any]] = []
    for name in options.networks:
        case = make_case(name, options)
        print(f"{name}: {check_waits(case, options.device)}", flush=True)
        print(profiled(case, options.device), flush=True)
        ratios += measure(name, case, options)
    record = {
        "kind": "accelerator",
        "batch": options.batch_size,
        "pixels": options.img_size,
        "ratios": ratios,
        "commit": records.commit(),
        "machine": records.machine(options.device),
    }
    print(pages.markdown(page.accelerator_table(record), texts=3))
    if not (options.dry_run or options.tiny):
        records.append(options.results, record)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--img-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--arithmetic", nargs="+", default=list(ARITHMETICS), choices=ARITHMETICS)
    parser.add_argument("--no-compiled", action="store_true", help="saves minutes")
    parser.add_argument("--tiny", action="store_true", help="try the command: records nothing")
    parser.add_argument("--results", type=Path, default=page.RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    return parser


def make_case(name: str, options: argparse.Namespace) -> Pair:
    """A network and its batch, channels last."""
    torch.manual_seed(0)
    arguments = {"img_size": options.img_size} if "vit" in name else {}
    network = timm.create_model(name, num_classes=CLASSES, **arguments)
    network.to(options.device, memory_format=torch.channels_last)
    shape = (options.batch_size, 3, options.img_size, options.img_size)
    images = torch.randn(shape, device=options.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (options.batch_size,), device=options.device)
    model = anyprec.convert(copy.deepcopy(network), example_input=images[:1])
    anyprec.calibrate(model, [images], norm_batches=1)
    model.set_bits(4)
    return Pair(network, model, images, labels)


# Ratios


def measure(name: str, case: Pair, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios of all variants, in every arithmetic."""
    ratios: list[dict[str, Any]] = []
    for arithmetic in options.arithmetic:
        if arithmetic == "TF32" and not options.device.startswith("cuda"):
            print(f"{name}: no TF32, which needs CUDA", flush=True)
            continue
        compiled = not (options.no_compiled or options.tiny) and arithmetic == options.arithmetic[0]
        for label, variant in make_variants(case, options, compiled=compiled).items():
            with ARITHMETICS[arithmetic](options.device), variant.context():
                found = time_variant(variant, case, options)
            ratios.append({"network": name, "arithmetic": arithmetic, "variant": label, **found})
            told = ", ".join(f"{key} {value:.2f}" for key, value in found.items())
            print(f"{name}, {arithmetic}, {label}: {told}", flush=True)
    return ratios


def make_variants(case: Pair, options: argparse.Namespace, *, compiled: bool) -> dict[str, Variant]:
    """The converted network in several ways, and peers."""
    variants = {
        "eager": Variant(case.model, case.network),
        "naive chain": Variant(case.model, case.network, naive_chain),
    }
    with suppress(ImportError):
        variants["ModelOpt"] = Variant(
            modelopt(copy.deepcopy(case.network), case.images), case.network
        )
    if "ModelOpt" not in variants:
        print("no ModelOpt, which is not installed")
    if not compiled:
        return variants
    for label, arguments in COMPILATIONS.items():
        if "mode" in arguments and not options.device.startswith("cuda"):
            print(f"no variant {label!r}, which needs CUDA")
            continue
        torch.compiler.reset()
        variants[label] = Variant(
            torch.compile(case.model, **arguments), torch.compile(case.network, **arguments)
        )
    return variants


def time_variant(variant: Variant, case: Pair, options: argparse.Namespace) -> dict[str, float]:
    """Ratios of a step and of an eval forward to the base, and milliseconds of the base.

    Of times that pass the medians over rounds, in turn; on the device those of one call.
    """
    found: dict[str, float] = {}
    calls: dict[str, Callable[[nn.Module], None]] = {
        "step": lambda module: train_step(module, case.images, case.labels),
        "eval": lambda module: _evaluate(module, case.images),
    }
    for name, call in calls.items():
        run = functools.partial(call, variant.module)
        base = functools.partial(call, variant.base)
        found[name], found[f"float {name}, ms"] = _median_ratio(run, base, options)
        if options.device.startswith("cuda"):
            found[f"{name} on device"] = _device_time(run) / _device_time(base)
    return found


def _median_ratio(
    run: Callable[[], None], base: Callable[[], None], options: argparse.Namespace
) -> tuple[float, float]:
    for _ in range(3):  # compiles, and captures graphs
        run()
        base()
    ratios, of_base = [], []
    for _ in range(options.rounds):
        seconds = _seconds(run, options.device)
        of_base.append(_seconds(base, options.device))
        ratios.append(seconds / of_base[-1])
    return statistics.median(ratios), 1000 * statistics.median(of_base)


def _seconds(run: Callable[[], None], device: str, repeats: int = 3) -> float:
    """Time of a call, until the device has done all of it: the mean of a few."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _device_time(run: Callable[[], None]) -> float:
    """Microseconds in which the device runs something, of one call."""
    total: float = sum(event["dur"] for event in _device_events(run))
    return total


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@torch.no_grad()
def _evaluate(network: nn.Module, images: Tensor) -> None:
    network.eval()
    network(images)


# Arithmetic


@contextmanager
def _float32(device: str) -> Iterator[None]:  # noqa: ARG001 (as the others)
    with _matmul_precision("highest", tf32=False):
        yield


@contextmanager
def _tf32(device: str) -> Iterator[None]:  # noqa: ARG001 (as the others)
    with _matmul_precision("high", tf32=True):
        yield


@contextmanager
def _bfloat16(device: str) -> Iterator[None]:
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        yield


@contextmanager
def _matmul_precision(precision: str, *, tf32: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


ARITHMETICS: dict[str, Callable[[str], AbstractContextManager[None]]] = {
    "float32": _float32,
    "TF32": _tf32,
    "bfloat16": _bfloat16,
}


# Waits and gaps


def check_waits(case: Pair, device: str) -> str:
    """Train while each wait for the device is an error, and say how that went."""
    loader = [(case.images.cpu(), case.labels.cpu())] * 2
    case.model.train()
    trained = copy.deepcopy(case.model)
    runs: dict[str, Callable[[], Any]] = {
        "a one-shot step": oneshot_step(case),
        "fit": lambda: anyprec.fit(trained, loader, epochs=1, norm_batches=0, show_progress=False),
    }
    for run in runs.values():
        run()  # what is made at first use may wait
    if not device.startswith("cuda"):
        return "a one-shot step and fit run; whether they wait is only known on CUDA"
    said = []
    for name, run in runs.items():
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        except RuntimeError as error:
            said.append(f"{name} WAITS FOR THE DEVICE: {error}")
        else:
            said.append(f"{name} does not wait")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "; ".join(said)


def profiled(case: Pair, device: str) -> str:
    """The longest gaps between two kernels in a one-shot step, and its kernels, as tables."""
    if not device.startswith("cuda"):
        return "no gaps between kernels, which need CUDA"
    case.model.train()
    step = oneshot_step(case)
    step()
    events = _device_events(step)
    tables = [pages.markdown(gaps_of(events), texts=2), pages.markdown(kernels_of(events))]
    return "\n\n".join(tables)


def _device_events(run: Callable[[], None]) -> list[dict[str, Any]]:
    """What runs on the device in one call, as events of a trace in Chrome's format."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        return on_device(json.loads(trace.read_text())["traceEvents"])


def on_device(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of a trace that run on the device, in the order in which they start."""
    found = [event for event in events if event.get("cat") in _ON_DEVICE]
    return sorted(found, key=lambda event: event["ts"])


def gaps_of(events: list[dict[str, Any]], count: int = GAPS) -> pd.DataFrame:
    """The longest times in which the device ran nothing, longest first.

    Args:
        events: What runs on the device, in the order in which it starts.
        count: How many.
    """
    gaps = []
    end, previous = None, ""
    for event in events:
        if end is not None and event["ts"] > end:
            gaps.append((event["ts"] - end, previous[:40], event["name"][:40]))
        finish = event["ts"] + event["dur"]
        if end is None or finish > end:
            end, previous = finish, event["name"]
    gaps.sort(reverse=True)
    rows = [(before, after, f"{gap:.0f}") for gap, before, after in gaps[:count]]
    return pd.DataFrame(rows, columns=["after", "before", "gap, us"])


def kernels_of(events: list[dict[str, Any]], count: int = KERNELS) -> pd.DataFrame:
    """The kernels that take longest, all launches together, longest first.

    Args:
        events: What runs on the device.
        count: How many.
    """
    times: dict[str, list[float]] = {}
    for event in events:
        times.setdefault(event["name"][:80], []).append(event["dur"])
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:count]
    rows = [(name, str(len(each)), f"{sum(each):.0f}") for name, each in longest]
    return pd.DataFrame(rows, columns=["kernel", "launches", "us"])


_ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})


if __name__ == "__main__":
    main()
