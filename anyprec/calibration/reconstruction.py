"""`reconstruct`: weights and step sizes that suit low precisions, from unlabelled images alone.

Each block of the network is held against the float network's (BRECQ, Li et al., ICLR 2021), its
input mixed with the float one (QDrop, Wei et al., ICLR 2022), all blocks in one pass. What is ours:
one set of weights is moved for all precisions, which are drawn anew in each step, and norm
statistics are those of the float network, corrected by what quantization changes on the batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.bits import Bits
from anyprec.calibration.norm_inputs import float_statistics
from anyprec.calibration.norm_statistics import norms_with_copies, pairs_of_copies
from anyprec.calibration.norm_updates import update_copies
from anyprec.calibration.passes import held_images, require_count
from anyprec.calibration.reconstruction_draws import Draws
from anyprec.calibration.reconstruction_losses import output_loss, relative_error
from anyprec.calibration.reconstruction_parameters import learning, optimizer_of
from anyprec.calibration.reconstruction_units import find_units
from anyprec.calibration.step_sizes import calibrate
from anyprec.errors import CalibrationError
from anyprec.model.checks import require_latents, uncalibrated
from anyprec.model.converted import ConvertedModel, require_converted
from anyprec.runtime.batches import Batch
from anyprec.runtime.modes import evaluating
from anyprec.runtime.processes import of_all_processes, process_count, sum_over_processes
from anyprec.runtime.progress import progress_bar

IMAGES = 20
"""Of a step."""

NORM_IMAGES = 128
"""That norm statistics are estimated on, at every pair of candidates: all would take longer."""

MIXED = 0.5
"""Share of the input values of a unit that are the float network's."""


def reconstruct(
    model: ConvertedModel,
    loader: Iterable[Batch],
    *,
    steps: int = 300,
    batches: int | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> None:
    """Make low precisions better without labels: weights, step sizes, scale and shift of norms.

    3 bits and mixed configurations gain most; 8 and 6 bits, and the float network, lose a little.

    To be called after `calibrate`, or instead of it: a model that is not calibrated is calibrated
    first, on the same images. A few hundred images are enough. Bits None become the float network
    with the new weights, which is no longer that which was converted.

    If anything fails, or is interrupted, the model is as it was.

    Under `torchrun`, with a process group, every process takes its own images; gradients are
    averaged, and all processes end with the same model.

    Args:
        model: A converted model.
        loader: Batches of images, or of pairs (images, labels); labels are not used.
        steps: Steps of the optimizer, each on a few images at one configuration.
        batches: At most so many batches of `loader`; None takes all of them.
        seed: Of all that is drawn: images, configurations, and mixed inputs.
        show_progress: Show a bar on a terminal.

    Raises:
        ConversionError: `model` is not converted.
        PackedError: It is packed.
        NoValuesError: It is on the meta device.
        BatchError: The loader yields something else than batches of images that the network takes.
        CalibrationError: The loader is empty, a number is not positive, or the loss is not finite.

    Example:
        >>> import timm, torch, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet"))
        >>> anyprec.reconstruct(model, [torch.randn(8, 3, 160, 160)], steps=2)
        >>> model.set_bits(4)
    """
    require_latents(require_converted(model, purpose="reconstruct"), purpose="reconstruct")
    require_count(steps, name="steps")
    if batches is not None:
        require_count(batches, name="batches")
    images = held_images(model, loader, batches, purpose="reconstruct")
    before = copy.deepcopy(model.state_dict())
    try:
        if uncalibrated(model):
            calibrate(model, images, seed=seed)
        with _seeded(images[0], seed), evaluating(model), model.using_bits(None):
            teacher = copy.deepcopy(model)
            _Reconstruction(model, teacher, images).run(steps, seed, show_progress=show_progress)
            _anchor_norms(model, teacher, images)
    except BaseException:  # Ctrl-C too must not leave a model that is changed in part
        model.load_state_dict(before)
        raise
    model.anyprec_record.statistics.clear()
    model.set_bits(model.bits)


class _Reconstruction:
    """One run.

    Args:
        model: What is moved, in eval mode.
        teacher: A copy of it, in floating point.
        images: Batches.
    """

    def __init__(
        self, model: ConvertedModel, teacher: ConvertedModel, images: list[Tensor]
    ) -> None:
        self._model, self._teacher = model, teacher
        self._images = images
        self._units = find_units(model, images[0][:1])
        self._norms = norms_with_copies(model)
        self._optimizer = optimizer_of(model)
        # Of the teacher on the batch of this step, by path, one for each call.
        self._inputs: dict[str, list[Tensor]] = {}
        self._outputs: dict[str, list[Tensor]] = {}
        self._statistics: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._calls: dict[str, int] = {}
        self._name = ""
        self._losses: dict[tuple[str, str], Tensor] = {}

    def run(self, steps: int, seed: int, *, show_progress: bool) -> None:
        """Move the model."""
        draws = Draws(self._model.candidates, seed)
        batches = _batches_of(self._images)
        with (
            self._watched(),
            learning(self._model, self._optimizer.parameters),
            progress_bar("reconstruct", steps, show=show_progress) as bar,
        ):
            for step in range(steps):
                self._name, config = draws.draw()
                loss = self._step(next(batches), config)
                _average_gradients(self._optimizer.parameters)
                self._optimizer.step(0.5 * (1 + math.cos(math.pi * step / steps)))
                bar.advance()
                # To read the loss makes a device wait.
                if (step + 1) % 10 == 0 or step + 1 == steps:
                    bar.advance(0, note=f"{self._name} bits: {_finite(loss, step):.4f}")

    def _step(self, images: Tensor, config: Mapping[str, Bits]) -> Tensor:
        """Gradients on a batch; returns the loss of the output."""
        self._inputs.clear()
        self._outputs.clear()
        self._statistics.clear()
        self._calls.clear()
        with torch.no_grad():
            target = self._teacher(images)
        with self._model.using_bits(config):
            output = self._model(images)
            loss = output_loss(output, target)
            self._learn(loss, "")
        return loss.detach()

    def _learn(self, loss: Tensor, unit: str) -> None:
        """Add the gradients of a unit's loss, which it may have none of: nothing in it moves."""
        if loss.requires_grad:
            (loss * self._weight(unit, loss)).backward()

    def _weight(self, unit: str, loss: Tensor) -> Tensor:
        """Makes losses of all units and precisions count alike: by the root of what they were."""
        key = self._name, unit
        now = loss.detach()
        before = self._losses.get(key)
        average = now if before is None else before.lerp(now, 0.1)
        self._losses[key] = average
        return average.clamp_min(1e-4).rsqrt()

    # What happens at modules.

    @contextmanager
    def _watched(self) -> Iterator[None]:
        units, norms = self._units, self._norms
        with ExitStack() as hooks:
            for path in units.starts:
                of_teacher, own = self._modules(path)
                note, mix = partial(self._note_input, path), partial(self._mix_input, path)
                hooks.enter_context(of_teacher.register_forward_pre_hook(note))
                hooks.enter_context(own.register_forward_pre_hook(mix))
            for path in units.inner:
                of_teacher, own = self._modules(path)
                keep, hold = partial(self._note_output, path), partial(self._hold_output, path)
                hooks.enter_context(of_teacher.register_forward_hook(keep))
                hooks.enter_context(own.register_forward_hook(hold))
            for path in norms:
                of_teacher, own = self._modules(path)
                seen = partial(self._note_statistics, path)
                correct = partial(self._correct_statistics, path)
                hooks.enter_context(of_teacher.register_forward_pre_hook(seen))
                hooks.enter_context(own.register_forward_pre_hook(correct))
            yield

    def _modules(self, path: str) -> tuple[nn.Module, nn.Module]:
        return self._teacher.get_submodule(path), self._model.get_submodule(path)

    def _note_input(self, path: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        # A copy where the block may change it in place.
        self._inputs.setdefault(path, []).append(args[0].clone())

    def _note_output(self, path: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self._outputs.setdefault(path, []).append(output.clone())

    def _mix_input(self, path: str, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given, target = args[0].detach(), self._inputs[path][self._call(path, "input")]
        is_float = torch.rand_like(target) < MIXED
        return torch.where(is_float, target, given), *args[1:]

    def _hold_output(self, path: str, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        target = self._outputs[path][self._call(path, "output")]
        self._learn(relative_error(output, target), path)
        return output.detach()

    def _note_statistics(self, path: str, _norm: nn.Module, args: tuple[Any, ...]) -> None:
        self._statistics.setdefault(path, []).append(_mean_and_variance(args[0]))

    def _correct_statistics(self, path: str, _norm: nn.Module, args: tuple[Any, ...]) -> None:
        if self._model.bits is None:
            return
        float_mean, float_variance = self._statistics[path][self._call(path, "norm")]
        with torch.no_grad():
            mean, variance = _mean_and_variance(args[0])
            original: Any = self._teacher.get_submodule(path)
            eps = original.eps
            mean = original.running_mean + (mean - float_mean)
            variance = original.running_var * (variance + eps) / (float_variance + eps)
        self._norms[path].override_with((mean, variance))

    def _call(self, path: str, what: str) -> int:
        """The number of this call of a module, in this pass."""
        key = f"{what} {path}"
        number = self._calls.get(key, 0)
        self._calls[key] = number + 1
        return number


def _mean_and_variance(values: Tensor) -> tuple[Tensor, Tensor]:
    dims = [dim for dim in range(values.ndim) if dim != 1]
    values = values.detach().float()
    mean = values.mean(dim=dims, keepdim=True)
    return mean.flatten(), (values - mean).square_().mean(dim=dims)


def _batches_of(images: list[Tensor]) -> Iterator[Tensor]:
    """Batches of a few images, shuffled anew each time that all were used."""
    if len({batch.shape[1:] for batch in images}) > 1:
        while True:
            for number in torch.randperm(len(images)).tolist():
                yield images[number]
    pool = torch.cat(images)
    order: list[int] = []
    size = min(IMAGES, len(pool))
    while True:
        if len(order) < size:
            order = torch.randperm(len(pool)).tolist()
        chosen, order = order[:size], order[size:]
        batch = pool[chosen]
        # Most networks see as much in the mirror.
        yield batch.flip(-1) if torch.rand(()) < 0.5 else batch


def _average_gradients(parameters: Iterable[Tensor]) -> None:
    """Give all processes of a distributed run the mean of their gradients."""
    if process_count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten().float() for gradient in gradients])
    flat = sum_over_processes(flat).div_(process_count())
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _finite(loss: Tensor, step: int) -> float:
    # Of all processes: they must fail together.
    value = float(sum_over_processes(loss.clone())) / process_count()
    if not math.isfinite(value):
        msg = f"the loss is {value} after {step + 1} steps: check that the images are normalised "
        msg += "as the network expects"
        raise CalibrationError(msg)
    return value


@contextmanager
def _seeded(like: Tensor, seed: int) -> Iterator[None]:
    """In the block torch draws from this seed; afterwards as if nothing had been drawn."""
    devices = [like.device] if like.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _anchor_norms(model: ConvertedModel, teacher: ConvertedModel, images: list[Tensor]) -> None:
    """Give all copies, and the float network, the statistics of the moved weights."""
    norms = norms_with_copies(model)
    if not norms:
        return
    images = _first(images, NORM_IMAGES)
    with torch.no_grad():
        reference = float_statistics(teacher, norms_with_copies(teacher), images)
    update_copies(model, norms, images, [*pairs_of_copies(model), None], reference=reference)


def _first(batches: list[Tensor], count: int) -> list[Tensor]:
    """The first batches, until they have so many images: as many in each process."""
    chosen: list[Tensor] = []
    for batch in batches:
        if sum(map(len, chosen)) < count:
            chosen.append(batch)
    return chosen[: min(of_all_processes(len(chosen)))]
