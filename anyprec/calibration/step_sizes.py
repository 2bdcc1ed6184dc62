"""`calibrate`: step sizes and zero points for every candidate, before any training.

The weights are searched in full, inputs on a fixed random sample of what the float network sees.
The search itself is in `least_squares`; copies of norms are the matter of `norm_statistics`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from anyprec.calibration.least_squares import input_grids, weight_steps
from anyprec.calibration.norm_statistics import update_norms
from anyprec.calibration.passes import (
    held_images,
    require_count,
    run_on_images,
    undo_on_error,
)
from anyprec.errors import CalibrationError, NegativeInputWarning
from anyprec.model.checks import require_latents
from anyprec.model.converted import ConvertedModel, require_converted
from anyprec.model.input_size import facts_at_size_of, take_over_facts
from anyprec.model.intact import output_quantizers, switchable_norms
from anyprec.network.facts import NetworkFacts
from anyprec.nn.quantizers import InputQuantizer
from anyprec.runtime.batches import Batch
from anyprec.runtime.modes import evaluating
from anyprec.runtime.processes import of_all_processes, process_count
from anyprec.runtime.transfers import numbers_of, to_device

SAMPLE_SIZE = 32_768
"""Input values kept of each layer, over all batches."""


def calibrate(
    model: ConvertedModel,
    loader: Iterable[Batch],
    *,
    batches: int = 4,
    norm_batches: int = 2,
    seed: int = 0,
) -> None:
    """Set the step sizes of every candidate bit-width, and the norm copies, from a few batches.

    Step sizes and zero points become those of least squared error. They start anew from the latent
    weights and the float network's activations: call it before training, not after. Then every copy
    of every BatchNorm gets the float network's scale and shift, and the statistics of its own
    precision. `update_norms` does only the last, and may follow training.

    Costs are counted at the size of the first batch from now on.

    The model's precision, mode and float parameters are left as they were. If anything fails, its
    step sizes and norm copies are too.

    Args:
        model: A converted model.
        loader: Batches of images, or of pairs (images, labels); training data, in training order.
        batches: At most so many batches of `loader` for the step sizes.
        norm_batches: At most so many for the norm statistics of each precision, from the same
            beginning.
        seed: Of the generator that draws the sample of input values.

    Raises:
        ConversionError: `model` is not converted.
        PackedError: It is packed.
        NoValuesError: It is on the meta device.
        BatchError: The loader yields something else than batches of images that the network takes.
        CalibrationError: The loader is empty, a number of batches is not positive, or a layer's
            input or weight is not finite.

    Warns:
        NegativeInputWarning: The input of a layer is negative somewhere, though `convert` took it
            for one that never is. It is calibrated as one that may be.

    Example:
        >>> import timm, torch, anyprec
        >>> model = anyprec.convert(timm.create_model("test_vit"))
        >>> anyprec.calibrate(model, [torch.randn(4, 3, 160, 160)])
        >>> model.set_bits(4)
    """
    require_latents(require_converted(model, purpose="calibrate"), purpose="calibrate")
    require_count(batches, name="batches")
    require_count(norm_batches, name="norm_batches")
    images = held_images(model, loader, max(batches, norm_batches), purpose="calibrate")
    layers, quantizers = model.quantized_layers, _input_quantizers(model)
    steps = {}
    with evaluating(model), model.using_bits(None):
        samplers = _sample_inputs(model, images[:batches], seed)
        samples = {path: sampler.sample(path) for path, sampler in samplers.items()}
    _require_finite(samples, {path: samplers[path].weight for path in layers})
    with _refuted_signs_dropped(model, samples), undo_on_error(model):
        with evaluating(model), model.using_bits(None):
            facts = facts_at_size_of(model, images[0])
        grids = input_grids(samples, quantizers)
        for path, layer in layers.items():
            steps[path] = weight_steps(samplers[path].weight, layer.weight_quantizer)
        for path, quantizer in quantizers.items():
            quantizer.set_grid(*grids[path])
        for path, layer in layers.items():
            with torch.no_grad():
                layer.weight_quantizer.step.copy_(steps[path])
        for _, norm in switchable_norms(model):
            if norm.bank is not None:
                norm.bank.copy_from(norm)
        update_norms(model, images[:norm_batches], anchored=True)
    take_over_facts(model, facts)
    model.anyprec_record.statistics.clear()


@contextmanager
def _refuted_signs_dropped(model: ConvertedModel, samples: dict[str, Tensor]) -> Iterator[None]:
    """Treat inputs that are negative somewhere as such from now on, and warn of it.

    If the block fails, or the warning is made an error, the model takes them for never negative
    again.

    Args:
        model: The model.
        samples: Values of each layer's input, and of each output, by path, the lowest among them.
    """
    record, quantizers = model.anyprec_record, _input_quantizers(model)
    refuted = _refuted_signs(quantizers, samples)
    if not refuted:
        yield
        return
    try:
        for path, lowest in refuted.items():
            quantizers[path].nonnegative = False
            is_input = path in record.facts.layers
            what = f"the input of layer {path!r}" if is_input else f"what {path!r} quantizes"
            msg = f"{what} is as low as {lowest:.4g}, though what the network does before it "
            msg += "seemed to exclude negative numbers: it is calibrated as signed. Check that the "
            msg += "network computes the same in every eval-mode forward pass"
            warnings.warn(msg, NegativeInputWarning, stacklevel=4)
        known = _with_signs(record.facts, refuted)
        vars(model)["anyprec_record"] = dataclasses.replace(record, facts=known)
        yield
    except BaseException:
        for path in refuted:
            quantizers[path].nonnegative = True
        vars(model)["anyprec_record"] = record
        raise


def _refuted_signs(
    quantizers: Mapping[str, InputQuantizer], samples: Mapping[str, Tensor]
) -> dict[str, float]:
    """The lowest value of each input that is negative somewhere, though it was said never to be."""
    minima: dict[str, Tensor] = {}
    for path, sample in samples.items():
        if quantizers[path].nonnegative:
            minima[path] = sample.min()
    lowest = zip(minima, numbers_of(list(minima.values())), strict=True)
    return {path: value for path, value in lowest if value < 0}


def _with_signs(facts: NetworkFacts, signed: Collection[str]) -> NetworkFacts:
    """`facts` in which these layers' inputs, and these outputs, may be negative."""
    layers = dict(facts.layers)
    for path in layers.keys() & set(signed):
        layers[path] = dataclasses.replace(layers[path], nonnegative=False)
    outputs = []
    for output in facts.outputs:
        nonnegative = output.nonnegative and output.path not in signed
        outputs.append(dataclasses.replace(output, nonnegative=nonnegative))
    return dataclasses.replace(facts, layers=layers, outputs=tuple(outputs))


def _input_quantizers(model: ConvertedModel) -> dict[str, InputQuantizer]:
    """Those of all layers by the layer's path, and those of outputs by their own."""
    quantizers: dict[str, InputQuantizer] = {}
    for path, layer in model.quantized_layers.items():
        quantizers[path] = layer.input_quantizer
    return {**quantizers, **output_quantizers(model)}


class _Sampler:
    """Keeps a random sample of fixed size of values, and the weight they multiply, if any.

    The weight comes from the operator, not from the layer: a standardised weight has another scale
    than the latent one.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._samples: list[Tensor] = []
        self.weight = torch.empty(0)

    def __call__(self, values: Tensor, weight: Tensor | None = None) -> None:
        if weight is not None:
            self.weight = weight.detach()
        flat = values.detach().reshape(-1)
        if flat.numel() > self._size:
            index = torch.randint(flat.numel(), (self._size,), generator=self._generator)
            # The range is exact, whatever was drawn.
            extremes = torch.stack((flat.amin(), flat.amax()))
            flat = torch.cat((flat[to_device(index, flat.device)], extremes))
        if flat.numel():  # a batch may have no rows for this layer
            # A copy, since the network may change the tensor in place.
            self._samples.append(flat.float().clone())

    def sample(self, path: str) -> Tensor:
        """The values of all batches and processes, flat; `path` names the layer in errors."""
        if not self._samples:
            msg = f"layer {path!r} was not reached by the calibration data"
            raise CalibrationError(msg)
        sample = torch.cat(self._samples)
        if process_count() > 1:
            sample = torch.cat(of_all_processes(sample.cpu())).to(sample.device)
        return sample


def _sample_inputs(model: ConvertedModel, batches: list[Tensor], seed: int) -> dict[str, _Sampler]:
    """Run the network on `batches` with a sampler at every quantized layer and output."""
    layers, outputs = model.quantized_layers, output_quantizers(model)
    values_per_batch = max(1, SAMPLE_SIZE // len(batches))
    samplers = {path: _Sampler(values_per_batch, seed) for path in (*layers, *outputs)}
    with ExitStack() as observed, torch.no_grad():
        for path, output in outputs.items():
            observed.enter_context(output.observers.including(samplers[path]))
        for path, layer in layers.items():
            observed.enter_context(layer.operand_observers.including(samplers[path]))
        if not all(numbers_of([torch.isfinite(images).all() for images in batches])):
            msg = "the calibration images hold NaN or infinite values"
            raise CalibrationError(msg)
        for images in batches:
            run_on_images(model, images)
    return samplers


def _require_finite(samples: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse what has no best step size, in one transfer for all layers.

    Raises:
        CalibrationError: The input or the weight of a layer is not finite.
    """
    values = [*samples.values(), *weights.values()]
    are_finite = numbers_of([torch.isfinite(value).all() for value in values])
    for path, is_finite in zip(samples, are_finite, strict=False):
        if not is_finite:
            msg = f"the input of layer {path!r} holds NaN or infinite values: check the "
            msg += "calibration data (and its normalisation) and the network's weights"
            raise CalibrationError(msg)
    if not all(are_finite):
        msg = "a weight holds NaN or infinite values: calibrate a network with finite weights"
        raise CalibrationError(msg)
