"""Numbers: float outputs are unchanged, low precision has an effect, switching leaves no trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyprec.calibration.step_sizes import calibrate
from anyprec.model.checks import uncalibrated
from anyprec.model.converted import ConvertedModel
from anyprec.nn.operators import tensors_in
from anyprec.testing.outputs import are_equal, require, require_finite, require_same, run
from anyprec.testing.report import Report
from anyprec.testing.trial import Trial

_CLASSES = 7
"""Classes of the new classifier: a number that no network has by default."""


def check_float_outputs(trial: Trial, report: Report) -> None:
    """With bits None the output is that of the float network."""
    with report.check("float output, eval mode"):
        require_same(run(trial.model, trial.images), trial.eval_outputs)
    with report.check("float output, train mode"):
        require_same(run(trial.model, trial.images, train=True), trial.train_outputs)


def calibrate_briefly(model: ConvertedModel, images: Tensor) -> None:
    """Step sizes and norm statistics from one batch."""
    calibrate(model, [images], batches=1, norm_batches=1)


def check_precisions(trial: Trial, report: Report) -> None:
    """Low precision is finite and has an effect, and switching leaves no trace."""
    with report.check("finite at the lowest and highest bits, and different"):
        require_effect(trial)
    with report.check("switching there and back"):
        _require_switching(trial)


def require_effect(trial: Trial) -> None:
    """Require finite outputs at the lowest and highest bits, and that quantization changes them."""
    with trial.model.using_bits(trial.lowest):
        lowest = run(trial.model, trial.images)
    require_finite(lowest)
    with trial.model.using_bits(trial.highest):
        highest = run(trial.model, trial.images)
    require_finite(highest)
    require(
        not are_equal(lowest, trial.eval_outputs),
        "the output at the lowest bits is the float network's",
    )
    require(
        not are_equal(lowest, highest),
        "the output at the lowest bits is that at the highest bits",
    )


def _require_switching(trial: Trial) -> None:
    model = trial.model
    model.set_bits((trial.second, trial.highest))
    before = run(model, trial.images)
    with model.using_bits(trial.lowest):
        run(model, trial.images)
    require_same(run(model, trial.images), before)
    model.set_bits(None)


def check_methods(trial: Trial, report: Report) -> None:
    """Methods of timm keep working, where the network has them."""
    network: Any = trial.model
    if hasattr(network, "forward_features"):
        with report.check("forward_features"), network.using_bits(trial.lowest), torch.no_grad():
            features = network.eval().forward_features(trial.images)
            require_finite(list(tensors_in([features])))
    if hasattr(network, "reset_classifier"):
        with report.check("reset_classifier"):
            _require_new_classifier(network, trial)


def _require_new_classifier(network: Any, trial: Trial) -> None:
    before = network.quantized_layers.keys()
    network.reset_classifier(_CLASSES)
    layers = network.quantized_layers
    if uncalibrated(network):
        calibrate_briefly(network, trial.images)
    network.set_bits(trial.lowest)
    outputs = run(network, trial.images)
    require_finite(outputs)
    shape = tuple(outputs[0].shape)
    require(
        shape[-1] == _CLASSES, f"the output has shape {shape} after reset_classifier({_CLASSES})"
    )
    # timm's distilled networks drop their second classifier: only what is still there is expected.
    expected = before & dict(network.named_modules()).keys()
    lost = sorted(expected - layers.keys())
    require(not lost, f"no longer quantized: {lost}")
