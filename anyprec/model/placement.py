"""Which values between layers are quantized, and putting their quantizers in place.

`placement="layers"` quantizes the inputs of layers alone, as the paper does. With
`placement="integer"` a runtime can compute with integers throughout: see `nn/outputs.py`. What can
be quantized is found in `network/outputs.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Literal

from torch import nn

from anyprec.network.facts import NetworkFacts, OutputFacts
from anyprec.nn.grids import GridRule
from anyprec.nn.outputs import (
    OutputPoint,
    OutputQuantizer,
    add_output_quantizer,
    own_outputs,
)
from anyprec.runtime.batches import device_of

Placement = Literal["layers", "integer"]
"""Where activations are quantized."""


def place_outputs(facts: NetworkFacts, quantized: Collection[str]) -> NetworkFacts:
    """`facts` with those values alone that get a quantizer.

    Args:
        facts: All values that can be quantized.
        quantized: Paths of the layers that will be.
    """
    chosen = [output for output in facts.outputs if _needs_quantizer(output, facts, quantized)]
    paths = {output.path for output in chosen}
    layers = {}
    for path, layer in facts.layers.items():
        reads = layer.reads if layer.reads in paths else None
        layers[path] = dataclasses.replace(layer, reads=reads)
    return dataclasses.replace(
        facts, layers=layers, outputs=tuple(chosen), apart=_apart(facts, chosen)
    )


def _needs_quantizer(output: OutputFacts, facts: NetworkFacts, quantized: Collection[str]) -> bool:
    source = facts.layers.get(output.source)
    if source is not None:
        # A layer in floating point has no use for it, and logits are compared, not computed with.
        makes_logits = source.last and output.output
        if makes_logits or source.path not in quantized:
            return False
    readers = set(output.layers)
    if output.other_readers or output.output or not readers <= set(quantized):
        return True
    # The input quantizer of a single layer does it by itself.
    return len(readers) > 1


def _apart(facts: NetworkFacts, chosen: list[OutputFacts]) -> tuple[str, ...]:
    """The owners of other values inside the owners of the chosen ones.

    Their calls were not counted for the owners around them.
    """
    owners = {output.owner for output in chosen}
    apart: dict[str, None] = {}
    for output in facts.outputs:
        inside = any(not owner or output.owner.startswith(f"{owner}.") for owner in owners)
        if output.owner not in owners and inside:
            apart[output.owner] = None
    return tuple(apart)


def owners_of(facts: NetworkFacts) -> dict[str, tuple[OutputPoint, ...]]:
    """Path of each module that is made an owner of outputs, to its points."""
    owners: dict[str, tuple[OutputPoint, ...]] = dict.fromkeys(facts.apart, ())
    for output in facts.outputs:
        prefix = f"{output.owner}." if output.owner else ""
        point = OutputPoint(
            output.function, output.index, output.counts, output.path.removeprefix(prefix)
        )
        owners[output.owner] = (*owners.get(output.owner, ()), point)
    return owners


def add_outputs(
    model: nn.Module, facts: NetworkFacts, *, rule: GridRule
) -> dict[str, OutputQuantizer]:
    """Give a float network the quantizers and owners of its outputs, in place.

    It stays in floating point until it is switched. Call it before layers and norms are changed.

    Args:
        model: The network.
        facts: Which outputs get a quantizer.
        rule: What is allowed of their grids.

    Returns:
        The quantizers by path.
    """
    quantizers: dict[str, OutputQuantizer] = {}
    device = device_of(model)
    for output in facts.outputs:
        quantizers[output.path] = add_output_quantizer(
            model.get_submodule(output.holder),
            output.path.rpartition(".")[2],
            nonnegative=output.nonnegative,
            device=device,
            rule=rule,
        )
    for path, points in owners_of(facts).items():
        own_outputs(model.get_submodule(path), points)
    return quantizers


def trunk_of(
    path: str, facts: NetworkFacts, quantizers: Mapping[str, OutputQuantizer]
) -> OutputQuantizer | None:
    """What quantizes the values that a layer reads before it does, or None."""
    reads = facts.layers[path].reads
    return None if reads is None else quantizers[reads]
