"""At which precision each part of the autograd graph was made.

A backward pass that runs layers again (`torch.utils.checkpoint`) needs it. Nothing is attached to
graphs: torch numbers the nodes that a thread makes, so it is enough to note at which number each
precision begins.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from anyprec.bits import Bits
from anyprec.errors import PrecisionError
from anyprec.nn.backward import next_node_number

Precision = Mapping[str, Bits | None]
"""Bits of every quantized layer, by path; None is floating point. Never changed in place."""

_ERAS = 128
_THREADS = 16


def is_same(first: Precision, second: Precision) -> bool:
    """Whether these are the same bits for the same layers."""
    return first is second or dict(first) == dict(second)


class PrecisionHistory:
    """The last precisions of one network, by thread, with the number of the first node of each."""

    def __init__(self) -> None:
        self._eras: dict[int, list[tuple[int, Precision]]] = {}
        # Threads that ran forward passes whose backward pass may still come.
        self._forward_threads: set[int] = set()
        self._is_settled = False

    def note(self, precision: Precision, *, before: Precision) -> None:
        """Note that nodes which this thread makes from now on are of this precision.

        Args:
            precision: The active one.
            before: The one before, if this thread has made nodes of none so far.
        """
        thread, number = threading.get_ident(), next_node_number()
        eras = self._eras.get(thread)
        if eras is None:
            eras = self._eras[thread] = [(0, before)]
            self._limit_threads()
        if eras[-1][0] == number:
            # No node was made since: without gradients, switching leaves no trace.
            eras[-1] = number, precision
        else:
            eras.append((number, precision))
            del eras[:-_ERAS]

    def note_forward(self, precision: Precision) -> None:
        """Note that this thread runs a forward pass at this precision, with gradients."""
        self.enter_thread(precision)
        if self._is_settled:
            self._forward_threads.clear()
            self._is_settled = False
        self._forward_threads.add(threading.get_ident())

    def enter_thread(self, precision: Precision) -> None:
        """Note that this thread runs at this precision, which another thread has set perhaps."""
        eras = self._eras.get(threading.get_ident())
        if eras is None or eras[-1][1] is not precision:
            self.note(precision, before=precision)

    def settle(self) -> None:
        """Note that a backward pass has ended: what runs forward next is of another step."""
        self._is_settled = True

    def may_have_run(self, thread: int) -> bool:
        """Whether this thread may have made the graph of a backward pass."""
        return thread in self._candidates()

    def at(self, number: int) -> Precision | None:
        """The precision at which the node of this number was made; None if it never changed.

        Raises:
            PrecisionError: It is too long ago, or threads ran forward passes at several precisions,
                and which of them made the node is unknown.
        """
        precisions: list[Precision] = []
        for thread in self._candidates():
            precision = self._of_thread(thread, number)
            if not any(is_same(precision, known) for known in precisions):
                precisions.append(precision)
        if len(precisions) > 1:
            msg = "a backward pass runs layers again (gradient checkpointing) after forward passes "
            msg += "of several threads at several precisions, so that theirs is unknown: call "
            msg += "backward in each thread, or give each thread its own model.view(bits)"
            raise PrecisionError(msg)
        return precisions[0] if precisions else None

    def _candidates(self) -> set[int]:
        """The threads that may have made the graph of a backward pass."""
        if self._forward_threads:
            return set(self._forward_threads)  # another thread may start one meanwhile
        # Forward passes of parts of the network are not noted.
        thread = threading.get_ident()
        return {thread} if thread in self._eras else set(self._eras)

    def _of_thread(self, thread: int, number: int) -> Precision:
        eras = self._eras.get(thread, [])
        for start, precision in reversed(eras):
            if start <= number:
                return precision
        msg = "a backward pass runs layers again (gradient checkpointing) whose precision was set "
        msg += f"more than {_ERAS} switches ago and is forgotten: call backward earlier"
        raise PrecisionError(msg)

    def _limit_threads(self) -> None:
        for thread in list(self._eras)[:-_THREADS]:
            if thread not in self._forward_threads:
                self._eras.pop(thread, None)
