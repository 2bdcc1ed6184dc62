"""Whatever a forward remembers, a network that was looked at is as it was before."""

from __future__ import annotations

import copy
import functools
import random
import weakref
from collections import deque
from types import FunctionType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import anyprec
from anyprec.errors import ConversionError
from anyprec.network.analysis import analyze
from anyprec.network.preserving import left_as_it_was

seen_sizes: dict[int, Tensor] = {}
last_output: Tensor | None = None


class Remembering(nn.Module):
    """Two layers; classes below remember something in `note`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        self.note(y)
        return y

    def note(self, y: Any) -> None:
        raise NotImplementedError


class InAttributes(Remembering):
    grid: Any = None

    def note(self, y: Any) -> None:
        self.last, self.shape = y, y.shape
        self.grid = y * 2
        self.b.mine = [y]
        self.training = True


class InContainers(Remembering):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[Any] = []
        self.by_name = {"calls": 0, "inner": {"outputs": [1]}}
        self.recent: deque[Any] = deque(maxlen=1)
        self.seen = {1}
        self.holder = SimpleNamespace(value=0)
        self.weak: Any = weakref.WeakKeyDictionary({self.a: 0})
        self.method = self.recent.append

    def note(self, y: Any) -> None:
        self.history.append(y)
        self.by_name["calls"] += 1
        self.by_name["inner"]["outputs"].append(y)
        self.by_name["new"] = y
        self.recent.append(y)
        self.seen.add(2)
        self.holder.value = y
        self.weak[self.a] = y


class Slotted:
    __slots__ = ("late", "value")

    def __init__(self) -> None:
        self.value: Any = 0


class Computed(Slotted):
    """Its property hides the slot of its base, and computes what it gives (as in mpmath)."""

    __slots__ = ()

    def __init__(self) -> None:
        pass

    def __deepcopy__(self, memo: Any) -> Computed:
        return self

    @property
    def value(self) -> Any:
        return 0.5


class InSlots(Remembering):
    def __init__(self) -> None:
        super().__init__()
        self.state = Slotted()
        self.computed = Computed()

    def note(self, y: Any) -> None:
        self.state.value = self.state.late = y


class InTensors(Remembering):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("matrix", torch.arange(6.0).view(2, 3))
        self.plain = torch.zeros(2)
        self.array = np.zeros(2)

    def note(self, _y: Any) -> None:
        self.calls += 1
        self.average.data.add_(1)
        self.matrix.t_()
        self.plain.numpy()[0] = 5
        self.array += 1


class InParameters(Remembering):
    def note(self, _y: Any) -> None:
        with torch.no_grad():
            self.a.weight.clamp_(-0.01, 0.01)
        self.b.weight.data = torch.ones(4, 4)
        self.b.bias.requires_grad_(False)


class InStructure(Remembering):
    def __init__(self) -> None:
        super().__init__()
        self.first_time = True

    def note(self, y: Any) -> None:
        self.late = nn.Linear(4, 4)
        self.register_buffer("later", torch.ones(1))
        self._buffers["average"] = y
        vars(self).pop("first_time", None)


class InClass(Remembering):
    history: ClassVar[list[Any]] = []
    calls = 0

    def note(self, y: Any) -> None:
        type(self).calls += 1
        InClass.history.append(y)
        InClass.last = y


class InGlobals(Remembering):
    def note(self, y: Any) -> None:
        global last_output  # noqa: PLW0603 (what users write)
        last_output = y
        seen_sizes[4] = y


@functools.cache
def remembered(value: Any) -> Any:
    return value


class InFunctions(Remembering):
    def __init__(self) -> None:
        super().__init__()
        outputs: list[Any] = []
        count = 0

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            nonlocal count
            count += 1
            outputs.append(output)

        self.register_forward_hook(hook)
        self.hook = hook

    def note(self, y: Any, kept: list[Any] = []) -> None:  # noqa: B006 (what users write)
        kept.append(y)
        remembered(y)


class InGenerators(Remembering):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.python, self.numpy = random.Random(0), np.random.default_rng(0)

    def note(self, _y: Any) -> None:
        torch.rand(1, generator=self.generator)
        self.python.random()
        self.numpy.random()
        torch.rand(1)
        random.random()
        np.random.rand()


class OnlyInTracing(Remembering):
    def note(self, y: Any) -> None:
        self.last = y
        if isinstance(y, fx.Proxy):
            msg = "half-way"
            raise RuntimeError(msg)


KINDS = [
    InAttributes, InContainers, InSlots, InTensors, InParameters, InStructure, InClass, InGlobals,
    InFunctions, InGenerators, OnlyInTracing,
]  # fmt: skip


PARTS = {
    Tensor: lambda value: [
        repr((value.tolist(), value.shape, value.stride(), value.requires_grad))
    ],
    np.ndarray: lambda value: [repr(value.tolist())],
    dict: lambda value: [*map(repr, value), *value.values()],
    (list, tuple, set, deque): list,
    torch.Generator: lambda value: [repr(value.get_state().tolist())],
    random.Random: lambda value: [repr(value.getstate())],
    np.random.Generator: lambda value: [repr(value.bit_generator.state)],
    Slotted: lambda value: [getattr(value, name, "none") for name in value.__slots__],
    FunctionType: lambda value: [cell.cell_contents for cell in value.__closure__ or ()],
}
"""What is in an object, beside its attributes."""


def picture(value: Any, pictures: dict[int, Any] | None = None) -> Any:
    """All that is within reach of a value, as plain values, with the identities of objects."""
    pictures = {} if pictures is None else pictures
    if isinstance(value, (int, float, str, type(None), type)):
        return repr(value)
    if id(value) in pictures:
        return id(value)
    pictures[id(value)] = value
    parts: list[Any] = [id(value)]
    for kind, parts_of in PARTS.items():
        if isinstance(value, kind):
            parts += parts_of(value)
    parts.append(getattr(value, "__dict__", None))
    return [picture(part, pictures) for part in parts]


def whole_picture(model: nn.Module) -> Any:
    attributes = {k: v for k, v in vars(type(model)).items() if not k.startswith("__")}
    return (
        picture(model), [module.training for module in model.modules()],
        [(name, picture(value)) for name, value in attributes.items()],
        picture(type(model).note.__defaults__), list(seen_sizes), last_output is None,
        torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state()),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_remembers_is_left_as_it_was(kind: type[Remembering]) -> None:
    model = kind()
    images = torch.randn(2, 4)
    before = whole_picture(model)
    analyze(model, images)
    unchanged = whole_picture(model) == before  # pytest would compare for minutes to explain it
    assert unchanged


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_remembers_can_be_converted_used_and_copied(kind: type[Remembering]) -> None:
    model, images = kind().eval(), torch.randn(8, 4)
    with torch.no_grad():
        expected = copy.deepcopy(model)(images)
    converted = anyprec.convert(model, example_input=images)
    with torch.no_grad():
        assert torch.equal(converted(images), expected) or kind is InParameters
    anyprec.calibrate(converted, [images])
    converted.set_bits(8)
    with torch.no_grad():
        assert torch.isfinite(converted(images)).all()


def test_an_input_that_is_changed_in_place_is_a_copy() -> None:
    class Shifting(Remembering):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.sub_(1)))

    images = torch.zeros(2, 4)
    analyze(Shifting(), images)
    assert not images.any()


def test_a_network_that_fails_is_left_as_it_was() -> None:
    class Failing(Remembering):
        def note(self, y: Any) -> None:
            self.last = y
            self.a.bias.data.zero_()
            msg = "too late"
            raise ValueError(msg)

    model, images = Failing(), torch.randn(2, 4)
    before = whole_picture(model)
    with pytest.raises(ConversionError, match="too late"):
        analyze(model, images)
    unchanged = whole_picture(model) == before  # pytest would compare for minutes to explain it
    assert unchanged


class Vault:
    """Keeps values where no walk over objects finds them."""

    def __init__(self) -> None:
        self._iterator = self._keeping()
        next(self._iterator)

    def _keeping(self) -> Any:
        values: list[Any] = []
        while True:
            values.append((yield))

    def put(self, value: Any) -> None:
        self._iterator.send(value)


def test_a_network_that_keeps_proxies_out_of_reach_is_refused() -> None:
    class Hiding(Remembering):
        def __init__(self) -> None:
            super().__init__()
            self.vault = Vault()

        def note(self, y: Any) -> None:
            self.vault.put(y)

    model = Hiding()
    with pytest.raises(ConversionError, match=r"Hiding keeps values .* attributes of its modules"):
        anyprec.convert(model, example_input=torch.randn(2, 4))
    assert type(model) is Hiding


def test_parameters_that_nothing_writes_to_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Any] = []
    clone = torch.UntypedStorage.clone
    monkeypatch.setattr(
        torch.UntypedStorage, "clone", lambda storage: copies.append(storage) or clone(storage)
    )
    model = Remembering()
    with left_as_it_was(model), torch.no_grad():
        model.b(model.a(torch.randn(2, 4)))
    assert not copies
    with left_as_it_was(model), torch.no_grad():
        model.a.weight[0].zero_()
    assert len(copies) == 1


def test_modules_without_shapes_are_refused_and_stay_lazy() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(ConversionError, match=r"'1.weight' has no shape yet: run the network once"):
        analyze(model, torch.randn(2, 4))
    assert isinstance(model[1], nn.LazyLinear)


def test_constants_of_the_graph_do_not_stay_in_the_network() -> None:
    class Shifted(Remembering):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x + torch.tensor([1.0, 2.0, 3.0, 4.0])))

    model = Shifted()
    attributes = list(vars(model))
    facts = analyze(model, torch.randn(2, 4))
    assert facts.untraceable is None
    assert list(vars(model)) == attributes
