"""Whether the statistics of a norm's copies belong to the present weights.

Training moves weights, and each copy sees few of its steps: most are left behind. That is noted in
plain Python where it happens, so asking costs nothing and no device is waited for. A copy of the
network whose weights follow (a moving average) is left behind with it, and a state dict says that
its statistics are stale.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from anyprec.errors import StaleNormsWarning

if TYPE_CHECKING:
    from anyprec.nn.norm_bank import NormBank

STALE = "stale"
"""Entry in the metadata of a state dict: the rows of this norm's copies that are stale."""


@dataclass
class TrainedNetwork:
    """What the norms of one network in training share.

    Attributes:
        compiled: It runs compiled, where forward passes cannot warn: switching the precision does.
        has_warned: Whether it was said that statistics are stale; it is said once.
    """

    compiled: bool = False
    has_warned: bool = False


@dataclass
class StaleRows:
    """The copies of one norm whose statistics training has left behind.

    Attributes:
        network: The network that the norm belongs to.
        rows: Copies; None is the float network's own statistics.
    """

    network: TrainedNetwork
    rows: set[int | None] = field(default_factory=set)

    def warn_about(self, row: int | None) -> None:
        """Warn, once for the network, if the statistics of this copy are stale."""
        if row not in self.rows or self.network.has_warned:
            return
        self.network.has_warned = True
        msg = "norm statistics of the active precision are those of weights before training steps: "
        msg += "what is evaluated now may mean nothing. Evaluate inside `with "
        msg += "oneshot.evaluating(train_loader):` (an average of weights after "
        msg += "oneshot.refresh_norms(average)), or call anyprec.update_norms(model, train_loader, "
        msg += "batches=16, include_float=True) first"
        warnings.warn(msg, StaleNormsWarning, stacklevel=2)


class Relatives:
    """The copies that were made of one norm's bank, itself included, as long as they live.

    Copies share this object; what is pickled elsewhere has no relatives.
    """

    def __init__(self) -> None:
        # Each bank, and how often its parameters had been written when that was last looked at.
        self._writes: WeakKeyDictionary[NormBank, int] = WeakKeyDictionary()

    def add(self, bank: NormBank) -> None:
        """Know this bank from now on, with the parameters that it has."""
        self._writes[bank] = _writes_to(bank)

    def moved(self, trained: NormBank) -> Iterable[NormBank]:
        """The other banks whose parameters were written since the last call: they follow."""
        moved = []
        for bank, writes in list(self._writes.items()):
            self._writes[bank] = _writes_to(bank)
            if bank is not trained and self._writes[bank] != writes:
                moved.append(bank)
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> Relatives:
        """A copy of a bank is a relative of it."""
        return self

    def __reduce__(self) -> tuple[type[Relatives], tuple[()]]:
        """Pickle as one that knows nobody."""
        return Relatives, ()


def warn_before_saving(banks: Iterable[NormBank]) -> None:
    """Warn, once for the network, if none of the copies of a norm that is saved is up to date."""
    for bank in banks:
        if bank.stale is None or bank.stale.network.has_warned:
            continue
        if not bank.stale.rows.issuperset(range(bank.rows)):
            continue
        bank.stale.network.has_warned = True
        msg = "the norm statistics that are saved are those of weights before training steps: what "
        msg += "is loaded from this file may answer nothing right. Save inside `with "
        msg += "oneshot.evaluating(train_loader):`, or call anyprec.update_norms on what is loaded"
        warnings.warn(msg, StaleNormsWarning, stacklevel=3)


def _writes_to(bank: NormBank) -> int:
    """How often the affine parameters of a bank were written in place."""
    writes = 0
    # `parameters()` takes longer than all else in a step of training that is noted here.
    for parameter in bank._parameters.values():  # noqa: SLF001
        if parameter is not None and not parameter.is_inference():  # of these nothing is counted
            writes += parameter._version  # noqa: SLF001 (torch has no public name for it)
    return writes
