"""Names of the user's that conversion would need are refused, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import anyprec
from anyprec.errors import ConversionError
from anyprec.model.classifier import ConvertedClassifier
from anyprec.model.converted import ConvertedModel
from anyprec.nn.layers import QuantizedModule
from anyprec.nn.norms import SwitchableNorm
from anyprec.nn.operators import MATRICES
from anyprec.nn.owners import FunctionalOwner
from anyprec.nn.specialize import Specialized, names_of

X = torch.zeros(2, 3, 8, 8)


class OwnLayer(nn.Conv2d):
    """A layer of the user's own class."""


class OwnNorm(nn.BatchNorm2d):
    """A norm of the user's own class."""


class Attention(nn.Module):
    """Uses the weight of a layer, and a parameter, without calling a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.mix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.query.weight) @ self.mix


class Network(nn.Module):
    """One of each kind of module that conversion changes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layer, self.norm = OwnLayer(8, 8, 3), OwnNorm(8)
        self.attention = Attention()
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layer(self.stem(x).relu())).mean((2, 3))
        return self.fc(self.attention(x))


KINDS: list[tuple[str, type[Specialized]]] = [
    ("", ConvertedModel),
    ("layer", QuantizedModule),
    ("norm", SwitchableNorm),
    ("attention", FunctionalOwner),
]
REMEDIES = {
    "": "put the network inside another module, e.g. nn.Sequential",
    "layer": r"exclude the layer \(exclude='layer'\) or rename the attribute",
    "norm": "rename the attribute",
    "attention": r"exclude the layers that it uses \(.*'attention.query'\) or rename",
}


def _state(network: nn.Module) -> list[object]:
    modules = [(path, type(module), list(vars(module))) for path, module in network.named_modules()]
    return [modules, list(network.state_dict())]


def _require_refused(network: nn.Module, text: str) -> None:
    network.eval()
    before, expected = _state(network), network(X)
    with pytest.raises(ConversionError, match=text):
        anyprec.convert(network, bits=(2, 8), example_input=X)
    assert _state(network) == before
    assert torch.equal(network(X), expected)


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, mixin in KINDS for name in sorted(names_of(mixin))]
)
def test_every_name_that_a_mixin_takes_is_refused_on_the_object(path: str, name: str) -> None:
    network = Network()
    setattr(network.get_submodule(path), name, 0.5)
    subject = f"'{path}' " if path else "the network "
    _require_refused(network, f"{subject}.*'{name}' of its own.*{REMEDIES[path]}")


def _as_child(module: nn.Module, name: str) -> None:
    module.add_module(name, nn.Identity())


def _as_parameter(module: nn.Module, name: str) -> None:
    module.register_parameter(name, nn.Parameter(torch.ones(1)))


def _as_buffer(module: nn.Module, name: str) -> None:
    module.register_buffer(name, torch.ones(1))


def _in_class(value: object) -> Callable[[nn.Module, str], None]:
    def put(module: nn.Module, name: str) -> None:
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {name: value})

    return put


WAYS = [
    _as_child,
    _as_parameter,
    _as_buffer,
    _in_class(1),
    _in_class(lambda self: 1),
    _in_class(property(lambda self: 1 / 0)),
]


@pytest.mark.parametrize("put", WAYS)
@pytest.mark.parametrize(
    ("path", "name"),
    [("", "freeze"), ("layer", "weight_quantizer"), ("norm", "bank"), ("attention", MATRICES)],
)
def test_a_name_is_refused_whatever_it_stands_for(
    path: str, name: str, put: Callable[[nn.Module, str], None]
) -> None:
    network = Network()
    put(network.get_submodule(path), name)
    _require_refused(network, f"'{name}' of its own")


def test_an_excluded_layer_may_have_any_name() -> None:
    network = Network().eval()
    network.layer.bits = 32
    model = anyprec.convert(network, bits=(2, 8), exclude="layer", example_input=X)
    assert model.layer.bits == 32


def test_the_network_inside_another_module_may_have_any_name() -> None:
    network = Network().eval()
    network.bits = network.summary = 32
    expected = network(X)
    model = anyprec.convert(nn.Sequential(network), bits=(2, 8), example_input=X)
    assert torch.equal(model(X), expected)
    assert model[0].bits == model[0].summary == 32


class Delegating(nn.Module):
    """Passes on whatever its inner network has."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class Answering(Delegating):
    """Has an answer for every name."""

    def __getattr__(self, name: str) -> object:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return f"no {name}"


def test_a_name_that_a_wrapper_passes_on_is_refused() -> None:
    network = Delegating(Network())
    network.inner.freeze = lambda: None
    _require_refused(network, "Delegating.*'freeze' of its own")
    del network.inner.freeze
    anyprec.convert(network, bits=(2, 8), example_input=X)


def test_a_network_that_answers_to_every_name_is_converted() -> None:
    network = Answering(Network()).eval()
    expected = network(X)
    model = anyprec.convert(network, bits=(2, 8), example_input=X)
    assert torch.equal(model(X), expected)
    assert model.bits is None
    assert type(model).__mro__[1] is ConvertedModel  # and has no `reset_classifier`


@pytest.mark.parametrize("name", ["no_weight_decay", "reset_classifier"])
@pytest.mark.parametrize("value", [{"norm.weight"}, property(lambda self: {"norm.weight"})])
def test_what_timm_calls_must_be_a_method(name: str, value: object) -> None:
    network = Network()
    _in_class(value)(network, name)
    _require_refused(network, f"an attribute '{name}' that is no method of its class")
    other = Network()
    setattr(other, name, value)
    _require_refused(other, f"an attribute '{name}' that is no method of its class")


@pytest.mark.parametrize("path", ["layer", "norm", "attention"])
def test_a_forward_set_on_the_object_is_refused(path: str) -> None:
    network = Network()
    module = network.get_submodule(path)
    module.forward = module.forward
    _require_refused(network, f"'{path}' .* has a forward that was set on the object")


def test_a_norm_that_computes_its_weight_is_refused() -> None:
    network = Network()
    prune.l1_unstructured(network.norm, "weight", 0.5)
    _require_refused(network, "norm 'norm' was pruned or is parametrized.*prune.remove")


def _ours(module: nn.Module) -> set[str]:
    return {*vars(module), *module._modules, *module._parameters, *module._buffers}


@pytest.mark.parametrize("packed", [False, True])
def test_what_conversion_adds_is_what_the_mixins_name(packed: bool, tmp_path: object) -> None:
    """An attribute or child that is added to a converted module must be listed by its mixin."""
    network = Network().eval()
    before = {path: _ours(module) for path, module in network.named_modules()}
    model = anyprec.convert(network, bits=(2, 8), example_input=X)
    anyprec.calibrate(model, [torch.randn(2, 3, 8, 8)])
    if packed:
        path = tmp_path / "net.safetensors"
        anyprec.save(model, path, packed=True, rebuildable=False)
        model = anyprec.load(path, Network().eval())
    model.set_bits(2)
    model(X)
    for path, names in before.items():
        module = model.get_submodule(path)
        taken = {MATRICES} if path == "attention" else set()
        for mixin in type(module)._anyprec_mixins if isinstance(module, Specialized) else ():
            taken |= names_of(mixin)
        assert _ours(module) - names <= taken, path


@pytest.mark.parametrize("mixin", [*dict(KINDS).values(), ConvertedClassifier])
def test_no_mixin_takes_a_name_of_torchs_own_modules(mixin: type[Specialized]) -> None:
    kinds = [nn.Conv2d, nn.Linear, nn.ConvTranspose2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.LSTM]
    kinds += [nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.ModuleList, nn.Sequential]
    for kind in kinds:
        assert names_of(mixin).isdisjoint(dir(kind)), kind


def test_parameters_may_have_the_names_of_a_dictionarys_methods() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.values = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.keys).softmax(-1) @ self.values

    x = torch.randn(4, 8)
    network = nn.Sequential(nn.Linear(8, 8), Memory(), nn.Linear(8, 2)).eval()
    model = anyprec.convert(network, bits=(2, 8), example_input=x)
    assert {"1.matrices.keys", "1.matrices.values"} <= model.quantized_layers.keys()
