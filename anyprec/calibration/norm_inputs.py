"""Mean and variance of what reaches norms, at the precision that the network has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from anyprec.calibration.passes import run_on_images
from anyprec.model.converted import ConvertedModel
from anyprec.nn.counting import uncounted
from anyprec.nn.norms import SwitchableNorm
from anyprec.runtime.processes import process_count, sum_over_processes

Reference = dict[tuple[str, int], tuple[Tensor, Tensor]]
"""Mean and variance at a norm (by path) after so many calls."""


def estimate_active_copies(
    model: ConvertedModel,
    norms: dict[str, SwitchableNorm],
    batches: list[Tensor],
    reference: Reference | None,
) -> None:
    """Write statistics into every norm's active copy, layer by layer in each forward pass.

    A norm takes over what it has seen so far before it runs, so the layers behind it are measured
    on inputs that are normalised as they will be.
    """
    # The float network's own may be among those that are written.
    origins = {}
    if reference is not None:
        for path, norm in norms.items():
            origins[path] = norm.running_mean.clone(), norm.running_var.clone()

    def take_over(path: str, so_far: _RunningStatistics) -> None:
        norm, mean, variance = norms[path], so_far.mean, so_far.variance
        if reference is not None and (path, so_far.calls) not in reference:
            return  # the float network had no sample there so far
        if reference is not None:
            # Of the same images, or the difference would hold the noise between images too.
            float_mean, float_variance = reference[path, so_far.calls]
            origin_mean, origin_variance = origins[path]
            mean = origin_mean + (mean - float_mean)
            # eps keeps a channel that is constant on these images from making the ratio noise.
            variance = origin_variance * (variance + norm.eps) / (float_variance + norm.eps)
        active_mean, active_variance = norm.active_statistics()
        active_mean.copy_(mean)
        active_variance.copy_(variance)

    _watch_norms(model, norms, batches, take_over)


def float_statistics(
    model: ConvertedModel, norms: dict[str, SwitchableNorm], batches: list[Tensor]
) -> Reference:
    """What the float network has on `batches` at the input of each norm."""
    reference: Reference = {}

    def note(path: str, so_far: _RunningStatistics) -> None:
        reference[path, so_far.calls] = so_far.mean, so_far.variance

    with model.using_bits(None):
        _watch_norms(model, norms, batches, note)
    return reference


def _watch_norms(
    model: ConvertedModel,
    norms: dict[str, SwitchableNorm],
    batches: list[Tensor],
    before_norm: Callable[[str, _RunningStatistics], None],
) -> None:
    """Run `batches`, and before each norm runs call `before_norm` with its statistics so far."""
    statistics = {path: _RunningStatistics() for path in norms}

    def watch(path: str, _norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        with uncounted():
            statistics[path].add(args[0])
            if not statistics[path].is_empty:
                before_norm(path, statistics[path])

    hooks = []
    for path, norm in norms.items():
        hooks.append(norm.register_forward_pre_hook(partial(watch, path)))
    try:
        for images in batches:
            run_on_images(model, images)
    finally:
        for hook in hooks:
            hook.remove()


class _RunningStatistics:
    """Mean and variance per channel over several batches.

    They are combined pairwise (Chan, Golub and LeVeque 1979), which stays exact where a sum of
    squares would cancel.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._count = 0.0
        self.mean = torch.zeros(())
        self._squares = torch.zeros(())

    @property
    def variance(self) -> Tensor:
        """Unbiased, as BatchNorm keeps it."""
        return self._squares / max(1, self._count - 1)

    @property
    def is_empty(self) -> bool:
        """Whether no batch had a sample so far."""
        return not self._count

    def add(self, values: Tensor) -> None:
        """Take in a batch, channels on axis 1, with those of all processes of a distributed run."""
        count: float = values.numel() // values.shape[1]
        dims = [dim for dim in range(values.ndim) if dim != 1]
        values = values.float()
        # In two passes: torch.var_mean is as exact and 5 to 15 times slower on a CPU.
        average = values.mean(dim=dims, keepdim=True)
        variance = (values - average).square_().mean(dim=dims).double()
        mean = average.flatten().double()
        if not count:  # then the means are NaN
            mean, variance = torch.zeros_like(mean), torch.zeros_like(variance)
        if process_count() > 1:
            count, mean, variance = _of_all_processes(count, mean, variance)
        self.calls += 1
        total = self._count + count
        if not total:
            return
        shift = mean - self.mean
        self._squares = self._squares + variance * count + shift**2 * (self._count * count / total)
        self.mean = self.mean + shift * (count / total)
        self._count = total


def _of_all_processes(count: float, mean: Tensor, variance: Tensor) -> tuple[float, Tensor, Tensor]:
    """Count, mean and biased variance of the batches of all processes together."""
    sums = torch.cat((mean.new_tensor([count]), count * mean, count * (variance + mean**2)))
    total, first, second = sum_over_processes(sums).split([1, len(mean), len(mean)])
    # Without a sample in any process all sums are zero.
    count = float(total)
    mean = first / max(1.0, count)
    return count, mean, (second / max(1.0, count) - mean**2).clamp_min_(0)
