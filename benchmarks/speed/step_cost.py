"""What fake quantization costs: a training step of one path, an eval forward and memory.

    python -m benchmarks.speed.step_cost [--models NAME ...] [--device cuda] [--compiled] [--peers]

All against the float network, interleaved in one run: the converted network at W4A4; the converted
network with the naive chain of elementary operations in place of anyprec's autograd function, and
with its quantized weights cached; with `--compiled` also both networks through `torch.compile`;
with `--peers` those of Brevitas and ModelOpt, as far as they are installed, with 8-bit layers as
they make them by default.

Prints the median of the ratios to the float time of the same round, and the ratio of the bytes that
autograd keeps for the backward pass, parameters aside.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stdout,
    suppress,
)
from functools import partial
from typing import Any

import pandas as pd
import timm
import torch
from torch import Tensor, nn

import anyprec
from anyprec.nn import layers, quantizers

Variants = dict[str, tuple[nn.Module, Callable[[], AbstractContextManager[None]]]]
"""Networks to measure, each with the context in which it runs."""

Times = dict[str, list[float]]
"""Seconds of each round, by variant."""


def main() -> None:
    """Print a Markdown table of ratios."""
    args = parse_arguments()
    warnings.simplefilter("ignore")
    rows = [{"network": f"`{name}`", **measure(name, args)} for name in args.models]
    columns = len(rows[0])
    aligned = ["left", *["right"] * (columns - 1)]
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True, colalign=aligned))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["resnet18", "mobilenetv2_100", "vit_tiny_patch16_224"]
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--img-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--compiled", action="store_true", help="also through torch.compile: takes minutes"
    )
    parser.add_argument(
        "--peers", action="store_true", help="also Brevitas and ModelOpt, if installed"
    )
    return parser.parse_args()


def measure(name: str, args: argparse.Namespace) -> dict[str, str]:
    """The cells of one network."""
    torch.manual_seed(0)
    options = {"img_size": args.img_size} if "vit" in name else {}
    network = timm.create_model(name, num_classes=100, **options)
    network.to(args.device, memory_format=torch.channels_last)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(100, (args.batch_size,), device=args.device)
    variants = make_variants(network, images, args)
    steps, evaluations = time_rounds(variants, images, labels, args)
    cells = {"float step, ms": f"{1000 * statistics.median(steps['float']):.1f}"}
    for variant in variants:
        if variant != "float":
            cells[f"step, {variant}"] = ratio(steps[variant], steps["float"])
    for variant in variants:
        if variant not in {"float", "naive chain"}:
            cells[f"eval, {variant}"] = ratio(evaluations[variant], evaluations["float"])
    float_bytes = saved_bytes(network, images, labels)
    for variant, (module, context) in variants.items():
        if variant == "float" or "compiled" in variant:
            continue
        with context():
            cells[f"saved, {variant}"] = f"{saved_bytes(module, images, labels) / float_bytes:.2f}"
    return cells


def make_variants(network: nn.Module, images: Tensor, args: argparse.Namespace) -> Variants:
    """The float network, and what it is compared with."""
    model = anyprec.convert(copy.deepcopy(network), example_input=images[:1])
    anyprec.calibrate(model, [images], norm_batches=1)
    model.set_bits(4)
    variants: Variants = {
        "float": (network, nullcontext),
        "anyprec": (model, nullcontext),
        "naive chain": (model, naive_chain),
    }
    if args.compiled:
        variants["float, compiled"] = (torch.compile(network), nullcontext)
        variants["anyprec, compiled"] = (torch.compile(model), nullcontext)
    if args.peers:
        for peer, make in PEERS.items():
            with suppress(ImportError):
                variants[peer] = (make(copy.deepcopy(network), images), nullcontext)
    return variants


def time_rounds(
    variants: Variants, images: Tensor, labels: Tensor, args: argparse.Namespace
) -> tuple[Times, Times]:
    """Times of training steps and of evaluations, all variants in turn in each round."""
    steps: Times = {variant: [] for variant in variants}
    evaluations: Times = {variant: [] for variant in variants}
    for number in range(args.rounds + 1):
        for variant, (module, context) in variants.items():
            with context():
                step = seconds(partial(train_step, module, images, labels), args.device)
                evaluation = seconds(partial(evaluate, module, images), args.device)
            if number > 0:  # the first round warms up
                steps[variant].append(step)
                evaluations[variant].append(evaluation)
    return steps, evaluations


def ratio(times: list[float], base: list[float]) -> str:
    """Median of the ratios of the rounds, as text."""
    pairs = zip(times, base, strict=True)
    return f"{statistics.median(time_ / base_time for time_, base_time in pairs):.2f}"


def train_step(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward and backward."""
    network.train()
    nn.functional.cross_entropy(logits(network, images), labels).backward()
    network.zero_grad()


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor) -> None:
    """Two forward passes in eval mode; the second finds the quantized weights cached."""
    network.eval()
    network(images)
    network(images)


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """The output as a plain tensor: Brevitas wraps it."""
    output = network(images)
    return output if isinstance(output, Tensor) else output.value


def saved_bytes(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass.

    Parameters, buffers and images do not count.
    """
    network.train()
    held_anyway = set()
    for tensor in (*network.parameters(), *network.buffers(), images):
        held_anyway.add(tensor.untyped_storage().data_ptr())
    sizes: dict[int, int] = {}
    alive = []

    def note(tensor: Tensor) -> Tensor:
        # As long as a tensor is alive, no other one gets its address.
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held_anyway:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        noting_in_layers(note),
        torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved),
    ):
        nn.functional.cross_entropy(logits(network, images), labels)
    return sum(sizes.values())


@contextmanager
def noting_in_layers(note: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Call `note` with what layers save, too: hooks of their own hide it from those around them."""
    layers_module: Any = layers
    recomputing = layers_module.recomputing

    def noted(*arguments: Any) -> Any:
        hooks = recomputing(*arguments)
        pack = getattr(hooks, "pack_hook", None)
        if pack is not None:

            def pack_and_note(saved: Tensor) -> Any:
                packed = pack(saved)
                return note(packed) if isinstance(packed, Tensor) else packed

            hooks.pack_hook = pack_and_note
        return hooks

    layers_module.recomputing = noted
    try:
        yield
    finally:
        layers_module.recomputing = recomputing


def seconds(run: Callable[[], None], device: str) -> float:
    """Time of one call, until the device has done all of it."""
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def brevitas(network: nn.Module, images: Tensor) -> nn.Module:
    """Every layer with a weight and an input quantizer whose scales are learned."""
    module = importlib.import_module("brevitas.graph.quantize")
    quantized: nn.Module = module.layerwise_quantize(network)
    quantized.train()
    quantized(images)
    return quantized


def modelopt(network: nn.Module, images: Tensor) -> nn.Module:
    """Every layer that it knows with fixed scales; it learns no step sizes."""
    module = importlib.import_module("modelopt.torch.quantization")
    with redirect_stdout(None):
        quantized: nn.Module = module.quantize(
            network, module.INT8_DEFAULT_CFG, lambda model: model(images)
        )
    return quantized


PEERS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "Brevitas": brevitas,
    "ModelOpt": modelopt,
}


@contextmanager
def naive_chain() -> Iterator[None]:
    """Replace anyprec's autograd function by elementary operations, and cache quantized weights."""
    quantizers_module: Any = quantizers
    layers_module: Any = layers
    fake_quantize, recomputing = quantizers_module.fake_quantize, layers_module.recomputing
    quantize_operands = layers_module.quantize_operands
    quantize_input = layers_module.quantize_input
    quantizers_module.fake_quantize = fake_quantize_by_elementary_operations
    layers_module.recomputing = lambda *_: nullcontext()
    layers_module.quantize_operands = lambda *_: None
    layers_module.quantize_input = lambda quantizer, values, index: quantizer(values, index)
    try:
        yield
    finally:
        quantizers_module.fake_quantize = fake_quantize
        layers_module.recomputing = recomputing
        layers_module.quantize_operands = quantize_operands
        layers_module.quantize_input = quantize_input


def fake_quantize_by_elementary_operations(
    values: Tensor,
    step: Tensor,
    *,
    qmin: int,
    qmax: int,
    row: int | None = None,
    axis: int | None = None,
    gradient_scale: float = 1.0,
    keep_result: bool = True,  # noqa: ARG001 (autograd decides what is kept)
) -> Tensor:
    """LSQ as it is usually written, with straight-through estimators by `detach`."""
    if row is not None:
        step = step[row]
    step = step * gradient_scale + (step - step * gradient_scale).detach()
    if axis is not None:
        shape = [1] * values.ndim
        shape[axis] = -1
        step = step.reshape(shape)
    clamped = torch.clamp(values / step, qmin, qmax)
    return ((clamped.round() - clamped).detach() + clamped) * step


if __name__ == "__main__":
    main()
