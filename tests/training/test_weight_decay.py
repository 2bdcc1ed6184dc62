"""Who decays: weights alone, by our groups and by the rules of other people's scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

import anyprec
from anyprec.nn.norms import NormBank, SwitchableNorm
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer

NETWORKS = ("test_resnet", "test_efficientnet", "test_vit", "test_convnext")


@pytest.fixture(params=["shared-affine", "per-pair"])
def sharing(request: pytest.FixtureRequest) -> str:
    return request.param


def make(name: str, norm: str = "shared-affine") -> anyprec.ConvertedModel:
    network = timm.create_model(name, num_classes=4)
    return anyprec.convert(network, bits=(2, 4, 8), norm=norm, depthwise_min_bits=2)


def ids(parameters: Iterable[nn.Parameter]) -> set[int]:
    return {id(parameter) for parameter in parameters}


def ids_of(model: nn.Module, *types: type) -> set[int]:
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, types):
            found |= ids(module.parameters())
    return found


def decayed(groups: Iterable[dict[str, Any]]) -> set[int]:
    found: set[int] = set()
    for group in groups:
        if group["weight_decay"] != 0:
            assert group["weight_decay"] == pytest.approx(0.05)
            found |= ids(group["params"])
    return found


def latent_weights(model: anyprec.ConvertedModel) -> set[int]:
    network = timm.create_model(model.default_cfg["architecture"])
    undecayed = getattr(network, "no_weight_decay", set)
    names = {name for name, _ in model.named_parameters()} - set(undecayed())
    found = set()
    for layer_path, layer in model.quantized_layers.items():
        if f"{layer_path}.weight" in names:
            found.add(id(layer.weight))
    return found


def set_weight_decay(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The rule of torchvision's references: by the class of the module, biases by name."""
    norm_classes = (
        nn.modules.batchnorm._BatchNorm,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.modules.instancenorm._InstanceNorm,
        nn.LocalResponseNorm,
    )
    groups: dict[str, list[nn.Parameter]] = {"other": [], "norm": [], "bias": []}

    def add_parameters(module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if name == "bias":
                groups["bias"].append(parameter)
            elif isinstance(module, norm_classes):
                groups["norm"].append(parameter)
            else:
                groups["other"].append(parameter)
        for child in module.children():
            add_parameters(child)

    add_parameters(model)
    decays = {"other": weight_decay, "norm": 0.0, "bias": 0.0}
    return [
        {"params": parameters, "weight_decay": decays[name]} for name, parameters in groups.items()
    ]


RULES: dict[str, Callable[[anyprec.ConvertedModel], list[dict[str, Any]]]] = {
    "ours, decay of the optimizer": lambda model: (
        torch.optim.SGD(anyprec.param_groups(model), lr=0.1, weight_decay=0.05).param_groups
    ),
    "ours, decay of AdamW": lambda model: (
        torch.optim.AdamW(anyprec.param_groups(model, lr=0.1), weight_decay=0.05).param_groups
    ),
    "ours, decay of the groups": lambda model: anyprec.param_groups(model, weight_decay=0.05),
    "ours, in timm's factory": lambda model: (
        create_optimizer_v2(
            anyprec.param_groups(model), opt="sgd", lr=0.1, weight_decay=0.05
        ).param_groups
    ),
    "timm's factory": lambda model: (
        create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.05).param_groups
    ),
    "timm's factory, without a rule for axes": lambda model: (
        create_optimizer_v2(
            model, opt="sgd", lr=0.1, weight_decay=0.05, filter_bias_and_bn=False
        ).param_groups
    ),
    "timm's groups": lambda model: param_groups_weight_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay()
    ),
    "timm's groups by layer": lambda model: param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.9
    ),
    "torchvision's": lambda model: set_weight_decay(model, 0.05),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rule", RULES)
def test_weights_decay_and_step_sizes_and_norm_copies_do_not(
    rule: str, name: str, sharing: str
) -> None:
    model = make(name, sharing)
    found = decayed(RULES[rule](model))
    assert latent_weights(model) <= found
    assert not found & ids_of(model, WeightQuantizer, InputQuantizer)
    assert not found & ids_of(model, NormBank)
    if "without a rule" not in rule:
        assert not found & ids_of(model, SwitchableNorm)


def test_torchvisions_own_helper_takes_step_sizes_and_norm_copies_for_norms() -> None:
    split = pytest.importorskip("torchvision.ops._utils").split_normalization_params
    model = make("test_resnet")
    norms, others = split(model)
    ours = ids_of(model, WeightQuantizer, InputQuantizer, NormBank)
    assert ours <= ids(norms)
    assert latent_weights(model) <= ids(others)


def test_timm_is_told_the_names_that_the_network_gave_before() -> None:
    model = make("test_vit")
    before = timm.create_model("test_vit").no_weight_decay()
    assert before
    assert before < model.no_weight_decay()
    assert model.no_weight_decay() - before <= {name for name, _ in model.named_parameters()}


def test_a_step_without_gradients_of_the_loss_moves_nothing_but_weights(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    """Decay is all that moves a parameter whose gradient is zero."""
    optimizer = create_optimizer_v2(
        anyprec.param_groups(net), opt="momentum", lr=0.5, weight_decay=0.1
    )
    before = {name: value.clone() for name, value in net.named_parameters()}
    net.set_bits(4)
    (0 * F.relu(net(images)).sum()).backward()
    optimizer.step()
    weights = {f"{path}.weight" for path in net.quantized_layers}
    for name, value in net.named_parameters():
        expected = 0.95 * before[name] if name in weights else before[name]
        torch.testing.assert_close(value, expected)
