"""Validating while training: norm statistics of the present weights, from a few training batches.

Each copy of a norm sees few of the steps of one-shot training, and the float network's norms see
none, so what is evaluated between two steps needs statistics of its own. They are estimated here,
and training goes on as if nothing had happened.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from torch import Tensor

from anyprec.bits import BitConfig
from anyprec.calibration.norm_statistics import refresh_norms
from anyprec.errors import TrainingError
from anyprec.model.converted import BitsRequest, ConvertedModel
from anyprec.model.intact import switchable_norms
from anyprec.nn.staleness import TrainedNetwork
from anyprec.runtime.batches import Batch
from anyprec.training.randomness import keeping_randomness


class RecentBatches:
    """The last training images, for statistics where no loader is at hand.

    Args:
        images: Batches are kept until there are so many images.
    """

    def __init__(self, images: int = 512) -> None:
        self._limit = images
        self._batches: deque[Tensor] = deque()

    def add(self, batch: Tensor) -> None:
        """Keep a batch, and drop the oldest ones that are not needed any more."""
        if len(batch) > self._limit:
            batch = batch[: self._limit].clone()  # a view would keep all of it
        self._batches.append(batch.detach())
        while sum(map(len, self._batches)) - len(self._batches[0]) >= self._limit:
            self._batches.popleft()

    def all(self) -> list[Tensor]:
        """The batches that are kept, oldest first."""
        return list(self._batches)


def norms_in_training(model: ConvertedModel) -> set[str]:
    """Paths of the norms with copies whose statistics forward passes move at the moment."""
    return {path for path, norm in switchable_norms(model) if norm.bank and norm.training}


def note_weights_moved(model: ConvertedModel, network: TrainedNetwork, trained: set[str]) -> None:
    """Note after a training step that norm statistics belong to weights of before.

    Args:
        model: A converted model.
        network: What its norms share.
        trained: Paths of the norms that were in training mode in the step. Of the others the
            statistics are what training uses.
    """
    for path, norm in switchable_norms(model):
        if norm.bank is not None and path in trained:
            norm.bank.mark_stale(network)


def note_average_moved(average: ConvertedModel, model: ConvertedModel) -> None:
    """Note that the weights of an average moved; it has no training mode that would show its norms.

    Args:
        average: A copy of `model`.
        model: The model in training.
    """
    network = TrainedNetwork()
    norms = dict(switchable_norms(average))
    for path, norm in switchable_norms(model):
        bank = norms[path].bank
        if bank is not None and norm.bank is not None and norm.bank.stale is not None:
            bank.mark_stale(network)


def trust_statistics(model: ConvertedModel) -> None:
    """End the watch over statistics: training is over, and they are as its user wants them."""
    for _, norm in switchable_norms(model):
        if norm.bank is not None:
            norm.bank.stale = None


def refresh(
    model: ConvertedModel,
    loader: Iterable[Batch],
    bits: BitsRequest | list[BitsRequest] = "uniform",
    *,
    batches: int | None = None,
) -> None:
    """Bring norm statistics up to date, as `OneShot.evaluating` says.

    Raises:
        BitsError: A precision does not fit the model.
        TrainingError: There is no batch.
    """
    configs: list[BitConfig | None] | None = None
    if bits != "uniform":
        requests = bits if isinstance(bits, list) else [bits]
        configs = [model.resolve_bits(request) for request in requests]
    if isinstance(loader, list) and not loader:
        msg = "norm statistics need training images, and there are none: pass a loader or batches, "
        msg += "or call oneshot.remember(images) in the training loop"
        raise TrainingError(msg)
    with keeping_randomness(loader):
        refresh_norms(model, loader, configs, batches=batches)
