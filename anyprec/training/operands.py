"""The tensors that layers quantize as their weights.

Most layers quantize their weight parameter itself. Some (weight standardisation) derive another
tensor from it in every forward pass. That tensor is what the quantization-error term and the
instability measure must see, so it is noted while a training path runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from anyprec.model.converted import ConvertedModel
from anyprec.nn.layers import QuantizedLayer


class WeightOperands:
    """Knows the weight operand of each layer of a converted model.

    Attributes:
        derived: Operands that were noted since the last `forget`, by the path of their layer.
    """

    def __init__(self, model: ConvertedModel) -> None:
        self._model = model
        self.derived: dict[str, Tensor] = {}

    def direct_layers(self) -> dict[str, QuantizedLayer]:
        """Layers that quantize their weight parameter itself."""
        facts = self._model.anyprec_record.facts.layers
        layers = self._model.quantized_layers
        return {path: layer for path, layer in layers.items() if not facts[path].derived}

    def current(self) -> dict[str, Tensor]:
        """The operands that are known now: weight parameters, then those that were noted."""
        weights = {path: layer.weight for path, layer in self.direct_layers().items()}
        return {**weights, **self.derived}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the derived operands that forward passes in the block make."""
        with ExitStack() as observed:
            for path, layer in self._derived_layers().items():
                observed.enter_context(layer.operand_observers.including(partial(self._note, path)))
            yield

    def forget(self) -> None:
        """Drop what was noted: the weights have changed."""
        self.derived.clear()

    def _derived_layers(self) -> dict[str, QuantizedLayer]:
        layers = {}
        for path, layer in self._model.quantized_layers.items():
            facts = self._model.anyprec_record.facts.layers[path]
            # The operand of a dynamic layer depends on the image, so one step says little about it.
            if facts.derived and not facts.dynamic:
                layers[path] = layer
        return layers

    def _note(self, path: str, _input: Tensor, operand: Tensor) -> None:
        self.derived[path] = operand
