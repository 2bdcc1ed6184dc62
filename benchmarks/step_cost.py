"""What fake quantization costs: one training step and one eval forward, against the float network's, in one run.

    python benchmarks/step_cost.py [--models NAME ...]

Interleaves the float network, the converted one at W4A4, and the converted one with the naive chain of elementary
operations in place of anyprec's autograd function; prints the median of the ratios to the float time of the same round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn

import anyprec
from anyprec import quantizer


def main() -> None:
    """Print a Markdown table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenetv2_100", "vit_tiny_patch16_224"])
    parser.add_argument("--img-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print("| network | train step / float | naive chain / float | eval forward / float |\n| --- | ---: | ---: | ---: |")
    for name in args.models:
        print(row(name, args), flush=True)


def row(name: str, args: argparse.Namespace) -> str:
    """Measure one network."""
    torch.manual_seed(0)
    options = {"img_size": args.img_size} if "vit" in name else {}
    network = timm.create_model(name, num_classes=100, **options).to(memory_format=torch.channels_last)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(100, (args.batch_size,))
    model = anyprec.convert(copy.deepcopy(network), example_input=images[:1])
    anyprec.calibrate(model, [images], norm_batches=1)
    model.set_bits(4)
    ratios: dict[str, list[float]] = {"step": [], "chain": [], "eval": []}
    for index in range(args.rounds + 1):
        plain = seconds(lambda: train_step(network, images, labels))
        ours = seconds(lambda: train_step(model, images, labels))
        with naive_chain():
            chain = seconds(lambda: train_step(model, images, labels))
        plain_eval, ours_eval = (seconds(lambda net=net: evaluate(net, images)) for net in (network, model))
        if index:  # the first round warms up
            ratios["step"].append(ours / plain)
            ratios["chain"].append(chain / plain)
            ratios["eval"].append(ours_eval / plain_eval)
    cells = (f"{statistics.median(values):.2f}" for values in ratios.values())
    return f"| `{name}` | {' | '.join(cells)} |"


def train_step(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward and backward."""
    network.train()
    nn.functional.cross_entropy(network(images), labels).backward()
    network.zero_grad()


@torch.no_grad()
def evaluate(network: nn.Module, images: Tensor) -> None:
    """Two forward passes in eval mode; the second finds the quantized weights kept."""
    network.eval()
    network(images)
    network(images)


def seconds(run: Callable[[], None]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@contextmanager
def naive_chain() -> Iterator[None]:
    """Replace anyprec's autograd function by the operations that it stands for."""
    ours = quantizer.fake_quantize

    def chain(
        values: Tensor, step: Tensor, *, qmin: int, qmax: int, axis: int | None = None, gradient_scale: float = 1.0
    ) -> Tensor:
        step = step * gradient_scale + (step - step * gradient_scale).detach()
        if axis is not None:
            step = step.reshape([-1 if dim == axis else 1 for dim in range(values.ndim)])
        ratio = torch.clamp(values / step, qmin, qmax)
        return ((ratio.round() - ratio).detach() + ratio) * step

    replaced: Any = quantizer
    replaced.fake_quantize = chain
    try:
        yield
    finally:
        replaced.fake_quantize = ours


if __name__ == "__main__":
    main()
