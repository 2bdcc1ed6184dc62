"""From a lowered network to what chips compute: all passes, in their order.

Afterwards every quantized convolution and Linear layer multiplies codes by codes and has an int32
bias. What runs between them in floating point still does.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

from anyprec.exporting.biases import RaisedScale, quantize_biases
from anyprec.exporting.codes import simplify_quantizers
from anyprec.exporting.lowering import Lowered
from anyprec.exporting.norms import fold_norms


@dataclass(frozen=True, eq=False)
class IntegerGraph:
    """A network as integer layers.

    Attributes:
        lowered: The network; its graph is the one that was changed.
        folded: Layers whose scale took a norm.
        raised: Layers with channels of another weight scale, so that their bias fits into int32.
        notes: What the target's tools may not take, in words.
    """

    lowered: Lowered
    folded: tuple[str, ...]
    raised: tuple[RaisedScale, ...]
    notes: tuple[str, ...] = ()


def to_integers(lowered: Lowered) -> IntegerGraph:
    """The integer form of a lowered network, which stays as it is."""
    graph = copy.deepcopy(lowered.graph)
    simplify_quantizers(graph)
    folded = fold_norms(graph)
    # Clamps behind a norm now follow the convolution.
    simplify_quantizers(graph)
    raised = quantize_biases(graph)
    changed = dataclasses.replace(lowered, graph=graph)
    return IntegerGraph(changed, tuple(folded), tuple(raised))
