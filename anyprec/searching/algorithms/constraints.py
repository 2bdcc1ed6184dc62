"""The space of a network under constraints: what hardware can run, and layers tied together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from anyprec.bits import Bits, Candidates, check_bit_width, match_paths, shorten
from anyprec.errors import BitsError
from anyprec.searching.algorithms.space import Choice, Space

AllowedBits = int | str | Bits | Sequence["int | str | Bits | tuple[int, int]"]
"""Bit-widths (for both operands) or precisions that a layer may take; see `make_space`."""


def make_space(
    candidates: Candidates,
    *,
    allowed: AllowedBits | Mapping[str, AllowedBits] | None = None,
    tied: Iterable[Sequence[str]] = (),
    hardware: str = "",
    pairs: Mapping[str, Sequence[Bits]] = MappingProxyType({}),
) -> Space:
    """The space of a network's candidates under constraints.

    Args:
        candidates: What each layer may take.
        allowed: What hardware can run: `(4, 8)` allows these bit-widths for both operands;
            `("W4A4", "W8A8")` only these precisions; a mapping from paths or patterns to either
            gives layers their own. A layer whose candidates have none of them (a first layer fixed
            at 8 bits under `4`) raises.
        tied: Groups of paths or patterns; the layers of a group take the same precision. Groups
            that overlap are one.
        hardware: The target that `pairs` are of, for messages.
        pairs: The precisions that a target runs, by path of the layer; all other ones are left out.

    Raises:
        BitsError: A path or pattern matches nothing, a bit-width is out of range, or nothing is
            left for a layer.
    """
    options = {}
    for path, layer in candidates.items():
        product = itertools.product(layer.weight, layer.activation)
        options[path] = list(itertools.starmap(Bits, product))
    for path, runnable in pairs.items():
        options[path] = _on_hardware(options[path], runnable, path, hardware)
    if allowed is not None:
        rules = allowed if isinstance(allowed, Mapping) else {"*": allowed}
        for pattern, rule in rules.items():
            _restrict(options, _matching(pattern, candidates), rule, candidates)
    groups = _groups(candidates, tied)
    return Space(tuple(_choice(paths, options) for paths in groups))


def _on_hardware(
    options: list[Bits], runnable: Sequence[Bits], path: str, hardware: str
) -> list[Bits]:
    """The options that a target runs."""
    common = [bits for bits in options if bits in runnable]
    if not common:
        msg = f"{hardware} can run no precision that layer {path!r} may take: it runs "
        msg += f"{', '.join(map(str, runnable)) or 'no such layer in integers'}, and the layer may "
        msg += f"take {', '.join(map(str, options))}: convert with hardware={hardware!r}"
        raise BitsError(msg)
    return common


@dataclass(frozen=True)
class _Rule:
    widths: frozenset[int]
    precisions: frozenset[Bits]

    def permits(self, bits: Bits) -> bool:
        in_widths = bits.weight in self.widths and bits.activation in self.widths
        return in_widths or bits in self.precisions


def _read_rule(allowed: AllowedBits) -> _Rule:
    entries = [allowed] if isinstance(allowed, (int, str, Bits)) else list(allowed)
    if not entries:
        msg = "allowed=() leaves nothing: name bit-widths such as (4, 8), "
        msg += "or precisions such as ('W4A4', 'W8A8')"
        raise BitsError(msg)
    widths: set[int] = set()
    precisions: set[Bits] = set()
    for entry in entries:
        if isinstance(entry, int):
            check_bit_width(entry, what="allowed bit-width")
            widths.add(entry)
        else:
            precisions.add(Bits.of(entry))
    return _Rule(frozenset(widths), frozenset(precisions))


def _restrict(
    options: dict[str, list[Bits]], paths: list[str], allowed: AllowedBits, candidates: Candidates
) -> None:
    """Leave only what a rule permits to the layers at `paths`."""
    rule = _read_rule(allowed)
    for path in paths:
        permitted = [bits for bits in options[path] if rule.permits(bits)]
        if not permitted:
            layer = candidates[path]
            msg = f"allowed={allowed!r} leaves nothing for layer {path!r}, whose candidates are "
            msg += f"weight bits {layer.weight} and activation bits {layer.activation}"
            raise BitsError(msg)
        options[path] = permitted


def _choice(paths: tuple[str, ...], options: Mapping[str, Sequence[Bits]]) -> Choice:
    common = set(options[paths[0]]).intersection(*map(options.__getitem__, paths))
    if not common:
        msg = f"the tied layers {shorten(paths)} have no precision in common: "
        msg += "tie others, or allow more"
        raise BitsError(msg)
    return Choice(paths, tuple(sorted(common)))


def _groups(candidates: Candidates, tied: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Layers by choice, in network order."""
    # Each layer starts as a group of its own, numbered in network order.
    group_of = dict(zip(candidates, itertools.count(), strict=False))
    for patterns in tied:
        if isinstance(patterns, str):
            msg = f"tied={patterns!r} is not a list of groups: write tied=[[{patterns!r}, ...]]"
            raise BitsError(msg)
        _merge(group_of, patterns, candidates)
    groups: dict[int, list[str]] = {}
    for path, number in group_of.items():
        groups.setdefault(number, []).append(path)
    return list(map(tuple, groups.values()))


def _merge(group_of: dict[str, int], patterns: Sequence[str], candidates: Candidates) -> None:
    """Make one group of all groups that the patterns touch."""
    merged: set[int] = set()
    for pattern in patterns:
        merged.update(map(group_of.__getitem__, _matching(pattern, candidates)))
    for path, number in group_of.items():
        if number in merged:
            group_of[path] = min(merged)


def _matching(pattern: str, candidates: Candidates) -> list[str]:
    return [pattern] if pattern in candidates else match_paths(pattern, candidates)
