"""Data passes without gradients: step sizes and zero points for every candidate, and norm statistics.

Step sizes minimise the squared quantization error, for every candidate bit-width at once and before any training:
weights exactly, by a grid of starting points refined with the closed-form optimum for given codes; inputs on a fixed
random sample of what the float network sees. BatchNorm copies get the statistics over a few batches, each at its own
precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from anyprec.bits import BitConfig, Bits, highest_config, shorten
from anyprec.errors import BitsError, CalibrationError
from anyprec.model.converted import ConvertedModel, Request, require_converted, require_latents
from anyprec.nn.functional import STEP_FLOOR
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norms import SwitchableNorm
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer, usable_steps
from anyprec.runtime.batches import Batch, device_of, images_of, take
from anyprec.runtime.modes import evaluating
from anyprec.runtime.processes import of_all_processes, process_count, sum_over_processes

SAMPLE_SIZE = 32_768
"""Input values kept of each layer, over all batches."""

_GRID = (0.1, 0.15, 0.2, 0.27, 0.35, 0.45, 0.55, 0.67, 0.8, 1.0)
"""Clipping points to start from, as fractions of the largest magnitude."""

_REFINEMENTS = 4

_CHUNK = 2**18
"""Weights whose step sizes are sought together."""


def calibrate(
    model: ConvertedModel,
    loader: Iterable[Batch],
    *,
    step_batches: int = 4,
    norm_batches: int = 2,
    seed: int = 0,
) -> None:
    """Set the step sizes of every candidate bit-width, and the norm copies, from a few batches.

    Weight and input step sizes (and zero points) become those of least squared error, anew from the latent weights
    and the float network's activations: call it before training, not after. Then every copy of every BatchNorm gets
    the float network's scale and shift and the statistics of its own precision; `calibrate_norms` does only the last, and may
    follow training.

    The model's precision, mode and float parameters are left as they were; if anything fails, its step sizes and
    norm copies are too.

    Args:
        model: A converted model.
        loader: Batches of images, or of pairs (images, labels); training data, in training order.
        step_batches: Batches for the step sizes.
        norm_batches: Batches for each precision's norm statistics.
        seed: Of the generator that draws the sample of input values.

    Raises:
        ConversionError: `model` is not converted.
        PackedError: It is packed.
        CalibrationError: The loader is empty, or a layer's input or weight is not finite.

    Example:
        >>> import timm, torch, anyprec
        >>> model = anyprec.convert(timm.create_model("test_vit"))
        >>> anyprec.calibrate(model, [torch.randn(4, 3, 160, 160)])
        >>> model.set_bits(4)
    """
    require_latents(require_converted(model, purpose="calibrate"), purpose="calibrate")
    batches = _held(loader, max(step_batches, norm_batches), device_of(model))
    with evaluating(model), model.using_bits(None):
        samplers = _watch_layers(model, batches[:step_batches], seed)
        grids = {
            path: input_grid(samplers[path].sample(path), layer.input_quantizer)
            for path, layer in _layers(model)
        }
        weights = {
            path: weight_steps(samplers[path].weight, layer.weight_quantizer)
            for path, layer in _layers(model)
        }
    with _undo_on_error(model):
        for path, layer in _layers(model):
            layer.input_quantizer.set_grid(*grids[path])
            with torch.no_grad():
                layer.weight_quantizer.step.copy_(weights[path])
        for _, norm in _norms(model):
            if norm.bank is not None:
                norm.bank.copy_from(norm)
        calibrate_norms(model, batches[:norm_batches], anchored=True)
    model.anyprec_record.statistics.clear()


def calibrate_norms(
    model: ConvertedModel,
    loader: Iterable[Batch],
    *,
    batches: int | None = None,
    anchored: bool = False,
    include_float: bool = False,
) -> None:
    """Re-estimate the running statistics of every BatchNorm copy, at the precision that it belongs to.

    For each pair of candidates the network runs uniformly at that pair, and every norm's active copy takes the
    statistics of all batches together.
    Where one copy serves several uniform bit-widths, those of each are kept besides. Norms that all precisions share are
    left alone. Affine parameters of copies and step sizes stay as they are.

    Args:
        model: A converted and calibrated model.
        loader: Batches of images, or of pairs (images, labels).
        batches: At most so many of them.
        anchored: Trust the statistics that the float network brought, and only correct them by what quantization
            changes on these images: means by the difference, variances by the ratio. Far more accurate on few
            images, as long as the weights are those that the float statistics belong to.
        include_float: Serve the float network too, once training moved the weights: its norms take scale and shift of the
            highest precision's copies, which learned, and statistics of their own are estimated anew.

    Raises:
        ConversionError: `model` is not converted.
        NotCalibratedError: Step sizes are missing.
        CalibrationError: The loader is empty, or statistics come out not finite; the old ones are restored.
        ValueError: Both `anchored` and `include_float` are asked for.
    """
    if anchored and include_float:
        msg = "anchored=True takes the float statistics as given, include_float=True re-estimates them: choose one"
        raise ValueError(msg)
    require_converted(model, purpose="calibrate_norms")
    norms = [norm for _, norm in _norms(model) if norm.bank is not None]
    if not norms:
        return
    held = _held(loader, batches, device_of(model))
    with _undo_on_error(model), evaluating(model), torch.no_grad():
        if include_float:
            hand_over_affine(model)
        reference = _reference_statistics(model, norms, held) if anchored else None
        done: set[tuple[tuple[int | None, int | None], ...]] = set()
        for bits in (*_uniform_pairs(model), *([None] if include_float else [])):
            with model.using_bits(bits):
                width = bits.weight if bits is not None and bits.weight == bits.activation else None
                for norm in norms:
                    norm.switch(norm.row, None, width=width)
                places = tuple((norm.row, norm.uniform) for norm in norms)
                # A pair that layers round up to one that was done already (depthwise layers) has nothing new.
                if places not in done:
                    _estimate_statistics(model, norms, held, reference)
                done.add(places)
                for norm in norms:
                    _share_with_row(norm)
        _require_finite_norms(model)
    for norm in norms:
        norm.bank.refresh()  # type: ignore[union-attr]  # those without were left out above
    model.set_bits(model.bits)


def hand_over_affine(model: ConvertedModel) -> None:
    """Give the float network's norms scale and shift of the highest precision's copies, which training taught."""
    with model.using_bits(highest_config(model.candidates)):
        for _, norm in _norms(model):
            norm.take_over_affine()


def recalibrate(
    model: ConvertedModel, loader: Iterable[Batch], bits: Request, *, batches: int | None = None
) -> BitConfig:
    """Re-estimate norm statistics for one configuration, which has them from then on.

    They are used whenever exactly this configuration is active in eval mode, and kept in the model's file; those of all
    other configurations stay as they are. Copies of a norm are estimated with all layers at one precision; in a mixed
    configuration the layers before a norm are at others, so its own statistics fit better. Further training drops them.

    Args:
        model: A converted and calibrated model; its mode and precision are left as they are.
        loader: Batches of images, or of pairs (images, labels); training images.
        bits: The configuration: anything that `set_bits` takes, except None.
        batches: At most so many of `loader`.

    Returns:
        The configuration.

    Raises:
        ConversionError: `model` is not converted.
        BitsError: `bits` does not fit the model, or is None.
        NotCalibratedError: Step sizes are missing.
        CalibrationError: The loader is empty, or statistics come out not finite.

    Example:
        >>> import timm, torch, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet"))
        >>> images = torch.randn(8, 3, 160, 160)
        >>> anyprec.calibrate(model, [images])
        >>> config = anyprec.recalibrate(model, [images], {"layer1.*": 4})
        >>> model.set_bits(config)
    """
    require_converted(model, purpose="recalibrate")
    config = model.resolve_bits(bits)
    if config is None:
        msg = "recalibrate takes a configuration; calibrate_norms(..., include_float=True) serves the float network"
        raise BitsError(msg)
    norms = dict(_norms(model))
    held = _held(loader, batches, device_of(model))
    with evaluating(model), torch.no_grad(), model.using_bits(config):
        for norm in norms.values():
            mean, variance = norm.active_statistics()
            norm.override_with((mean.clone(), variance.clone()))
        _estimate_statistics(model, list(norms.values()), held, None)
        found = {path: norm.active_statistics() for path, norm in norms.items()}
    broken = [
        path
        for path, parts in found.items()
        if not all(torch.isfinite(part).all() for part in parts)
    ]
    _require_none_broken(broken)
    model.anyprec_record.statistics[config] = found
    if model.bits == config:
        model.set_bits(config)
    return config


def weight_steps(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """Step sizes of least squared error for every candidate, shape `(len(candidates), channels or 1)`.

    Raises:
        CalibrationError: `weight` is not finite.
    """
    rows = quantizer.per_channel(weight.detach().float())
    if not torch.isfinite(rows).all():
        msg = "a weight holds NaN or infinite values: calibrate a network with finite weights"
        raise CalibrationError(msg)
    parts = rows.split(
        max(1, _CHUNK // rows.shape[1])
    )  # so that the many passes over a part stay in the cache
    steps = [
        usable_steps(
            torch.cat([_least_squares(part, *quantizer.limits(index)) for part in parts]), weight
        )
        for index in range(len(quantizer.candidates))
    ]
    return torch.stack(steps)


def input_grid(sample: Tensor, quantizer: InputQuantizer) -> tuple[Tensor, Tensor]:
    """Step sizes and zero points of least squared error for every candidate, each shape `(len(candidates),)`.

    An input that may be negative gets the better of a symmetric grid and one placed on the sample's range.

    Args:
        sample: Values of the input, flat.
        quantizer: Knows the candidates and whether the graph proves the input non-negative.
    """
    row = sample.float().reshape(1, -1)
    steps, zeros = [], []
    for bits in quantizer.candidates:
        choices = [0] if quantizer.nonnegative else _zero_points(row, bits)
        tried = [(zero, _least_squares(row, -zero, 2**bits - 1 - zero)) for zero in choices]
        errors = [
            float(_squared_error(row, step, -zero, 2**bits - 1 - zero)) for zero, step in tried
        ]
        zero, step = tried[errors.index(min(errors))]
        steps.append(step[0] if step[0] > STEP_FLOOR else step.new_tensor(1.0 / (2**bits - 1)))
        zeros.append(zero)
    return torch.stack(steps), torch.tensor(zeros, dtype=torch.int32)


def _zero_points(row: Tensor, bits: int) -> list[int]:
    """The symmetric zero point first (it wins ties), then those that fit the sample's range and its bulk."""
    top = 2**bits - 1
    choices = [2 ** (bits - 1)]
    for tail in (0.0, 0.001, 0.01):
        low, high = (float(torch.quantile(row, q)) for q in (tail, 1 - tail))
        low, high = min(low, 0.0), max(high, 0.0)
        if high > low:
            exact = -low / (high - low) * top
            choices += [min(top, max(0, zero)) for zero in (int(exact), int(exact) + 1)]
    return list(dict.fromkeys(choices))


def _least_squares(rows: Tensor, qmin: int, qmax: int) -> Tensor:
    """For each row, the step size with the least squared error that a grid search and its refinement find.

    For fixed codes q the optimal step is <w, q> / <q, q>; taking codes and step in turn never raises the error.
    """
    magnitude = torch.maximum(rows.amax(dim=1) / max(qmax, 1), -rows.amin(dim=1) / max(-qmin, 1))
    best = magnitude.clamp_min(STEP_FLOOR)
    best_error = _squared_error(rows, best, qmin, qmax)
    for fraction in _GRID:
        step = (magnitude * fraction).clamp_min(STEP_FLOOR)
        error = _squared_error(rows, step, qmin, qmax)
        best = torch.where(error < best_error, step, best)
        best_error = torch.minimum(error, best_error)
    for _ in range(_REFINEMENTS):
        codes = _codes(rows, best, qmin, qmax)
        energy = (codes * codes).sum(dim=1)
        step = torch.where(energy > 0, (rows * codes).sum(dim=1) / energy.clamp_min(1), best)
        step = step.clamp_min(STEP_FLOOR)
        error = _squared_error(rows, step, qmin, qmax)
        best = torch.where(error < best_error, step, best)
        best_error = torch.minimum(error, best_error)
    return best


def _codes(rows: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    return (rows / step[:, None]).round_().clamp_(qmin, qmax)


def _squared_error(rows: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    difference = _codes(rows, step, qmin, qmax).mul_(step[:, None]).sub_(rows)
    return difference.square_().sum(dim=1)


class _Sampler:
    """Keeps a fixed-size random sample of a layer's input values, and the weight that they meet.

    The weight comes from the operator, not from the layer: a standardised weight has another scale than the latent.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._parts: list[Tensor] = []
        self.weight = torch.empty(0)

    def __call__(self, values: Tensor, weight: Tensor) -> None:
        self.weight = weight.detach()
        flat = values.detach().reshape(-1)
        if flat.numel() > self._size:
            index = torch.randint(flat.numel(), (self._size,), generator=self._generator)
            extremes = torch.stack((flat.amin(), flat.amax()))
            flat = torch.cat((flat[index.to(flat.device)], extremes))
        self._parts.append(flat.float())

    def sample(self, path: str) -> Tensor:
        if not self._parts:
            msg = f"layer {path!r} was not reached by the calibration data"
            raise CalibrationError(msg)
        sample = torch.cat(self._parts)
        if process_count() > 1:
            sample = torch.cat(of_all_processes(sample.cpu())).to(sample.device)
        if not torch.isfinite(sample).all():
            msg = f"the input of layer {path!r} holds NaN or infinite values: check the calibration data (and its "
            msg += "normalisation) and the network's weights"
            raise CalibrationError(msg)
        return sample


def _watch_layers(model: ConvertedModel, batches: list[Tensor], seed: int) -> dict[str, _Sampler]:
    """What every layer's operator meets in the float network."""
    layers = dict(_layers(model))
    share = max(1, SAMPLE_SIZE // len(batches))
    samplers = {path: _Sampler(share, seed) for path in layers}
    with ExitStack() as observed, torch.no_grad():
        for path, layer in layers.items():
            observed.enter_context(layer.operand_observers.including(samplers[path]))
        for images in batches:
            if not torch.isfinite(images).all():
                msg = "the calibration images hold NaN or infinite values"
                raise CalibrationError(msg)
            model(images)
    return samplers


def _uniform_pairs(model: ConvertedModel) -> list[Bits]:
    """Precisions whose uniform configurations reach every copy of every norm."""
    layers = model.candidates.values()
    weight = sorted({width for layer in layers for width in layer.weight})
    activation = sorted({width for layer in layers for width in layer.activation})
    return [Bits(w, a) for w in weight for a in activation]


def _share_with_row(norm: SwitchableNorm) -> None:
    """Statistics beside the active copy go into it too, for other configurations: the precision that comes last has it."""
    if norm.bank is not None and norm.row is not None and norm.uniform is not None:
        copy, own = (
            norm.bank.statistics(norm.row, None),
            norm.bank.statistics(norm.row, norm.uniform),
        )
        for target, value in zip(copy, own, strict=True):
            target.copy_(value)


_Reference = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""Mean and variance at a norm (by index) after so many calls."""


class _Statistics:
    """Mean and variance per channel over several batches (Chan et al. 1979, pairwise combination)."""

    def __init__(self) -> None:
        self.calls = 0
        self._count = 0.0
        self.mean = torch.zeros(())
        self._squares = torch.zeros(())

    @property
    def variance(self) -> Tensor:
        """Unbiased, as BatchNorm keeps it."""
        return self._squares / max(1, self._count - 1)

    def add(self, values: Tensor) -> None:
        """Take in a batch, channels on axis 1, together with those of all other processes of a distributed run."""
        count: float = values.numel() // values.shape[1]
        dims = [dim for dim in range(values.ndim) if dim != 1]
        values = values.float()
        average = values.mean(dim=dims, keepdim=True)
        # In two passes: torch.var_mean is as exact and 5 to 15 times slower on a CPU.
        mean, variance = (
            average.flatten().double(),
            (values - average).square_().mean(dim=dims).double(),
        )
        if process_count() > 1:
            count, mean, variance = _of_all_processes(count, mean, variance)
        total = self._count + count
        shift = mean - self.mean
        self._squares = self._squares + variance * count + shift**2 * (self._count * count / total)
        self.mean = self.mean + shift * (count / total)
        self._count = total
        self.calls += 1


def _of_all_processes(count: float, mean: Tensor, variance: Tensor) -> tuple[float, Tensor, Tensor]:
    """Count, mean and biased variance of the batches of all processes together."""
    sums = torch.cat((mean.new_tensor([count]), count * mean, count * (variance + mean**2)))
    total, first, second = sum_over_processes(sums).split([1, len(mean), len(mean)])
    mean = first / total
    return float(total), mean, (second / total - mean**2).clamp_min_(0)


def _estimate_statistics(
    model: nn.Module,
    norms: list[SwitchableNorm],
    batches: list[Tensor],
    reference: _Reference | None,
) -> None:
    """Write statistics into every norm's active copy, layer by layer in each forward pass.

    A norm takes over what it has seen so far before it runs, so the layers behind it are measured on inputs that
    are normalised as they will be.
    """

    def take_over(index: int, calls: int, seen: _Statistics) -> None:
        norm, mean, variance = norms[index], seen.mean, seen.variance
        if reference is not None:
            # Of the same images, or the difference would hold the noise between images too.
            float_mean, float_variance = reference[index, calls]
            mean = norm.running_mean + (mean - float_mean)
            # eps keeps channels that are constant on these images from turning the ratio into noise.
            variance = norm.running_var * (variance + norm.eps) / (float_variance + norm.eps)
        active_mean, active_variance = norm.active_statistics()
        active_mean.copy_(mean)
        active_variance.copy_(variance)

    _watch_norms(model, norms, batches, take_over)


def _reference_statistics(
    model: ConvertedModel, norms: list[SwitchableNorm], batches: list[Tensor]
) -> _Reference:
    """What the float network has on `batches` at the input of each norm."""
    reference: _Reference = {}

    def note(index: int, calls: int, seen: _Statistics) -> None:
        reference[index, calls] = seen.mean, seen.variance

    with model.using_bits(None):
        _watch_norms(model, norms, batches, note)
    return reference


def _watch_norms(
    model: nn.Module,
    norms: list[SwitchableNorm],
    batches: list[Tensor],
    take_over: Callable[[int, int, _Statistics], None],
) -> None:
    """Run `batches`; before each norm runs, its index, calls and statistics so far are handed to `take_over`."""
    statistics = [_Statistics() for _ in norms]

    def watch(index: int, _norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        statistics[index].add(args[0])
        take_over(index, statistics[index].calls, statistics[index])

    hooks = [
        norm.register_forward_pre_hook(partial(watch, index)) for index, norm in enumerate(norms)
    ]
    try:
        for images in batches:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()


def _require_finite_norms(model: ConvertedModel) -> None:
    _require_none_broken(
        [
            path
            for path, norm in _norms(model)
            if norm.bank is not None
            and not all(
                torch.isfinite(value).all()
                for value in (norm.bank.running_mean, norm.bank.running_var)
            )
        ]
    )


def _require_none_broken(broken: list[str]) -> None:
    if broken:
        msg = f"norm statistics of {shorten(broken, 3)} came out not finite: check the calibration data"
        raise CalibrationError(msg)


def _held(loader: Iterable[Batch], limit: int | None, device: torch.device) -> list[Tensor]:
    batches = [images_of(batch).to(device) for batch in take(loader, limit)]
    if not batches:
        msg = "the loader yields no batch: calibration needs at least one"
        raise CalibrationError(msg)
    return batches


def _layers(model: ConvertedModel) -> Iterator[tuple[str, QuantizedLayer]]:
    return iter(model.quantized_layers.items())


def _norms(model: ConvertedModel) -> Iterator[tuple[str, SwitchableNorm]]:
    for path in model.anyprec_record.norms:
        norm = model.get_submodule(path)
        if isinstance(norm, SwitchableNorm):
            yield path, norm


@contextmanager
def _undo_on_error(model: ConvertedModel) -> Iterator[None]:
    """Restore step sizes, zero points and norm copies if the block fails."""
    parts: list[nn.Module] = [norm.bank for _, norm in _norms(model) if norm.bank is not None]
    parts += [norm for _, norm in _norms(model)]
    parts += [
        part
        for _, layer in _layers(model)
        for part in (layer.weight_quantizer, layer.input_quantizer)
    ]
    kept = [{name: value.clone() for name, value in part.state_dict().items()} for part in parts]
    try:
        yield
    except BaseException:
        for part, state in zip(parts, kept, strict=True):
            part.load_state_dict(state)
        raise
