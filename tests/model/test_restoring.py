"""A convert that fails at any moment leaves the network as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import anyprec
from anyprec.model import conversion
from anyprec.nn import layers, matrices, norms, owners
from tests.model.test_names import Network, X

STEPS = [
    (conversion, "quantize_layer"),
    (conversion, "quantize_parameter"),
    (conversion, "intercept_in_owner"),
    (conversion, "switch_norm"),
    (conversion, "ConversionRecord"),
    (conversion, "specialize"),
    (conversion, "Structure"),
    (layers, "WeightQuantizer"),
    (layers, "input_quantizer_of"),
    (layers, "specialize"),
    (layers, "Observers"),
    (matrices, "add_precision"),
    (norms, "NormBank"),
    (norms, "specialize"),
    (norms, "NormSelection"),
    (owners, "specialize"),
]


def _looks(network: nn.Module) -> list[Any]:
    looks: list[Any] = [dict(network.state_dict(keep_vars=True))]
    for path, module in network.named_modules():
        looks.append((path, module, type(module), dict(vars(module)), dict(module._modules)))
    return looks


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, dict):
        same_keys = list(before) == list(after)
        return same_keys and all(_same(before[name], after[name]) for name in before)
    if isinstance(before, (list, tuple)):
        return len(before) == len(after) and all(map(_same, before, after))
    return before is after or (not isinstance(before, torch.Tensor) and before == after)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("module", "name"), STEPS)
def test_after_a_failure_in_any_step_nothing_is_changed(
    module: Any,
    name: str,
    late: bool,
    failure: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, failures = getattr(module, name), 0
    for count in (1, 2, 3):
        network, calls = Network().eval(), []
        # Children of these names are the user's own, in modules that need no such name of ours.
        network.fc.matrices = network.attention.bank = nn.Identity()
        before, expected = _looks(network), network(X)

        def fail(*args: Any, calls: list[int] = calls, count: int = count, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) < count:
                return step(*args, **kwargs)
            if late:
                step(*args, **kwargs)
            raise failure

        with monkeypatch.context() as patched:
            patched.setattr(module, name, fail)
            try:
                anyprec.convert(network, bits=(2, 8), example_input=X)
            except failure:
                failures += 1
                assert _same(before, _looks(network))
                assert torch.equal(network(X), expected)
    assert failures  # the step runs at least once


def test_after_a_failure_the_network_can_be_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network().eval()
    with monkeypatch.context() as patched:
        patched.delattr(conversion, "switch_norm")
        with pytest.raises(NameError):
            anyprec.convert(network, bits=(2, 8), example_input=X)
    anyprec.convert(network, bits=(2, 8), example_input=X)
