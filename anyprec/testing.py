"""What anyprec promises of every converted network, as checks that take a float network and say what broke.

`zoo.py` runs them over all of timm, the tests over one small network for each mechanism. A check returns nothing and
raises `BrokenPromiseError`, or whatever the network raised; `examine` turns both into text.
"""

from __future__ import annotations

import copy
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import anyprec
from anyprec.model.conversion import revert

BITS = (2, 8)

_LARGE = 200_000_000
"""Parameters above which the float network is not kept beside the converted one, but got back from it when needed."""


class BrokenPromiseError(AssertionError):
    """A promise does not hold."""


@dataclass
class Report:
    """What was found.

    Attributes:
        coverage: Layers by what became of them: quantized, exempt, skipped.
        reasons: Why layers are not quantized, and how many for each reason.
        functional: Quantized layers whose weight is used without calling them, and bare parameters among the layers.
        macs: Multiply-accumulates for one sample by our cost model, and by torch's counter.
        broken: Check that failed to what was wrong.
        held: Checks that held.
        alone: Layers whose step sizes got a gradient only with all others at their highest bits, by bit-width.
        unreached: Layers without a gradient, to whose weights the float network passes none either.
        convert_seconds: Time of `convert`.
    """

    coverage: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    functional: dict[str, int] = field(default_factory=dict)
    macs: tuple[int, int] = (0, 0)
    broken: dict[str, str] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)
    alone: dict[str, int] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    convert_seconds: float = 0.0

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Note whether the block went through."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (any network may raise anything: that is what is looked for)
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
            self.broken[name] = f"{type(error).__name__}: {text} ({where.name}:{where.lineno})"
        else:
            self.held.append(name)


# --- Structure ----------------------------------------------------------------------------------------------------


def examine_structure(model: nn.Module, example_input: Tensor | None = None) -> Report:
    """Convert a network, on the meta device if it is there, and look at coverage and MACs.

    Args:
        model: A float network; it is converted.
        example_input: As for `convert`; None leaves the choice to it.
    """
    report = Report()
    model.eval()
    with report.check("convert"):
        start = time.perf_counter()
        anyprec.convert(model, example_input=example_input)
        report.convert_seconds = time.perf_counter() - start
    if report.broken:
        return report
    describe_coverage(model, report)
    with report.check("nothing is skipped"):
        skipped = [f"{row.path}: {row.reason}" for row in model.coverage if row.status == "skipped"]
        _require(not skipped, "; ".join(skipped[:3]))
    with report.check("MACs equal those of torch's counter"):
        shape = model.anyprec_record.facts.example_shape
        first = next(model.parameters())
        compare_macs(model, torch.zeros(shape, device=first.device, dtype=first.dtype), report)
    return report


def describe_coverage(model: anyprec.ConvertedModel, report: Report) -> None:
    """Count layers by what became of them."""
    report.coverage = dict(Counter(row.status for row in model.coverage))
    report.reasons = dict(
        Counter(row.reason for row in model.coverage if row.status != "quantized")
    )
    facts = [model.anyprec_record.facts.layers[path] for path in model.quantized_layers]
    report.functional = {
        "used without a call": sum(
            layer.owner is not None and layer.parameter is None for layer in facts
        ),
        "bare parameters": sum(layer.parameter is not None for layer in facts),
    }


def compare_macs(model: anyprec.ConvertedModel, images: Tensor, report: Report) -> None:
    """Our MACs, with those that are listed as not counted, against torch's counter on the float network."""
    cost = anyprec.cost_model(model)
    ours = cost.macs + sum(entry.macs for entry in cost.uncounted)
    # torch's counter hooks into autograd where a parameter asks for gradients, and misses fused attention on a CPU.
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad = False
    try:
        with (
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            model(images)
    finally:
        for parameter in wanting:
            parameter.requires_grad = True
    report.macs = ours, counter.get_total_flops() // 2 // len(images)
    _require(report.macs[0] == report.macs[1], f"{report.macs[0]:,} against {report.macs[1]:,}")


# --- Numbers ------------------------------------------------------------------------------------------------------


def examine(
    model: nn.Module, make_images: Callable[[], Tensor], *, bits: tuple[int, ...] = BITS
) -> Report:
    """Convert a network and try every promise on it.

    Args:
        model: A float network on a real device; it is converted, trained a little and given another classifier.
        make_images: Makes a batch of at least two random images.
        bits: Candidates; the lowest and the highest are tried.
    """
    report = Report()
    images = make_images()
    waken(model, make_images)
    expected = {train: run(model, images, train=train) for train in (False, True)}
    fresh = _kept_float_network(model)
    reparameterized = _reparameterized(model)
    floats = list(model.state_dict())
    with report.check("convert"):
        start = time.perf_counter()
        anyprec.convert(model, bits=bits, example_input=images[:1])
        report.convert_seconds = time.perf_counter() - start
    if report.broken:
        return report
    describe_coverage(model, report)
    with report.check("float output, eval mode"):
        _require_same(run(model, images), expected[False])
    with report.check("float output, train mode"):
        _require_same(run(model, images, train=True), expected[True])
    with report.check("calibrate"):
        anyprec.calibrate(model, [images], batches=1, norm_batches=1)
    if "calibrate" in report.broken:
        return report
    with report.check("finite at the lowest and highest bits, and different"):
        _check_extremes(model, images, bits, expected[False])
    with report.check("switching there and back"):
        _check_switching(model, images, bits)
    with report.check("deepcopy"), model.using_bits(bits[1]):
        _require_same(run(copy.deepcopy(model), images), run(model, images))
    for width in (bits[0], bits[-1]):
        with report.check(f"gradients at {width} bits"):
            alone, report.unreached = _check_gradients(model, images, width, highest=bits[-1])
            report.alone[str(width)] = len(alone)
    fresh = fresh or _float_network_of(model)
    with report.check("state dict into a fresh network"):
        _check_state_dict(model, fresh, images, bits)
    with report.check("float state dict"):
        if not isinstance(fresh, anyprec.ConvertedModel):
            anyprec.convert(fresh, bits=bits, example_input=images[:1])
        _check_float_state_dict(model, floats, fresh, images, expected[False])
    del fresh
    if reparameterized is not None:
        with report.check("after reparameterize_model"):
            _check_reparameterized(reparameterized, images, bits)
        if "after reparameterize_model" in report.held:
            with report.check("gradients after reparameterize_model"):
                _check_gradients(reparameterized, images, bits[0], highest=bits[-1])
    if hasattr(model, "forward_features"):
        with report.check("forward_features"), model.using_bits(bits[0]), torch.no_grad():
            _require_finite(_tensors(model.eval().forward_features(images)))
    if hasattr(model, "reset_classifier"):
        with report.check("reset_classifier"):
            _check_classifier(model, images, bits)
    return report


def _kept_float_network(model: nn.Module) -> nn.Module | None:
    """A copy of the float network for later, unless it is large."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return None if parameters > _LARGE else copy.deepcopy(model)


def _float_network_of(model: nn.Module) -> nn.Module:
    """The float network that a converted one was."""
    fresh = copy.deepcopy(model)
    revert(fresh)
    return fresh


def waken(model: nn.Module, make_images: Callable[[], Tensor]) -> None:
    """Give zero-initialised parameters a value, since they block every gradient, and norms some statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.max() == parameter.min():
                fresh = (
                    torch.randn_like(parameter) * 0.1
                    if parameter.ndim > 1
                    else 0.3 + torch.rand_like(parameter)
                )
                parameter.copy_(fresh)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):  # noqa: SLF001
            model.train()
            for _ in range(3):
                model(make_images())
    model.eval()


def run(model: nn.Module, images: Tensor, *, train: bool = False) -> list[Tensor]:
    """All tensors of the output in the given mode, under one seed; buffers are left as they were."""
    model.train(train)
    torch.manual_seed(5)
    with _keeping_buffers(model), torch.no_grad():
        outputs = _tensors(model(images))
    model.eval()
    return outputs


@contextmanager
def _keeping_buffers(model: nn.Module) -> Iterator[None]:
    before = (
        {name: buffer.clone() for name, buffer in model.named_buffers()} if model.training else {}
    )
    yield
    with torch.no_grad():
        for name, buffer in before.items():
            model.get_buffer(name).copy_(buffer)


def _check_extremes(
    model: anyprec.ConvertedModel, images: Tensor, bits: tuple[int, ...], floats: list[Tensor]
) -> None:
    found = []
    for width in (bits[0], bits[-1]):
        with model.using_bits(width):
            found.append(run(model, images))
        _require_finite(found[-1])
    for other, name in ((floats, "the float network's"), (found[1], "that at the highest bits")):
        same = all(torch.equal(here, there) for here, there in zip(found[0], other, strict=True))
        _require(not same, f"the output at the lowest bits is {name}")


def _check_switching(model: anyprec.ConvertedModel, images: Tensor, bits: tuple[int, ...]) -> None:
    model.set_bits((bits[1], bits[-1]))
    first = run(model, images)
    with model.using_bits(bits[0]):
        run(model, images)
    _require_same(run(model, images), first)
    model.set_bits(None)


def _check_gradients(
    model: anyprec.ConvertedModel, images: Tensor, width: int, *, highest: int
) -> tuple[list[str], list[str]]:
    """Backward passes leave a gradient on both active step sizes of every layer: none is bypassed.

    With random weights and few bits whole inputs round to zero, or gates saturate, and pass no gradient on. Layers
    that a pass with all layers at `width` missed so are tried again with the others at `highest`, then each operand by
    itself, at last one by one. What is still missed then counts as bypassed, unless the float network itself passes no
    gradient to the weight: where a class token alone reaches the head, say.

    Returns:
        The layers that were reached only with the others at their highest bits, and those that nothing reaches.
    """
    layers = model.quantized_layers
    lowest, others = model.resolve_bits(width), model.resolve_bits(highest)
    steps = {path: layer.input_quantizer.step.detach().clone() for path, layer in layers.items()}
    try:
        missing = _missed(model, images, lowest, set(layers))
        if missing:
            with model.using_bits(lowest):
                _set_steps_from_arriving_inputs(model.eval(), images)
            missing = _missed(model, images, lowest, missing)
            # Not as they were: a step size that fits a constant input exactly has no gradient.
            _restore_steps(layers, {path: 1.07 * step for path, step in steps.items()})
        alone = sorted(missing)
        if missing:
            missing = _missed(
                model, images, others.replace({path: lowest[path] for path in missing}), missing
            )
        unreached = _without_float_gradient(model, images, missing)
        missing = missing - unreached
        missing -= _reached_by_operand(model, images, missing, lowest, others)
        for path in sorted(missing)[:_MOST_ALONE]:
            missing -= _reached_by_operand(model, images, {path}, lowest, others)
    finally:
        model.set_bits(None)
        model.zero_grad(set_to_none=True)
        model.eval()
        _restore_steps(layers, steps)
    _require(not missing, f"{len(missing)} layers have none: {', '.join(sorted(missing)[:4])}")
    return alone, sorted(unreached)


_MOST_ALONE = 40


def _reached_by_operand(
    model: anyprec.ConvertedModel,
    images: Tensor,
    paths: set[str],
    lowest: anyprec.BitConfig,
    others: anyprec.BitConfig,
) -> set[str]:
    """Those whose step sizes get a gradient with everything else, their own other operand too, at the highest bits.

    A weight of few values may round to zero where the gradient of the input would pass, and an input where that of the
    weight would.
    """
    low_weights = {
        path: anyprec.Bits(lowest[path].weight, others[path].activation) for path in paths
    }
    low_inputs = {
        path: anyprec.Bits(others[path].weight, lowest[path].activation) for path in paths
    }
    reached = paths - _missed(
        model, images, others.replace(low_weights), paths, operands=("weight",)
    )
    return reached - _missed(
        model, images, others.replace(low_inputs), reached, operands=("input",)
    )


def _missed(
    model: anyprec.ConvertedModel,
    images: Tensor,
    config: anyprec.BitConfig,
    looked_for: set[str],
    operands: tuple[str, ...] = ("weight", "input"),
) -> set[str]:
    """Which layers have a step size without gradient after a pass in eval mode and one in train mode."""
    model.zero_grad(set_to_none=True)
    missing = looked_for
    with model.using_bits(config):
        for train in (False, True) if looked_for else ():
            _run_backward(model.train(train), images)
            missing = {
                path
                for path in looked_for
                if not _has_gradients(model.get_submodule(path), operands)
            }
            if not missing:
                break
    return missing


def _without_float_gradient(
    model: anyprec.ConvertedModel, images: Tensor, paths: set[str]
) -> set[str]:
    """Which of these layers have a latent weight that no element of the output depends on in floating point."""
    reached: set[str] = set()
    with model.using_bits(None):
        for train in (False, True) if paths else ():
            model.zero_grad(set_to_none=True)
            model.train(train)
            with _keeping_buffers(model):
                _run_backward(model, images)
            weights = {path: model.quantized_layers[path].weight for path in paths}
            reached |= {
                path
                for path, weight in weights.items()
                if weight.grad is not None and bool(weight.grad.any())
            }
    return paths - reached


def _run_backward(model: nn.Module, images: Tensor) -> None:
    sum(output.float().square().mean() for output in _tensors(model(images))).backward()  # type: ignore[union-attr]


def _has_gradients(layer: Any, operands: tuple[str, ...]) -> bool:
    quantizers = {
        "weight": (layer.weight_quantizer, layer.bits.weight),
        "input": (layer.input_quantizer, layer.bits.activation),
    }
    return all(
        quantizer.step.grad is not None
        and bool(torch.isfinite(quantizer.step.grad).all())
        and bool(quantizer.step.grad[quantizer.candidates.index(bits)].any())
        for quantizer, bits in (quantizers[operand] for operand in operands)
    )


@torch.no_grad()
def _restore_steps(layers: dict[str, Any], steps: dict[str, Tensor]) -> None:
    for path, layer in layers.items():
        layer.input_quantizer.step.copy_(steps[path])


@torch.no_grad()
def _set_steps_from_arriving_inputs(model: anyprec.ConvertedModel, images: Tensor) -> None:
    layers = model.quantized_layers.values()

    def set_step(layer: Any, values: Tensor, _weight: Tensor) -> None:
        quantizer = layer.input_quantizer
        index = quantizer.candidates.index(layer.bits.activation)
        some = values[values != 0].abs()
        # Typical values fall inside the range and not on its border, where no gradient passes.
        quantizer.step[index] = 1.2 * some.median() if some.numel() else quantizer.step[index]

    with ExitStack() as observed:
        for layer in layers:
            observed.enter_context(layer.operand_observers.including(partial(set_step, layer)))
        model(images)


def _check_state_dict(
    model: anyprec.ConvertedModel, fresh: nn.Module, images: Tensor, bits: tuple[int, ...]
) -> None:
    anyprec.convert(fresh, bits=bits, example_input=images[:1])
    fresh.load_state_dict(model.state_dict())
    with model.using_bits((bits[1], bits[0])), fresh.using_bits((bits[1], bits[0])):
        _require_same(run(fresh, images), run(model, images))


def _check_float_state_dict(
    model: anyprec.ConvertedModel,
    floats: list[str],
    other: nn.Module,
    images: Tensor,
    expected: list[Tensor],
) -> None:
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    state = model.state_dict()
    other.load_state_dict({name: state[name] for name in floats})
    _require_same(run(other, images), expected)


def _check_classifier(model: anyprec.ConvertedModel, images: Tensor, bits: tuple[int, ...]) -> None:
    before = list(model.quantized_layers)
    model.reset_classifier(7)
    if not all(layer.input_quantizer.calibrated for layer in model.quantized_layers.values()):
        anyprec.calibrate(model, [images], batches=1, norm_batches=1)
    model.set_bits(bits[0])
    outputs = run(model, images)
    _require_finite(outputs)
    _require(
        outputs[0].shape[-1] == 7,
        f"the output has shape {tuple(outputs[0].shape)} after reset_classifier(7)",
    )
    remaining = dict(
        model.named_modules()
    )  # timm's distilled networks drop their second classifier
    lost = {path for path in before if path in remaining} - set(model.quantized_layers)
    _require(not lost, f"no longer quantized: {sorted(lost)}")


def _reparameterized(model: nn.Module) -> nn.Module | None:
    """A copy with its branches merged by timm, or None if there was nothing to merge."""
    names = ("fuse", "reparameterize", "switch_to_deploy")
    if not any(hasattr(module, name) for module in model.modules() for name in names):
        return None
    merged = reparameterize_model(copy.deepcopy(model).eval())
    return merged if list(merged.state_dict()) != list(model.state_dict()) else None


def _check_reparameterized(model: Any, images: Tensor, bits: tuple[int, ...]) -> None:
    expected = run(model, images)
    anyprec.convert(model, bits=bits, example_input=images[:1])
    _require_same(run(model, images), expected)
    skipped = [row.path for row in model.coverage if row.status == "skipped"]
    _require(not skipped, f"skipped: {skipped[:4]}")
    anyprec.calibrate(model, [images], batches=1, norm_batches=1)
    _check_extremes(model, images, bits, expected)


# --- Shared -------------------------------------------------------------------------------------------------------


def _tensors(output: Any) -> list[Tensor]:
    """Every tensor in an output, however it is nested."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return _tensors(list(output.values()))
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def _require(holds: bool, message: str) -> None:  # noqa: FBT001 (reads as an assertion)
    if not holds:
        raise BrokenPromiseError(message)


def _require_finite(outputs: list[Tensor]) -> None:
    _require(bool(outputs), "no output")
    _require(
        all(bool(torch.isfinite(output.float()).all()) for output in outputs),
        "the output is not finite",
    )


def _require_same(found: list[Tensor], expected: list[Tensor]) -> None:
    _require(len(found) == len(expected), f"{len(found)} outputs instead of {len(expected)}")
    for here, there in zip(found, expected, strict=True):
        if here.shape != there.shape or here.dtype != there.dtype:
            msg = f"{here.dtype} {tuple(here.shape)} instead of {there.dtype} {tuple(there.shape)}"
            raise BrokenPromiseError(msg)
        _require(
            torch.equal(here, there),
            f"off by {float((here.float() - there.float()).abs().max()):.3g}",
        )
