"""Copies: deep copies, state dicts, and networks whose branches are merged."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

from anyprec.model.conversion import convert, revert
from anyprec.model.converted import ConvertedModel
from anyprec.testing.gradients import require_gradients
from anyprec.testing.numbers import calibrate_briefly, require_effect
from anyprec.testing.outputs import require_same, run
from anyprec.testing.report import Report
from anyprec.testing.structure import require_coverage
from anyprec.testing.trial import Trial

_LARGE = 200_000_000
"""Parameters above which memory is spared: no copy of the float network is kept."""


def copy_unless_large(model: nn.Module) -> nn.Module | None:
    """A copy of the float network for later, or None if it is large."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return None if parameters > _LARGE else copy.deepcopy(model)


def check_deepcopy(trial: Trial, report: Report) -> None:
    """A deep copy gives the same output."""
    with report.check("deepcopy"), trial.model.using_bits(trial.second):
        outputs = run(copy.deepcopy(trial.model), trial.images)
        require_same(outputs, run(trial.model, trial.images))


def check_state_dicts(
    trial: Trial, float_network: nn.Module | None, float_names: list[str], report: Report
) -> None:
    """A state dict loads into another network; so does one with the float network's names alone.

    Args:
        trial: The network whose state dict is taken.
        float_network: A copy of its float network; None makes one from the converted network.
        float_names: The names in the float network's state dict.
        report: Notes what came of it.
    """
    if float_network is None:
        float_network = copy.deepcopy(trial.model)
        revert(float_network)
    with report.check("state dict into a fresh network"):
        twin = convert(float_network, bits=trial.bits, example_input=trial.images[:1])
        _require_state_dict(trial, twin)
    with report.check("float state dict"):
        if not isinstance(float_network, ConvertedModel):  # the check before this one broke early
            convert(float_network, bits=trial.bits, example_input=trial.images[:1])
        _require_float_state_dict(trial, float_network, float_names)


def _require_state_dict(trial: Trial, twin: ConvertedModel) -> None:
    twin.load_state_dict(trial.model.state_dict())
    bits = (trial.second, trial.lowest)
    with trial.model.using_bits(bits), twin.using_bits(bits):
        require_same(run(twin, trial.images), run(trial.model, trial.images))


def _require_float_state_dict(trial: Trial, twin: nn.Module, float_names: list[str]) -> None:
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)  # so that whatever is not loaded shows
    state = trial.model.state_dict()
    twin.load_state_dict({name: state[name] for name in float_names})
    require_same(run(twin, trial.images), trial.eval_outputs)


def merge_branches(model: nn.Module) -> nn.Module | None:
    """A copy with its branches merged by timm, or None if there is nothing to merge."""
    methods = ("fuse", "reparameterize", "switch_to_deploy")
    for module in model.modules():
        if any(hasattr(module, method) for method in methods):
            break
    else:
        return None
    from timm.utils.model import reparameterize_model  # noqa: PLC0415 (rarely used)

    merged: nn.Module = reparameterize_model(copy.deepcopy(model).eval())
    return merged if list(merged.state_dict()) != list(model.state_dict()) else None


def check_merged(merged: nn.Module, trial: Trial, report: Report) -> None:
    """The main promises hold for the network with merged branches too.

    Args:
        merged: The float network with merged branches; it is converted.
        trial: The trial of the network that it comes from.
        report: Notes what came of it.
    """
    name = "after reparameterize_model"
    with report.check(name):
        floats = run(merged, trial.images)
        model = convert(merged, bits=trial.bits, example_input=trial.images[:1])
        trial = dataclasses.replace(trial, model=model, eval_outputs=floats)
        require_same(run(model, trial.images), floats)
        require_coverage(model)
        calibrate_briefly(model, trial.images)
        require_effect(trial)
    if name in report.held:
        with report.check(f"gradients {name}"):
            require_gradients(trial, trial.lowest)
