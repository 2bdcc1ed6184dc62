"""The random generators of a training run, so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class RandomStates:
    """The states of all generators at the beginning of the present epoch and where a run goes on.

    A resumed run goes through the batches of its epoch again, from the state at the beginning, so
    that the loader draws the same order. Then it takes the state of the moment of the snapshot.

    Args:
        loader: Generators that it or its sampler draws from are saved too.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._epoch_start: dict[str, Any] | None = None
        self._resumed: dict[str, Any] | None = None

    def enter_epoch(self) -> None:
        """Call this before the loader is iterated."""
        if self._epoch_start is not None:
            restore_randomness(self._epoch_start, self._generators())
        else:
            self.go_on()
        self._epoch_start = capture_randomness(self._generators())

    def go_on(self) -> None:
        """Take the state of the snapshot, if the run was resumed; the first call does it."""
        if self._resumed is not None:
            restore_randomness(self._resumed, self._generators())
            self._resumed = None

    def leave_epoch(self) -> None:
        """Forget the beginning of the epoch: the next one begins where the generators are."""
        self._epoch_start = None

    def state_dict(self) -> dict[str, Any]:
        """The states at the beginning of the epoch, if one is under way, and now."""
        return {"start": self._epoch_start, "now": capture_randomness(self._generators())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict`; it takes effect when the next epoch is entered."""
        self._epoch_start, self._resumed = state["start"], state["now"]

    def _generators(self) -> list[torch.Generator]:
        return generators_of(self._loader)


@contextmanager
def keeping_randomness(loader: Iterable[Any]) -> Iterator[None]:
    """Leave all generators, those of `loader` too, as if the block had not run."""
    generators = generators_of(loader)
    state = capture_randomness(generators)
    try:
        yield
    finally:
        restore_randomness(state, generators)


def generators_of(loader: Iterable[Any]) -> list[torch.Generator]:
    """Generators of the loader and its sampler, each one once."""
    generators: dict[int, torch.Generator] = {}
    for owner in (loader, getattr(loader, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            generators[id(generator)] = generator
    return list(generators.values())


def capture_randomness(generators: Iterable[torch.Generator]) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, and of others in this order."""
    name, keys, *numpy_rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        # A tensor takes the place of the array: a snapshot holds tensors only.
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *numpy_rest),
        "torch": torch.get_rng_state(),
        "cuda": [state.cpu() for state in cuda],
        "others": [generator.get_state() for generator in generators],
    }


def restore_randomness(state: dict[str, Any], generators: Iterable[torch.Generator]) -> None:
    """Put all generators back to where `capture_randomness` found them."""
    random.setstate(state["python"])
    name, keys, *numpy_rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *numpy_rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    for generator, generator_state in zip(generators, state["others"], strict=True):
        generator.set_state(generator_state)
