"""The study's part of `docs/results.md`: tables, targets and pictures, all from the records.

Nothing here is a number of its own but the targets. What was not run yet is said so.
"""

from __future__ import annotations

import itertools
import operator
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.pages import origin, table, write_part
from benchmarks.study.figures import (
    MISSING,
    Place,
    Record,
    Study,
    cell,
    difference,
    float_top1,
    mean_top1,
    minutes,
    mixed,
    passes_ratio,
    reestimation,
    searched,
    time_ratio,
    top1,
    uniform_at,
    verdict,
    worst_reestimation,
)
from benchmarks.study.grid import RATES, Track, methods
from benchmarks.study.plots import draw_bitops, draw_instability, draw_interference
from benchmarks.study.runs import BUDGETS

OURS = "ours"
"""The method that is held against everything else."""

# --- Targets ------------------------------------------------------------------------------------------------------

_HELD = {OURS: "ours", "full": "full method"}


Row = tuple[str, ...]
"""Cells of a line of a table."""


def dedicated_rows(study: Study) -> tuple[Row, list[Row]]:
    """Points of each method over dedicated networks: the header with what is required, and a row for each network."""
    bits = sorted({width for place in study.places for width in place.track.bits}, reverse=True)
    header = (
        "network",
        "method",
        *(f"{width} bits (at least {_over_dedicated(width):g})" for width in bits),
    )
    rows = []
    for place, (method, title) in itertools.product(study.places, _HELD.items()):
        found = {width: _gain_over_dedicated(study, place, method, width) for width in bits}
        cells = [_verdict_cell(found[width], _over_dedicated(width)) for width in bits]
        rows.append(
            (str(place), title, *(cells if any(cells) else [MISSING, *[""] * (len(bits) - 1)]))
        )
    return header, rows


def _over_dedicated(width: int) -> float:
    return {2: -1.0, 3: -0.3}.get(width, 0.0)


def _gain_over_dedicated(study: Study, place: Place, method: str, width: int) -> dict[int, float]:
    by = top1(str(width))
    return difference(
        study.values(place, method, by), study.values(place, f"dedicated-{width}", by)
    )


def _verdict_cell(found: Mapping[int, float], least: float) -> str:
    """In bold where it is missed."""
    text = cell(found, 2)
    return f"**{text}**" if "missed" in verdict(found, least) else text


def target_rows(study: Study) -> list[Row]:
    """All other targets."""
    rows = [*_against_plain(study)]
    for place in study.places:
        for budget, least in (("W4A4", 0.3), ("W3A3", 1.0), ("W2.5A2.5", 3.0)):
            uniform = study.values(place, OURS, uniform_at(budget))
            found = difference(study.values(place, OURS, searched(budget)), uniform)
            rows.append(_row(f"ours: searched over uniform, {budget}", place, least, found))
    for place in study.places:
        if place.track.pretrained:
            found = difference(
                study.values(place, OURS, searched("W4A4")),
                study.values(place, "float", float_top1),
            )
            rows.append(_row("ours: searched W4A4 over float", place, 0.0, found))
    for place in study.places:
        worst, added = worst_reestimation(study, place, OURS)
        title = "ours: stored over re-estimated statistics, the worst bit-width"
        title += f" ({worst})" if added else ""
        rows.append(_row(title, place, -0.5, {seed: -value for seed, value in added.items()}))
    for place in study.places:
        for what, ratio in (
            ("passes", passes_ratio(study, place, OURS)),
            ("time", time_ratio(study, place, OURS)),
        ):
            title = f"ours: training cost of the dedicated networks over it, {what}"
            rows.append((title, str(place), "1.5 times", cell(ratio, 2), verdict(ratio, 1.5)))
    return rows


def _row(what: str, where: object, least: float, found: Mapping[int, float]) -> Row:
    return what, str(where), f"{least:+.1f}", cell(found, 2), verdict(found, least)


def _against_plain(study: Study) -> Iterator[Row]:
    gains: dict[tuple[str, str], dict[int, float]] = {}
    for place in study.places:
        low = [str(width) for width in place.track.bits if width <= 6]
        for method, title in _HELD.items():
            for what, by, least in (
                (f"mean of {low[0]} to {low[-1]} bits", mean_top1(low), 0.5),
                (f"{low[0]} bits", top1(low[0]), 1.5),
            ):
                found = difference(
                    study.values(place, method, by), study.values(place, "plain", by)
                )
                yield _row(f"{title}: over plain, {what}", place, least, found)
                gains.setdefault((str(place), method), found)
    for method, title in _HELD.items():
        if {("S/mobile", method), ("S/resnet", method)} <= set(gains):
            found = difference(gains["S/mobile", method], gains["S/resnet", method])
            yield _row(
                f"{title}: mean gain over plain, mobile over residual network", "S", 0.0, found
            )


# --- Tables -------------------------------------------------------------------------------------------------------

MAIN = (
    "random",
    "plain",
    "scheduler",
    "distortion",
    "both",
    "full",
    "any-precision",
    "sandwich",
    "affine",
    "sandwich-affine",
    "weight-1.5",
    OURS,
)


def planned(place: Place, names: Iterable[str]) -> list[str]:
    """Those methods that the place's track has seeds for."""
    known = methods(place.track.bits)
    return [name for name in names if place.track.seeds_of(known[name].group)]


def method_table(
    study: Study, place: Place, names: Sequence[str], *, against: str, references: bool = False
) -> list[str]:
    """Accuracy of methods at every uniform bit-width and at the random configurations.

    Args:
        study: All results.
        place: Whose table it is.
        names: Of the methods, one in a row.
        against: The method that all are held against, seed by seed.
        references: Whether the dedicated networks have a row.
    """
    widths = [str(width) for width in place.track.bits]
    low = [width for width in widths if int(width) <= 6]
    known = methods(place.track.bits)
    held, by_mean = study.values(place, against, mean_top1(low)), mean_top1(low)
    time = minutes(study.processor(place, OURS))
    header = ["method", "passes", *widths, f"mean {low[0]} to {low[-1]}", f"over {against}", "mixed", "mixed, stored",
              "minutes"]  # fmt: skip
    rows = [reference_row(study, place, low, held)] if references else []
    for name in names:
        cells = [study.values(place, name, top1(width)) for width in widths]
        mean = study.values(place, name, by_mean)
        cells += [mean, {} if name == against else difference(mean, held)]
        cells += [study.values(place, name, by) for by in (mixed("own"), mixed("stored"), time)]
        shown = [cell(values) for values in cells]
        rows.append(
            [known[name].title, str(known[name].passes), *(shown if any(shown) else [MISSING])]
        )
    return table(header, [[*row, *[""] * (len(header) - len(row))] for row in rows])


def reference_row(
    study: Study, place: Place, low: Sequence[str], held: Mapping[int, float]
) -> list[str]:
    """The dedicated networks, one for each column, their mean against another method's, and what they cost together."""
    found = {
        str(width): study.values(place, f"dedicated-{width}", top1(str(width)))
        for width in place.track.bits
    }
    cells = [cell(values) or MISSING for values in found.values()]
    seeds = [seed for seed in found[low[0]] if all(seed in found[width] for width in low)]
    mean = {seed: statistics.fmean(found[width][seed] for width in low) for seed in seeds}
    time = minutes(study.processor(place, OURS))
    times = [study.values(place, f"dedicated-{width}", time) for width in place.track.bits]
    together = {
        seed: sum(part[seed] for part in times)
        for seed in times[0]
        if all(seed in part for part in times)
    }
    return ["dedicated, one network each", f"{len(times)} x 1", *cells, cell(mean),
            cell(difference(mean, held)), "", "", cell(together)]  # fmt: skip


def caption(records: Sequence[Record], selection: str) -> list[str]:
    """What a table was measured on, and the command."""
    return [
        "",
        f"{origin(records) if records else f'({MISSING})'} `python -m benchmarks.study run --data CIFAR10 {selection}`",
        "",
    ]


def _records(study: Study, places: Iterable[Place], names: Iterable[str]) -> list[Record]:
    wanted = list(names)
    return [
        record for place in places for name in wanted for record in study.of(place, name).values()
    ]


def reestimation_table(study: Study, place: Place, names: Sequence[str]) -> list[str]:
    """Points that re-estimated statistics add."""
    known = methods(place.track.bits)
    header = ["method", *(str(width) for width in place.track.bits), "mixed"]
    rows = []
    for name in names:
        cells = [study.values(place, name, reestimation(width)) for width in place.track.bits]
        cells.append(
            difference(
                study.values(place, name, mixed("own")), study.values(place, name, mixed("stored"))
            )
        )
        shown = [cell(values) for values in cells]
        rows.append(
            [known[name].title, *(shown if any(shown) else [MISSING, *[""] * (len(shown) - 1)])]
        )
    return table(header, rows)


def search_table(study: Study) -> list[str]:
    """Searched configurations beside the uniform ones of the same BitOPs."""
    header = ["network", "method", "budget", "MBitOPs", "used", "uniform", "searched", "gain", "searched, stored",
              "evaluations"]  # fmt: skip
    rows = []
    for place in study.places:
        known = methods(place.track.bits)
        for name in place.track.searches:
            if not study.of(place, name):
                rows.append([str(place), known[name].title, MISSING, *[""] * 7])
                continue
            for budget in BUDGETS:
                found = study.values(place, name, searched(budget))
                if not found:
                    rows.append([str(place), known[name].title, budget, "nothing fits", *[""] * 6])
                    continue
                entries = [
                    record["searched"][budget]
                    for seed, record in study.of(place, name).items()
                    if seed in found
                ]
                uniform = study.values(place, name, uniform_at(budget))
                used = [100 * entry["bitops"] / entry["budget"] for entry in entries]
                rows.append(
                    [
                        str(place),
                        known[name].title,
                        budget,
                        f"{entries[0]['budget'] / 1e6:.1f}",
                        f"{statistics.fmean(used):.1f} %",
                        cell(uniform),
                        cell(found),
                        cell(difference(found, uniform), 2),
                        cell(study.values(place, name, searched(budget, "stored"))),
                        f"{statistics.fmean(entry['evaluations'] for entry in entries):.0f}",
                    ]
                )
    return table(header, rows, texts=3)


def rate_table(study: Study) -> list[str]:
    """One precision's own network and the shared one at other learning rates."""
    header = ["network", "bits", "method", *(f"{rate:g} times" for rate in _RATES.values())]
    rows = []
    for place in study.places:
        same, known = study.of_seeds(place.track.seeds_of("rate")), methods(place.track.bits)
        for width, name in _rated(place):
            cells = [
                cell(same.values(place, name + suffix, top1(str(width)))) or MISSING
                for suffix in _RATES
            ]
            rows.append([str(place), str(width), known[name].title, *cells])
    return table(header, rows, texts=3)


_RATES = {f"-{name}-rate": rate for name, rate in RATES.items()} | {"": 1.0}
_RATES = dict(sorted(_RATES.items(), key=operator.itemgetter(1)))
"""What a method's name ends with, in ascending order of the learning rate."""


def _of_rates(study: Study) -> list[Record]:
    """The records that the table of learning rates shows."""
    found = []
    for place in study.places:
        names = dict.fromkeys(name + suffix for _, name in _rated(place) for suffix in _RATES)
        found += _records(study.of_seeds(place.track.seeds_of("rate")), [place], names)
    return found


def _rated(place: Place) -> list[tuple[int, str]]:
    """Bit-widths and methods that are looked at with other learning rates."""
    widths = (min(place.track.bits), max(place.track.bits)) if place.track.seeds_of("rate") else ()
    return [(width, name) for width in widths for name in (f"dedicated-{width}", OURS)]


def frozen_table(study: Study, names: Sequence[str]) -> list[str]:
    """What the scheduler froze at the end, and the lowest precision with and without it."""
    header = [
        "network",
        "method",
        "layers frozen at the end",
        "lowest uniform",
        "lowest that is not frozen",
    ]
    rows = []
    for place in study.places:
        lowest = str(min(place.track.bits))
        for name in planned(place, names):
            frozen = {
                seed: float(len(record["frozen"])) for seed, record in study.of(place, name).items()
            }
            every = (
                study.values(place, name, top1(lowest)),
                study.values(place, name, top1("lowest not frozen")),
            )
            shown = [cell(frozen) or MISSING, *(cell(values) for values in every)]
            rows.append([str(place), methods(place.track.bits)[name].title, *shown])
    return table(header, rows, texts=2)


# --- The page -----------------------------------------------------------------------------------------------------


def write_page(
    records: Iterable[Record], tracks: Mapping[str, Track], *, page: Path, pictures: Path
) -> None:
    """Write the part of `page` between the markers, and the pictures that the records allow."""
    kept = list(records)
    ran = {record["track"] for record in kept}
    study = Study(kept, [track for name, track in tracks.items() if name != "A" or name in ran])
    drawn = draw(study, pictures)
    write_part(
        page, "study", "benchmarks.study render", render(study, drawn, relative=pictures.name)
    )


def draw(study: Study, pictures: Path) -> list[str]:
    """Draw what there are records for; returns the names of the files."""
    pictures.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, drawing in (
        ("study-bitops.png", bitops_panels(study)),
        ("study-interference.png", interference_panels(study)),
        ("study-instability.png", instability_panels(study)),
    ):
        if drawing:
            _DRAW[name](drawing, pictures / name)
            drawn.append(name)
    return drawn


_DRAW: dict[str, Callable[[Any, Path], None]] = {
    "study-bitops.png": draw_bitops,
    "study-interference.png": draw_interference,
    "study-instability.png": draw_instability,
}


def bitops_panels(study: Study) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """For each network the points (BitOPs, accuracy) of our method, by kind."""
    panels = {}
    for place in study.places:
        records = list(study.of(place, OURS).values())
        if not records:
            continue
        uniform = [
            (
                records[0]["configs"][str(width)]["bitops"],
                statistics.fmean(r["configs"][str(width)]["own"] for r in records),
            )
            for width in place.track.bits
        ]
        random = [
            (entry["bitops"], statistics.fmean(record["mixed"][index]["own"] for record in records))
            for index, entry in enumerate(records[0]["mixed"])
        ]
        found = [
            (entry["bitops"], entry["own"])
            for record in records
            for entry in record["searched"].values()
            if entry["config"] is not None
        ]
        trained = study.values(place, "float", float_top1)
        panels[str(place)] = {
            "uniform": uniform,
            "random": random,
            "searched": found,
            "float": [(0.0, statistics.fmean(trained.values()))] if trained else [],
        }
    return panels


def interference_panels(study: Study) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """For each network and bit-width: its accuracy as lower and lower candidates are trained along, lowest first."""
    panels = {}
    for place in study.places:
        bits, same = (
            sorted(place.track.bits, reverse=True),
            study.of_seeds(place.track.seeds_of("interference")),
        )
        trained_with = {bits[0]: f"dedicated-{bits[0]}", bits[-1]: "random"}
        trained_with |= {lowest: f"random-{lowest}-up" for lowest in bits[1:-1]}
        lines: dict[str, list[tuple[int, float]]] = {}
        for width in bits:
            for lowest in (low for low in bits if low <= width):
                found = same.values(place, trained_with[lowest], top1(str(width)))
                if found:
                    lines.setdefault(f"{width} bits", []).append(
                        (lowest, statistics.fmean(found.values()))
                    )
            ours = same.values(place, OURS, top1(str(width)))
            if ours and f"{width} bits" in lines:
                lines.setdefault(f"{width} bits, ours", []).append(
                    (bits[-1], statistics.fmean(ours.values()))
                )
        if any(len(points) > 1 for points in lines.values()):
            panels[str(place)] = lines
    return panels


def instability_panels(study: Study) -> dict[str, list[dict[str, Any]]]:
    """For each network the instability of every layer after every epoch of the full method's first seed."""
    panels = {}
    for place in study.places:
        records = study.of(place, "full")
        if records and records[min(records)]["trace"]:
            panels[str(place)] = records[min(records)]["trace"]
    return panels


def render(study: Study, drawn: Sequence[str], *, relative: str) -> str:
    """The Markdown of the study."""
    lines = ["## The study: what one-shot training is worth", "", *_introduction(study)]
    lines += ["### Against dedicated networks", "", _DEDICATED, ""]
    header, rows = dedicated_rows(study)
    lines += [*table(header, rows, texts=2), ""]
    lines += ["### Other targets", "", _TARGETS, ""]
    lines += [*table(("target", "where", "at least", "found", ""), target_rows(study), texts=2), ""]
    for place in study.places:
        lines += _method_section(study, place)
    lines += ["### Other learning rates", "", *rate_table(study)]
    lines += caption(_of_rates(study), "--group rate")
    lines += ["### Searched configurations", "", _SEARCH, "", *search_table(study)]
    names = list(dict.fromkeys(name for place in study.places for name in place.track.searches))
    selection = " ".join(f"--only '*/{name}/*'" for name in names)
    lines += caption([record for record in study.records if record.get("searched")], selection)
    lines += ["### Frozen candidates", "", *frozen_table(study, ("scheduler", "both", "full"))]
    lines += caption(
        _records(study, study.places, ("scheduler", "both", "full")),
        "--group core --group ablation",
    )
    for name in drawn:
        description, text = _PICTURES[name]
        lines += [f"![{description}]({relative}/{name})", "", text, ""]
    return "\n".join(lines).rstrip()


def _method_section(study: Study, place: Place) -> list[str]:
    """All tables of one network."""
    known = methods(place.track.bits)
    lines = [f"### Every method: {place.network}, {place.track.title}", ""]
    names = [
        name for name, method in known.items() if method.group in {"core", "weight", "ablation"}
    ]
    records = _records(study, [place], names)
    if not records:
        return [*lines, f"{MISSING.capitalize()}.", ""]
    shown = planned(place, MAIN)
    lines += [
        *_float_line(study, place),
        "",
        *method_table(study, place, shown, against="plain", references=True),
    ]
    lines += caption(records, f"--only '{place}/*' --group core --group weight --group ablation")
    lines += ["What re-estimated norm statistics add to stored ones, in points:", ""]
    lines += [*reestimation_table(study, place, shown), ""]
    variants = [name for name, method in known.items() if method.group == "variant"]
    if _records(study, [place], variants):
        names = [OURS, *variants]
        lines += [f"#### Variants of ours: {place.network}", ""]
        same = study.of_seeds(place.track.seeds_of("variant"))
        lines += method_table(same, place, names, against=OURS)
        lines += caption(_records(same, [place], names), f"--only '{place}/{OURS}*'")
        lines += [
            "What re-estimated norm statistics add:",
            "",
            *reestimation_table(same, place, names),
            "",
        ]
    return lines


_DEDICATED = """"Ours" are the defaults: plain one-shot training with the lowest precision in every step (sandwich), one scale and
shift of a norm for all its copies (shared affine), and random paths that together weigh twice the max path. The full method is
the paper's. Differences are in points of top-1 with re-estimated norm statistics, seed by seed: mean ± standard deviation
over the seeds that both sides have. Bold: less than was aimed at."""

_TARGETS = """What else was aimed at, measured in the same way."""

_SEARCH = """`anyprec.search` (objective: divergence) on images that training did not see; then the found configuration's norm
statistics were re-estimated, as the uniform ones' were. "uniform" is the uniform precision of the same BitOPs; at W2.5A2.5,
where there is none, the mean of W2A2 and W3A3: the budget is the middle of the two."""

_PICTURES = {
    "study-bitops.png": (
        "Accuracy against BitOPs of uniform, random and searched configurations",
        "One set of weights, our method; each point with norm statistics of its own. Random points are means over seeds.",
    ),
    "study-interference.png": (
        "Accuracy of each bit-width as lower candidates are trained along",
        "Interference: random paths and labels only, trained with fewer and with more candidates. At the left a network that is "
        "trained for the highest bit-width alone; crosses: ours.",
    ),
    "study-instability.png": (
        "Instability of every layer after every epoch, frozen ones marked",
        "The measure that the bit-width scheduler ranks layers by, full method, first seed; a cross marks a layer whose lowest "
        "candidate is frozen at that time.",
    ),
}


def _introduction(study: Study) -> list[str]:
    return [
        f"{len(study.records)} of {study.planned} runs are done.",
        _METHOD,
        "",
        *(_described(track) for track in study.tracks),
        "",
        "```sh",
        "python -m benchmarks.study run --data CIFAR10   # resumable; `plan` tells how long it takes",
        "python -m benchmarks.study render",
        "```",
        "",
    ]


_METHOD = """Within a seed all methods start from the same float network and take the same number of optimizer steps on the same
images; the forward-backward passes of a step stand beside. Accuracy is on images that neither training nor search saw, with
norm statistics re-estimated for each configuration (on training images) unless it says stored. First and last layers have 8
bits, depthwise convolutions at least 3. "mixed" is the mean of random mixed configurations, the same for all; "over" is the
difference of the means seed by seed, where rows have different seeds; minutes are processor time of training, on the machine
that trained ours."""


def _described(track: Track) -> str:
    images = f"CIFAR-10 at {track.size} px, {track.images:,} images to train on, {track.search_images} to search on, "
    images += f"{track.report_images:,} to report on (the {track.mixed} random configurations on {track.mixed_images:,})"
    length = f"{track.start_epochs} float epochs, then {track.epochs} epochs of each method ({track.steps:,} steps of "
    length += (
        f"{track.batch_size} images); {len(track.seeds)} seed{'s' if len(track.seeds) > 1 else ''}"
    )
    return f"- **{track.name}**, {track.title}: {', '.join(track.networks)}; {images}; {length}."


def _float_line(study: Study, place: Place) -> list[str]:
    found = study.values(place, "float", float_top1)
    start = study.values(place, "float", lambda record: float(record["start"]))
    return [
        f"Float: {cell(found)} % (start of all methods: {cell(start)} %)."
        if found
        else f"Float: {MISSING}."
    ]
