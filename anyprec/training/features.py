"""Features of layers during a training step, for information distortion mitigation (RFQuant, section 3.4).

The feature of a layer is, whichever comes first: the output of the BatchNorm that it feeds, before any activation; the
output of another norm or of the activation right behind it; the output of its own operator. It is taken the moment it
exists, before an in-place operation (ReLU, residual sum) can change it: the max path's is copied, and the distance of a
random path's to it is computed on the spot.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from anyprec.layers import QuantizedLayer
from anyprec.model import ConvertedModel
from anyprec.norms import NORM_TYPES, SwitchableNorm
from anyprec.training.losses import feature_distance


class FeatureDistances:
    """Holds the features of a max path, and sums up how far those of a random path are from them.

    Args:
        model: A converted model.
    """

    def __init__(self, model: ConvertedModel) -> None:
        self._model = model
        self._targets: dict[str, list[Tensor]] = defaultdict(list)

    @contextmanager
    def keeping(self, paths: Set[str]) -> Iterator[None]:
        """Keep the features of these layers from the forward passes in the block, detached, in their own dtype."""
        self.forget()

        def keep(path: str, _place: nn.Module, feature: Tensor) -> None:
            self._targets[path].append(feature.detach().clone())

        with self._watching(paths, keep):
            yield

    @contextmanager
    def measuring(self, paths: Set[str]) -> Iterator[list[Tensor]]:
        """Yield a list that the forward passes in the block fill with distances, one for each call of these layers."""
        distances: list[Tensor] = []
        calls: dict[str, int] = defaultdict(int)

        def measure(path: str, place: nn.Module, feature: Tensor) -> None:
            targets, call = self._targets.get(path, []), calls[path]
            calls[path] += 1
            # A layer that the max path did not reach as often (layer drop) has nothing to be compared with.
            if call < len(targets) and targets[call].shape == feature.shape:
                relative = not isinstance(place, NORM_TYPES)
                distances.append(feature_distance(feature, targets[call], relative=relative))

        with self._watching(paths, measure):
            yield distances

    def forget(self) -> None:
        """Drop the features that are kept."""
        self._targets.clear()

    @contextmanager
    def _watching(self, paths: Set[str], observer: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
        with ExitStack() as undo:
            for path, place in self._places(paths):
                undo.callback(_watch(place, partial(observer, path, place)))
            yield

    def _places(self, paths: Set[str]) -> Iterator[tuple[str, nn.Module]]:
        """For each of these layers the module whose output is its feature."""
        record = self._model.anyprec_record
        fed = {feeding: norm for norm, feeding in record.norms.items()}
        for path in sorted(paths):
            yield path, self._model.get_submodule(fed.get(path) or record.facts.layers[path].feature or path)


def _watch(place: nn.Module, observer: Callable[[Tensor], None]) -> Callable[[], None]:
    """Call `observer` with every feature that `place` makes, until the function that is returned is called."""
    if isinstance(place, SwitchableNorm):
        place.observer = observer
        return lambda: setattr(place, "observer", None)
    if isinstance(place, QuantizedLayer):
        place.output_observer = observer
        return lambda: setattr(place, "output_observer", None)

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        observer(output)

    return place.register_forward_hook(hook).remove
