"""docs/zoo.md, rendered from the records of all models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import timm

from benchmarks.zoo.beyond import NETWORKS
from benchmarks.zoo.records import shortfalls
from benchmarks.zoo.trials import SHALLOW

Record = dict[str, Any]

_STATUSES = ["quantized", "exempt", "skipped"]

_SHALLOW_NAMES = set().union(*SHALLOW)

_PAGE = """# Every timm model

{totals}

Each model is converted twice. *Structure*: without values, at the input size and depth of
`timm.create_model(name)`; nothing that multiplies may be skipped (parameters that are only
added or indexed are no part of the counts here), and our MACs must equal those of torch's counter;
so too as a feature extractor, where timm has one. *Numbers*: with random weights, at the smallest
input that the model takes: bits None bit-identical to the float network in eval and train mode
(dropout, drop path and patch drop under one seed); finite output at 2 and at 8 bits; a gradient on
both step sizes of every layer; A -> B -> A exact; deepcopy; state dict into a fresh network; float
state dict; `forward_features`; `reset_classifier`; the same after `reparameterize_model`, where it
merges branches.

With random weights and 2 bits, whole inputs can round to zero and pass no gradient on. Layers
without a gradient in such a pass are tried again with all others at 8 bits, and then in floating
point: where the float network passes no gradient to the weight either, none can be expected. How
many networks needed that is counted above.

{versions}

```sh
python -m benchmarks.zoo run      # hours on two cores; resumable
python -m benchmarks.zoo render   # this page
```

## By family

{families}

## What falls short

{shortfalls}

## Beyond timm

The same checks at full depth, with random weights (`python -m benchmarks.zoo beyond`).

{beyond}

## Layers that are not quantized

{reasons}

## Tried with fewer blocks

{reduced}

## Tried on an accelerator

{accelerators}
"""


def write_page(page: Path, records: dict[str, Record]) -> None:
    """Write the page.

    Args:
        page: The Markdown file.
        records: The last record of every model, by name.
    """
    names = timm.list_models()
    tried = [records[name] for name in names if name in records]
    models = pd.DataFrame([_summary(record) for record in tried])
    untried = [name for name in names if name not in records]
    text = _PAGE.format(
        totals=_totals(models, count=len(names)),
        versions=_versions(tried),
        families=_family_table(models),
        shortfalls=_shortfall_section(models, untried),
        beyond=_beyond_table(records),
        reasons=_reason_table(tried),
        reduced=_sentence(_with_size(models[models.reduced])),
        accelerators=_sentence(_with_device(models[models.device != ""])),
    )
    page.write_text(text)


def _summary(record: Record) -> dict[str, Any]:
    """What the page says about a model, as a row of a table."""
    structure = record.get("structure", {})
    numbers = record.get("numbers") or {}
    uses = structure.get("functional", {})
    problems = shortfalls(record)
    row = {
        "name": record["name"],
        "family": record.get("family", "unknown"),
        "parameters": record.get("parameters", 0),
        "device": record.get("device", ""),
        "problems": "<br>".join(map(_cell, problems)),
        "completed": "died" not in record,
        "converts": structure.get("broken") == {},
        "has_numbers": bool(numbers),
        "keeps": bool(numbers) and not problems,
        "reduced": not _SHALLOW_NAMES.isdisjoint(record.get("arguments", {})),
        "uncalled": uses.get("used without a call", 0),
        "bare": uses.get("bare parameters", 0),
        "equal_macs": len(set(structure.get("macs", ()))) == 1,
        "is_extractor": "none" not in record.get("features", {"none": ""}),
        "extracts": record.get("features") == {},
        "alone": any(numbers.get("alone", {}).values()),
        "unreached": bool(numbers.get("unreached")),
    }
    coverage = structure.get("coverage", {})
    return row | {status: coverage.get(status, 0) for status in _STATUSES}


def _totals(models: pd.DataFrame, count: int) -> str:
    total = models.sum(numeric_only=True).astype(int)
    whole = int((models.keeps & ~models.reduced).sum())
    return (
        f"- **{total.converts} of {count}** models of timm convert as they are created, "
        "with nothing skipped.\n"
        f"- **{total.keeps} of {count}** keep every promise; "
        f"the numbers of {total.has_numbers} were tried so far.\n"
        f"- {whole} of these were tried whole; {total.keeps - whole} with fewer blocks "
        "(their structure whole).\n"
        f"- Layers: {total.quantized:,} quantized, {total.exempt:,} exempt by rule, "
        f"{total.skipped:,} skipped. Of the quantized, {total.uncalled:,} have a weight that is "
        f"used without calling the layer, and {total.bare:,} are bare parameters of a module.\n"
        "- MACs equal those of torch's counter, to the last one, "
        f"in {total.equal_macs} of {total.completed} models.\n"
        f"- {total.extracts} of {total.is_extractor} feature extractors convert.\n"
        f"- {total.alone} networks have layers whose gradient at 2 bits took the others at 8 bits; "
        f"{total.unreached} have layers to which the float network passes no gradient either."
    )


def _versions(records: list[Record]) -> str:
    used = pd.DataFrame(records, columns=["timm", "torch", "commit"])
    texts = []
    for key, values in used.items():
        texts.append(f"{key} {', '.join(sorted(set(values)))}")
    return "; ".join(texts) + "."


def _family_table(models: pd.DataFrame) -> str:
    groups = models.groupby("family")
    families = groups[["keeps", *_STATUSES]].sum().astype(int)
    families.insert(0, "models", groups.size())
    return _markdown(families.reset_index().rename(columns={"keeps": "keep every promise"}))


def _shortfall_section(models: pd.DataFrame, untried: list[str]) -> str:
    broken = models[models.problems != ""].sort_values("name")
    paragraphs = ["None of those tried."]
    if len(broken):
        rows = pd.DataFrame({"model": "`" + broken.name + "`", "what": broken.problems})
        paragraphs = [_markdown(rows)]
    without_numbers = models[models.completed & ~models.has_numbers]
    waiting = {
        "Numbers not tried yet": list(without_numbers.name),
        "Not looked at yet": untried,
    }
    for label, names in waiting.items():
        if names:
            paragraphs.append(f"{label} ({len(names)}): `{'`, `'.join(names)}`.")
    return "\n\n".join(paragraphs)


def _beyond_table(records: dict[str, Record]) -> str:
    rows = []
    for name in NETWORKS:
        row = _summary(records.get(name, {"name": name, "died": "not looked at yet"}))
        parameters = f"{row['parameters'] / 1e6:.1f} M" if row["parameters"] else ""
        quantized = str(row["quantized"] or "")
        rows.append((f"`{name}`", parameters, quantized, row["problems"] or "nothing"))
    columns = ["network", "parameters", "layers quantized", "what falls short"]
    aligned = ("left", "right", "right", "left")
    return _markdown(pd.DataFrame(rows, columns=columns), colalign=aligned)


def _reason_table(records: list[Record]) -> str:
    rows = []
    for record in records:
        for reason, count in record.get("structure", {}).get("reasons", {}).items():
            rows.append((reason, count, record["family"]))
    if not rows:
        return "There are none."
    groups = pd.DataFrame(rows, columns=["reason", "layers", "families"]).groupby("reason")
    table = groups.agg({"layers": "sum", "families": _listed})
    return _markdown(table.reset_index())


def _listed(names: pd.Series[str]) -> str:
    return ", ".join(sorted(set(names)))


def _with_size(models: pd.DataFrame) -> list[str]:
    millions = models.parameters / 1e6
    return [f"`{name}` ({size:.0f} M)" for name, size in zip(models.name, millions, strict=True)]


def _with_device(models: pd.DataFrame) -> list[str]:
    pairs = zip(models.name, models.device, strict=True)
    return [f"`{name}` ({device})" for name, device in pairs]


def _sentence(entries: list[str]) -> str:
    return ", ".join(entries) + "." if entries else "None."


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:240]


def _markdown(table: pd.DataFrame, **options: Any) -> str:
    """The table in Markdown, with thousands set apart by commas."""
    return table.to_markdown(index=False, intfmt=",", **options)
