"""A plain network and its file, and the tools to change the one and to compare the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec.runtime.storage import read_file, write_file


def plain_network() -> nn.Sequential:
    """No timm: convolutions with and without norm, a depthwise one, a classifier; 8x8 images."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.SiLU(),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6 * 8 * 8, 3),
    ).eval()


def converted_network(network: nn.Module) -> anyprec.ConvertedModel:
    """Converted and calibrated on random 8x8 images."""
    batch = torch.randn(4, 3, 8, 8)
    model = anyprec.convert(network, bits=(2, 4, 8), example_input=batch[:1])
    anyprec.calibrate(model, [batch])
    return model


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def plain() -> Callable[[], nn.Sequential]:
    return plain_network


@pytest.fixture
def model() -> anyprec.ConvertedModel:
    return converted_network(plain_network())


@pytest.fixture
def path(tmp_path: Path, model: anyprec.ConvertedModel) -> Path:
    """The file of `model`, with one named configuration."""
    file = tmp_path / "net.safetensors"
    anyprec.save(model, file, configs={"small": model.resolve_bits({"*": (2, 4)})})
    return file


@pytest.fixture
def tamper(path: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """Rewrites the document of `path` as a forger would: whole, and with a digest that is right."""

    def rewrite(change: Callable[[dict[str, Any]], object]) -> Path:
        tensors, text = read_file(path)
        document = json.loads(text)
        change(document)
        write_file(path, tensors, json.dumps(document))
        return path

    return rewrite


@pytest.fixture
def same_state() -> Callable[[dict[str, Tensor], dict[str, Tensor]], bool]:
    """Whether two states are equal bit for bit, NaN included."""

    def compare(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
        return left.keys() == right.keys() and all(
            value.dtype == right[name].dtype
            and value.shape == right[name].shape
            and torch.equal(_bytes(value), _bytes(right[name]))
            for name, value in left.items()
        )

    return compare


@pytest.fixture
def photograph(same_state) -> Callable[[nn.Module], Callable[[], None]]:
    """Takes down all that a network is, and returns a check that it still is so."""

    def take(network: nn.Module) -> Callable[[], None]:
        state = {name: value.clone() for name, value in network.state_dict().items()}
        before = _anatomy(network)

        def check() -> None:
            assert _anatomy(network) == before
            assert same_state(network.state_dict(), state)

        return check

    return take


def _anatomy(network: nn.Module) -> list[tuple[Any, ...]]:
    modules = [
        (path, type(module), module.training, sorted(vars(module)), module.extra_repr())
        for path, module in network.named_modules()
    ]
    return [*modules, *((name, id(parameter)) for name, parameter in network.named_parameters())]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
