"""Several processes as one: what a run under `torchrun` must agree on. In a single process nothing happens here."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def process_count() -> int:
    """Number of processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return process_rank() == 0


def of_first_process(value: T) -> T:
    """The value that the first process has; any that pickle takes. Every process must call it."""
    if process_count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def of_all_processes(value: T) -> list[T]:
    """The values of all processes, in their order; any that pickle takes. Every process must call it."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over all processes, in place. Every process must call it."""
    if process_count() > 1:
        dist.all_reduce(tensor)
    return tensor


def first_reason(reason: str) -> str:
    """The first process's reason that is not empty. Every process must call it."""
    return next(filter(None, of_all_processes(reason)), "")


@contextmanager
def holding_back_interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C must not stop one of several processes where the others wait for it: it is noted, and the caller asks for it.

    A second one is not held back. In a single process, and outside the main thread, nothing changes.

    Yields:
        Whether this process was interrupted.
    """
    noted: list[int] = []
    if process_count() == 1 or threading.current_thread() is not threading.main_thread():
        yield bool
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        if noted and callable(before):
            before(number, frame)
        noted.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)
