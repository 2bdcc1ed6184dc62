"""The open `using_bits` blocks of one network, and who may run the network while one is open.

A network has one precision at a time. Blocks of several threads therefore take turns, and whoever
would run the network at the precision of somebody else's block gets an error. Tasks of one event
loop cannot wait for each other; what they get is the error, too.
"""

from __future__ import annotations

import os
import threading
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from anyprec.errors import PrecisionError

VIEW_HINT = "For parallel use, give each its own model.view(bits), which shares the weights"
"""What the errors about threads say at the end."""


INTERLEAVED = (
    "another task opened `with model.using_bits(...)` inside this block and has not left it: what "
    "ran here since then may have run at its precision. Do not await inside such a block, or give "
    "each task its own model.view(bits)"
)
"""What a block says that is left before one that was opened later."""


@dataclass(eq=False)
class Block:
    """One open block.

    Attributes:
        before: The precision to restore after it.
        below: The block inside of which it was opened, if any.
        outer: The innermost block of the same context before.
        thread: Identifier of the thread that opened it.
        process: Number of the process that opened it.
        in_backward: It was opened inside a backward pass.
        is_open: False after it was left.
    """

    before: Any
    below: Block | None
    outer: Block | None
    thread: int
    process: int
    in_backward: bool = False
    is_open: bool = True


class OpenBlocks:
    """The open blocks of one network, the innermost one on top."""

    def __init__(self) -> None:
        # No lock that its own thread must release: a generator with an open block may be closed by
        # another thread.
        self._change = threading.Condition()
        self._top: Block | None = None
        # The innermost block of this thread or task, also where work was handed to a thread.
        self._innermost: ContextVar[Block | None] = ContextVar("innermost", default=None)

    @property
    def thread(self) -> int | None:
        """The thread that opened the innermost block; None if none is open."""
        top = self._top
        return None if top is None else top.thread

    def open(self, *, waiting: bool = True) -> Block:
        """Open a block as soon as no other thread has one open.

        The caller sets its `before`, and then the precision.

        Args:
            waiting: False opens it at once, inside the block of whatever thread.

        Raises:
            PrecisionError: This process was forked while another thread had a block open, which
                nobody ends here.
        """
        with self._change:
            while waiting and self._must_wait(self._top):
                self._change.wait()
            outer = self._own_block()
            block = Block(None, self._top, outer, threading.get_ident(), os.getpid())
            self._top = block
        self._innermost.set(block)
        return block

    def is_innermost(self, block: Block) -> bool:
        """Whether no other block was opened inside this one and is still open."""
        return self._top is block

    def close(self, block: Block) -> None:
        """Close a block, after the precision before it was restored.

        If it is not the innermost one, the block above restores that precision later.
        """
        self._innermost.set(block.outer)
        with self._change:
            block.is_open = False
            if block is self._top:
                self._top = block.below
            else:
                self._take_out(block)
            self._change.notify_all()

    def require_turn(self, purpose: str) -> None:
        """Refuse whoever would meet the precision of a block that is not its own.

        Raises:
            PrecisionError: A block of another thread, or of another task, is open.
        """
        top = self._top
        if top is None or self._is_own(top):
            return
        if top.process != os.getpid():
            raise PrecisionError(_FORKED)
        who = "thread" if top.thread != threading.get_ident() else "task"
        msg = f"{purpose} while another {who} is inside `with model.using_bits(...)`: it would be "
        msg += f"at the precision of that block. Use a block here, too. {VIEW_HINT}"
        raise PrecisionError(msg)

    def _is_own(self, top: Block) -> bool:
        """Whether the innermost block is that of this thread or task."""
        innermost = self._own_block()
        if innermost is not None:
            return innermost is top
        return top.thread == threading.get_ident()

    def _must_wait(self, top: Block | None) -> bool:
        """Whether another thread has a block open; a task of this one cannot be waited for."""
        if top is None or top.thread == threading.get_ident() or self._is_own(top):
            return False
        if top.process != os.getpid():
            raise PrecisionError(_FORKED)
        return True

    def _own_block(self) -> Block | None:
        """The innermost open block of this context."""
        block = self._innermost.get()
        while block is not None and not block.is_open:
            block = block.outer
        return block

    def _take_out(self, block: Block) -> None:
        above = self._top
        while above is not None and above.below is not block:
            above = above.below
        if above is not None:
            above.before, above.below = block.before, block.below


_FORKED = (
    "this process was forked while another thread was inside `with model.using_bits(...)`, so the "
    "copy of the model is at the precision of that block for ever: start processes outside of "
    "such blocks, or by 'spawn'"
)
