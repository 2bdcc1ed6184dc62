"""What fake quantization costs: a training step of one path, an eval forward and memory, against the float network's.

    python -m benchmarks.speed.step_cost [--models NAME ...] [--device cuda] [--compiled] [--peers]

Interleaves, in one run: the float network; the converted one at W4A4; the converted one with the naive chain of elementary
operations in place of anyprec's autograd function and with quantized weights kept; with `--compiled` also both networks
through `torch.compile`; with `--peers` those of Brevitas and ModelOpt, as far as they are installed, with 8-bit layers
as they make them by default. Prints the median of the ratios to the float time of the same round, and the bytes that
autograd keeps for the backward pass, parameters aside.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn

import anyprec
from anyprec.nn import layers
from anyprec.nn import quantizers as quantizer


def main() -> None:
    """Print a Markdown table of ratios."""
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
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [measure(name, args) for name in args.models]
    columns = list(rows[0])
    print(f"| network | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    for name, row in zip(args.models, rows, strict=True):
        print(f"| `{name}` | {' | '.join(row[column] for column in columns)} |")


def measure(name: str, args: argparse.Namespace) -> dict[str, str]:
    """The cells of one network."""
    torch.manual_seed(0)
    options = {"img_size": args.img_size} if "vit" in name else {}
    network = timm.create_model(name, num_classes=100, **options).to(
        args.device, memory_format=torch.channels_last
    )
    shape = args.batch_size, 3, args.img_size, args.img_size
    images = torch.randn(shape, device=args.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(100, (args.batch_size,), device=args.device)
    model = anyprec.convert(copy.deepcopy(network), example_input=images[:1])
    anyprec.calibrate(model, [images], norm_batches=1)
    model.set_bits(4)
    runs: dict[str, tuple[nn.Module, Callable[[], Any]]] = {
        "float": (network, contextlib.nullcontext)
    }
    runs["anyprec"] = (model, contextlib.nullcontext)
    runs["naive chain"] = (model, naive_chain)
    if args.compiled:
        runs["float, compiled"] = (torch.compile(network), contextlib.nullcontext)
        runs["anyprec, compiled"] = (torch.compile(model), contextlib.nullcontext)
    for peer, make in PEERS.items() if args.peers else ():
        with contextlib.suppress(ImportError):
            runs[peer] = (make(copy.deepcopy(network), images), contextlib.nullcontext)
    steps: dict[str, list[float]] = {run: [] for run in runs}
    evals: dict[str, list[float]] = {run: [] for run in runs}
    for index in range(args.rounds + 1):
        for run, (net, context) in runs.items():
            with context():
                step = seconds(lambda net=net: train_step(net, images, labels), args.device)
                evaluation = seconds(lambda net=net: evaluate(net, images), args.device)
            if index:  # the first round warms up
                steps[run].append(step)
                evals[run].append(evaluation)
    cells = {"float step, ms": f"{1000 * statistics.median(steps['float']):.1f}"}
    for run in list(runs)[1:]:
        cells[f"step, {run}"] = f"{ratio(steps[run], steps['float']):.2f}"
    for run in [run for run in runs if run not in {"float", "naive chain"}]:
        cells[f"eval, {run}"] = f"{ratio(evals[run], evals['float']):.2f}"
    plain = saved_bytes(network, images, labels)
    for run in [run for run in runs if "compiled" not in run and run != "float"]:
        with runs[run][1]():
            cells[f"saved, {run}"] = f"{saved_bytes(runs[run][0], images, labels) / plain:.2f}"
    return cells


def ratio(times: list[float], base: list[float]) -> float:
    """Median of the ratios of the rounds."""
    return statistics.median(here / there for here, there in zip(times, base, strict=True))


def train_step(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward and backward."""
    network.train()
    nn.functional.cross_entropy(logits(network, images), labels).backward()
    network.zero_grad()


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor) -> None:
    """Two forward passes in eval mode; the second finds the quantized weights kept."""
    network.eval()
    network(images)
    network(images)


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """The output as a plain tensor: Brevitas wraps it."""
    output = network(images)
    return output if isinstance(output, Tensor) else output.value


def saved_bytes(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass; parameters, buffers and images aside."""
    network.train()
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*network.parameters(), *network.buffers(), images)
    }
    found: dict[int, int] = {}
    alive = []

    def note(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # so that no other tensor takes its place in memory
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        nn.functional.cross_entropy(logits(network, images), labels)
    return sum(found.values())


def seconds(run: Callable[[], None], device: str) -> float:
    """Time of one call, until the device has done all of it."""
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def brevitas(network: nn.Module, images: Tensor) -> nn.Module:
    """Every layer with a weight and an input quantizer whose scales are learned."""
    quantized: nn.Module = importlib.import_module("brevitas.graph.quantize").layerwise_quantize(
        network
    )
    quantized.train()
    quantized(images)
    return quantized


def modelopt(network: nn.Module, images: Tensor) -> nn.Module:
    """Every layer that it knows with fixed scales; it learns no step sizes."""
    module = importlib.import_module("modelopt.torch.quantization")
    with contextlib.redirect_stdout(None):
        quantized: nn.Module = module.quantize(
            network, module.INT8_DEFAULT_CFG, lambda net: net(images)
        )
    return quantized


PEERS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "Brevitas": brevitas,
    "ModelOpt": modelopt,
}


@contextmanager
def naive_chain() -> Iterator[None]:
    """Replace anyprec's autograd function by the operations that it stands for, and keep quantized weights."""
    replaced: Any = quantizer
    owner: Any = layers
    ours = quantizer.fake_quantize, layers.recomputing

    def chain(
        values: Tensor,
        step: Tensor,
        *,
        qmin: int,
        qmax: int,
        axis: int | None = None,
        gradient_scale: float = 1.0,
    ) -> Tensor:
        step = step * gradient_scale + (step - step * gradient_scale).detach()
        if axis is not None:
            step = step.reshape([-1 if dim == axis else 1 for dim in range(values.ndim)])
        clamped = torch.clamp(values / step, qmin, qmax)
        return ((clamped.round() - clamped).detach() + clamped) * step

    replaced.fake_quantize, owner.recomputing = chain, lambda *_: contextlib.nullcontext()
    try:
        yield
    finally:
        replaced.fake_quantize, owner.recomputing = ours


if __name__ == "__main__":
    main()
