"""Random small networks of mixed operations keep what anyprec promises of every network.

At W8A8 they answer as in floating point, `convert` leaves their state and attributes as they were,
and `summary` accounts for every parameter of two or more axes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import anyprec

CHANNELS = 8
Step = Callable[[Tensor], Tensor]


class Function(nn.Module):
    """A function of the feature map, without parameters."""

    def __init__(self, function: Step) -> None:
        super().__init__()
        self.function = function

    def forward(self, features: Tensor) -> Tensor:
        return self.function(features)


class Weighted(nn.Module):
    """A function of the feature map and of a bare parameter."""

    def __init__(
        self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)
        self.function = function

    def forward(self, features: Tensor) -> Tensor:
        return self.function(features, self.matrix)


class Residual(nn.Module):
    """A sum or difference of a branch and its input."""

    def __init__(self, branch: nn.Module, sign: float) -> None:
        super().__init__()
        self.branch = branch
        self.sign = sign

    def forward(self, features: Tensor) -> Tensor:
        return torch.add(features, self.branch(features), alpha=self.sign)


class Attention(nn.Module):
    """Self-attention between the places of a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)

    def forward(self, features: Tensor) -> Tensor:
        tokens = _tokens(features)
        output, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return _image(output, features)


class Recurrence(nn.Module):
    """A recurrent network along the places of a feature map."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.recurrence = kind(CHANNELS, CHANNELS, batch_first=True)

    def forward(self, features: Tensor) -> Tensor:
        output, _ = self.recurrence(_tokens(features))
        return _image(output, features)


class Remembering(nn.Module):
    """Keeps its last input, how often it ran, and a moving average in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.register_buffer("average", torch.zeros(CHANNELS))
        self.last: Tensor | None = None
        self.shapes: list[Any] = []
        self.runs = 0

    def forward(self, features: Tensor) -> Tensor:
        self.last = features
        self.runs += 1
        self.shapes.append(features.shape)
        self.average = 0.9 * self.average + 0.1 * features.mean((0, 2, 3)).detach()
        return self.layer(features)


def _tokens(features: Tensor) -> Tensor:
    return features.flatten(2).transpose(1, 2)


def _image(tokens: Tensor, like: Tensor) -> Tensor:
    return tokens.transpose(1, 2).reshape(like.shape)


def _subtract_in_part(features: Tensor) -> Tensor:
    features = features.clone()
    features[:, : CHANNELS // 2].sub_(0.5)
    return features


def _negate_through_view(features: Tensor) -> Tensor:
    features = features * 1.0
    view = features.flatten(2)
    view -= 0.3
    return features


FUNCTIONS: dict[str, Step] = {
    "relu": F.relu,
    "silu": F.silu,
    "relu6": F.relu6,
    "sigmoid gate": lambda features: features * torch.sigmoid(features.mean((2, 3), keepdim=True)),
    "clamp": lambda features: features.clamp(min=-0.5),
    "negative padding": lambda features: F.pad(features, (1, 1, 1, 1), value=-1.0)[..., 1:-1, 1:-1],
    "max pool": lambda features: F.max_pool2d(features, 3, 1, 1),
    "average pool": lambda features: F.avg_pool2d(features, 3, 1, 1),
    "subtract in part": _subtract_in_part,
    "negate through a view": _negate_through_view,
    "cat": lambda features: torch.cat((features[:, :4], -features[:, :4]), dim=1),
    "roll": lambda features: features.roll(1, dims=1).contiguous(),
}

BRANCHES: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
    "grouped transposed": lambda: nn.ConvTranspose2d(
        CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS // 2
    ),
    "conv and norm": lambda: nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU()
    ),
    "attention": Attention,
    "lstm": lambda: Recurrence(nn.LSTM),
    "gru": lambda: Recurrence(nn.GRU),
    "remembering": Remembering,
    "bare conv": lambda: Weighted(
        (CHANNELS, CHANNELS, 3, 3), lambda features, matrix: F.conv2d(features, matrix, padding=1)
    ),
    "matmul": lambda: Weighted(
        (CHANNELS, CHANNELS),
        lambda features, matrix: (matrix @ features.flatten(2)).reshape(features.shape),
    ),
    "tensordot": lambda: Weighted(
        (CHANNELS, CHANNELS),
        lambda features, matrix: _image(
            torch.tensordot(_tokens(features), matrix, dims=1), features
        ),
    ),
    "masked": lambda: Weighted(
        (CHANNELS, CHANNELS),
        lambda features, matrix: _image(F.linear(_tokens(features), matrix.tril()), features),
    ),
    "scale": lambda: Weighted((CHANNELS, 1, 1), lambda features, scale: features * scale),
    "bias map": lambda: Weighted((1, CHANNELS, 6, 6), lambda features, bias: features + bias),
}


class Network(nn.Module):
    """A stem, steps drawn at random, and a head."""

    def __init__(self, steps: list[tuple[str, float | None]], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        modules: list[nn.Module] = []
        for name, sign in steps:
            module = Function(FUNCTIONS[name]) if name in FUNCTIONS else BRANCHES[name]()
            modules.append(module if sign is None else Residual(module, sign))
        self.steps = nn.Sequential(*modules)
        self.head = nn.Conv2d(CHANNELS, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.steps(self.stem(image)))


@st.composite
def networks(draw: st.DrawFn) -> Network:
    kinds = st.sampled_from([*FUNCTIONS, *BRANCHES])
    steps = st.tuples(kinds, st.sampled_from([None, 1.0, -1.0]))
    return Network(draw(st.lists(steps, min_size=1, max_size=3)), draw(st.integers(0, 2**16)))


@pytest.mark.filterwarnings("error")
@settings(max_examples=30, deadline=None, derandomize=True)
@given(network=networks())
def test_random_networks_keep_every_promise(network: Network) -> None:
    network.eval()
    image = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(network)
    with torch.no_grad():
        expected = copy.deepcopy(network)(image)

    model = anyprec.convert(network, bits=(4, 8), example_input=image[:1])

    _assert_as_before(model, before)
    _assert_all_weights_listed(model, before)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(image), expected)
        anyprec.calibrate(model, [image])
        model.set_bits(8)
        error = (copy.deepcopy(model)(image) - expected).norm() / expected.norm()
    assert error < 0.02


def _assert_as_before(model: nn.Module, before: nn.Module) -> None:
    """Every tensor and every plain attribute that the float network had is as it was."""
    state = model.state_dict()
    for key, value in before.state_dict().items():
        assert torch.equal(state[key], value), key
    modules = dict(model.named_modules())
    for path, module in before.named_modules():
        for name, value in _plain_attributes(module):
            assert _same(vars(modules[path])[name], value), f"{path}.{name}"


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if not name.startswith("_"):
            yield name, value


def _same(value: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(value, Tensor) and torch.equal(value, expected)
    return bool(value == expected)


def _assert_all_weights_listed(model: anyprec.ConvertedModel, before: nn.Module) -> None:
    listed = {row.path for row in model.summary().rows}
    for name, parameter in before.named_parameters():
        holder, _, attribute = name.rpartition(".")
        if parameter.ndim > 1:
            assert {holder, f"{holder}.matrices.{attribute}"} & listed, name
