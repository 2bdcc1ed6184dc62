"""The active precision of one model object: who may use it now, and what backward passes need.

A backward pass may run layers again (`torch.utils.checkpoint`). Then the precision of their forward
pass is made active, layer by layer as the pass reaches them; when it has ended, the precision that
the user has set is back. What can be right only at one precision at a time is refused.

Here are no layers: they are switched in `switching.py`. Views of a network (`views.py`) share their
weights, and each has an `ActivePrecision` of its own.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from anyprec.errors import PrecisionError
from anyprec.model.blocks import VIEW_HINT, Block, OpenBlocks
from anyprec.model.checks import require_calibrated
from anyprec.model.history import Precision, PrecisionHistory, is_same
from anyprec.model.intact import parts_of
from anyprec.model.switching import NormSources, norm_sources, switch
from anyprec.nn import backward
from anyprec.nn.backward import BackwardGuard

if TYPE_CHECKING:
    from anyprec.model.converted import ConvertedModel


class Family:
    """What a network and its views know of each other.

    Attributes:
        needs_check: Step sizes may have been dropped since a precision was set.
    """

    def __init__(self) -> None:
        self.needs_check = False
        self._members: weakref.WeakSet[ConvertedModel] = weakref.WeakSet()

    def add(self, *models: ConvertedModel) -> None:
        """Note that these share their weights."""
        self._members.update(models)

    @property
    def has_views(self) -> bool:
        """Whether several members are alive."""
        return len(self._members) > 1


@dataclass
class _Backward:
    """A backward pass that runs layers again.

    Attributes:
        number: torch's.
        before: The precision to restore after it.
        threads: Those that ran layers again in it.
    """

    number: int
    before: Precision
    threads: set[int] = field(default_factory=set)


class ActivePrecision(BackwardGuard):
    """The precision of one model object.

    A copy or pickle has the same precision, and nothing else of it: blocks, views and backward
    passes are those of the model object that they began with.

    Args:
        active: Bits of every quantized layer, by path.

    Attributes:
        active: As above, at present.
        blocks: The open `using_bits` blocks.
        family: The network and its views.
        thread: See `BackwardGuard`.
    """

    def __init__(self, active: Precision) -> None:
        self.active = active
        self.blocks = OpenBlocks()
        self.family = Family()
        self.thread = 0
        self._norms_used: NormSources | None = None
        self._history = PrecisionHistory()
        self._model: weakref.ref[ConvertedModel] | None = None
        self._backward: _Backward | None = None
        self._is_following = False  # the switch that happens is a backward pass's
        self._explicit = 0  # open blocks that were opened inside a backward pass
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[ActivePrecision], tuple[Precision]]:
        """See the class."""
        return ActivePrecision, (dict(self.active),)

    def connect(self, model: ConvertedModel) -> None:
        """Be the precision of `model`, which has new layers perhaps."""
        self._model = weakref.ref(model)
        vars(model)["anyprec_precision"] = self
        layers = model.quantized_layers
        self.active = {path: layer.bits for path, layer in layers.items()}
        parts = parts_of(model)
        for module in (*layers.values(), *parts.norms.values(), *parts.owners.values()):
            vars(module)["backward_guard"] = self

    def changed(self, model: ConvertedModel, active: Precision) -> None:
        """Note that `model`, whose precision this is, has been switched."""
        self._model = weakref.ref(model)
        if not self._is_following:
            # Nodes that are made in a backward pass are used up in it.
            self._history.note(active, before=self.active)
            self.thread = threading.get_ident()
        self.active = active
        if self.family.has_views:
            self.note_norms(model)

    def before_forward(self, model: ConvertedModel) -> None:
        """Check and note a forward pass of the whole network, which is about to start.

        Raises:
            PrecisionError: It would be at the precision of another thread or task.
            NotCalibratedError: Step sizes were dropped since the precision was set.
        """
        if backward.in_backward():
            return  # each layer follows by itself
        self._require_turn("a forward pass")
        if torch.is_grad_enabled() or model.training:
            if self._model is None:
                self._model = weakref.ref(model)
            self._history.note_forward(self.active)
            self.thread = threading.get_ident()
        if self.family.needs_check and any(self.active.values()):
            require_calibrated(model)
            self.family.needs_check = False
        if self.family.has_views and not model.training:
            self._follow_norms(model)

    def require_switchable(self) -> None:
        """Refuse `set_bits` where somebody else's forward or backward pass would be changed.

        Raises:
            PrecisionError: It would be.
        """
        if self._explicit and backward.in_backward():
            return
        if backward.in_backward():
            msg = "set_bits inside a backward pass, which switches the precision by itself: use "
            msg += "`with model.using_bits(...)` there"
            raise PrecisionError(msg)
        self._require_turn("set_bits")

    def open_block(self, model: ConvertedModel) -> Block:
        """Open a `using_bits` block of `model`, as soon as no other thread has one open.

        Raises:
            PrecisionError: as `OpenBlocks.open`.
        """
        # The thread of a backward pass may be one that the opener of the block below waits for.
        is_inside = backward.in_backward()
        layers = model.quantized_layers
        block = self.blocks.open(waiting=not is_inside)
        block.before = {path: layer.bits for path, layer in layers.items()}
        block.in_backward = is_inside
        self._explicit += is_inside
        return block

    def close_block(self, model: ConvertedModel, block: Block) -> bool:
        """Close a block, and restore the precision before it.

        Returns:
            Whether it was the innermost one. Otherwise the precision stays that of the innermost.
        """
        self._explicit -= block.in_backward
        is_innermost = self.blocks.is_innermost(block)
        try:
            if is_innermost:
                switch(model, block.before)
        finally:
            # Only now, since another thread may be waiting for its turn.
            self.blocks.close(block)
        return is_innermost

    def enter_thread(self) -> None:
        """See `BackwardGuard`."""
        self._history.enter_thread(self.active)
        self.thread = threading.get_ident()

    def follow(self) -> None:
        """See `BackwardGuard`."""
        with self._lock:
            if self._explicit:
                return
            thread = threading.get_ident()
            running = self._running_backward(thread)
            running.threads.add(thread)
            if backward.backward_number() != running.number:
                # Started inside the outer one, on a graph that was made just now at the active
                # precision, by layers that ran again.
                return
            wanted = self._history.at(backward.running_node_number())
            if wanted is None or is_same(wanted, self.active):
                return
            self._require_alone(running)
            self._switch(wanted)

    def _running_backward(self, thread: int) -> _Backward:
        running = self._backward
        if running is None:
            running = _Backward(backward.backward_number(), self.active)
            self._backward = running
            backward.call_after_backward(_AtEnd(self, running))
        elif running.number != backward.backward_number() and thread not in running.threads:
            msg = "two backward passes run layers of one model again (gradient checkpointing) at "
            msg += f"the same time. {VIEW_HINT}"
            raise PrecisionError(msg)
        return running

    def _require_alone(self, running: _Backward) -> None:
        """Refuse a switch that another thread, perhaps inside a layer, would notice."""
        if len(running.threads) > 1:
            msg = "a backward pass of several precisions runs layers again (gradient "
            msg += "checkpointing) on several devices at a time: call backward after the forward "
            msg += "pass of each precision"
            raise PrecisionError(msg)
        opener = self.blocks.thread
        if opener is not None and not self._history.may_have_run(opener):
            msg = "a backward pass of another precision while another thread is inside `with "
            msg += f"model.using_bits(...)`. {VIEW_HINT}"
            raise PrecisionError(msg)

    def _switch(self, precision: Precision) -> None:
        model = None if self._model is None else self._model()
        if model is None:
            return
        layers = model.quantized_layers
        if layers.keys() != set(precision):
            msg = "a backward pass runs layers again (gradient checkpointing) of a network whose "
            msg += "layers have changed since its forward pass: call backward before that"
            raise PrecisionError(msg)
        self._is_following = True
        try:
            switch(model, precision)
        finally:
            self._is_following = False

    def end_backward(self, ended: object) -> None:
        """Restore the precision from before a backward pass, once."""
        with self._lock:
            running = self._backward
            if running is None or running is not ended:
                return
            self._backward = None
            self._history.settle()
            if not is_same(running.before, self.active):
                self._switch(running.before)

    def _require_turn(self, purpose: str) -> None:
        self.blocks.require_turn(purpose)
        if self._backward is not None:
            msg = f"{purpose} while a backward pass of another thread has the precision of its own "
            msg += f"(gradient checkpointing). {VIEW_HINT}"
            raise PrecisionError(msg)

    def note_norms(self, model: ConvertedModel) -> None:
        """Note what the statistics that the norms of `model` use were chosen from."""
        self._norms_used = norm_sources(model, self.active)

    def _follow_norms(self, model: ConvertedModel) -> None:
        """Let norms use statistics that were estimated, or dropped, through another view."""
        sources, used = norm_sources(model, self.active), self._norms_used
        if used is not None and not sources.are_those_of(used):
            switch(model, self.active)


class _AtEnd:
    """Called when a backward pass has ended, or dropped after an exception: the same either way."""

    def __init__(self, precision: ActivePrecision, running: _Backward) -> None:
        self._precision = precision
        self._running = running

    def __call__(self) -> None:
        self._precision.end_backward(self._running)

    def __del__(self) -> None:
        self._precision.end_backward(self._running)
