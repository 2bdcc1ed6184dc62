"""Finding the values that can be quantized in what was noted of one forward pass.

How it is noted is in `outputs.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from anyprec.errors import ConversionError
from anyprec.network.facts import OutputFacts
from anyprec.network.trail import Trail
from anyprec.nn.counting import NORM
from anyprec.nn.outputs import output_prefix

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules that may run all their children: they get none."""


@dataclass(frozen=True, eq=False)
class Frame:
    """One call of a module."""

    path: str
    module: nn.Module

    @property
    def is_leaf(self) -> bool:
        """Whether the module has no others inside."""
        return next(self.module.children(), None) is None


@dataclass
class Function:
    """One call of a function.

    Attributes:
        name: As it is counted; None if it is not.
        frames: The calls of modules that it ran in, the outermost first.
        input: Number of its first argument.
        is_sum: It adds two activations.
        has_limits: Its further arguments are numbers.
        layer: Path of the layer that it was the operator of.
        layer_input: Number of what that layer multiplied.
        result: Number of what it returned, if that depends on the input and fills its storage.
        nonnegative: That cannot be negative.
    """

    name: str | None
    frames: tuple[Frame, ...]
    input: int | None = None
    is_sum: bool = False
    is_average: bool = False
    has_limits: bool = False
    layer: str | None = None
    layer_input: int | None = None
    result: int | None = None
    nonnegative: bool = False


@dataclass
class Outputs:
    """The values that can be quantized, by the path of their quantizer.

    Attributes:
        facts: What is known of each of them.
        reads: Layer to the one of them that it reads in all its calls.
    """

    facts: dict[str, OutputFacts] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)


class OutputSearch:
    """Finds the values in what was noted of a forward pass.

    Args:
        functions: All calls of functions, in order.
        trail: The values.
        calls: How often each module was called, by path.
        modules: All modules by path.
        last: Numbers of the network's outputs.
    """

    def __init__(
        self,
        functions: list[Function],
        trail: Trail,
        calls: Mapping[str, int],
        modules: Mapping[str, nn.Module],
        last: set[int | None],
    ) -> None:
        self._functions = functions
        self._trail = trail
        self._calls = calls
        self._modules = modules
        self._last = last

    def outputs(self) -> Outputs:
        """See `OutputTracker.finish`."""
        sources: list[tuple[Function, Function]] = []
        for function in self._functions:
            is_source = function.layer is not None or function.is_sum or function.is_average
            if is_source and function.name is not None and function.result is not None:
                sources.append((function, self._end(function)))
        owners = {self._owner(end).path for _, end in sources}
        positions = _Positions(self._functions, owners)
        outputs = Outputs()
        paths: dict[tuple[str, str, int], str] = {}
        origins: dict[int, str] = {}
        for source, end in sources:
            facts = self._facts(source, end, positions, paths)
            earlier = outputs.facts.get(facts.path)
            outputs.facts[facts.path] = facts if earlier is None else _merged(earlier, facts)
            for number in self._trail.handed_on(_known(end.result)):
                origins[number] = facts.path
        outputs.reads = dict(self._layers_that_read(origins))
        return outputs

    def _end(self, function: Function) -> Function:
        """The norm or clamp behind a source, or the source itself."""
        following = self._sole_reader(function)
        if function.layer is not None and following is not None and following.name == NORM:
            function, following = following, self._sole_reader(following)
        if following is not None and following.has_limits:
            function = following
        return function

    def _sole_reader(self, function: Function) -> Function | None:
        """The one function that reads a result, if it has a result of its own."""
        number = _known(function.result)
        readers = {read.function for read in self._trail.reads(number)}
        if number in self._last or len(readers) != 1:
            return None
        (reader,) = readers
        if reader is None:
            return None
        following = self._functions[reader]
        is_next = following.input == number and following.result is not None
        return following if is_next and following.name is not None else None

    def _owner(self, function: Function) -> Frame:
        """The call of a module that a function's calls are counted in.

        A module without children that is called several times is as good as a function.
        """
        for frame in reversed(function.frames):
            if not frame.is_leaf or self._calls[frame.path] == 1:
                return frame
        return function.frames[0]

    def _facts(
        self,
        source: Function,
        end: Function,
        positions: _Positions,
        paths: dict[tuple[str, str, int], str],
    ) -> OutputFacts:
        """What is known of a value. Equal positions in two calls of a module are one value."""
        owner, name = self._owner(end).path, end.name or ""
        index = positions.index(end)
        key = owner, name, index
        if key not in paths:
            holder = self._holder(end, owner)
            prefix = output_prefix(holder)
            number = sum(path.startswith(prefix) for path in paths.values())
            paths[key] = f"{prefix}{number}"
        number = _known(end.result)
        if number in self._trail.stale:
            msg = f"in {owner!r} the result of {name!r}, which changed its argument in place, is "
            msg += "read under the name of that argument: use what the function returns, so that "
            msg += 'it can be quantized, or convert with placement="layers"'
            raise ConversionError(msg)
        layers, other_readers = self._readers(number)
        return OutputFacts(
            path=paths[key],
            source=source.layer or source.name or "",
            owner=owner,
            function=name,
            index=index,
            counts=positions.counts(owner, name),
            nonnegative=end.nonnegative,
            layers=tuple(layers),
            other_readers=other_readers,
            output=not self._last.isdisjoint(self._trail.handed_on(number)),
        )

    def _holder(self, function: Function, owner: str) -> str:
        """Path of the module that gets the quantizer: the innermost one inside the owner."""
        path = function.frames[-1].path
        prefix = f"{owner}." if owner else ""
        if path != owner and not path.startswith(prefix):
            path = owner
        if not isinstance(self._modules[path], _CONTAINERS):
            return path
        prefix = f"{path}." if path else ""
        for inner, module in self._modules.items():
            if inner.startswith(prefix) and inner != path and not any(module.children()):
                return inner
        return path

    def _readers(self, number: int) -> tuple[dict[str, None], bool]:
        """The layers that read a value, in order, and whether something else does."""
        layers: dict[str, None] = {}
        others = False
        for read in self._trail.reads(number):
            function = None if read.function is None else self._functions[read.function]
            if function is not None and function.layer and function.layer_input == number:
                layers[function.layer] = None
            elif read.handed_on is not None:
                behind, others_behind = self._readers(read.handed_on)
                layers.update(behind)
                others |= others_behind
            else:
                others = True
        return layers, others

    def _layers_that_read(self, origins: Mapping[int, str]) -> Iterator[tuple[str, str]]:
        """Each layer with the one value that it reads in all its calls."""
        origins_of: dict[str, set[str | None]] = {}
        for function in self._functions:
            if function.layer is not None:
                origin = origins.get(function.layer_input or 0)
                origins_of.setdefault(function.layer, set()).add(origin)
        for layer, found in origins_of.items():
            (first, *others) = found
            if first is not None and not others:
                yield layer, first


class _Positions:
    """Where each function stands among the calls of its name, in one call of its owner.

    Args:
        functions: All calls of functions, in order.
        owners: Paths of the modules whose calls are counted apart.
    """

    def __init__(self, functions: Iterable[Function], owners: set[str]) -> None:
        self._indices: dict[int, int] = {}
        # For each call of an owner: how many calls of each function it makes.
        self._totals: dict[Frame, dict[str, int]] = {}
        for function in functions:
            frame = _innermost(function.frames, owners)
            if frame is None:
                continue
            totals = self._totals.setdefault(frame, {})
            if function.name is not None:
                index = totals.get(function.name, 0)
                self._indices[id(function)] = index
                totals[function.name] = index + 1

    def index(self, function: Function) -> int:
        """How many calls come before this one."""
        return self._indices[id(function)]

    def counts(self, owner: str, name: str) -> tuple[int, ...]:
        """How many calls there are in all, in each call of the owner."""
        counts = set()
        for frame, totals in self._totals.items():
            if frame.path == owner:
                counts.add(totals.get(name, 0))
        return tuple(sorted(counts))


def _innermost(frames: tuple[Frame, ...], owners: set[str]) -> Frame | None:
    for frame in reversed(frames):
        if frame.path in owners:
            return frame
    return None


def _merged(first: OutputFacts, second: OutputFacts) -> OutputFacts:
    """What is known of a value that several calls of a module make."""
    return dataclasses.replace(
        first,
        nonnegative=first.nonnegative and second.nonnegative,
        layers=tuple(dict.fromkeys((*first.layers, *second.layers))),
        other_readers=first.other_readers or second.other_readers,
        output=first.output or second.output,
    )


def _known(number: int | None) -> int:
    """The number of a result that there is."""
    if number is None:
        msg = "a function without a result was taken for one that has one"
        raise AssertionError(msg)
    return number
