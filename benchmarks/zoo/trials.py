"""One timm model, tried: structure at full size, numbers at the smallest input that fits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

import anyprec
from anyprec.testing import Report, check_promises, check_structure

SIZES = (56, 64, 84, 96, 112, 128, 160, 192, 224, 256, 384)
"""Image sizes to try, smallest first; some divide by 14, some by 16 and 32."""

RATES = (
    {"drop_rate": 0.1, "drop_path_rate": 0.1, "patch_drop_rate": 0.25},
    {"drop_rate": 0.1, "drop_path_rate": 0.1},
    {"drop_path_rate": 0.1},
    {"drop_rate": 0.1},
    {},
)
"""Arguments that make train mode differ from eval mode; a model takes the first that it knows."""

SHALLOW = (
    {"depth": 2},
    {"depth": 2, "num_kv_heads": (8, 4)},
    {"depths": (1, 1, 2, 1)},
    {"layers": (1, 1, 2, 1)},
    {"stages": (1, 1, 2, 1)},
)
"""Arguments that give a model fewer blocks."""

FLOAT_RUNS = "the float network runs"
_MOST_SIZES = 3
"""Sizes that are tried for a model in which layers have no gradient."""


def try_model(
    name: str, largest: int, *, device: str = "cpu", structure_only: bool = False
) -> dict[str, Any]:
    """The record of one model, as JSON can hold it.

    Args:
        name: timm's name of the model.
        largest: Parameters above which numbers are tried with fewer blocks.
        device: Where numbers are tried.
        structure_only: Leave out the numbers.
    """
    torch.manual_seed(0)
    start = time.perf_counter()
    model = create_on_meta(name)
    record: dict[str, Any] = {
        "name": name,
        "family": type(model).__module__.rpartition(".")[2],
        "class": type(model).__name__,
        "parameters": parameter_count(model),
    }
    structure = check_structure(model)
    if isinstance(model, anyprec.ConvertedModel):
        facts = model.anyprec_record.facts
        uncounted = anyprec.cost_model(model).uncounted
        record["input"] = facts.example_shape[1:]
        record["untraceable"] = facts.untraceable
        record["uncounted"] = {entry.name: entry.macs for entry in uncounted}
    record["structure"] = as_json(structure)
    arguments = smaller_depth(name) if record["parameters"] > largest else {}
    record["features"] = try_features(name, arguments)
    record["structure_seconds"] = round(time.perf_counter() - start, 2)
    del model
    if structure_only:
        return {**record, "numbers": None, "arguments": {}}
    start = time.perf_counter()
    report, used = try_numbers(name, arguments, device)
    record["numbers"] = as_json(report)
    record["arguments"] = used
    if device != "cpu":
        record["device"] = torch.cuda.get_device_name(device)
    record["numbers_seconds"] = round(time.perf_counter() - start, 2)
    return record


def as_json(report: Report) -> dict[str, Any]:
    """A report with the checks that held counted, not named."""
    return {**dataclasses.asdict(report), "held": len(report.held)}


def parameter_count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def create_on_meta(name: str, **arguments: Any) -> nn.Module:
    """A model without values."""
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def try_features(name: str, arguments: dict[str, Any]) -> dict[str, str]:
    """What broke in the model as a feature extractor; "none" where timm has no such form.

    A network may look at values while it runs. If conversion fails without them, the network is
    created with values and with `arguments`.
    """
    try:
        model = create_on_meta(name, features_only=True)
    except Exception as error:  # noqa: BLE001 (models refuse in their own ways)
        return {"none": f"{type(error).__name__}: {error}"[:200]}
    broken = check_structure(model).broken
    if "convert" in broken:
        broken = check_structure(timm.create_model(name, features_only=True, **arguments)).broken
    return broken


def smaller_depth(name: str) -> dict[str, Any]:
    """Arguments that halve the parameters or better by fewer blocks, or none."""
    full = parameter_count(create_on_meta(name))
    for arguments in SHALLOW:
        if not creates(name, arguments) or next(fitting_sizes(name, arguments), None) is None:
            continue
        if parameter_count(create_on_meta(name, **arguments)) < full / 2:
            return arguments
    return {}


def try_numbers(name: str, arguments: dict[str, Any], device: str) -> tuple[Report, dict[str, Any]]:
    """Try all promises at the smallest input at which they hold; else at the last that fits.

    At the smallest sizes a deep stage may see a single position, in which attention has nothing to
    choose and no gradient: then larger ones are tried.

    Returns:
        The report, and the arguments and image size that were used.
    """
    report, used = Report(broken={"input": "no size of input fits"}), dict(arguments)
    lacking_sizes = 0
    for size, created in fitting_sizes(name, arguments):
        report, used = Report(), {**created, "size": size}
        model = timm.create_model(name, **created).to(device)
        shape = (2, in_channels(model), size, size)
        with report.check(FLOAT_RUNS):
            report = check_promises(model, partial(_random_images, shape, device))
        del model
        if FLOAT_RUNS in report.broken:
            continue
        lacks_gradients, breaks_more = _judge(report)
        lacking_sizes += lacks_gradients
        if breaks_more or not lacks_gradients or lacking_sizes == _MOST_SIZES:
            break
    return report, used


def _random_images(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.randn(shape).to(device)


def _judge(report: Report) -> tuple[bool, bool]:
    """Whether layers have no gradient, and whether another promise is broken."""
    gradients = [check for check in report.broken if check.startswith("gradients")]
    return bool(report.unreached or gradients), len(report.broken) > len(gradients)


def fitting_sizes(name: str, arguments: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Sizes that the model takes, smallest first, with the arguments that create it for them."""
    # In order of preference: the more that train mode differs from eval mode, the better the trial.
    variants = [{**arguments, **rates} for rates in RATES]
    accepted = [variant for variant in variants if creates(name, variant)]
    config = create_on_meta(name, **accepted[0]).pretrained_cfg
    native = config.get("input_size", (3, 224, 224))[-1]
    for size in (*(size for size in SIZES if size < native), native):
        sized = [{**created, "img_size": size} for created in accepted]
        for created in (*sized, *accepted):
            if runs(name, created, size):
                yield size, created
                break


def creates(name: str, arguments: dict[str, Any]) -> bool:
    """Whether the model knows these arguments."""
    try:
        create_on_meta(name, **arguments)
    except Exception:  # noqa: BLE001 (models refuse in their own ways)
        return False
    return True


def runs(name: str, arguments: dict[str, Any], size: int) -> bool:
    """Whether the model takes images of this size, in both modes."""
    try:
        model = create_on_meta(name, **arguments)
        images = torch.zeros(2, in_channels(model), size, size, device="meta")
        with torch.no_grad():
            model.eval()(images)
            model.train()(images)
    except NotImplementedError:
        return True  # an operator without a meta form: the real run will tell
    except Exception:  # noqa: BLE001 (models refuse in their own ways)
        return False
    return True


def in_channels(model: nn.Module) -> int:
    """Channels of an image."""
    return int(model.pretrained_cfg.get("input_size", (3,))[0])
