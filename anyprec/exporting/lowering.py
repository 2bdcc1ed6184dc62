"""From a converted network at one configuration to one graph of operators, for all targets.

The graph is that of `torch.export`: torch's own operators, and those of `operators.py` where a
value is an integer. It computes what `set_bits(config)` computes, bit for bit. What a target needs
changed is done to it by passes, which are no part of lowering: `norms.py`, `codes.py`, `biases.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from anyprec.bits import BitConfig
from anyprec.errors import ExportError
from anyprec.exporting.constants import fold_constant_weights
from anyprec.exporting.deployed import deployed_copy
from anyprec.exporting.points import name_points
from anyprec.model.checks import require_values
from anyprec.model.converted import BitsRequest, ConvertedModel, require_converted


@dataclass(frozen=True, eq=False)
class Lowered:
    """A network as a graph.

    Attributes:
        graph: The graph module: one input, a batch of images, and the outputs of the network.
        config: Precision of each layer.
        example: An input that it accepts; only its shape and dtype matter.
        floating: Layers that stay in floating point, with the reason.
        dynamic_batch: Whether batches of any size are accepted.
    """

    graph: fx.GraphModule
    config: BitConfig
    example: Tensor
    floating: dict[str, str]
    dynamic_batch: bool


def lower(
    model: ConvertedModel,
    bits: BitsRequest = None,
    *,
    example_input: Tensor | None = None,
    dynamic_batch: bool = True,
) -> Lowered:
    """The graph of a network at one configuration.

    Args:
        model: A calibrated network in float32; not changed.
        bits: As `set_bits` takes it; None is the precision that is set.
        example_input: A batch that it accepts, for networks that take no images of the size that
            they were converted on.
        dynamic_batch: Accept batches of any size.

    Raises:
        ExportError: No precision is set, the network is not float32, its weights are no integers
            (`norm="shared"`), or `torch.export` cannot trace it.
        BitsError, NotCalibratedError: as `set_bits`.

    Example:
        >>> import timm, torch, anyprec
        >>> from anyprec.exporting.lowering import lower
        >>> model = anyprec.convert(timm.create_model("test_resnet").eval(), bits=(4, 8))
        >>> anyprec.calibrate(model, [torch.randn(8, 3, 160, 160)])
        >>> lowered = lower(model, 4)
    """
    require_converted(model, purpose="export")
    require_values(model, purpose="lowering a network")
    config = _config(model, bits)
    _require_float32(model)
    example = _example(model, example_input, dynamic_batch=dynamic_batch)
    network = deployed_copy(model, config)
    graph = traced(network, example, dynamic_batch=dynamic_batch)
    fold_constant_weights(graph)
    name_points(graph)
    floating = {row.path: row.reason for row in model.coverage if row.status != "quantized"}
    return Lowered(graph, config, example, floating, dynamic_batch)


def _config(model: ConvertedModel, bits: BitsRequest) -> BitConfig:
    config = model.bits if bits is None else model.resolve_bits(bits)
    if config is None:
        msg = "the network runs in floating point: pass bits=..., or call set_bits first"
        raise ExportError(msg)
    return config


def _require_float32(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            msg = f"{name} is {parameter.dtype}: integer networks are made from float32 ones, so "
            msg += "call model.float() before"
            raise ExportError(msg)


def _example(model: ConvertedModel, example_input: Tensor | None, *, dynamic_batch: bool) -> Tensor:
    if example_input is None:
        _, *shape = model.anyprec_record.facts.example_shape
        return torch.zeros(2 if dynamic_batch else 1, *shape)
    if not isinstance(example_input, Tensor) or example_input.ndim == 0:
        msg = f"example_input is a {type(example_input).__name__}: pass a batch of images"
        raise ExportError(msg)
    example = example_input.detach().cpu()
    if dynamic_batch and len(example) < 2:
        # One sample would be taken for a constant of the program.
        example = example.expand(2, *example.shape[1:]).contiguous()
    return example


class _OfImages(nn.Module):
    """Calls a network with one argument, whatever its own forward says that it takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return self.network(images)


def traced(network: nn.Module, example: Tensor, *, dynamic_batch: bool) -> fx.GraphModule:
    """The graph of a network in eval mode, of torch's operators.

    Args:
        network: Any network of one input.
        example: A batch that it accepts; of at least two images if its size is to be dynamic.
        dynamic_batch: Accept batches of any size.

    Raises:
        ExportError: `torch.export` cannot trace it.
    """
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    try:
        with torch.no_grad():
            program = torch.export.export(
                _OfImages(network), (example,), dynamic_shapes=shapes, strict=False
            )
            # Nothing is decomposed but what changes tensors in place.
            module = program.run_decompositions({}).module(check_guards=False)
    except Exception as error:
        msg = f"torch.export cannot trace {type(network).__name__} ({_first_line(error)})"
        if dynamic_batch:
            msg += "; if its forward needs to know the size of the batch, pass dynamic_batch=False"
        raise ExportError(msg) from error
    if not isinstance(module, fx.GraphModule):  # pragma: no cover (torch's promise)
        msg = f"torch.export made a {type(module).__name__}"
        raise ExportError(msg)
    return module


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
