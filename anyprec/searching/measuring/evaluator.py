"""The evaluator: what a configuration is worth, by forward passes on a fixed set of batches.

The batches are held in memory. Only this folder of the search knows torch: the algorithms see a
function from configuration to number.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DistributedSampler

from anyprec.bits import BitConfig, highest_config
from anyprec.errors import PackedError, SearchError
from anyprec.model.accepted_images import explaining_images, require_batch_axis
from anyprec.model.checks import require_values
from anyprec.model.converted import ConvertedModel
from anyprec.model.input_size import facts_at_size_of, take_over_facts
from anyprec.nn.norms import normalising_by_batch
from anyprec.runtime.batches import Batch, device_of, images_of, labels_of, take
from anyprec.runtime.processes import (
    of_all_processes,
    of_first_process,
    process_count,
    process_rank,
    sum_over_processes,
)
from anyprec.runtime.transfers import numbers_of, to_device
from anyprec.searching.measuring.execution import DEFAULT_MEMORY, PartialExecution
from anyprec.searching.measuring.scores import ClassLabels, number_of, require_logits

Objective = str | Callable[[ConvertedModel], float]
"""`"loss"`, `"error"`, `"divergence"`, or a function of the model at the configuration to judge;
lower is better."""

OBJECTIVES = ("loss", "error", "divergence")

SearchNorms = Literal["stored", "batch"]
"""Whose statistics norms use in a search: those that the model holds, or those of each batch."""


class Evaluator:
    """Judges configurations of one model in eval mode; its precision is restored each time.

    Under `torchrun` each process runs its share of the batches, and all get the same number, bit
    for bit that of one process with as many threads. Every process must make the same calls.

    Args:
        model: A converted and calibrated model.
        loader: Batches of (images, labels); images alone for `"divergence"`.
        objective: `"loss"` is the mean cross-entropy; `"error"` the share of images whose most
            probable class is not their label; `"divergence"` the mean Kullback-Leibler divergence
            from the float network's predictions, which needs no labels and is far less noisy; or
            any function.
        norms: `"stored"` uses each BatchNorm's own statistics for the configuration, as `set_bits`
            does; `"batch"` those of the batch, which shows what the configuration is worth once its
            statistics are re-estimated.
        batches: At most so many batches are held.
        reuse: Execute only what depends on the layers that changed. Changes no result.
        memory: Bytes of intermediate results that are kept for that.

    Attributes:
        unable: Why forward passes cannot be reused in parts; None if they are.

    Raises:
        SearchError: Unknown objective or norms, an empty loader, or outputs or labels that do not
            fit the objective.
        BatchError: The loader yields no images or labels, or images that the network does not run
            on.
        NoValuesError: The model is on the meta device.
    """

    def __init__(
        self,
        model: ConvertedModel,
        loader: Iterable[Batch],
        objective: Objective = "loss",
        *,
        norms: SearchNorms = "stored",
        batches: int | None = None,
        reuse: bool = True,
        memory: int = DEFAULT_MEMORY,
    ) -> None:
        _check(objective, norms, batches)
        require_values(model, purpose="search")
        self._model = model
        self._objective = objective
        self._norms = norms
        self._images: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._labels = ClassLabels()
        self._positions: list[int] = []  # of this process's batches among those of all processes
        self._batches = 0
        self._forward_runs = 0
        self._execution: PartialExecution | None = None
        self.unable: str | None = None
        self._hold(loader, batches)
        if callable(objective):
            self.unable = "the objective is a function of the whole model"
            return
        self._image_count = sum(of_all_processes(sum(map(len, self._images))))
        self._try()
        if objective == "divergence":
            self._targets = [F.log_softmax(logits, dim=-1) for logits in self._reference()]
        if not reuse:
            self.unable = "reuse=False"
            return
        with self._normalising(), self._explaining():
            self._execution, self.unable = PartialExecution.of(model, self._images, memory=memory)

    @property
    def layer_runs(self) -> int:
        """Executions of quantized layers by this process so far, counted for each batch."""
        if self._execution is None:
            return self._forward_runs
        return self._forward_runs + self._execution.layer_runs

    def __call__(self, config: BitConfig) -> float:
        """The objective at `config`; not finite where the network's output is not."""
        with self._model.using_bits(config), torch.no_grad():
            if callable(self._objective):
                return of_first_process(number_of(self._objective(self._model)))
            with self._normalising(), self._explaining():
                sums = map(self._judge, range(len(self._images)))
                return self._total(list(sums)) / self._image_count

    def follow_input_size(self) -> None:
        """Count the model's MACs at the size of these images from now on."""
        first = self._images[0] if self._images else None
        take_over_facts(self._model, facts_at_size_of(self._model, first))

    def set_anchor(self, config: BitConfig) -> None:
        """Expect configurations that differ little from this one: keep what they share."""
        if self._execution is not None:
            self._execution.set_anchor(config)

    def fingerprint(self) -> str:
        """A digest of all that scores depend on: the network, its images and the objective."""
        objective = self._objective if isinstance(self._objective, str) else "own"
        digest = hashlib.sha256(repr((objective, self._norms)).encode())
        _add_network(digest, self._model)
        batch_digests = []
        targets = self._targets or self._images
        for position, *batch in zip(self._positions, self._images, targets, strict=True):
            batch_digest = hashlib.sha256()
            for value in batch:
                _add(batch_digest, value)
            batch_digests.append((position, batch_digest.hexdigest()))
        # Sorted by position, so that the number of processes does not matter.
        of_all = sorted(itertools.chain.from_iterable(of_all_processes(batch_digests)))
        digest.update(repr(of_all).encode())
        return digest.hexdigest()

    def _hold(self, loader: Iterable[Batch], batches: int | None) -> None:
        """Keep this process's batches: every n-th, or all if the loader itself shares them out."""
        shared_out = isinstance(getattr(loader, "sampler", None), DistributedSampler)
        device = device_of(self._model)
        count = 0
        for number, batch in enumerate(take(loader, batches)):
            count += 1
            position = number
            if shared_out:
                position = number * process_count() + process_rank()
            elif number % process_count() != process_rank():
                continue
            self._positions.append(position)
            images = to_device(images_of(batch), device)
            require_batch_axis(self._model, images)
            self._images.append(images)
            if self._objective in ("loss", "error"):
                labels = labels_of(batch)
                self._labels.add(labels, images=len(images))
                self._targets.append(to_device(labels, device))
        self._batches = max(of_all_processes(count)) * (process_count() if shared_out else 1)
        if not self._batches and not callable(self._objective):
            msg = "the loader yields no batch: "
            msg += "search needs at least one to judge configurations on"
            if isinstance(loader, Iterator):
                msg += ", and an iterator that was used before has none left"
            raise SearchError(msg)

    def _try(self) -> None:
        """Run the network on a batch of each shape: what fits no objective is refused at once."""
        objective = str(self._objective)
        of_each_kind = {(images.shape[1:], images.dtype): images for images in self._images}
        highest = highest_config(self._model.candidates)
        with self._model.using_bits(highest), torch.no_grad(), self._explaining():
            for images in of_each_kind.values():
                with self._normalising(), explaining_images(self._model, images):
                    output = self._model(images)
                logits = require_logits(output, objective=objective)
                if self._targets:
                    self._labels.require_classes(logits, objective=objective)

    def _reference(self) -> list[Tensor]:
        """Logits of the float network; of the highest precision if there are no float weights."""
        try:
            return self._logits_at(None)
        except PackedError:
            return self._logits_at(highest_config(self._model.candidates))

    def _logits_at(self, config: BitConfig | None) -> list[Tensor]:
        with self._model.using_bits(config), torch.no_grad():
            return [self._logits(self._model(images)) for images in self._images]

    def _judge(self, number: int) -> Tensor:
        """The objective summed over the images of one batch."""
        images, targets = self._images[number], self._targets[number]
        if self._execution is None:
            output = self._model(images)
            self._forward_runs += len(self._model.anyprec_record.quantized)
        else:
            output = self._execution.run(number, images)
        logits = self._logits(output)
        if self._objective == "divergence":
            predictions = F.log_softmax(logits, dim=-1)
            return F.kl_div(predictions, targets, reduction="sum", log_target=True)
        if self._objective == "error":
            return (logits.argmax(dim=-1) != targets).sum()
        return F.cross_entropy(logits, targets.long(), reduction="sum")

    def _logits(self, output: Any) -> Tensor:
        return require_logits(output, objective=str(self._objective))

    def _total(self, values: list[Tensor]) -> float:
        """The sum over the batches of all processes, in their order: that of one process.

        The device is waited for here, once in an evaluation.
        """
        if process_count() == 1:
            return math.fsum(numbers_of(values))
        of_all = torch.zeros(self._batches, dtype=torch.float64, device=device_of(self._model))
        for position, value in zip(self._positions, values, strict=True):
            of_all[position] = value
        return math.fsum(sum_over_processes(of_all).tolist())

    def _normalising(self) -> AbstractContextManager[Any]:
        return normalising_by_batch() if self._norms == "batch" else nullcontext()

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Say what to do about torch's error for a BatchNorm that sees a single value."""
        try:
            yield
        except ValueError as error:
            if self._norms != "batch" or "more than 1 value per channel" not in str(error):
                raise
            msg = "norms='batch' needs batches of several images: "
            msg += "a BatchNorm here sees a single value per channel"
            raise SearchError(msg) from error


def _check(objective: Objective, norms: str, batches: int | None) -> None:
    if not callable(objective) and objective not in OBJECTIVES:
        msg = f"objective {objective!r} is unknown: "
        msg += f"use one of {OBJECTIVES}, or a function of the model"
        raise SearchError(msg)
    if norms not in ("stored", "batch"):
        msg = f"norms={norms!r} is unknown: use 'stored' or 'batch'"
        raise SearchError(msg)
    if batches is not None and (not isinstance(batches, int) or batches < 1):
        msg = f"batches={batches!r} leaves no batch: use a positive integer, or None for all"
        raise SearchError(msg)


def _add_network(digest: Any, model: ConvertedModel) -> None:
    """Weights, step sizes and statistics, those of single configurations included."""
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        _add(digest, value)
    for config, statistics in model.anyprec_record.statistics.items():
        digest.update(repr(config).encode())
        for path, values in statistics.items():
            digest.update(path.encode())
            for value in values:
                _add(digest, value)


def _add(digest: Any, value: Tensor) -> None:
    digest.update(repr((value.dtype, tuple(value.shape))).encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
