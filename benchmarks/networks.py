"""Fifteen timm networks of every kind: what is promised of a converted network, checked on each at full size.

    python benchmarks/networks.py [NAME ...]

For each network: layers quantized, exempt and skipped; bits None bit-identical in eval and train mode; a gradient on
every layer's weight and activation step at the lowest bits; A -> B -> A exact; deepcopy, pickle, state dict round trip,
float state dict, `forward_features` and `reset_classifier`; seconds to convert and to calibrate.
"""

from __future__ import annotations

import argparse
import copy
import pickle
import time
from collections import Counter
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

import anyprec

NETWORKS = (
    "resnet18",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "tf_efficientnet_lite0",
    "efficientnet_b0",
    "densenet121",
    "res2net50_26w_4s",
    "convnext_atto",
    "nf_resnet26",
    "resnetv2_50x1_bit",
    "vit_tiny_patch16_224",
    "swinv2_tiny_window8_256",
    "eva02_tiny_patch14_224",
    "mixer_s32_224",
    "repvgg_a0",
)
CLASSES = 10


@dataclass
class Report:
    """What was found for one network; `failures` names the promises that do not hold."""

    name: str
    coverage: Counter[str]
    failures: list[str]
    convert_seconds: float
    calibrate_seconds: float

    def __str__(self) -> str:
        layers = "/".join(str(self.coverage[status]) for status in ("quantized", "exempt", "skipped"))
        verdict = "all hold" if not self.failures else "; ".join(self.failures)
        times = f"{self.convert_seconds:.1f} | {self.calibrate_seconds:.1f}"
        return f"| `{self.name}` | {layers} | {times} | {verdict} |"


def main() -> None:
    """Check the named networks, or all, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NETWORKS)
    names = parser.parse_args().names
    print(
        "| network | quantized/exempt/skipped | convert s | calibrate s | promises |\n| --- | --- | ---: | ---: | --- |"
    )
    for name in names:
        print(check(name), flush=True)


def check(name: str) -> Report:
    """Convert one network and try every promise."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    size = input_size(model)
    waken(model, size)
    original, images = copy.deepcopy(model), torch.randn(4, 3, size, size)
    start = time.perf_counter()
    anyprec.convert(model, example_input=images[:1])
    convert_seconds = time.perf_counter() - start
    start = time.perf_counter()
    anyprec.calibrate(model, [images])
    calibrate_seconds = time.perf_counter() - start
    checks = {
        "float eval differs": lambda: torch.equal(run(original, images), run(model, images)),
        "float train differs": lambda: torch.equal(run(original, images, train=True), run(model, images, train=True)),
        "no gradient at the lowest bits": lambda: gradients_reach_every_step(model, size),
        "switching back differs": lambda: switching_back_is_exact(model, images),
        "a copy differs": lambda: all(
            torch.equal(run(other, images), run(model, images))
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))  # noqa: S301 (our own)
        ),
        "state dict round trip differs": lambda: state_dict_round_trip(model, original, images),
        "float state dict does not load": lambda: loads_float_state(model, original, images),
        "forward_features fails": lambda: bool(torch.isfinite(model.forward_features(images)).all()),
        "reset_classifier fails": lambda: exchanges_classifier(model, images),
    }
    failures = [failure for failure, holds in checks.items() if not holds()]
    coverage = Counter(row.status for row in model.coverage)
    return Report(name, coverage, failures, convert_seconds, calibrate_seconds)


def input_size(model: nn.Module) -> int:
    """The image size of networks that fix it, 128 px for the others."""
    config = model.pretrained_cfg
    return config["input_size"][-1] if config.get("fixed_input_size") else 128


def waken(model: nn.Module, size: int) -> None:
    """Give zero-initialised parameters a value, since they block every gradient, and norms some statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 1 or parameter.std() == 0:
                fresh = torch.randn_like(parameter) * 0.1 if parameter.ndim > 1 else 0.3 + torch.rand_like(parameter)
                parameter.copy_(fresh)
        model.train()
        for _ in range(3):
            model(torch.randn(4, 3, size, size))


def run(model: nn.Module, images: Tensor, *, train: bool = False) -> Tensor:
    """Output of a copy in the given mode under one seed."""
    model = copy.deepcopy(model).train(train)
    torch.manual_seed(5)
    with torch.no_grad():
        return model(images)


def gradients_reach_every_step(model: anyprec.ConvertedModel, size: int) -> bool:
    """Whether a few backward passes at the lowest bits leave a gradient on every step size."""
    trained = copy.deepcopy(model).train()
    trained.set_bits(2)
    for _ in range(3):
        trained(torch.randn(4, 3, size, size)).square().sum().backward()
    return all(
        quantizer.step.grad is not None and bool(quantizer.step.grad[0].any())
        for layer in trained.quantized_layers.values()
        for quantizer in (layer.weight_quantizer, layer.input_quantizer)
    )


def switching_back_is_exact(model: anyprec.ConvertedModel, images: Tensor) -> bool:
    """A -> B -> A; B must differ, and A come back."""
    model.eval()
    model.set_bits(4)
    first = run(model, images)
    with model.using_bits(2):
        changed = not torch.equal(run(model, images), first)
    return changed and torch.equal(run(model, images), first)


def state_dict_round_trip(model: anyprec.ConvertedModel, original: nn.Module, images: Tensor) -> bool:
    """Into a freshly converted network."""
    fresh = anyprec.convert(copy.deepcopy(original), example_input=images[:1])
    fresh.load_state_dict(model.state_dict())
    fresh.set_bits((3, 6))
    with model.using_bits((3, 6)):
        return torch.equal(run(fresh, images), run(model, images))


def loads_float_state(model: anyprec.ConvertedModel, original: nn.Module, images: Tensor) -> bool:
    """A float state dict goes into a converted network, which then answers as the float one."""
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(original.state_dict())
    return torch.equal(run(loaded, images), run(original, images))


def exchanges_classifier(model: anyprec.ConvertedModel, images: Tensor) -> bool:
    """A new classifier is quantized like the old one."""
    changed = copy.deepcopy(model).eval()
    changed.reset_classifier(7)
    anyprec.calibrate(changed, [images])
    changed.set_bits(4)
    same = changed.quantized_layers.keys() == model.quantized_layers.keys()
    return same and run(changed, images).shape == (len(images), 7)


if __name__ == "__main__":
    main()
