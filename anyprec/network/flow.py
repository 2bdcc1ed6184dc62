"""How layers are connected: what reads the image, what makes the output, which layer feeds a norm.

All of it is read off the values of one observed forward pass (`values.py`), so that a network needs
no graph for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.weak import WeakIdKeyDictionary

from anyprec.network.activations import is_activation
from anyprec.network.calls import EXPOSING
from anyprec.network.values import ValueTracker
from anyprec.nn.norms import NORM_TYPES
from anyprec.nn.operators import LAYER_TYPES


@dataclass
class Flow:
    """How layers are connected. Everything is named by its path.

    Attributes:
        feeds: BatchNorm to the single layer that feeds it, or None.
        features: Layer to the other norm or the activation right behind it.
        first: Layers that read the network's input.
        last: Layers that make the network's output.
        nonnegative: Layers whose input cannot be negative.
    """

    feeds: dict[str, str | None] = field(default_factory=dict)
    features: dict[str, str] = field(default_factory=dict)
    first: set[str] = field(default_factory=set)
    last: set[str] = field(default_factory=set)
    nonnegative: set[str] = field(default_factory=set)


class FlowTracker:
    """Watches how layers are connected during one forward pass.

    Args:
        model: The network.
        example_input: The very tensor that it will be run on.

    Attributes:
        values: What is known of every value; a mode that must be active during the pass.
    """

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        self.values = ValueTracker(model, example_input)
        self._flow = Flow()
        # Path of the layer in each call, and the calls whose output another call has read.
        self._calls: list[str] = []
        self._read: set[int] = set()
        self._signed: set[str] = set()
        # What a layer put out, unchanged: its path, and how often the storage was written to then.
        # Tensors are keys by identity, and are not kept alive.
        self._outputs: Any = WeakIdKeyDictionary()
        # Modules that take a layer's output, in order: path of the layer, path, module.
        self._followers: list[tuple[str, str, nn.Module]] = []

    def layer_ran(self, path: str, input_: Tensor, weight: Tensor, result: object) -> None:
        """Note a call of a layer, after it: what it multiplied, and what came out."""
        if self.values.of(input_).from_input:
            self._flow.first.add(path)
        if not self.values.is_nonnegative(input_):
            self._signed.add(path)
        self._note_calls([path], [input_, weight], result)
        self._note_output(path, result)

    def layers_ran(self, paths: list[str], inputs: list[Tensor], result: object) -> None:
        """Note a call of a function that uses the weights of layers in a way that is hidden."""
        self._signed.update(paths)
        if any(self.values.of(tensor).from_input for tensor in inputs):
            self._flow.first.update(paths)
        self._note_calls(paths, inputs, result)

    def function_ran(self, func: Any, args: tuple[Any, ...], result: object) -> None:
        """Note a call of any other function of torch."""
        if func in EXPOSING:
            self.values.expose(args[0], writable=EXPOSING[func])
        if func in _COPYING and (path := self._layer_behind(args[0])) is not None:
            self._note_output(path, result)

    def module_starts(self, path: str, module: nn.Module, input_: object) -> None:
        """Note that a module is called; `input_` is its first argument."""
        layer = self._layer_behind(input_)
        if isinstance(module, _BatchNorm):
            # A norm that is called with the outputs of several layers belongs to none of them.
            unambiguous = self._flow.feeds.get(path, layer) == layer
            self._flow.feeds[path] = layer if unambiguous else None
        elif layer is not None:
            self._followers.append((layer, path, module))

    def module_ends(self, path: str, module: nn.Module, output: object) -> None:
        """Note what a module returned: a layer may have scaled what its operator put out."""
        if isinstance(module, LAYER_TYPES) and path in self._calls[-1:]:
            self._note_output(path, output)

    def finish(self, output: object) -> Flow:
        """The connections, once the network has returned `output` and is no longer watched."""
        made: set[int] = set()
        for tensor in tensors_anywhere(output):
            made |= self.values.of(tensor).layers
        # On a residual stream every block's output reaches the end; the last one is read by no
        # other layer.
        self._flow.last = {self._calls[call] for call in made - self._read}
        # An input or an output that was somewhere else than in torch on its way.
        self._flow.first = self._flow.first or set(self._calls[:1])
        self._flow.last = self._flow.last or set(self._calls[-1:])
        self._flow.nonnegative = set(self._calls) - self._signed
        for layer, path, module in self._followers:
            if layer not in self._flow.features and _is_feature(module):
                self._flow.features[layer] = path
        return self._flow

    def _note_calls(self, paths: list[str], inputs: list[Tensor], result: object) -> None:
        for tensor in inputs:
            self._read |= self.values.of(tensor).layers
        start = len(self._calls)
        self._calls += paths
        self.values.mark_output(result, frozenset(range(start, len(self._calls))))

    def _note_output(self, path: str, result: object) -> None:
        if isinstance(result, Tensor):
            self._outputs[result] = path, self.values.writes(result)

    def _layer_behind(self, value: object) -> str | None:
        """The layer whose unchanged output a value is."""
        if not isinstance(value, Tensor):
            return None
        path, writes = self._outputs.get(value, (None, 0))
        return path if self.values.writes(value) == writes else None


_COPYING = {torch.clone, Tensor.clone, Tensor.contiguous, Tensor.float}
"""Functions whose result holds the numbers of their first argument."""


def _is_feature(module: nn.Module) -> bool:
    """Whether a module is a norm or one of torch's activations."""
    if isinstance(module, NORM_TYPES):
        return True
    return type(module).__module__.startswith("torch.nn.") and is_activation(module)


def tensors_anywhere(value: object, depth: int = 8) -> Iterator[Tensor]:
    """The tensors in a network's output: in containers, dataclasses and plain objects."""
    if isinstance(value, Tensor):
        yield value
        return
    parts: list[object] = []
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (tuple, list, set)):
        parts = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, part.name) for part in dataclasses.fields(value)]
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        parts = list(vars(value).values())
    if depth:
        for part in parts:
            yield from tensors_anywhere(part, depth - 1)
