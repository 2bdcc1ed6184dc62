"""The loop of a training run: epochs, optimizer steps, snapshots. `fit.py` sets it up."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.errors import TrainingError
from anyprec.model.converted import ConvertedModel
from anyprec.runtime.batches import Batch, device_of, images_of, labels_of
from anyprec.runtime.processes import (
    is_first_process,
    of_all_processes,
    process_count,
    process_rank,
)
from anyprec.runtime.progress import Bar
from anyprec.training.oneshot import Criterion, OneShot
from anyprec.training.recipe import Recipe
from anyprec.training.snapshot import (
    capture_randomness,
    read_snapshot,
    restore_randomness,
    write_snapshot,
)


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training.

    Attributes:
        epoch: From 0.
        losses: Mean unweighted loss of the max path, then of each random path.
        images_per_second: Images trained, each on all paths, per second; of this process in a distributed run.
        seconds: Time of the epoch.
        frozen: Layers whose lowest candidates are frozen at its end.
    """

    epoch: int
    losses: tuple[float, ...]
    images_per_second: float
    seconds: float
    frozen: int = 0


@dataclass
class Position:
    """How far a run is."""

    epoch: int = 0
    batches: int = 0  # of the epoch, trained already
    totals: list[float] = field(default_factory=list)  # of the losses in this epoch
    steps: int = 0  # in this epoch
    history: list[EpochRecord] = field(default_factory=list)


@dataclass
class Run:
    """One call of `fit`."""

    model: ConvertedModel
    network: nn.Module
    oneshot: OneShot
    optimizers: list[torch.optim.Optimizer]
    schedules: list[Any]
    recipe: Recipe
    criterion: Criterion
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None
    autocast: torch.dtype | None
    accumulation: int
    batches: int
    loader: Iterable[Batch]
    average: Any
    identity: dict[str, Any]
    snapshot: Path | None
    snapshot_steps: int
    position: Position = field(default_factory=Position)
    epoch_start: dict[str, Any] | None = None
    """Random states at the beginning of the present epoch."""
    resumed: dict[str, Any] | None = None
    """Random states where a resumed run goes on."""

    def run_epoch(self, bar: Bar) -> EpochRecord:
        """Train to the end of the present epoch."""
        self.model.train()
        position = self.position
        images_seen, start = 0, time.perf_counter()
        for group in self._groups():
            losses = self.run_step(group)
            images_seen += sum(len(images_of(batch)) for batch in group)
            position.batches += len(group)
            position.totals = [
                a + b for a, b in zip(position.totals or [0.0] * len(losses), losses, strict=True)
            ]
            position.steps += 1
            speed = images_seen / (time.perf_counter() - start)
            bar.advance(note=_note(position.epoch, losses, speed, len(self.model.frozen)))
            if self.oneshot.steps_done % self.snapshot_steps == 0:
                self.write()
        seconds = time.perf_counter() - start
        means = tuple(total / position.steps for total in position.totals)
        record = EpochRecord(
            position.epoch, means, images_seen / seconds, seconds, len(self.model.frozen)
        )
        _reduce_norms(self.model)
        self.position = Position(position.epoch + 1, history=[*position.history, record])
        self.epoch_start = None
        return record

    def run_step(self, group: Sequence[Batch]) -> list[float]:
        """One optimizer step on some batches; returns the unweighted loss of every path, mean over the batches."""
        # The schedule is read in the middle of each step, so that neither the first nor the last one is lost.
        for schedule in self.schedules:
            schedule.step_update(self.oneshot.steps_done + 0.5)
        losses = []
        for number, batch in enumerate(group):
            images, labels = self._prepared(batch)
            for path in self.oneshot.paths(images):
                last = path.is_last and number == len(group) - 1
                with self._synchronising(last=last):
                    with self._autocasting(images.device):
                        loss = path.loss(self.network(images), labels, self.criterion)
                    (loss / len(group)).backward()
                losses.append(loss.detach() / path.weight / len(group))
        means = torch.stack(losses).double().reshape(len(group), -1).sum(dim=0).tolist()
        self._require_finite(means)
        self.recipe.clip_gradients(*self.optimizers)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.oneshot.step()
        if self.average is not None:
            self.average.update(self.model, step=self.oneshot.steps_done)
        return means

    def write(self) -> None:
        """Write a snapshot, if one is wanted; all processes take part, and the first one writes."""
        if self.snapshot is None:
            return
        _reduce_norms(self.model)
        now = capture_randomness(self._generators())
        state = {
            "identity": self._identity(),
            "position": {
                **vars(self.position),
                "history": [asdict(record) for record in self.position.history],
            },
            "model": dict(self.model.state_dict()),
            "average": None if self.average is None else dict(self.average.module.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "oneshot": self.oneshot.state_dict(),
            "randomness": of_all_processes({"start": self.epoch_start, "now": now}),
        }
        if is_first_process():
            write_snapshot(self.snapshot, state)

    def resume(self) -> None:
        """Go on from the snapshot.

        Raises:
            TrainingError: It is that of another run.
        """
        state = read_snapshot(self.snapshot)  # type: ignore[arg-type]  # the caller looked
        own, found = self._identity(), state.get("identity") if isinstance(state, dict) else None
        if own != found:
            differing = sorted(
                key for key in own if not isinstance(found, dict) or found.get(key) != own[key]
            )
            msg = f"the snapshot {str(self.snapshot)!r} is that of another run, which differs in {', '.join(differing)}: "
            msg += "delete it to begin anew, or name another file"
            raise TrainingError(msg)
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        for optimizer, one in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(one)
        self.oneshot.load_state_dict(state["oneshot"])
        position = state["position"]
        history = [
            EpochRecord(**{**record, "losses": tuple(record["losses"])})
            for record in position["history"]
        ]
        self.position = Position(**{**position, "history": history})
        randomness = state["randomness"][process_rank()]
        self.epoch_start, self.resumed = randomness["start"], randomness["now"]

    def _groups(self) -> Iterator[list[Batch]]:
        """The batches of the rest of the epoch, those of one optimizer step together."""
        sampler: Any = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.position.epoch)
        if self.epoch_start is not None:
            restore_randomness(self.epoch_start, self._generators())
        elif self.resumed is not None:
            restore_randomness(self.resumed, self._generators())
            self.resumed = None
        self.epoch_start = capture_randomness(self._generators())
        iterator = iter(self.loader)
        for _ in itertools.islice(iterator, self.position.batches):
            pass  # trained before the run was resumed
        if self.resumed is not None:
            restore_randomness(self.resumed, self._generators())
            self.resumed = None
        while group := list(itertools.islice(iterator, self.accumulation)):
            yield group

    def _prepared(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = device_of(self.model)
        images, labels = images_of(batch).to(device), labels_of(batch).to(device)
        return (images, labels) if self.mixup is None else self.mixup(images, labels)

    def _autocasting(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)

    def _synchronising(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are reduced over the processes in the last backward pass of a step only."""
        no_sync = getattr(self.network, "no_sync", None)
        return contextlib.nullcontext() if last or no_sync is None else no_sync()

    def _require_finite(self, losses: list[float]) -> None:
        broken = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
        if not broken:
            return
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        which = f"random path {broken[0]}" if broken[0] else "max path"
        msg = f"the loss of the {which} is {losses[broken[0]]} at step {self.oneshot.steps_done}: lower the learning "
        msg += "rate, or check the data; the weights are those of the last finite step"
        raise TrainingError(msg)

    def _generators(self) -> list[torch.Generator]:
        """Generators that the loader draws from."""
        owners = (self.loader, getattr(self.loader, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        settings = {
            name: _plain(value) for name, value in vars(self.recipe).items() if name != "conversion"
        }
        layers = {path: str(candidates) for path, candidates in self.model.candidates.items()}
        return {**self.identity, "processes": process_count(), "recipe": settings, "layers": layers}


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float, str)) else repr(value)


def _reduce_norms(model: ConvertedModel) -> None:
    """Average running statistics over all processes."""
    if process_count() > 1:
        from timm.utils.distributed import distribute_bn  # noqa: PLC0415 (timm is slow to import)

        distribute_bn(model, process_count(), reduce=True)


def _note(epoch: int, losses: list[float], speed: float, frozen: int) -> str:
    random = f", random {sum(losses[1:]) / len(losses[1:]):.3f}" if len(losses) > 1 else ""
    some = f", {frozen} layers frozen" if frozen else ""
    return f"epoch {epoch + 1}, loss max {losses[0]:.3f}{random}{some}, {speed:.0f} images/s"
