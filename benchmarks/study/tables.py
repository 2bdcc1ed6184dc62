"""The tables of the study's page: data frames of text cells, a row for each method or target."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence

import pandas as pd

from benchmarks.study.figures import (
    DEDICATED,
    MISSING,
    OURS,
    Record,
    Study,
    Workload,
    cell,
    verdict,
    worst_reestimation,
)
from benchmarks.study.methods import RATES, methods
from benchmarks.study.runs import BUDGETS

_COMPARED = {OURS: "ours", "full": "full method"}
"""The methods that targets are for."""

_SEARCH_TARGETS = {"W4A4": 0.3, "W3A3": 1.0, "W2.5A2.5": 3.0}
"""Points over the uniform precision of the same BitOPs."""

_PLAIN_TARGETS = {"mean": 0.5, "lowest": 1.5}
"""Points over plain one-shot training."""

_COST_TARGET = 1.5
"""Times the cost of one training that the dedicated networks together should have."""


def mark_missing(table: pd.DataFrame, texts: int) -> pd.DataFrame:
    """Say in the first number of a row, if all of them are empty, that it was not run yet."""
    numbers = table.columns[texts:]
    table.loc[(table[numbers] == "").all(axis=1), numbers[0]] = MISSING
    return table


def planned(workload: Workload, names: Iterable[str]) -> list[str]:
    """Those methods that the workload's track has seeds for."""
    available = methods(workload.track.bits)
    return [name for name in names if workload.track.seeds_of(available[name].group)]


# --- Targets --------------------------------------------------------------------------------------


def dedicated_table(study: Study) -> pd.DataFrame:
    """Points of each method over dedicated networks; the header says what is required."""
    bits = sorted(set().union(*(track.bits for track in study.tracks)), reverse=True)
    rows = []
    for workload, (method, title) in itertools.product(study.workloads, _COMPARED.items()):
        row = {"network": str(workload), "method": title}
        gains = study.of(workload, method)["own"] - study.of(workload, DEDICATED)["own"]
        for width in bits:
            least = {2: -1.0, 3: -0.3}.get(width, 0.0)
            text = cell(gains[str(width)], 2)
            if "missed" in verdict(gains[str(width)], least):
                text = f"**{text}**"
            row[f"{width} bits (at least {least:g})"] = text
        rows.append(row)
    return mark_missing(pd.DataFrame(rows), 2)


def target_table(study: Study) -> pd.DataFrame:
    """All other targets."""
    rows = [*_against_plain(study), *_searched(study), *_reestimated(study), *_cheaper(study)]
    # The last column, the verdict, has no header.
    return pd.DataFrame(rows, columns=["target", "where", "at least", "found", ""])


Row = tuple[str, ...]


def _target(what: str, where: object, least: float, gains: pd.Series[float]) -> Row:
    return what, str(where), f"{least:+.1f}", cell(gains, 2), verdict(gains, least)


def _against_plain(study: Study) -> Iterator[Row]:
    gains = {}
    for workload in study.workloads:
        low = workload.low
        titles = {"mean": f"mean of {low[0]} to {low[-1]} bits", "lowest": f"{low[0]} bits"}
        plain = study.of(workload, "plain")["own"]
        for method, title in _COMPARED.items():
            over_plain = study.of(workload, method)["own"] - plain
            gains[str(workload), method] = over_plain["mean"]
            for name, least in _PLAIN_TARGETS.items():
                column = low[0] if name == "lowest" else name
                what = f"{title}: over plain, {titles[name]}"
                yield _target(what, workload, least, over_plain[column])
    if {"S/mobile", "S/resnet"} <= set(study.runs):
        for method, title in _COMPARED.items():
            what = f"{title}: mean gain over plain, mobile over residual network"
            yield _target(what, "S", 0.0, gains["S/mobile", method] - gains["S/resnet", method])


def _searched(study: Study) -> Iterator[Row]:
    for workload in study.workloads:
        own = study.of(workload, OURS)["own"]
        for budget, least in _SEARCH_TARGETS.items():
            gains = own[f"searched {budget}"] - own[f"uniform {budget}"]
            yield _target(f"ours: searched over uniform, {budget}", workload, least, gains)
    for workload in study.workloads:
        if workload.track.pretrained:
            searched = study.values(workload, OURS, "searched W4A4")
            gains = searched - study.values(workload, "float", "float")
            yield _target("ours: searched W4A4 over float", workload, 0.0, gains)


def _reestimated(study: Study) -> Iterator[Row]:
    for workload in study.workloads:
        worst, added = worst_reestimation(study, workload, OURS)
        title = "ours: stored over re-estimated statistics, the worst bit-width"
        if not added.empty:
            title += f" ({worst})"
        yield _target(title, workload, -0.5, -added)


def _cheaper(study: Study) -> Iterator[Row]:
    for workload in study.workloads:
        ratios = study.of(workload, DEDICATED)["costs"] / study.of(workload, OURS)["costs"]
        for what, column in (("passes", "passes"), ("time", "minutes")):
            title = f"ours: training cost of the dedicated networks over it, {what}"
            ratio = ratios[column]
            limit = f"{_COST_TARGET} times"
            yield title, str(workload), limit, cell(ratio, 2), verdict(ratio, _COST_TARGET)


# --- Methods --------------------------------------------------------------------------------------


def method_table(
    study: Study,
    workload: Workload,
    names: Sequence[str],
    *,
    against: str,
    references: bool = False,
) -> pd.DataFrame:
    """Accuracy of methods at every uniform bit-width and at the random configurations.

    Args:
        study: All results.
        workload: Whose table it is.
        names: Of the methods, one in a row.
        against: The method that all are compared with, seed by seed.
        references: Whether the dedicated networks have a row.
    """
    runs, low = study.runs[str(workload)], workload.low
    own = runs["own"]
    gains = own["mean"].sub(study.values(workload, against, "mean"), level="seed")
    is_against = gains.index.get_level_values("method") == against
    figures = own[workload.widths].assign(
        **{
            f"mean {low[0]} to {low[-1]}": own["mean"],
            f"over {against}": gains.mask(is_against),
            "mixed": own["mixed"],
            "mixed, stored": runs["stored"]["mixed"],
            "minutes": runs["costs"]["minutes"],
        }
    )
    if references:
        names = [DEDICATED, *names]
    cells = figures.groupby("method").agg(cell).reindex(names, fill_value="")
    titles, passes = {DEDICATED: "dedicated, one network each"}, {}
    passes[DEDICATED] = f"{len(workload.widths)} x 1"
    for name, method in methods(workload.track.bits).items():
        titles[name], passes[name] = method.title, str(method.passes)
    cells.insert(0, "method", cells.index.map(titles))
    cells.insert(1, "passes", cells.index.map(passes))
    return mark_missing(cells, 2)


def reestimation_table(study: Study, workload: Workload, names: Sequence[str]) -> pd.DataFrame:
    """Points that re-estimated statistics add."""
    runs = study.runs[str(workload)]
    added = (runs["own"] - runs["stored"])[[*workload.widths, "mixed"]]
    cells = added.groupby("method").agg(cell).reindex(names, fill_value="")
    available = methods(workload.track.bits)
    cells.insert(0, "method", [available[name].title for name in names])
    return mark_missing(cells, 1)


def frozen_table(study: Study, names: Sequence[str]) -> pd.DataFrame:
    """What the scheduler froze at the end, and the lowest precision with and without it."""
    rows = []
    for workload in study.workloads:
        available = methods(workload.track.bits)
        for name in planned(workload, names):
            runs = study.of(workload, name)
            rows.append(
                {
                    "network": str(workload),
                    "method": available[name].title,
                    "layers frozen at the end": cell(runs["costs", "frozen"]),
                    "lowest uniform": cell(runs["own", workload.low[0]]),
                    "lowest that is not frozen": cell(runs["own", "lowest not frozen"]),
                }
            )
    return mark_missing(pd.DataFrame(rows), 2)


# --- Searched configurations ----------------------------------------------------------------------

_SEARCH_HEADER = ["network", "method", "budget", "MBitOPs", "used", "uniform", "searched", "gain"]
_SEARCH_HEADER += ["searched, stored", "evaluations"]


def search_table(study: Study) -> pd.DataFrame:
    """Searched configurations beside the uniform ones of the same BitOPs."""
    empty = dict.fromkeys(_SEARCH_HEADER, "")
    rows = []
    for workload in study.workloads:
        available = methods(workload.track.bits)
        for name in workload.track.searches:
            labels = {"network": str(workload), "method": available[name].title}
            records = study.records_of(workload, [name])
            if not records:
                rows.append({**empty, **labels, "budget": MISSING})
                continue
            runs = study.of(workload, name)
            for budget in BUDGETS:
                row = _search_row(runs, records, budget)
                rows.append({**empty, **labels, "budget": budget, **row})
    return pd.DataFrame(rows)


def _search_row(runs: pd.DataFrame, records: Sequence[Record], budget: str) -> dict[str, str]:
    searches = pd.DataFrame([record["searched"][budget] for record in records])
    searches = searches[searches["config"].notna()]
    if searches.empty:
        return {"MBitOPs": "nothing fits"}
    searched, uniform = runs["own", f"searched {budget}"], runs["own", f"uniform {budget}"]
    used = 100 * searches["bitops"] / searches["budget"]
    return {
        "MBitOPs": f"{searches['budget'].iloc[0] / 1e6:.1f}",
        "used": f"{used.mean():.1f} %",
        "uniform": cell(uniform),
        "searched": cell(searched),
        "gain": cell(searched - uniform, 2),
        "searched, stored": cell(runs["stored", f"searched {budget}"]),
        "evaluations": f"{searches['evaluations'].mean():.0f}",
    }


# --- Learning rates -------------------------------------------------------------------------------

_SUFFIXES = {f"-{name}-rate": rate for name, rate in RATES.items()} | {"": 1.0}
_SUFFIXES = dict(sorted(_SUFFIXES.items(), key=operator.itemgetter(1)))
"""What a method's name ends with, in ascending order of the learning rate."""


def rate_table(study: Study) -> pd.DataFrame:
    """One precision's own network and the shared one at other learning rates."""
    rows = []
    for same, workload in _rated(study):
        available = methods(workload.track.bits)
        for width, name in _methods_of_rates(workload):
            row = {"network": str(workload), "bits": width, "method": available[name].title}
            for suffix, rate in _SUFFIXES.items():
                values = same.values(workload, name + suffix, width)
                row[f"{rate:g} times"] = cell(values) or MISSING
            rows.append(row)
    return pd.DataFrame(rows)


def records_of_rates(study: Study) -> list[Record]:
    """The records that the table of learning rates shows."""
    records = []
    for same, workload in _rated(study):
        names = set()
        for _, name in _methods_of_rates(workload):
            names |= {name + suffix for suffix in _SUFFIXES}
        records += same.records_of(workload, names)
    return records


def _rated(study: Study) -> Iterator[tuple[Study, Workload]]:
    """The workloads that have other learning rates, and the study of the seeds that have them."""
    for workload in study.workloads:
        seeds = workload.track.seeds_of("rate")
        if seeds:
            yield study.of_seeds(seeds), workload


def _methods_of_rates(workload: Workload) -> Iterator[tuple[str, str]]:
    """Bit-widths and methods that are compared at other learning rates."""
    for width in (workload.widths[0], workload.widths[-1]):
        yield width, f"{DEDICATED}-{width}"
        yield width, OURS
