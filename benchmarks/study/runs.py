"""One run of the study: training by one method, and its evaluation.

The images of the report are in neither training nor search.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
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
from benchmarks.study.any_precision import DescendingWidths, RecursiveDistillation
from benchmarks.study.grid import REVISION, Run, Track
from benchmarks.study.networks import NETWORKS

CLASSES = 10
BUDGETS = {"W4A4": (4, 4), "W3A3": (3, 3), "W2.5A2.5": (2, 3)}
"""Budgets to search, each with two uniform bit-widths: its BitOPs are the mean of theirs."""

_ROUNDING = 0.05
"""Points of top-1 by which one network can differ from itself on another device."""

Batches = list[tuple[Tensor, Tensor]]
Losses = Callable[[Tensor, Tensor], Iterator[Tensor]]
"""The losses of the passes of one step. Each is followed by its backward pass before the next is
asked for."""


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
class Workspace:
    """Where a run works.

    Attributes:
        data: Folder of the images.
        cache: Folder for snapshots, and for networks that later runs load.
        device: That trains.
        starts: Accuracy of the start networks of the runs that are done, by `Run.start_name`.
    """

    data: Path
    cache: Path
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


def perform(run: Run, workspace: Workspace) -> dict[str, Any]:
    """Train and evaluate: one line of the results.

    A one-shot run that is killed goes on from its snapshot when it is performed again.

    Raises:
        ValueError: The start network is not that of the runs of this seed that are done: it was
            trained again, elsewhere.
    """
    track, method, data = run.track, run.method, workspace.images(run.track)
    start = start_network(run, workspace, data)
    report = list(batches(data.report, workspace.report_batch, training=False))
    record: dict[str, Any] = {
        "run": run.name,
        "track": track.name,
        "network": run.network,
        "method": method.name,
        "seed": run.seed,
        "settings": run.settings,
        "machine": machine(workspace.device),
        "commit": commit(),
        "steps": track.steps,
        "passes": track.steps * method.passes,
        "start": _checked_start(run, workspace, accuracy(start, report)),
    }
    torch.manual_seed(run.seed)
    loader = batches(data.train, track.batch_size, training=True, seed=run.seed)
    clock = _Clock()
    if method.kind == "float":
        train_float(start, loader, _recipe(run), epochs=track.epochs)
        record["training"] = clock.lap()
        record["float"] = accuracy(start, report)
    else:
        model, training = trained(start, loader, run, workspace, data)
        clock = _Clock()
        record |= {**training, **evaluate(model, run, data, report)}
    record["evaluation"] = clock.lap()
    return record


def _checked_start(run: Run, workspace: Workspace, top1: float) -> float:
    """The accuracy of a start network, which all runs of its seed must share."""
    expected = workspace.starts.get(run.start_name, top1)
    if abs(top1 - expected) > _ROUNDING:
        msg = f"the start network of {run.start_name} has {top1:.2f} %, "
        msg += f"that of the runs that are done {expected:.2f} %: "
        msg += "remove those runs from the results, or run another seed"
        raise ValueError(msg)
    return top1


# --- Training -------------------------------------------------------------------------------------


def trained(
    start: nn.Module, loader: Any, run: Run, workspace: Workspace, data: Data
) -> tuple[anyprec.ConvertedModel, dict[str, Any]]:
    """The start network converted, calibrated and trained, and what is recorded of that.

    A network that is searched is stored with its record: searching or reporting in another way
    needs no training again.
    """
    name = f"study.{run.name.replace('/', '.')}.{_digest(run.track)}.revision-{REVISION}"
    file = workspace.cache / f"{name}.safetensors"
    notes, snapshot = file.with_suffix(".json"), file.with_suffix(".snapshot")
    if file.exists() and notes.exists():
        stored: dict[str, Any] = json.loads(notes.read_text())
        return anyprec.load(file, start), stored
    clock = _Clock()
    model = converted(start, run, data)
    record = train(model, loader, run, snapshot)
    record |= {"training": clock.lap(), "trained_at": commit()}
    if run.track.searches_for(run.method):
        anyprec.save(model, file, rebuildable=False)
        notes.write_text(json.dumps(record))
    for finished in (snapshot, _trace_of(snapshot)):
        finished.unlink(missing_ok=True)
    return model, record


def start_network(run: Run, workspace: Workspace, data: Data) -> nn.Module:
    """The float network that all methods start from at this seed: trained once, and stored.

    Of runs that train it side by side the first to end stores its own, which the others load too.
    """
    track = run.track
    name = f"study.{track.name}.{run.network}.{run.seed}.{_digest(track)}.pt"
    file = workspace.cache / name
    torch.manual_seed(run.seed)
    network = NETWORKS[run.network](CLASSES)
    network = network.to(workspace.device).to(memory_format=torch.channels_last)
    if not file.exists():
        recipe = _recipe(run).changed(lr=track.start_lr)
        loader = batches(data.train, track.batch_size, training=True, seed=run.seed)
        train_float(network, loader, recipe, epochs=track.start_epochs)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        torch.save(network.state_dict(), unfinished)
        # Unlike a rename, a hard link never replaces the file of a run that ended earlier.
        with contextlib.suppress(FileExistsError):
            file.hardlink_to(unfinished)
        unfinished.unlink()
    network.load_state_dict(torch.load(file, weights_only=True, map_location=workspace.device))
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
        losses = _dedicated(model, method.widths[0])
    elif method.kind == "random paths":
        losses = _random_paths(model, method.passes, seed=run.seed)
    else:
        return _fit(model, loader, run, snapshot)
    descend(model, loader, _recipe(run), epochs=track.epochs, losses=losses)
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
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for parameter in network.parameters():
            (decayed if parameter.ndim > 1 else plain).append(parameter)
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain}]
    optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=True)
    total = epochs * len(loader)
    warmup = round(recipe.warmup * total)

    def share(step: int) -> float:
        """Of the learning rate, in the middle of a step."""
        now = step + 0.5
        if now < warmup:
            return now / warmup
        return (1 + math.cos(math.pi * (now - warmup) / (total - warmup))) / 2

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
    measured = {}
    for path, layer in model.quantized_layers.items():
        if len(layer.candidates.weight) > 1:
            fractions = unstable_fractions(layer.weight, layer.weight_quantizer, margin=margin)
            numbers = {bits: float(fraction) for bits, fraction in fractions.items()}
            measured[path] = layer_instability(numbers)
    return measured


# --- Evaluation -----------------------------------------------------------------------------------


def evaluate(
    model: anyprec.ConvertedModel, run: Run, data: Data, report: Batches
) -> dict[str, Any]:
    """Accuracy of all that the method promises, with stored and with re-estimated statistics."""
    judge = _Judge(model, run, data, report)
    frozen = sorted(model.frozen)
    named = named_configs(model, run)
    random = random_configs(model, run)
    # Before any configuration has statistics of its own, which would favour it in the search.
    searched = search(model, run, data)
    accepted = [entry for entry in searched.values() if entry["config"] is not None]

    # Re-estimated statistics replace the stored ones: those are judged first, for all.
    configs = {name: judge.stored(config) for name, config in named.items()}
    mixed = [judge.stored(config, few=True) for config in random]
    for entry in accepted:
        entry["stored"] = judge.accuracy(entry["config"])

    for name, config in named.items():
        configs[name]["own"] = judge.own_accuracy(config)
    for entry, config in zip(mixed, random, strict=True):
        entry["own"] = judge.own_accuracy(config, few=True)
    for entry in accepted:
        entry["own"] = judge.own_accuracy(entry["config"])
        entry["config"] = entry["config"].to_json()
    return {"frozen": frozen, "configs": configs, "mixed": mixed, "searched": searched}


class _Judge:
    """Accuracy of configurations of one model on the images of the report."""

    def __init__(
        self, model: anyprec.ConvertedModel, run: Run, data: Data, report: Batches
    ) -> None:
        self._model = model
        self._report = report
        self._few = report[: max(1, run.track.mixed_images // len(report[0][0]))]
        torch.manual_seed(run.seed)
        loader = batches(data.train, run.track.batch_size, training=True, seed=run.seed + 1)
        # `islice` would draw one batch more, and with it other random numbers afterwards.
        count = min(run.track.norm_batches, len(loader))
        iterator = iter(loader)
        self._training = [next(iterator) for _ in range(count)]

    def stored(self, config: anyprec.BitConfig, *, few: bool = False) -> dict[str, float]:
        """Accuracy with the statistics that the model has for it, and BitOPs."""
        bitops = anyprec.cost_of(self._model, config).bitops
        return {"stored": self.accuracy(config, few=few), "bitops": bitops}

    def accuracy(self, config: anyprec.BitConfig, *, few: bool = False) -> float:
        """With the statistics that the model has for it."""
        with self._model.using_bits(config):
            return accuracy(self._model, self._few if few else self._report)

    def own_accuracy(self, config: anyprec.BitConfig, *, few: bool = False) -> float:
        """With norm statistics re-estimated for it."""
        anyprec.update_norms(self._model, self._training, config)
        return self.accuracy(config, few=few)


def named_configs(model: anyprec.ConvertedModel, run: Run) -> dict[str, anyprec.BitConfig]:
    """The uniform configurations of a method, and those that are reported beside them."""
    pairs: dict[str, Any] = {str(width): width for width in run.method.widths}
    lowest = {}
    if run.track.serves_all(run.method):
        if {2, 3} <= set(run.track.bits):
            pairs |= {"W2A3": (2, 3), "W3A2": (3, 2)}
        if model.frozen:
            lowest = {path: bits.lowest for path, bits in model.current_candidates.items()}
    configs = {name: uniform(bits, model.candidates) for name, bits in pairs.items()}
    if lowest:
        configs["lowest not frozen"] = anyprec.BitConfig(lowest)
    return configs


def random_configs(model: anyprec.ConvertedModel, run: Run) -> list[anyprec.BitConfig]:
    """Mixed configurations, the same for all methods that serve all, and for all seeds.

    Frozen candidates are drawn too.
    """
    if not run.track.serves_all(run.method):
        return []
    generator = torch.Generator().manual_seed(2024)
    return anyprec.UniformSampler().draw(
        model.candidates, run.track.mixed, generator=generator, instability={}
    )


def search(model: anyprec.ConvertedModel, run: Run, data: Data) -> dict[str, dict[str, Any]]:
    """A configuration for each budget, found on the images for it, where the track asks for it."""
    if not run.track.searches_for(run.method):
        return {}
    images = list(batches(data.search, 128, training=False))
    results: dict[str, dict[str, Any]] = {}
    for name, widths in BUDGETS.items():
        if not set(widths) <= set(run.track.bits):
            continue
        low, high = (anyprec.cost_of(model, width).bitops for width in widths)
        limit = (low + high) / 2
        start = time.perf_counter()
        try:
            result = anyprec.search(
                model,
                images,
                anyprec.Budget(bitops=limit),
                objective="divergence",
                norms=run.track.search_norms,
                max_evaluations=run.track.search_evaluations,
                show_progress=False,
            )
        except anyprec.BudgetError as error:  # what is frozen can leave nothing that fits
            results[name] = {"budget": limit, "config": None, "stored": None, "refused": str(error)}
            continue
        results[name] = {
            "budget": limit,
            "bitops": result.cost.bitops,
            "config": result.config,
            "evaluations": result.evaluations,
            "seconds": time.perf_counter() - start,
        }
    return results


# --- Helpers --------------------------------------------------------------------------------------


class _Clock:
    """Seconds of the wall and of the processor between two laps."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def lap(self) -> dict[str, float]:
        """Since the last one."""
        wall, processor = time.perf_counter(), time.process_time()
        seconds = round(wall - self._wall, 2)
        cpu_seconds = round(processor - self._processor, 2)
        self._wall, self._processor = wall, processor
        return {"seconds": seconds, "cpu_seconds": cpu_seconds}


_OF_TRAINING = (
    "bits",
    "size",
    "images",
    "batch_size",
    "start_epochs",
    "start_lr",
    "epochs",
    "lr",
    "weight_decay",
    "norm_batches",
)


def _digest(track: Track) -> str:
    """A few letters that change with the settings of training."""
    settings = track.settings(shared=True)
    of_training = {name: settings[name] for name in _OF_TRAINING}
    return hashlib.sha256(json.dumps(of_training, sort_keys=True).encode()).hexdigest()[:8]


def _trace_of(snapshot: Path) -> Path:
    return snapshot.with_suffix(".trace.json")


def _read_trace(snapshot: Path) -> dict[str, Any]:
    trace: dict[str, Any] = {}
    file = _trace_of(snapshot)
    if snapshot.exists() and file.exists():
        trace = json.loads(file.read_text())
    return trace
