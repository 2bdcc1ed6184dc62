"""The parts of a network that are reconstructed, each for itself: blocks, or layers where none are.

A block is a module with several quantized layers that takes a tensor and returns one, as residual
units and transformer blocks are: the outermost such module that is no sequence, and holds no
sequence of other blocks. What follows the last one, up to the network's output, is its tail.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.calibration.passes import run_on_images
from anyprec.model.converted import ConvertedModel

_SEQUENCES = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Units:
    """Paths of modules, in the order in which a forward pass comes to them.

    Attributes:
        inner: Blocks and layers with an output of their own to be held against.
        tail: Layers whose output is held against that of the network.
    """

    inner: tuple[str, ...]
    tail: tuple[str, ...]

    @property
    def starts(self) -> tuple[str, ...]:
        """The units whose input is cut off from what is before it."""
        return self.inner + self.tail[:1]


@torch.no_grad()
def find_units(model: ConvertedModel, images: Tensor) -> Units:
    """The units of a network, as one forward pass in eval mode shows them."""
    calls = _Calls()
    with calls.noted(model):
        run_on_images(model, images)
    layers = tuple(model.quantized_layers)
    chosen = [*_choose(model, "", layers, calls)]
    chosen.sort(key=calls.order.index)
    several = [number for number, path in enumerate(chosen) if _count(path, layers) > 1]
    # Without blocks the last layer alone is held against the output.
    end = several[-1] + 1 if several else len(chosen) - 1
    return Units(tuple(chosen[:end]), tuple(chosen[end:]))


@dataclass
class _Calls:
    """Which modules a pass called.

    Attributes:
        order: Their paths, as they were first called.
        others: Those that took or returned something else than a tensor of floats.
    """

    order: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)

    @contextmanager
    def noted(self, model: nn.Module) -> Iterator[None]:
        """Note the calls in the block."""
        with ExitStack() as hooks:
            for path, module in model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # takes no hooks, and has no quantized layer
                enter, leave = partial(self._enter, path), partial(self._leave, path)
                hooks.enter_context(module.register_forward_pre_hook(enter))
                hooks.enter_context(module.register_forward_hook(leave))
            yield

    def _enter(self, path: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if path not in self.order:
            self.order.append(path)
        if not args or not _is_float(args[0]):
            self.others.add(path)

    def _leave(self, path: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if not _is_float(output):
            self.others.add(path)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _choose(module: nn.Module, path: str, layers: tuple[str, ...], calls: _Calls) -> Iterator[str]:
    """The units in a module."""
    if not _count(path, layers):
        return
    if (
        path
        and path in calls.order
        and path not in calls.others
        and not _is_made_of(module, path, layers)
    ):
        yield path
        return
    for name, child in module.named_children():
        yield from _choose(child, f"{path}.{name}" if path else name, layers, calls)


def _is_made_of(module: nn.Module, path: str, layers: tuple[str, ...]) -> bool:
    """Whether a module is a sequence, or holds one of several modules of several layers."""
    if isinstance(module, _SEQUENCES):
        return True
    for name, inner in module.named_modules(prefix=path):
        if isinstance(inner, _SEQUENCES):
            of_children = [_count(f"{name}.{child}", layers) for child, _ in inner.named_children()]
            if sum(count > 1 for count in of_children) > 1:
                return True
    return False


def _count(path: str, layers: tuple[str, ...]) -> int:
    """How many quantized layers are in a module; the network itself is the empty path."""
    if not path:
        return len(layers)
    return sum(layer == path or layer.startswith(f"{path}.") for layer in layers)
