"""Whether the statistics of a norm's copies belong to the present weights.

Training moves weights, and each copy sees few of its steps: most are left behind. That is noted in
plain Python where it happens, so asking costs nothing and no device is waited for.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from anyprec.errors import StaleNormsWarning


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
        msg += "oneshot.evaluating(train_loader):`, or call anyprec.update_norms(model, "
        msg += "train_loader, batches=16, include_float=True) first"
        warnings.warn(msg, StaleNormsWarning, stacklevel=2)
