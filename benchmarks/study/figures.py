"""Figures of the study: a data frame of each workload's runs, taken from the records.

Here are also the texts of cells and verdicts; `tables.py` puts them together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from benchmarks.study.grid import Track, grid
from benchmarks.study.runs import BUDGETS

MISSING = "not run yet"
OURS = "ours"
"""The method that is compared with everything else."""

DEDICATED = "dedicated"
"""Stands for the dedicated networks of a seed together, as if they were one run."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """A network of a track."""

    track: Track
    network: str

    def __str__(self) -> str:
        return f"{self.track.name}/{self.network}"

    @property
    def widths(self) -> list[str]:
        """Names of the uniform configurations."""
        return list(map(str, self.track.bits))

    @property
    def low(self) -> list[str]:
        """Those of at most 6 bits, whose mean is reported."""
        return [str(width) for width in self.track.bits if width <= 6]


class Study:
    """The records that belong to the tracks as they are declared now.

    Args:
        records: All that were measured; the last one of a run counts.
        tracks: Those that are on the page.

    Attributes:
        runs: For each workload a frame of its runs, by method and seed. The columns of the groups
            `own` and `stored` are top-1 with re-estimated and with stored norm statistics: of
            uniform configurations ("4"), of all random ones ("mixed"), of searched ones
            ("searched W4A4") and so on. The group `costs` has passes, minutes and the like.
    """

    def __init__(self, records: Iterable[Record], tracks: Iterable[Track]) -> None:
        self.tracks = tuple(tracks)
        planned = {run.name: run for run in grid(self.tracks)}
        latest: dict[str, Record] = {}
        for record in records:
            run = planned.get(record["run"])
            if run is not None and record["settings"] == run.settings:
                latest[run.name] = record
        self.planned = len(planned)
        self.records = list(latest.values())
        self.workloads: list[Workload] = []
        for track in self.tracks:
            self.workloads += [Workload(track, network) for network in track.networks]
        self.runs = {str(workload): self._frame(workload) for workload in self.workloads}

    def of_seeds(self, seeds: Collection[int]) -> Study:
        """Only the records of these seeds, to compare methods that have one seed with others."""
        return Study((record for record in self.records if record["seed"] in seeds), self.tracks)

    def records_of(
        self, workload: Workload, methods: Collection[str] | None = None
    ) -> list[Record]:
        """The records of a workload; only those of some methods, where they are given."""
        selected = []
        for record in self.records:
            network = f"{record['track']}/{record['network']}"
            if network == str(workload) and (methods is None or record["method"] in methods):
                selected.append(record)
        return selected

    def of(self, workload: Workload, method: str) -> pd.DataFrame:
        """The runs of a method, by seed."""
        runs = self.runs[str(workload)]
        return runs[runs.index.get_level_values("method") == method].droplevel("method")

    def values(
        self, workload: Workload, method: str, figure: str, *, group: str = "own"
    ) -> pd.Series[float]:
        """A figure of each seed's run, where it has one."""
        return self.of(workload, method)[group, figure].dropna()

    def _frame(self, workload: Workload) -> pd.DataFrame:
        records = self.records_of(workload)
        keys = [(record["method"], record["seed"]) for record in records]
        index = pd.MultiIndex.from_tuples(keys, names=["method", "seed"])
        searched = [f"searched {budget}" for budget in BUDGETS]
        figures = [*self._widths, "lowest not frozen", "mixed", *searched, "float", "start"]
        costs = ["passes", "minutes", "frozen"]
        groups = {
            "own": pd.DataFrame(_top1(records, "own"), index, figures, dtype=float),
            "stored": pd.DataFrame(_top1(records, "stored"), index, figures, dtype=float),
            "costs": pd.DataFrame(_costs(records), index, costs, dtype=float),
        }
        runs = _with_dedicated(pd.concat(groups, axis=1), workload)
        own = runs["own"]
        runs["own", "mean"] = own[workload.low].mean(axis=1, skipna=False)
        for budget, widths in BUDGETS.items():
            uniform = own.reindex(columns=list(map(str, widths)))
            runs["own", f"uniform {budget}"] = uniform.mean(axis=1, skipna=False)
        return runs

    @property
    def _widths(self) -> list[str]:
        """Of all tracks, so that the frames of all workloads have the same columns."""
        return list(map(str, sorted(set().union(*(track.bits for track in self.tracks)))))


# --- From records ---------------------------------------------------------------------------------


def _top1(records: Sequence[Record], kind: str) -> list[dict[str, float]]:
    """Top-1 of all configurations of each record, with `own` or with `stored` norm statistics."""
    rows = []
    for record in records:
        row = {name: entry[kind] for name, entry in record.get("configs", {}).items()}
        if record.get("mixed"):
            row["mixed"] = statistics.fmean(entry[kind] for entry in record["mixed"])
        for budget, entry in record.get("searched", {}).items():
            if entry["config"] is not None:
                row[f"searched {budget}"] = entry[kind]
        row |= {"float": record.get("float"), "start": record.get("start")}
        rows.append(row)
    return rows


def _costs(records: Sequence[Record]) -> list[dict[str, float]]:
    """Passes, frozen layers, and minutes on the machine that trained most runs of ours.

    Minutes of other machines do not compare, nor those of a run that was killed in between.
    """
    processors = [record["machine"]["processor"] for record in records if record["method"] == OURS]
    processor = statistics.mode(processors) if processors else None
    rows = []
    for record in records:
        row = {"passes": record.get("passes"), "frozen": len(record.get("frozen", ()))}
        if record["machine"]["processor"] == processor and not record.get("resumed"):
            row["minutes"] = record["training"]["cpu_seconds"] / 60
        rows.append(row)
    return rows


def _with_dedicated(runs: pd.DataFrame, workload: Workload) -> pd.DataFrame:
    """Add the dedicated networks of each seed together: their accuracies, and the sum of costs."""
    names = [f"{DEDICATED}-{width}" for width in workload.widths]
    by_seed = runs[runs.index.get_level_values("method").isin(names)].groupby("seed")
    top1 = by_seed.first()[["own", "stored"]]  # each accuracy is in one record only
    # A sum counts only if all networks are there.
    costs = by_seed.sum(min_count=len(names))[["costs"]]
    together = pd.concat([top1, costs], axis=1)
    return pd.concat([runs, pd.concat({DEDICATED: together}, names=["method"])])


def worst_reestimation(
    study: Study, workload: Workload, method: str
) -> tuple[int, pd.Series[float]]:
    """The uniform bit-width where re-estimation adds most, and what it adds there by seed.

    Most on the mean over seeds. The worst of each seed would be worse: six measured differences
    of nothing have a largest one too.
    """
    runs = study.of(workload, method)
    added = (runs["own"] - runs["stored"])[workload.widths]
    worst = added.mean().fillna(-math.inf).idxmax()
    return int(worst), added[worst].dropna()


# --- Texts ----------------------------------------------------------------------------------------


def cell(values: pd.Series[float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds; empty without values."""
    values = values.dropna()
    if values.empty:
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def verdict(values: pd.Series[float], least: float) -> str:
    """Whether a mean is at least as high as it should be."""
    values = values.dropna()
    if values.empty:
        return MISSING
    over = round(statistics.fmean(values) - least, 2)  # as it is shown
    return f"met by {abs(over):.2f}" if over >= 0 else f"**missed by {-over:.2f}**"
