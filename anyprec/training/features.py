"""Features of layers during a training step, for information distortion mitigation.

Method of RFQuant (Tang et al., CVPR 2024), section 3.4.

Which tensor the feature of a layer is, `feature_sources.py` says. It is taken the moment it exists,
before another in-place operation can change it: the max path's is copied, and the distance of a
random path's to it is computed on the spot.

A compiled network must not change its program from step to step. There the features of all layers
are taken in every step, and which of them count is data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anyprec.model.converted import ConvertedModel
from anyprec.nn.counting import uncounted
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norms import SwitchableNorm
from anyprec.runtime.batches import device_of
from anyprec.training.feature_sources import FeaturePoint, FeatureSource, feature_sources
from anyprec.training.losses import feature_distance


class FeatureDistances:
    """Holds the features of a max path, and sums up how far those of a random path are from them.

    Args:
        model: A converted model.
        point: Where features are taken.
        compiled: It runs compiled: features are taken always, of all layers that have several
            weight bit-widths, until `close`.
    """

    def __init__(
        self, model: ConvertedModel, point: FeaturePoint = "norm", *, compiled: bool = False
    ) -> None:
        self._model = model
        self._sources = feature_sources(model, point)
        self._taps: dict[str, _Tap] = {}
        self._compiled = compiled
        self._until_closed = ExitStack()
        if compiled:
            several = {path for path, layer in model.candidates.items() if len(layer.weight) > 1}
            for path in sorted(several):
                # Whether a distance counts is data, so that the compiled program stays the same.
                tap = _Tap(self._sources[path], counts=torch.ones((), device=device_of(model)))
                self._taps[path] = tap
                self._until_closed.enter_context(self._watching(tap))

    @contextmanager
    def keeping(self, paths: Set[str]) -> Iterator[None]:
        """Keep the features of these layers from the forward passes in the block.

        They are detached and stay in their own dtype.
        """
        self.forget()
        with ExitStack() as watched:
            if not self._compiled:
                for path in sorted(paths):
                    self._taps[path] = _Tap(self._sources[path])
                    watched.enter_context(self._watching(self._taps[path]))
            watched.enter_context(self._in_mode("keep"))
            yield

    @contextmanager
    def measuring(self, paths: Set[str]) -> Iterator[Callable[[], list[Tensor]]]:
        """Measure the distances of these layers' features from those that were kept.

        Yields:
            A function that returns the distances from the forward passes in the block, one for each
            call of a layer.
        """
        counting = self._taps.keys() & paths
        with ExitStack() as watched:
            for path, tap in self._taps.items():
                tap.distances.clear()
                if tap.counts is not None:
                    tap.counts.fill_(float(path in counting))
                elif path in counting:
                    watched.enter_context(self._watching(tap))
            watched.enter_context(self._in_mode("measure"))
            yield partial(self._distances, sorted(counting))

    def forget(self) -> None:
        """Drop the features that are kept."""
        for tap in self._taps.values():
            tap.targets.clear()
            tap.distances.clear()
        if not self._compiled:
            self._taps.clear()

    def close(self) -> None:
        """Stop taking features of a compiled network."""
        self._until_closed.close()
        self._taps.clear()

    def _distances(self, paths: Sequence[str]) -> list[Tensor]:
        distances: list[Tensor] = []
        for path in paths:
            distances += self._taps[path].distances
        return distances

    def _watching(self, tap: _Tap) -> AbstractContextManager[Any]:
        return _watch(self._model.get_submodule(tap.source.module), tap)

    @contextmanager
    def _in_mode(self, mode: Literal["keep", "measure"]) -> Iterator[None]:
        taps = list(self._taps.values())
        for tap in taps:
            tap.mode = mode
        try:
            yield
        finally:
            for tap in taps:
                tap.mode = "off"


class _Tap:
    """What is called with the features of one layer.

    Args:
        source: What is watched.
        counts: 0 or 1, if distances are always taken; they are multiplied by it.
    """

    def __init__(self, source: FeatureSource, counts: Tensor | None = None) -> None:
        self.source = source
        self.counts = counts
        self.mode: Literal["off", "keep", "measure"] = "off"
        self.targets: list[Tensor] = []
        self.distances: list[Tensor] = []

    def __call__(self, feature: Tensor) -> None:
        if self.mode == "keep":
            self.targets.append(feature.detach().clone())
        elif self.mode == "measure":
            call = len(self.distances)
            # With layer drop the max path may have called the layer less often, or on fewer images.
            if call < len(self.targets) and self.targets[call].shape == feature.shape:
                target = self.targets[call]
                distance = feature_distance(feature, target, relative=self.source.relative)
                if self.counts is not None:
                    distance = distance * self.counts
                self.distances.append(distance)


def _watch(module: nn.Module, tap: _Tap) -> AbstractContextManager[Any]:
    """Call `tap` with every feature that `module` has in the block."""
    if tap.source.side == "input":

        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            with uncounted():
                tap(args[0])

        return module.register_forward_pre_hook(before)
    if tap.source.side == "observed" and isinstance(module, (SwitchableNorm, QuantizedLayer)):
        return module.output_observers.including(tap)

    def after(_module: nn.Module, _args: Any, output: Tensor) -> None:
        with uncounted():
            tap(output)

    return module.register_forward_hook(after)
