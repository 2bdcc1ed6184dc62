"""The study's part of `docs/results.md`: text, tables and plots, all from the records.

No number is written here but the targets (`tables.py`). What was not run yet is said so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.common.pages import markdown, origin, write_part
from benchmarks.study.figures import MISSING, OURS, Record, Study, Workload, cell
from benchmarks.study.grid import Track
from benchmarks.study.methods import methods
from benchmarks.study.plots import draw
from benchmarks.study.tables import (
    dedicated_table,
    frozen_table,
    method_table,
    planned,
    rate_table,
    records_of_rates,
    reestimation_table,
    search_table,
    target_table,
)

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
"""The methods of the main table of a network."""


def write_page(
    records: Iterable[Record], tracks: Mapping[str, Track], *, page: Path, pictures: Path
) -> None:
    """Write the part of `page` between the markers, and the plots that the records allow."""
    records = list(records)
    measured = {record["track"] for record in records}
    study = Study(
        records, [track for name, track in tracks.items() if name != "A" or name in measured]
    )
    drawn = draw(study, pictures)
    text = render(study, drawn, relative=pictures.name)
    write_part(page, "study", "benchmarks.study render", text)


def render(study: Study, drawn: Sequence[str], *, relative: str) -> str:
    """The Markdown of the study."""
    lines = ["## The study: what one-shot training is worth", "", *_introduction(study)]
    lines += ["### Against dedicated networks", "", _DEDICATED, ""]
    lines += [markdown(dedicated_table(study), texts=2), ""]
    lines += ["### Other targets", "", _TARGETS, ""]
    lines += [markdown(target_table(study), texts=2), ""]
    for workload in study.workloads:
        lines += _methods_section(study, workload)
        lines += _variants_section(study, workload)
    lines += ["### Other learning rates", "", markdown(rate_table(study), texts=3)]
    lines += caption(records_of_rates(study), "--group rate")
    lines += [
        "### Searched configurations",
        "",
        _SEARCH,
        "",
        markdown(search_table(study), texts=3),
    ]
    lines += _search_caption(study)
    scheduled = ("scheduler", "both", "full")
    lines += ["### Frozen candidates", "", markdown(frozen_table(study, scheduled), texts=2)]
    lines += caption(_records(study, scheduled), "--group core --group ablation")
    for name in drawn:
        description, text = _PLOTS[name]
        lines += [f"![{description}]({relative}/{name})", "", text, ""]
    return "\n".join(lines).rstrip()


def caption(records: Sequence[Record], selection: str) -> list[str]:
    """What a table was measured on, and the command."""
    measured = origin(records) if records else f"({MISSING})"
    command = f"python -m benchmarks.study run --data CIFAR10 {selection}"
    return ["", f"{measured} `{command}`", ""]


def _search_caption(study: Study) -> list[str]:
    selection = {}  # each method once, in the order of the tracks
    for track in study.tracks:
        for name in track.searches:
            selection[name] = f"--only '*/{name}/*'"
    records = [record for record in study.records if record.get("searched")]
    return caption(records, " ".join(selection.values()))


def _records(study: Study, names: Collection[str]) -> list[Record]:
    return [record for record in study.records if record["method"] in names]


def _methods_section(study: Study, workload: Workload) -> list[str]:
    """The tables of one network."""
    lines = [f"### Every method: {workload.network}, {workload.track.title}", ""]
    names = _names_of(workload, ("core", "weight", "ablation"))
    records = study.records_of(workload, names)
    if not records:
        return [*lines, f"{MISSING.capitalize()}.", ""]
    shown = planned(workload, MAIN)
    table = method_table(study, workload, shown, against="plain", references=True)
    lines += [_float_line(study, workload), "", markdown(table, texts=1)]
    lines += caption(records, f"--only '{workload}/*' --group core --group weight --group ablation")
    lines += ["What re-estimated norm statistics add to stored ones, in points:", ""]
    return [*lines, markdown(reestimation_table(study, workload, shown)), ""]


def _variants_section(study: Study, workload: Workload) -> list[str]:
    """The tables of the variants of ours, on the seeds that they have."""
    variants = _names_of(workload, ("variant",))
    if not study.records_of(workload, variants):
        return []
    names = [OURS, *variants]
    same = study.of_seeds(workload.track.seeds_of("variant"))
    table = method_table(same, workload, names, against=OURS)
    lines = [f"#### Variants of ours: {workload.network}", "", markdown(table)]
    lines += caption(same.records_of(workload, names), f"--only '{workload}/{OURS}*'")
    lines += ["What re-estimated norm statistics add:", ""]
    return [*lines, markdown(reestimation_table(same, workload, names)), ""]


def _names_of(workload: Workload, groups: Collection[str]) -> list[str]:
    available = methods(workload.track.bits)
    return [name for name, method in available.items() if method.group in groups]


def _float_line(study: Study, workload: Workload) -> str:
    trained = cell(study.values(workload, "float", "float"))
    start = cell(study.values(workload, "float", "start"))
    if not trained:
        return f"Float: {MISSING}."
    return f"Float: {trained} % (start of all methods: {start} %)."


# --- Text -----------------------------------------------------------------------------------------

_DEDICATED = """"Ours" are the defaults: plain one-shot training with the lowest precision in
every step (sandwich), one scale and shift of a norm for all its copies (shared affine), and
random paths that together weigh twice the max path. The full method is the paper's. Differences
are in points of top-1 with re-estimated norm statistics, seed by seed: mean ± standard
deviation over the seeds that both sides have. Bold: less than was aimed at."""

_TARGETS = """What else was aimed at, measured in the same way."""

_SEARCH = """`anyprec.search` (objective: divergence) on images that training did not see; then
the found configuration's norm statistics were re-estimated, as the uniform ones' were.
"uniform" is the uniform precision of the same BitOPs; at W2.5A2.5, where there is none, the
mean of W2A2 and W3A3: the budget is the middle of the two."""

_PLOTS = {
    "study-bitops.png": (
        "Accuracy against BitOPs of uniform, random and searched configurations",
        "One set of weights, our method; each point with norm statistics of its own. "
        "Random points are means over seeds.",
    ),
    "study-interference.png": (
        "Accuracy of each bit-width as lower candidates are trained along",
        "Interference: random paths and labels only, trained with fewer and with more candidates. "
        "At the left a network that is trained for the highest bit-width alone; crosses: ours.",
    ),
    "study-instability.png": (
        "Instability of every layer after every epoch, frozen ones marked",
        "The measure that the bit-width scheduler ranks layers by, full method, first seed; "
        "a cross marks a layer whose lowest candidate is frozen at that time.",
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
        "python -m benchmarks.study plan                 # how long it takes",
        "python -m benchmarks.study run --data CIFAR10   # resumable",
        "python -m benchmarks.study render",
        "```",
        "",
    ]


_METHOD = """Within a seed all methods start from the same float network and take the same
number of optimizer steps on the same images; the forward-backward passes of a step stand
beside. Accuracy is on images that neither training nor search saw, with norm statistics
re-estimated for each configuration (on training images) unless it says stored. First and last
layers have 8 bits, depthwise convolutions at least 3. "mixed" is the mean of random mixed
configurations, the same for all; "over" is the difference of the means seed by seed, where rows
have different seeds; minutes are processor time of training, on the machine that trained ours."""


def _described(track: Track) -> str:
    plural = "s" if len(track.seeds) > 1 else ""
    return (
        f"- **{track.name}**, {track.title}: {', '.join(track.networks)}; "
        f"CIFAR-10 at {track.size} px, {track.images:,} images to train on, "
        f"{track.search_images} to search on, {track.report_images:,} to report on "
        f"(the {track.mixed} random configurations on {track.mixed_images:,}); "
        f"{track.start_epochs} float epochs, then {track.epochs} epochs of each method "
        f"({track.steps:,} steps of {track.batch_size} images); "
        f"{len(track.seeds)} seed{plural}."
    )
