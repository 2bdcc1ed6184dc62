"""One run of the study: training by one method, and its evaluation on images that neither training nor search saw."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import anyprec
from anyprec.bits import uniform
from anyprec.training.scheduler import layer_instability, unstable_fractions
from benchmarks.common.images import Images, accuracy, batches, load
from benchmarks.common.records import commit, machine
from benchmarks.study.grid import (
    NETWORKS,
    REVISION,
    DescendingWidths,
    RecursiveDistillation,
    Run,
    Track,
)

CLASSES = 10
BUDGETS = {"W4A4": (4, 4), "W3A3": (3, 3), "W2.5A2.5": (2, 3)}
"""Budgets to search, and between which two uniform bit-widths the BitOPs of each lie (in the middle)."""

_ROUNDING = 0.05
"""Points of top-1 by which one network can differ from itself on another device."""

Batches = list[tuple[Tensor, Tensor]]
Losses = Callable[[Tensor, Tensor], Iterator[Tensor]]
"""The losses of the passes of one step, each to be followed by its backward pass before the next is asked for."""


@dataclass(frozen=True)
class Data:
    """Images for training, for search and for the report: no image is in two of them."""

    train: Images
    search: Images
    report: Images


@functools.cache
def cifar10(folder: Path, size: int, train: int, search: int, report: int) -> Data:
    """From `train.tar` and `val.tar`."""
    return Data(
        load(folder / "train.tar", train, size=size),
        load(folder / "train.tar", search, skip=train, size=size),
        load(folder / "val.tar", report, size=size),
    )


@dataclass(frozen=True)
class Place:
    """Where a run works: images, device, and the folder for what is kept between runs and for snapshots.

    Attributes:
        starts: Accuracy of the start networks of the runs that are done, by `Run.start_name`.
    """

    data: Path
    kept: Path
    device: str = "cpu"
    starts: Mapping[str, float] = field(default_factory=dict)

    @property
    def report_batch(self) -> int:
        """Images in a batch of the report: an accelerator needs many to be busy."""
        return 250 if self.device == "cpu" else 2_500

    def images(self, track: Track) -> Data:
        """The images of a track."""
        return cifar10(
            self.data, track.size, track.images, track.search_images, track.report_images
        )


def perform(run: Run, place: Place) -> dict[str, Any]:
    """Train and evaluate: one line of the results.

    A one-shot run that is killed goes on from its snapshot when it is performed again.

    Raises:
        ValueError: The start network is not that of the runs of this seed that are done: it was trained again, elsewhere.
    """
    track, method, data = run.track, run.method, place.images(run.track)
    start = start_network(run, place, data)
    report = list(batches(data.report, place.report_batch, training=False))
    start_top1 = accuracy(start, report)
    expected = place.starts.get(run.start_name, start_top1)
    if abs(start_top1 - expected) > _ROUNDING:
        msg = f"the start network of {run.start_name} has {start_top1:.2f} %, that of the runs that are done {expected:.2f} %: "
        msg += "remove those runs from the results, or run another seed"
        raise ValueError(msg)
    record: dict[str, Any] = {
        "run": run.name,
        "track": track.name,
        "network": run.network,
        "method": method.name,
        "seed": run.seed,
        "settings": run.settings,
        "machine": machine(place.device),
        "commit": commit(),
        "steps": track.steps,
        "passes": track.steps * method.passes,
        "start": start_top1,
    }
    torch.manual_seed(run.seed)
    loader = batches(data.train, track.batch_size, training=True, seed=run.seed)
    clock = _Clock()
    if method.kind == "float":
        train_float(start, loader, _recipe(run), epochs=track.epochs)
        return {
            **record,
            "training": clock.lap(),
            "float": accuracy(start, report),
            "evaluation": clock.lap(),
        }
    model, training = trained(start, loader, run, place, data)
    clock = _Clock()
    record |= {**training, **evaluate(model, run, data, report)}
    record["evaluation"] = clock.lap()
    return record


# --- Training -----------------------------------------------------------------------------------------------------


def trained(
    start: nn.Module, loader: Any, run: Run, place: Place, data: Data
) -> tuple[anyprec.ConvertedModel, dict[str, Any]]:
    """The start network converted, calibrated and trained, and what is recorded of that.

    A network that is searched is kept with its record: to search or to report in another way needs no training again.
    """
    name = (
        f"study.{run.name.replace('/', '.')}.{_digest(run.track)}.revision-{REVISION}.safetensors"
    )
    kept = place.kept / name
    notes, snapshot = kept.with_suffix(".json"), kept.with_suffix(".snapshot")
    if kept.exists() and notes.exists():
        found: dict[str, Any] = json.loads(notes.read_text())
        return anyprec.load(kept, start), found
    clock = _Clock()
    model = converted(start, run, data)
    record = {
        **train(model, loader, run, snapshot),
        "training": clock.lap(),
        "trained_at": commit(),
    }
    if run.method.searches(run.track):
        anyprec.save(model, kept, rebuildable=False)
        notes.write_text(json.dumps(record))
    for left in (snapshot, _trace_of(snapshot)):
        left.unlink(missing_ok=True)
    return model, record


def start_network(run: Run, place: Place, data: Data) -> nn.Module:
    """The float network that all methods start from at this seed: trained once, and kept.

    Of runs that train it side by side the first to end keeps its own, which the others take too.
    """
    track = run.track
    kept = place.kept / f"study.{track.name}.{run.network}.{run.seed}.{_digest(track)}.pt"
    torch.manual_seed(run.seed)
    network = NETWORKS[run.network](CLASSES).to(place.device).to(memory_format=torch.channels_last)
    if kept.exists():
        network.load_state_dict(torch.load(kept, weights_only=True, map_location=place.device))
        return network
    recipe = _recipe(run).changed(lr=track.start_lr)
    loader = batches(data.train, track.batch_size, training=True, seed=run.seed)
    train_float(network, loader, recipe, epochs=track.start_epochs)
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(f".{os.getpid()}")
    torch.save(network.state_dict(), unfinished)
    with contextlib.suppress(FileExistsError):
        kept.hardlink_to(unfinished)
    unfinished.unlink()
    network.load_state_dict(torch.load(kept, weights_only=True, map_location=place.device))
    return network


def converted(start: nn.Module, run: Run, data: Data) -> anyprec.ConvertedModel:
    """The start network with the candidates of a method, calibrated."""
    track, method = run.track, run.method
    widths = method.widths
    if method.kind == "dedicated" and widths[0] < 3:
        # Depthwise convolutions have no candidate below 3 bits, here as in the shared network.
        widths = (*widths, 3)
    example = torch.zeros(1, *data.train[0].shape[1:])
    model = anyprec.convert(copy.deepcopy(start), widths, example_input=example, **method.convert)
    anyprec.calibrate(model, batches(data.train, track.batch_size, training=True, seed=run.seed))
    return model


def train(model: anyprec.ConvertedModel, loader: Any, run: Run, snapshot: Path) -> dict[str, Any]:
    """Train a converted network by the method of the run."""
    method, track = run.method, run.track
    if method.kind == "dedicated":
        descend(
            model,
            loader,
            _recipe(run),
            epochs=track.epochs,
            losses=_dedicated(model, method.widths[0]),
        )
    elif method.kind == "random paths":
        losses = _random_paths(model, method.passes, seed=run.seed)
        descend(model, loader, _recipe(run), epochs=track.epochs, losses=losses)
    else:
        return _fit(model, loader, run, snapshot)
    anyprec.update_norms(model, loader, batches=track.norm_batches)
    return {}


def train_float(network: nn.Module, loader: Any, recipe: anyprec.Recipe, *, epochs: int) -> None:
    """Train a float network in place."""

    def losses(images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        yield nn.functional.cross_entropy(network(images), labels)

    descend(network, loader, recipe, epochs=epochs, losses=losses)


def descend(
    network: nn.Module, loader: Any, recipe: anyprec.Recipe, *, epochs: int, losses: Losses
) -> None:
    """The optimizer, schedule and clipping of `anyprec.fit`, with other losses."""
    if isinstance(network, anyprec.ConvertedModel):
        groups = anyprec.param_groups(network, weight_decay=recipe.weight_decay)
    else:
        weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
        groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=True)
    total = epochs * len(loader)
    warmup = round(recipe.warmup * total)

    def share(step: int) -> float:
        """Of the learning rate, in the middle of a step."""
        now = step + 0.5
        return (
            now / warmup
            if now < warmup
            else (1 + math.cos(math.pi * (now - warmup) / (total - warmup))) / 2
        )

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    device = next(network.parameters()).device
    network.train()
    for _ in range(epochs):
        for images, labels in loader:
            for loss in losses(images.to(device), labels.to(device)):
                loss.backward()
            recipe.clip_gradients(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    network.eval()


def _dedicated(model: anyprec.ConvertedModel, width: int) -> Losses:
    def losses(images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        with model.using_bits(width):
            yield nn.functional.cross_entropy(model(images), labels)

    return losses


def _random_paths(model: anyprec.ConvertedModel, count: int, *, seed: int) -> Losses:
    """All paths are drawn, and learn from the labels alone."""
    generator = torch.Generator().manual_seed(seed)
    sampler, candidates = anyprec.UniformSampler(), model.candidates

    def losses(images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        for config in sampler.draw(candidates, count, generator=generator, instability={}):
            with model.using_bits(config):
                yield nn.functional.cross_entropy(model(images), labels) / count

    return losses


def _fit(model: anyprec.ConvertedModel, loader: Any, run: Run, snapshot: Path) -> dict[str, Any]:
    method, track = run.method, run.track
    recipe, criterion = _recipe(run), None
    if method.kind == "any-precision":
        recipe = recipe.changed(
            random_paths=method.passes - 1, sampler=DescendingWidths(method.widths)
        )
        criterion = RecursiveDistillation(method.passes)
    trace: dict[str, Any] = _read_trace(snapshot)
    resumed = snapshot.exists()

    def note(epoch: anyprec.EpochRecord) -> None:
        if method.kind == "one-shot":
            trace[str(epoch.epoch)] = {
                "instability": instability(model),
                "frozen": sorted(model.frozen),
            }
            _trace_of(snapshot).write_text(json.dumps(trace))

    history = anyprec.fit(
        model,
        loader,
        epochs=track.epochs,
        recipe=recipe,
        criterion=criterion,
        norm_batches=track.norm_batches,
        seed=run.seed,
        snapshot=snapshot,
        snapshot_steps=200,
        show_progress=False,
        on_epoch_end=note,
    )
    return {
        "resumed": resumed,
        "losses": [list(epoch.losses) for epoch in history],
        "trace": [trace[key] for key in sorted(trace, key=int)],
    }


def _recipe(run: Run) -> anyprec.Recipe:
    track = run.track
    recipe = anyprec.Recipe(lr=run.method.rate * track.lr, weight_decay=track.weight_decay)
    return recipe.changed(**run.method.recipe)


def instability(model: anyprec.ConvertedModel) -> dict[str, float]:
    """The measure that the bit-width scheduler ranks layers by."""
    margin = anyprec.BitWidthScheduler().margin
    layers = {
        path: layer
        for path, layer in model.quantized_layers.items()
        if len(layer.candidates.weight) > 1
    }
    return {
        path: layer_instability(
            {bits: float(part) for bits, part in unstable_fractions(layer.weight, layer.weight_quantizer, margin=margin).items()}
        )
        for path, layer in layers.items()
    }  # fmt: skip


# --- Evaluation ---------------------------------------------------------------------------------------------------


def evaluate(
    model: anyprec.ConvertedModel, run: Run, data: Data, report: Batches
) -> dict[str, Any]:
    """Accuracy of everything that the method promises, with the statistics that it stores and with re-estimated ones."""
    track, method = run.track, run.method
    judge = _Judge(model, run, data, report)
    found: dict[str, Any] = {"stored": {}, "frozen": sorted(model.frozen)}
    configs: dict[str, anyprec.BitConfig] = {
        str(width): uniform(width, model.candidates) for width in method.widths
    }
    mixed: list[anyprec.BitConfig] = []
    searched: dict[str, dict[str, Any]] = {}
    if method.is_whole(track):
        pairs = {"W2A3": (2, 3), "W3A2": (3, 2)}
        configs |= {
            name: uniform(pair, model.candidates)
            for name, pair in pairs.items()
            if set(pair) <= set(track.bits)
        }
        if model.frozen:
            floors = {path: model.current_candidates[path].lowest for path in model.candidates}
            configs["lowest not frozen"] = anyprec.BitConfig(floors)
        mixed = random_configs(model, track.mixed)
        # Before any configuration has statistics of its own, which would favour it in the search.
        searched = search(model, run, data) if method.searches(track) else {}
    stored = {name: judge.accuracy(config) for name, config in configs.items()}
    mixed_stored = [judge.accuracy(config, few=True) for config in mixed]
    for entry in searched.values():
        entry["stored"] = judge.accuracy(entry["config"]) if entry["config"] is not None else None
    found["configs"] = {
        name: {"stored": stored[name], "own": judge.own_accuracy(config), "bitops": anyprec.cost_of(model, config).bitops}
        for name, config in configs.items()
    }  # fmt: skip
    found["mixed"] = [
        {
            "stored": before,
            "own": judge.own_accuracy(config, few=True),
            "bitops": anyprec.cost_of(model, config).bitops,
        }
        for config, before in zip(mixed, mixed_stored, strict=True)
    ]
    for entry in searched.values():
        config = entry["config"]
        if config is not None:
            entry |= {"own": judge.own_accuracy(config), "config": config.to_json()}
    return {**found, "searched": searched}


class _Judge:
    """Accuracy of configurations of one model on the images of the report."""

    def __init__(
        self, model: anyprec.ConvertedModel, run: Run, data: Data, report: Batches
    ) -> None:
        self._model = model
        self._report = report
        self._few = report[: max(1, run.track.mixed_images // len(report[0][0]))]
        torch.manual_seed(run.seed)
        loader = iter(batches(data.train, run.track.batch_size, training=True, seed=run.seed + 1))
        count = min(run.track.norm_batches, len(data.train[0]) // run.track.batch_size)
        self._training = [next(loader) for _ in range(count)]

    def accuracy(self, config: anyprec.BitConfig, *, few: bool = False) -> float:
        """With the statistics that the model has for it."""
        with self._model.using_bits(config):
            return accuracy(self._model, self._few if few else self._report)

    def own_accuracy(self, config: anyprec.BitConfig, *, few: bool = False) -> float:
        """With norm statistics re-estimated for it."""
        anyprec.update_norms(self._model, self._training, config)
        return self.accuracy(config, few=few)


def random_configs(model: anyprec.ConvertedModel, count: int) -> list[anyprec.BitConfig]:
    """Mixed configurations, the same for every method and seed that has these candidates; frozen ones are drawn too."""
    generator = torch.Generator().manual_seed(2024)
    return anyprec.UniformSampler().draw(
        model.candidates, count, generator=generator, instability={}
    )


def search(model: anyprec.ConvertedModel, run: Run, data: Data) -> dict[str, dict[str, Any]]:
    """A configuration for each budget, found on the images for it."""
    held = list(batches(data.search, 128, training=False))
    found: dict[str, dict[str, Any]] = {}
    for name, widths in BUDGETS.items():
        if not set(widths) <= set(run.track.bits):
            continue
        limit = sum(anyprec.cost_of(model, width).bitops for width in widths) / 2
        start = time.perf_counter()
        try:
            result = anyprec.search(
                model,
                held,
                anyprec.Budget(bitops=limit),
                objective="divergence",
                norms=run.track.search_norms,
                max_evaluations=run.track.search_evaluations,
                show_progress=False,
            )
        except anyprec.BudgetError as error:  # what is frozen can leave nothing that fits
            found[name] = {"budget": limit, "config": None, "refused": str(error)}
            continue
        found[name] = {
            "budget": limit,
            "bitops": result.cost.bitops,
            "config": result.config,
            "evaluations": result.evaluations,
            "seconds": time.perf_counter() - start,
        }
    return found


# --- Helpers ------------------------------------------------------------------------------------------------------


class _Clock:
    """Seconds of the wall and of the processor between two laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter(), time.process_time()

    def lap(self) -> dict[str, float]:
        """Since the last one."""
        now = time.perf_counter(), time.process_time()
        wall, cpu = (after - before for after, before in zip(now, self._last, strict=True))
        self._last = now
        return {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}


_OF_TRAINING = ("bits", "size", "images", "batch_size", "start_epochs", "start_lr", "epochs", "lr", "weight_decay",
                "norm_batches")  # fmt: skip


def _digest(track: Track) -> str:
    """A few letters that change with the settings of training."""
    import hashlib  # noqa: PLC0415 (only here)

    every = track.settings(shared=True)
    settings = {name: every[name] for name in _OF_TRAINING}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _trace_of(snapshot: Path) -> Path:
    return snapshot.with_suffix(".trace.json")


def _read_trace(snapshot: Path) -> dict[str, Any]:
    path = _trace_of(snapshot)
    found: dict[str, Any] = (
        json.loads(path.read_text()) if snapshot.exists() and path.exists() else {}
    )
    return found
