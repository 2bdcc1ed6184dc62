from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from anyprec.exporting.timing import times_in_turns
from benchmarks.common import records
from benchmarks.deployment import families, page

ZOO = records.ROOT / "benchmarks" / "results" / "zoo.jsonl"


def test_a_family_is_exported_and_run() -> None:
    record = families.try_export("test_convnext", Namespace(zoo=Path("none.jsonl")))
    assert record["equal"]
    assert record["difference"] < 1e-3
    assert record["batch"] == "any"
    assert page.shortfall(record) is None


def test_every_family_has_its_smallest_network() -> None:
    networks = families.networks_of_families(ZOO)
    assert len(networks) >= 80
    assert networks["resnet"] == "resnet10t"
    assert families.arguments_of("resnet10t", ZOO)[1] >= 32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"equal": False}, "the graph is not equal to the network"),
        ({"error": "no such operator"}, "no such operator"),
        ({"died": "not done after 900 s"}, "not done after 900 s"),
    ],
)
def test_what_falls_short_is_named(change: dict[str, Any], reason: str | None) -> None:
    record = {
        "kind": "family",
        "family": "resnet",
        "name": "resnet10t",
        "layers": 12,
        "batch": "any",
        "equal": True,
        "difference": 1e-6,
        "integer_operators": 3,
        "seconds": 12.0,
        **change,
    }
    assert page.shortfall(record) == reason
    text = page.families_text([record])
    assert text.startswith(f"{0 if reason else 1} of 1 families")
    assert (reason or "| resnet10t") in text


def test_runs_take_turns() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    times = times_in_turns(runs, rounds=2)
    assert order == list("ab") * 5  # three rounds do not count
    assert [len(times[name]) for name in "ab"] == [2, 2]


def test_mixed_bits_are_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    import anyprec  # noqa: PLC0415

    model = anyprec.convert(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)),
        bits=(2, 8),
        example_input=torch.zeros(1, 3, 8, 8),
    )
    configs = {families.mixed_bits(model, seed) for seed in range(20)}
    assert len(configs) == 4  # the one layer between the first and the last has four precisions
