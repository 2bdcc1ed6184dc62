"""Several processes as one: what a run under `torchrun` must agree on.

In a single process nothing happens here. The functions that exchange values are collective: every
process must call them, in the same order.
"""

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
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1


def process_rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return process_rank() == 0


def of_first_process(value: T) -> T:
    """The value that the first process has; any that pickle takes."""
    if process_count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def of_all_processes(value: T) -> list[T]:
    """The values of all processes, in their order; any that pickle takes."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over all processes, in place."""
    if process_count() > 1:
        dist.all_reduce(tensor)
    return tensor


def first_reason(reason: str) -> str:
    """The first reason that is not empty, in the order of processes; "" if all are."""
    return next(filter(None, of_all_processes(reason)), "")


@contextmanager
def holding_back_interrupts() -> Iterator[Callable[[], bool]]:
    """Note a Ctrl-C instead of raising KeyboardInterrupt, so that the caller can stop in step.

    An exception in one of several processes would leave the others waiting for it. A second Ctrl-C
    is not held back. In a single process, and outside the main thread, nothing changes.

    Yields:
        A function that says whether this process was interrupted.
    """
    interrupted = False

    def was_interrupted() -> bool:
        return interrupted

    # Only the main thread may set signal handlers.
    if process_count() == 1 or threading.current_thread() is not threading.main_thread():
        yield was_interrupted
        return
    usual_handler = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted and callable(usual_handler):
            usual_handler(number, frame)
        interrupted = True

    signal.signal(signal.SIGINT, note)
    try:
        yield was_interrupted
    finally:
        signal.signal(signal.SIGINT, usual_handler)
