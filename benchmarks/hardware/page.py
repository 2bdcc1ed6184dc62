"""The tables of docs/hardware.md, rendered from the data: `python -m benchmarks.hardware.page`.

A test compares them with the page.
"""

from __future__ import annotations

from pathlib import Path

import anyprec
from anyprec.bits import MAX_BITS, MIN_BITS, Bits
from anyprec.model.hardware import KINDS

PAGE = Path(__file__).parents[2] / "docs" / "hardware.md"
START, END = "<!-- rendered: start -->\n", "<!-- rendered: end -->\n"

_COLUMNS = ("`hardware=`", *KINDS, "weights", "grid", "scale", "placement", "known")
_RULES = ("---",) * len(_COLUMNS)


def rendered() -> str:
    """One table of all targets, then a section for each."""
    targets = [anyprec.hardware(name) for name in anyprec.hardware_names()]
    rows = [_COLUMNS, _RULES, *map(_row, targets)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return table + "".join(map(_section, targets))


def in_page(page: str) -> str:
    """What stands between the marks of a page."""
    return page.partition(START)[2].partition(END)[0]


def with_rendered(page: str) -> str:
    """`page` with the present tables between its marks."""
    before, _, rest = page.partition(START)
    return before + START + rendered() + END + rest.partition(END)[2]


def _row(target: anyprec.Hardware) -> list[str]:
    cells = [f"[`{target.name}`](#{target.name})"]
    cells += [_pairs(target.pairs.of(kind)) for kind in KINDS]
    cells += [target.weights, target.grid, target.scale, f"`{target.placement}`", target.evidence]
    return cells


def _pairs(pairs: tuple[Bits, ...]) -> str:
    """Pairs in few letters: W2/4/8 A8."""
    if len(pairs) == (MAX_BITS - MIN_BITS + 1) ** 2:
        return "any"
    activations_of: dict[int, list[str]] = {}
    for bits in pairs:
        activations_of.setdefault(bits.weight, []).append(str(bits.activation))
    weights_of: dict[str, list[str]] = {}
    for weight, activations in activations_of.items():
        weights_of.setdefault("/".join(activations), []).append(str(weight))
    written = [
        f"W{'/'.join(weights)} A{activations}" for activations, weights in weights_of.items()
    ]
    return ", ".join(written) or "floating point"


def _section(target: anyprec.Hardware) -> str:
    lines = [f"\n### {target.name}\n", f"{target.title}. {target.route}"]
    if target.export:
        lines.append(f"`anyprec.export(..., target={target.export!r})` writes it.")
    if target.first_last is not None:
        lines.append(f"First and last layers have {target.first_last} bits.")
    beyond = _beyond(target)
    if beyond:
        lines.append(f"It also has {beyond}, which is beyond the 2 to 8 bits of anyprec.")
    if target.notes:
        lines.append(target.notes)
    if target.unchecked:
        lines.append(f"Not checked: {target.unchecked}")
    sources = [f"[{source.title}]({source.url})" for source in target.sources]
    lines.append(f"Known: {target.evidence}. Sources: {', '.join(sources)}.")
    return "\n".join(lines) + "\n"


def _beyond(target: anyprec.Hardware) -> str:
    """The precisions that anyprec lacks, with the kinds of layers that have them."""
    kinds_of: dict[str, list[str]] = {}
    for kind, names in target.unavailable.items():
        for name in names:
            kinds_of.setdefault(name, []).append(kind)
    written = []
    for name, kinds in kinds_of.items():
        written.append(name if len(kinds) == len(KINDS) else f"{name} ({', '.join(kinds)})")
    return ", ".join(written)


if __name__ == "__main__":
    PAGE.write_text(with_rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
