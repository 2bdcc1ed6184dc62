"""Facts of a network as plain values: what `analysis.py` finds and a checkpoint keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["convolution", "depthwise", "linear", "other"]
"""Kinds of layers that hardware treats differently."""

READ_BY = "read by "
"""How the problem begins of a weight that functions read that do not quantize it."""

HIDDEN = "which hides the operator"
"""How it ends where such a function multiplies the weight by an input."""


@dataclass(frozen=True)
class LayerFacts:
    """What is known of one layer.

    That is a Conv or Linear layer, or anything else that multiplies its input by a weight.

    Attributes:
        path: Path of the layer in the network; `HOLDER.matrices.NAME` for a bare parameter of a
            module.
        calls: How often its weight multiplied an input in one forward pass, or was read otherwise.
        macs: Multiply-accumulates for one sample, over all calls.
        weights: Number of weights; 0 if they are the products of another layer.
        owner: Path of the module that uses the weight without calling the layer, or None.
        parameter: Path of the bare parameter that is the weight, or None.
        axis: Axis of a bare parameter that holds output channels; None for a Conv or Linear layer,
            whose class determines it.
        groups: Groups of a transposed convolution: the output channels along the axis are those of
            one of them. 1 for anything else, and in files of earlier versions, where groups share
            step sizes.
        per_tensor: The weight operand has no fixed output channels, so one step size serves all
            of it.
        dynamic: The weight operand depends on the network's input.
        derived: The weight operand is made from the weight in every forward pass (weight
            standardisation).
        feature: Path of the norm (other than a BatchNorm) or activation right behind it, or None.
        depthwise: A grouped convolution with one input channel per group.
        nonnegative: What the network does before it proves that the input cannot be negative.
        first: It reads the network's input, with no other layer in between.
        last: Its output reaches the network's output, and no other layer.
        constant: Its input does not depend on the network's input.
        problem: Why the layer cannot be quantized, or None.
        kind: Of the layer, as hardware sees it; None unless the network was converted for hardware.
        reads: Path of the output quantizer (`OutputFacts`) whose values it reads in all its calls,
            unchanged but for their places; None if there is none.
    """

    path: str
    calls: int
    macs: int
    weights: int
    owner: str | None = None
    parameter: str | None = None
    axis: int | None = None
    groups: int = 1
    per_tensor: bool = False
    dynamic: bool = False
    derived: bool = False
    feature: str | None = None
    depthwise: bool = False
    nonnegative: bool = False
    first: bool = False
    last: bool = False
    constant: bool = False
    problem: str | None = None
    kind: LayerKind | None = None
    reads: str | None = None

    @property
    def is_only_read(self) -> bool:
        """Whether something read the weight but, as far as is known, multiplied no input by it.

        It was added, indexed, normalised with.
        """
        problem = self.problem or ""
        return problem.startswith(READ_BY) and not problem.endswith(HIDDEN) and not self.macs


@dataclass(frozen=True)
class OutputFacts:
    """What is known of a value between layers that can have a quantizer of its own.

    It is the output of a layer, a sum or an average, behind the norm and the clamp that follow it.

    Attributes:
        path: Path of its quantizer, `HOLDER.output_quantizers.NUMBER`.
        source: Path of the layer that makes it, or name of the function.
        owner: Path of the module in whose forward it is made.
        function: The function whose result it is, as `anyprec.nn.counting` names it.
        index: How many calls of that function come before, inside one call of the owner.
        counts: How many there are in all, in each call of the owner that was observed.
        nonnegative: It cannot be negative.
        layers: The layers that read it, unchanged but for the places of its numbers.
        other_readers: Something else reads it, too.
        output: It reaches the network's output.
    """

    path: str
    source: str
    owner: str
    function: str
    index: int
    counts: tuple[int, ...]
    nonnegative: bool = False
    layers: tuple[str, ...] = ()
    other_readers: bool = False
    output: bool = False

    @property
    def holder(self) -> str:
        """Path of the module that holds the quantizer."""
        return self.path.rpartition(".")[0].rpartition(".")[0]


@dataclass(frozen=True)
class NetworkFacts:
    """What is known of a network.

    Attributes:
        layers: Facts of every layer with a weight, by path, in the order of `named_modules`.
        norms: Path of every BatchNorm to the path of the single layer that feeds it, or None.
        uncounted: Operators with a cost of their own that belong to no layer, with calls and MACs
            for one sample.
        example_shape: Shape of the example input, batch first.
        untraceable: Why torch.fx could not trace the network, or None.
        outputs: Values between layers that have a quantizer of their own.
        apart: Paths of modules whose calls are not counted for the owners around them.
    """

    layers: dict[str, LayerFacts]
    norms: dict[str, str | None]
    uncounted: dict[str, tuple[int, int]]
    example_shape: tuple[int, ...]
    untraceable: str | None = None
    outputs: tuple[OutputFacts, ...] = ()
    apart: tuple[str, ...] = ()
