"""`integer`: a network at one configuration as chips compute it, as a module of torch.

Weights are int8 codes, activations uint8 codes, sums int32. What has no integer form runs in
floating point between, as in the file for a runtime. The rounding is that of onnxruntime, so that
accuracy measured here is the accuracy there.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from anyprec.bits import BitConfig
from anyprec.errors import BatchError, TrainingError
from anyprec.exporting.integer_rewriting import (
    FLOATING,
    INTEGERS,
    OperatorPlace,
    in_codes,
    quantize_before_views,
)
from anyprec.exporting.integers import IntegerGraph, to_integers
from anyprec.exporting.lowering import lower
from anyprec.model.converted import BitsRequest, ConvertedModel


class IntegerNetwork(nn.Module):
    """A network of integer layers, for evaluation.

    It has no latent weights and no gradients. Make it with `integer`.

    Attributes:
        config: Precision of each layer.
        operators: Where each operator runs, in the order of the network.
        network: The modules, by the paths of the layers.
        batch: The one size of a batch that it takes; None if it takes any.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        operators: tuple[OperatorPlace, ...],
        config: BitConfig,
        outputs: pytree.TreeSpec,
        batch: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.batch = batch
        self._outputs = outputs
        self.operators = operators
        self.config = config
        super().train(mode=False)

    @property
    def integer_operators(self) -> tuple[OperatorPlace, ...]:
        """Operators that compute with codes."""
        return tuple(place for place in self.operators if place.runs_in == INTEGERS)

    @property
    def floating_operators(self) -> tuple[OperatorPlace, ...]:
        """Operators that compute in floating point, with the reason."""
        return tuple(place for place in self.operators if place.runs_in == FLOATING)

    def forward(self, images: Tensor) -> Any:
        """The outputs of the network, float32.

        Args:
            images: A batch, as the network takes it.

        Raises:
            BatchError: The batch has another size than the one that was fixed.
        """
        if self.batch is not None and len(images) != self.batch:
            msg = f"the network was made for batches of {self.batch}, got one of {len(images)}: "
            msg += "call integer() with an example_input of this size"
            raise BatchError(msg)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            flat = self.network(images.to(torch.float32))
        return pytree.tree_unflatten(flat, self._outputs)

    def train(self, mode: bool = True) -> IntegerNetwork:  # noqa: FBT001, FBT002 (torch's name)
        """Refuses training mode.

        Raises:
            TrainingError: `mode` is True.
        """
        if mode:
            msg = "an integer network cannot be trained: train the network that it was made from, "
            msg += "and call integer() again"
            raise TrainingError(msg)
        return super().train(mode=False)


def integer(
    model: ConvertedModel,
    bits: BitsRequest,
    *,
    example_input: Tensor | None = None,
    dynamic_batch: bool = True,
) -> IntegerNetwork:
    """The integer network of a converted network at one configuration.

    It computes what onnxruntime computes from the file of `export`: bit for bit where an operator
    runs on codes, else but for the order of sums in floating point. Convert with
    `placement="integer"` so that codes go from layer to layer.

    Args:
        model: A calibrated network in float32; not changed.
        bits: As `set_bits` takes it; None is the precision that is set.
        example_input: A batch that it accepts, for networks that take no images of the size that
            they were converted on.
        dynamic_batch: Accept batches of any size; False fixes it to that of the example.

    Raises:
        ExportError: No precision is set, the network is not float32, its weights are no integers
            (`norm="shared"`), an accumulator can exceed int32, or `torch.export` cannot trace it.
        BitsError, NotCalibratedError: as `set_bits`.

    Example:
        >>> import timm, torch, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet").eval(), bits=(4, 8))
        >>> anyprec.calibrate(model, [torch.randn(8, 3, 160, 160)])
        >>> network = anyprec.integer(model, 8)
        >>> network(torch.randn(3, 3, 160, 160)).shape
        torch.Size([3, 1000])
        >>> network.operators[0]
        OperatorPlace(path='conv1.0', operator='conv2d', runs_in='integers', reason='')
    """
    lowered = lower(model, bits, example_input=example_input, dynamic_batch=dynamic_batch)
    return integer_network(to_integers(lowered))


def integer_network(network: IntegerGraph) -> IntegerNetwork:
    """The integer network of a graph; the graph stays as it is."""
    lowered = network.lowered
    graph = copy.deepcopy(lowered.graph)
    quantize_before_views(graph)
    made, operators = in_codes(graph, lowered.floating)
    outputs: Any = graph._out_spec  # noqa: SLF001 (how torch.export nests the outputs)
    batch = None if lowered.dynamic_batch else len(lowered.example)
    return IntegerNetwork(made, operators, lowered.config, outputs, batch)
