"""Figures of the study, taken from its records: by network, method and seed. Cells and verdicts of the page's tables."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.study.grid import Track, grid
from benchmarks.study.runs import BUDGETS

MISSING = "not run yet"
Record = dict[str, Any]
By = Callable[[Record], float | None]
"""A figure of a record, or None where it has none."""


@dataclass(frozen=True)
class Place:
    """A network of a track."""

    track: Track
    network: str

    def __str__(self) -> str:
        return f"{self.track.name}/{self.network}"


class Study:
    """The records that belong to the tracks as they are declared now.

    Args:
        records: All that were found; the last one of a run counts.
        tracks: Those that are on the page.
    """

    def __init__(self, records: Iterable[Record], tracks: Iterable[Track]) -> None:
        self.tracks = tuple(tracks)
        runs = {run.name: run for run in grid(self.tracks)}
        found = {
            record["run"]: record
            for record in records
            if record["run"] in runs and record["settings"] == runs[record["run"]].settings
        }
        self.records = [found[name] for name in runs if name in found]
        self.planned = len(runs)

    @property
    def places(self) -> list[Place]:
        """All networks."""
        return [Place(track, network) for track in self.tracks for network in track.networks]

    def of(self, place: Place, method: str) -> dict[int, Record]:
        """The records of a method, by seed."""
        return {
            record["seed"]: record
            for record in self.records
            if (record["track"], record["network"], record["method"])
            == (place.track.name, place.network, method)
        }

    def of_seeds(self, seeds: Iterable[int]) -> Study:
        """The records of these seeds only: to hold methods that have one seed against others that have more."""
        found, wanted = copy.copy(self), set(seeds)
        found.records = [record for record in self.records if record["seed"] in wanted]
        return found

    def processor(self, place: Place, method: str) -> str:
        """What most of the method's records were measured on."""
        names = [record["machine"]["processor"] for record in self.of(place, method).values()]
        return statistics.mode(names) if names else ""

    def values(self, place: Place, method: str, by: By) -> dict[int, float]:
        """A figure of each seed's record, where it has one."""
        found = {seed: by(record) for seed, record in self.of(place, method).items()}
        return {seed: value for seed, value in found.items() if value is not None}


# --- Figures of a record ------------------------------------------------------------------------------------------


def top1(name: str, kind: str = "own") -> By:
    """Of a named configuration, e.g. "4"; `kind` is "own" (statistics re-estimated) or "stored"."""

    def by(record: Record) -> float | None:
        entry = record["configs"].get(name)
        return None if entry is None else float(entry[kind])

    return by


def mean_top1(names: Sequence[str], kind: str = "own") -> By:
    """Mean over named configurations, all of which must be there."""

    def by(record: Record) -> float | None:
        found = [top1(name, kind)(record) for name in names]
        return (
            statistics.fmean(value for value in found if value is not None)
            if names and None not in found
            else None
        )

    return by


def mixed(kind: str) -> By:
    """Mean over the random configurations."""

    def by(record: Record) -> float | None:
        return (
            statistics.fmean(entry[kind] for entry in record["mixed"])
            if record.get("mixed")
            else None
        )

    return by


def searched(budget: str, kind: str = "own") -> By:
    """Of the configuration that was found for a budget."""

    def by(record: Record) -> float | None:
        entry = record.get("searched", {}).get(budget)
        return None if entry is None or entry["config"] is None else float(entry[kind])

    return by


def uniform_at(budget: str) -> By:
    """Of the uniform precision of the same BitOPs; in the middle between two, where no uniform one has them."""
    return mean_top1([str(width) for width in BUDGETS[budget]])


def reestimation(width: int) -> By:
    """Points that re-estimated statistics add to stored ones."""

    def by(record: Record) -> float | None:
        own, stored = top1(str(width))(record), top1(str(width), "stored")(record)
        return None if own is None or stored is None else own - stored

    return by


def minutes(processor: str) -> By:
    """Of training on a machine; None on another one, or if the run was killed in between."""

    def by(record: Record) -> float | None:
        if record.get("resumed") or record["machine"]["processor"] != processor:
            return None
        return float(record["training"]["cpu_seconds"]) / 60

    return by


def float_top1(record: Record) -> float | None:
    """Of the float network trained as long."""
    return float(record["float"])


def worst_reestimation(study: Study, place: Place, method: str) -> tuple[int, dict[int, float]]:
    """The uniform bit-width where re-estimation adds most on the mean over seeds, and what it adds there.

    The worst of each seed would be worse: six measured differences of nothing have a largest one too.
    """
    found = {width: study.values(place, method, reestimation(width)) for width in place.track.bits}
    worst = max(found, key=lambda width: statistics.fmean(found[width].values() or [-math.inf]))
    return worst, found[worst]


def passes_ratio(study: Study, place: Place, method: str) -> dict[int, float]:
    """Forward-backward passes of all dedicated networks together, over those of a method."""
    return _ratio(study, place, method, lambda record: float(record["passes"]))


def time_ratio(study: Study, place: Place, method: str) -> dict[int, float]:
    """The same for processor time of training, on one machine."""
    return _ratio(study, place, method, minutes(study.processor(place, method)))


def _ratio(study: Study, place: Place, method: str, by: By) -> dict[int, float]:
    dedicated = [study.values(place, f"dedicated-{width}", by) for width in place.track.bits]
    shared = study.values(place, method, by)
    seeds = [seed for seed in shared if all(seed in values for values in dedicated)]
    return {seed: sum(values[seed] for values in dedicated) / shared[seed] for seed in seeds}


# --- Cells --------------------------------------------------------------------------------------------------------


def cell(values: Mapping[int, float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return ""
    text = f"{statistics.fmean(values.values()):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values.values()):.{digits}f}"


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """Of the seeds that both have."""
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def verdict(found: Mapping[int, float], least: float) -> str:
    """Whether a mean is at least as high as it should be."""
    if not found:
        return MISSING
    over = round(statistics.fmean(found.values()) - least, 2)  # as it is shown
    return f"met by {abs(over):.2f}" if over >= 0 else f"**missed by {-over:.2f}**"
