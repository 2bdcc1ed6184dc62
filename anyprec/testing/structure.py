"""Structure: every layer is covered, and the cost model counts what torch counts."""

from __future__ import annotations

import time
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anyprec.model.conversion import convert
from anyprec.model.converted import ConvertedModel
from anyprec.model.costing import cost_model
from anyprec.model.presets import DEFAULT_BITS
from anyprec.testing.outputs import require
from anyprec.testing.report import Report


def check_structure(model: nn.Module, example_input: Tensor | None = None) -> Report:
    """Convert a network, and check that no layer is skipped and that MACs are right.

    No values are needed: a network made under `torch.device("meta")` takes no memory, at any size.
    It is also where torch's counter of floating-point operations is complete. On a CPU the counter
    misses operators that torch fuses there: those of an LSTM or of `nn.MultiheadAttention`.

    Args:
        model: A float network. It is converted in place.
        example_input: As for `anyprec.convert`; None leaves the choice to it.

    Returns:
        What held and what broke, with coverage and MACs.

    Example:
        >>> import timm, torch
        >>> from anyprec.testing import check_structure
        >>> with torch.device("meta"):
        ...     network = timm.create_model("resnet18")
        >>> report = check_structure(network)
        >>> report.broken, report.coverage, report.macs
        ({}, {'quantized': 21}, (1814073344, 1814073344))
    """
    report = Report()
    model.eval()
    converted = convert_timed(model, report, example_input=example_input)
    if converted is None:
        return report
    describe_coverage(converted, report)
    with report.check("nothing is skipped"):
        require_coverage(converted)
    with report.check("MACs equal those of torch's counter"):
        parameter = next(converted.parameters())
        shape = converted.anyprec_record.facts.example_shape
        images = torch.zeros(shape, device=parameter.device, dtype=parameter.dtype)
        ours, by_torch = report.macs = count_macs(converted, images)
        require(ours == by_torch, f"{ours:,} against {by_torch:,}")
    return report


def convert_timed(
    model: nn.Module,
    report: Report,
    *,
    bits: tuple[int, ...] = DEFAULT_BITS,
    example_input: Tensor | None,
) -> ConvertedModel | None:
    """Convert as a check of its own; None if that fails."""
    converted = None
    with report.check("convert"):
        start = time.perf_counter()
        converted = convert(model, bits=bits, example_input=example_input)
        report.convert_seconds = time.perf_counter() - start
    return converted


def describe_coverage(model: ConvertedModel, report: Report) -> None:
    """Count layers by what became of them."""
    statuses, reasons = Counter[str](), Counter[str]()
    layers = model.anyprec_record.facts.layers
    for row in model.coverage:
        is_only_read = row.status == "skipped" and layers[row.path].is_only_read
        statuses["only read" if is_only_read else row.status] += 1
        if row.status != "quantized":
            reasons[row.reason] += 1
    report.coverage, report.reasons = dict(statuses), dict(reasons)
    uses = {"used without a call": 0, "bare parameters": 0}
    for path in model.quantized_layers:
        facts = model.anyprec_record.facts.layers[path]
        if facts.parameter is not None:
            uses["bare parameters"] += 1
        elif facts.owner is not None:
            uses["used without a call"] += 1
    report.functional = uses


def require_coverage(model: ConvertedModel) -> None:
    """Require that no layer was skipped, nor a parameter that multiplies an input."""
    skipped = []
    for row in model.coverage:
        facts = model.anyprec_record.facts.layers[row.path]
        if row.status == "skipped" and not facts.is_only_read:
            skipped.append(f"{row.path}: {row.reason}")
    require(not skipped, f"skipped: {'; '.join(skipped[:3])}")


def count_macs(model: ConvertedModel, images: Tensor) -> tuple[int, int]:
    """MACs of one sample of the float network: by the cost model, and by torch's counter.

    Those that the cost model lists as not counted are included.
    """
    cost = cost_model(model)
    ours = cost.macs + sum(entry.macs for entry in cost.uncounted)
    # The counter hooks into autograd where a parameter requires gradients, which fails for some
    # operators; and it misses fused attention on a CPU.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad = False
    try:
        with (
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            model(images)
    finally:
        for parameter in trainable:
            parameter.requires_grad = True
    return ours, counter.get_total_flops() // 2 // len(images)
