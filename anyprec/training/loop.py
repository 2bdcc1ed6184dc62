"""The loop of a training run: epochs, records, snapshots. `fit.py` sets it up."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anyprec.errors import TrainingError
from anyprec.model.converted import ConvertedModel
from anyprec.runtime.batches import Batch, images_of
from anyprec.runtime.processes import (
    is_first_process,
    of_all_processes,
    process_count,
    process_rank,
)
from anyprec.runtime.progress import Bar
from anyprec.training.learner import Learner
from anyprec.training.randomness import RandomStates
from anyprec.training.snapshot import read_snapshot, write_snapshot


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training.

    Attributes:
        epoch: From 0.
        losses: Mean unweighted loss of the max path, then of each random path.
        images_per_second: Images trained, each on all paths, per second; of this process in a
            distributed run.
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
    """How far a run is.

    Attributes:
        epoch: From 0.
        batches: Of this epoch, trained already.
        totals: Of the losses of each path in this epoch.
        steps: In this epoch.
        history: Of the epochs that are done.
    """

    epoch: int = 0
    batches: int = 0
    totals: list[float] = field(default_factory=list)
    steps: int = 0
    history: list[EpochRecord] = field(default_factory=list)

    def add_step(self, losses: list[float], batches: int) -> None:
        """Count an optimizer step on some batches."""
        totals = self.totals or [0.0] * len(losses)
        self.totals = [total + loss for total, loss in zip(totals, losses, strict=True)]
        self.batches += batches
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Position:
        """The position that had this `state_dict`."""
        history = [EpochRecord(**record) for record in state["history"]]
        return cls(**{**state, "history": history})


class Run:
    """One call of `fit`.

    Args:
        learner: What is trained.
        loader: Batches, iterated anew each epoch.
        batches: Their number.

    Attributes:
        position: How far the run is.
    """

    def __init__(self, learner: Learner, loader: Iterable[Batch], batches: int) -> None:
        self.position = Position()
        self._learner = learner
        self._model = learner.model
        self._settings = learner.settings
        self._loader = loader
        self._batches = batches
        self._randomness = RandomStates(loader)

    def train(self, bar: Bar, on_epoch_end: Callable[[EpochRecord], None] | None) -> None:
        """Train to the end of the last epoch."""
        bar.advance(self._learner.oneshot.steps_done)
        while self.position.epoch < self._settings.epochs:
            record = self._run_epoch(bar)
            if on_epoch_end is not None:
                on_epoch_end(record)
            self._write()  # after the callback, which may draw random numbers

    def resume(self, file: Path) -> None:
        """Go on from a snapshot.

        Raises:
            TrainingError: It is that of another run.
            CheckpointError: It cannot be read.
        """
        state = read_snapshot(file)
        identity = state.get("identity") if isinstance(state, dict) else None
        differing = _differing_keys(self._identity(), identity)
        if differing:
            msg = f"the snapshot {str(file)!r} is that of another run, which differs in "
            msg += f"{', '.join(differing)}: delete it to begin anew, or name another file"
            raise TrainingError(msg)
        self._learner.load_state_dict(state)
        self.position = Position.from_state_dict(state["position"])
        self._randomness.load_state_dict(state["randomness"][process_rank()])

    def _run_epoch(self, bar: Bar) -> EpochRecord:
        """Train to the end of the present epoch."""
        self._model.train()
        images, start = 0, time.perf_counter()
        for group in self._groups():
            losses = self._learner.step(group)
            self.position.add_step(losses, len(group))
            images += sum(len(images_of(batch)) for batch in group)
            speed = images / (time.perf_counter() - start)
            bar.advance(note=_note(self.position.epoch, losses, speed, len(self._model.frozen)))
            if self._learner.oneshot.steps_done % self._settings.snapshot_steps == 0:
                self._write()
        seconds = time.perf_counter() - start
        _reduce_norms(self._model)
        return self._end_epoch(seconds, images / seconds)

    def _end_epoch(self, seconds: float, speed: float) -> EpochRecord:
        done = self.position
        means = tuple(total / done.steps for total in done.totals)
        record = EpochRecord(done.epoch, means, speed, seconds, len(self._model.frozen))
        self.position = Position(done.epoch + 1, history=[*done.history, record])
        self._randomness.leave_epoch()
        return record

    def _groups(self) -> Iterator[list[Batch]]:
        """The batches of the rest of the epoch, those of one optimizer step together."""
        sampler: Any = getattr(self._loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.position.epoch)
        self._randomness.enter_epoch()
        iterator = iter(self._loader)
        for _ in itertools.islice(iterator, self.position.batches):
            pass  # trained before the run was resumed
        self._randomness.go_on()
        while group := list(itertools.islice(iterator, self._settings.accumulation)):
            yield group

    def _write(self) -> None:
        """Write a snapshot, if one is wanted; all processes take part, and the first one writes."""
        if self._settings.snapshot is None:
            return
        _reduce_norms(self._model)
        state = {
            "identity": self._identity(),
            "position": self.position.state_dict(),
            **self._learner.state_dict(),
            "randomness": of_all_processes(self._randomness.state_dict()),
        }
        if is_first_process():
            write_snapshot(self._settings.snapshot, state)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        recipe = {}
        for name, value in vars(self._learner.oneshot.recipe).items():
            if name != "conversion":
                is_plain = value is None or isinstance(value, (int, float, str))
                recipe[name] = value if is_plain else repr(value)
        candidates = self._model.candidates
        return {
            "epochs": self._settings.epochs,
            "batches": self._batches,
            "accumulation": self._settings.accumulation,
            "seed": self._settings.seed,
            "processes": process_count(),
            "recipe": recipe,
            "layers": {path: str(layer) for path, layer in candidates.items()},
        }


def _differing_keys(expected: dict[str, Any], identity: Any) -> list[str]:
    if identity == expected:
        return []
    if not isinstance(identity, dict):
        return sorted(expected)
    keys = expected.keys() | identity.keys()
    return sorted(key for key in keys if identity.get(key) != expected.get(key))


def _reduce_norms(model: ConvertedModel) -> None:
    """Average running statistics over all processes."""
    if process_count() > 1:
        from timm.utils.distributed import distribute_bn  # noqa: PLC0415 (timm is slow to import)

        distribute_bn(model, process_count(), reduce=True)


def _note(epoch: int, losses: list[float], speed: float, frozen: int) -> str:
    """What the progress bar says."""
    note = f"epoch {epoch + 1}, loss max {losses[0]:.3f}"
    if len(losses) > 1:
        note += f", random {sum(losses[1:]) / len(losses[1:]):.3f}"
    if frozen > 0:
        note += f", {frozen} layers frozen"
    return f"{note}, {speed:.0f} images/s"
