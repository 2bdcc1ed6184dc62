"""Every promise, tried on one network.

The checks themselves are in `structure.py`, `numbers.py`, `gradients.py` and `copies.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anyprec.bits import check_candidates
from anyprec.errors import BitsError
from anyprec.testing.copies import (
    check_deepcopy,
    check_merged,
    check_state_dicts,
    copy_unless_large,
    merge_branches,
)
from anyprec.testing.gradients import check_gradients
from anyprec.testing.numbers import (
    calibrate_briefly,
    check_float_outputs,
    check_methods,
    check_precisions,
)
from anyprec.testing.outputs import run
from anyprec.testing.report import BrokenPromiseError, Report
from anyprec.testing.structure import convert_timed, describe_coverage
from anyprec.testing.trial import Trial


def assert_promises(
    model: nn.Module, make_images: Callable[[], Tensor], *, bits: tuple[int, ...] = (2, 8)
) -> Report:
    """Convert a network, try every promise on it, and raise an error if one is broken.

    Args:
        model: A float network with values. It is used up: converted, recalibrated, and given
            another classifier. Pass a copy if you need it afterwards.
        make_images: Makes a batch of random images, at least two.
        bits: Candidate bit-widths, two or more.

    Returns:
        What held, with coverage.

    Raises:
        BrokenPromiseError: At least one promise is broken; the message lists all of them.
        BitsError: `bits` are fewer than two, or not supported.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from anyprec.testing import assert_promises
        >>> network = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
        ... )
        >>> report = assert_promises(network, lambda: torch.randn(4, 3, 8, 8))
        >>> report.coverage
        {'quantized': 3}
    """
    name = type(model).__name__
    report = check_promises(model, make_images, bits=bits)
    if report.broken:
        count = len(report.broken) + len(report.held)
        lines = [f"{name} breaks {len(report.broken)} of {count} promises:"]
        lines += [f"- {check}: {text}" for check, text in report.broken.items()]
        raise BrokenPromiseError("\n".join(lines))
    return report


def check_promises(
    model: nn.Module, make_images: Callable[[], Tensor], *, bits: tuple[int, ...] = (2, 8)
) -> Report:
    """Convert a network, and try every promise on it.

    These are: with bits None the output is the float network's, bit for bit, in eval and train
    mode; at the lowest and highest bits it is finite and differs; switching there and back gives
    the first output again; deep copies and state dicts give the same network; both step sizes of
    every layer get a gradient; the same holds after `timm.utils.reparameterize_model`, where it
    merges branches; `forward_features` and `reset_classifier` work, where the network has them.

    Parameters of a single value, such as zero-initialised ones, get random values first: they
    block gradients. Random numbers come from torch's global generators, which are restored.

    Args:
        model: A float network with values. It is used up: converted, recalibrated, and given
            another classifier. Pass a copy if you need it afterwards.
        make_images: Makes a batch of random images, at least two.
        bits: Candidate bit-widths, two or more.

    Returns:
        What held and what broke, with coverage. If the network cannot be converted or calibrated,
        the other promises are not tried.

    Raises:
        BitsError: `bits` are fewer than two, or not supported.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from anyprec.testing import check_promises
        >>> network = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
        ... )
        >>> report = check_promises(network, lambda: torch.randn(4, 3, 8, 8), bits=(2, 4, 8))
        >>> report.broken, len(report.held)
        ({}, 11)
    """
    candidates = check_candidates(bits, what="bits")
    if len(candidates) < 2:
        msg = f"bits={bits!r} leave nothing to switch to: give two bit-widths or more"
        raise BitsError(msg)
    report = Report()
    gpus = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(gpus)):
        _try_all(model, make_images, candidates, report)
    return report


def _try_all(
    model: nn.Module,
    make_images: Callable[[], Tensor],
    bits: tuple[int, ...],
    report: Report,
) -> None:
    images = make_images()
    _wake(model, make_images)
    eval_outputs, train_outputs = run(model, images), run(model, images, train=True)
    float_network = copy_unless_large(model)
    float_names = list(model.state_dict())
    merged = merge_branches(model)
    converted = convert_timed(model, report, bits=bits, example_input=images[:1])
    if converted is None:
        return
    describe_coverage(converted, report)
    trial = Trial(converted, images, bits, eval_outputs, train_outputs)
    check_float_outputs(trial, report)
    with report.check("calibrate"):
        calibrate_briefly(converted, images)
    if "calibrate" in report.broken:
        return
    check_precisions(trial, report)
    check_deepcopy(trial, report)
    for width in (trial.lowest, trial.highest):
        check_gradients(trial, width, report)
    check_state_dicts(trial, float_network, float_names, report)
    del float_network  # memory for what follows
    if merged is not None:
        check_merged(merged, trial, report)
    check_methods(trial, report)


def _wake(model: nn.Module, make_images: Callable[[], Tensor]) -> None:
    """Give constant parameters values, since zeros block every gradient, and norms statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.max() != parameter.min():
                continue
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(0.3 + torch.rand_like(parameter))
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            model.train()
            for _ in range(3):
                model(make_images())
    model.eval()
