"""Features of layers during a training step, for information distortion mitigation (RFQuant, section 3.4).

The feature of a layer is, whichever comes first: the output of the BatchNorm that it feeds, before any activation; the
output of another norm or of the activation right behind it; the output of its own operator. It is taken the moment it
exists, before an in-place operation (ReLU, residual sum) can change it: the max path's is copied, and the distance of a
random path's to it is computed on the spot.

A compiled network must not change its program from step to step. There the features of all layers are taken in every
step, and which of them count is data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.model.converted import ConvertedModel
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norms import NORM_TYPES, SwitchableNorm
from anyprec.runtime.batches import device_of
from anyprec.training.losses import feature_distance


class FeatureDistances:
    """Holds the features of a max path, and sums up how far those of a random path are from them.

    Args:
        model: A converted model.
        compiled: It runs compiled: features are taken always, of all layers that have several weight bit-widths, until
            `close`.
    """

    def __init__(self, model: ConvertedModel, *, compiled: bool = False) -> None:
        self._model = model
        self._taps: dict[str, _Tap] = {}
        self._always = ExitStack()
        if compiled:
            several = {path for path, layer in model.candidates.items() if len(layer.weight) > 1}
            for path, place in self._places(several):
                tap = self._taps[path] = _Tap(place, counts=torch.ones((), device=device_of(model)))
                self._always.enter_context(_watch(place, tap))
        self._compiled = compiled

    @contextmanager
    def keeping(self, paths: Set[str]) -> Iterator[None]:
        """Keep the features of these layers from the forward passes in the block, detached, in their own dtype."""
        self.forget()
        with ExitStack() as undo:
            if not self._compiled:
                for path, place in self._places(paths):
                    tap = self._taps[path] = _Tap(place)
                    undo.enter_context(_watch(place, tap))
            undo.enter_context(self._in_mode("keep", self._taps.keys()))
            yield

    @contextmanager
    def measuring(self, paths: Set[str]) -> Iterator[Callable[[], list[Tensor]]]:
        """Yield a function that returns the distances from the forward passes in the block, one per call of a layer."""
        counting = self._taps.keys() & paths
        with ExitStack() as undo:
            for path, tap in self._taps.items():
                tap.distances.clear()
                if tap.counts is not None:
                    tap.counts.fill_(float(path in counting))
                elif path in counting:
                    undo.enter_context(_watch(tap.place, tap))
            undo.enter_context(self._in_mode("measure", self._taps.keys()))
            yield lambda: [
                distance for path in sorted(counting) for distance in self._taps[path].distances
            ]

    def forget(self) -> None:
        """Drop the features that are kept."""
        for tap in self._taps.values():
            tap.targets.clear()
            tap.distances.clear()
        if not self._compiled:
            self._taps.clear()

    def close(self) -> None:
        """Take features of a compiled network no more."""
        self._always.close()
        self._taps.clear()

    @contextmanager
    def _in_mode(self, mode: str, paths: Set[str]) -> Iterator[None]:
        taps = [self._taps[path] for path in paths]
        for tap in taps:
            tap.mode = mode
        try:
            yield
        finally:
            for tap in taps:
                tap.mode = "off"

    def _places(self, paths: Set[str]) -> Iterator[tuple[str, nn.Module]]:
        """For each of these layers the module whose output is its feature."""
        record = self._model.anyprec_record
        fed = {feeding: norm for norm, feeding in record.norms.items()}
        for path in sorted(paths):
            yield (
                path,
                self._model.get_submodule(
                    fed.get(path) or record.facts.layers[path].feature or path
                ),
            )


class _Tap:
    """What is called with the features of one layer."""

    def __init__(self, place: nn.Module, counts: Tensor | None = None) -> None:
        self.place = place
        self.counts = counts  # 0 or 1, of a layer whose distances are always taken
        self.relative = not isinstance(place, NORM_TYPES)
        self.mode = "off"
        self.targets: list[Tensor] = []
        self.distances: list[Tensor] = []

    def __call__(self, feature: Tensor) -> None:
        if self.mode == "keep":
            self.targets.append(feature.detach().clone())
        elif self.mode == "measure":
            call = len(self.distances)
            # A layer that the max path did not reach as often (layer drop) has nothing to be compared with.
            if call < len(self.targets) and self.targets[call].shape == feature.shape:
                distance = feature_distance(feature, self.targets[call], relative=self.relative)
                self.distances.append(distance if self.counts is None else distance * self.counts)


def _watch(place: nn.Module, tap: _Tap) -> AbstractContextManager[Any]:
    """Call `tap` with every feature that `place` makes in the block."""
    if isinstance(place, (SwitchableNorm, QuantizedLayer)):
        return place.output_observers.including(tap)

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        tap(output)

    return place.register_forward_hook(hook)
