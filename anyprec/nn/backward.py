"""What a module that runs during a backward pass can know of it, and whom it asks.

`torch.utils.checkpoint` runs parts of the network again in the backward pass. They must run at the
precision of their forward pass, whatever is active by then. Which one that was is the network's
knowledge (`model/precision.py`); a layer or norm only asks.

torch numbers the nodes of the autograd graph in the order in which a thread makes them. It has no
public name for these numbers, nor for the backward pass that is running: all uses of its private
ones are here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import get_ident

import torch
from torch import nn

_backward_number: Callable[[], int] = torch._C._current_graph_task_id  # noqa: SLF001 (see above)


class BackwardGuard(ABC):
    """Makes the right precision active while the network runs again in a backward pass.

    Attributes:
        thread: Identifier of the thread whose nodes it can tell apart from now on.
    """

    thread: int

    @abstractmethod
    def enter_thread(self) -> None:
        """Note that another thread runs a part of the network forward, with gradients."""

    @abstractmethod
    def follow(self) -> None:
        """Make the precision active that the autograd node now running was made at.

        Raises:
            PrecisionError: It cannot be known, or not be active now.
        """


def follow_precision(module: nn.Module) -> None:
    """If `module` runs as part of a backward pass, let its guard see to the precision."""
    if torch.compiler.is_compiling():
        return
    guard: BackwardGuard | None = module.backward_guard  # type: ignore[assignment]
    # Without another call, since every layer and norm asks in every forward pass.
    is_inside = _backward_number() != -1
    if guard is None or not (is_inside or guard.thread != get_ident()):
        return
    if "_is_replica" in vars(module):
        return  # of nn.DataParallel: it has a precision of its own, which nobody switches
    if is_inside:
        guard.follow()
    elif torch.is_grad_enabled() or module.training:
        guard.enter_thread()


def in_backward() -> bool:
    """Whether this thread is running a backward pass."""
    return _backward_number() != -1


def backward_number() -> int:
    """Number of the backward pass that this thread is running, -1 without one.

    A backward pass that is started inside another one has a number of its own.
    """
    return _backward_number()


def next_node_number() -> int:
    """Number of the autograd node that this thread makes next."""
    number: int = torch._C._autograd._get_sequence_nr()  # noqa: SLF001 (see above)
    return number


def running_node_number() -> int:
    """Number of the autograd node that this thread's backward pass is running."""
    node = torch._C._current_autograd_node()  # noqa: SLF001 (see above)
    number: int = node._sequence_nr()  # noqa: SLF001 (see above)
    return number


def call_after_backward(callback: Callable[[], None]) -> None:
    """Call `callback` when the backward pass that is running has ended.

    After an exception it is not called. It is dropped in any case, and not before the end.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # noqa: SLF001 (see above)
