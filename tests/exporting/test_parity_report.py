"""What a report says and shows, of values that are made up."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console

import anyprec
from anyprec.exporting.parity_report import NEAR_TIE

LOGITS = anyprec.LogitParity(
    images=100,
    mean=0.012,
    largest=0.5,
    lowered_largest=0.0,
    alone_largest=2e-6,
    noise=0.01,
    float_noise=1e-7,
    agreeing=98,
    accuracy=71.0,
    file_accuracy=70.0,
    pairs=((0.0, 0.1), (1.0, 1.0), (-2.0, -2.1)),
)
FIRST = anyprec.CodeParity("stem", 8, 8, 3000, 1.0, 0, 1.0, 0, 0.0)
SECOND = anyprec.CodeParity("fc", 4, 8, 1000, 0.9, 3, 0.998, 1, 0.0312)
REPORT = anyprec.ParityReport(
    path=Path("folder/net.onnx"),
    runtime="onnxruntime 1.0",
    config=anyprec.BitConfig({"stem": "W8A8", "fc": "W4A8"}),
    layers=(FIRST, SECOND),
    logits=LOGITS,
    size=2**20,
    float_size=5 * 2**20,
    speed=anyprec.SpeedParity(0.002, 0.005, 1, 1),
    shared=("third",),
    floating={"head": "excluded"},
    raised=(anyprec.RaisedScale("stem", 7, 32.0),),
)


def lines_of(report: anyprec.ParityReport) -> dict[str, str]:
    """Lines of the text by their first column."""
    lines = [line.split("  ", 1) for line in str(report).splitlines()]
    return {line[0]: line[1].strip() for line in lines if len(line) == 2}


def test_the_text_has_every_figure() -> None:
    lines = lines_of(REPORT)
    assert str(REPORT).startswith("net.onnx in onnxruntime 1.0 against the network, 100 images\n")
    assert lines["same top-1 class"] == "98.0 % (98 of 100; 95 % interval 93.0 to 99.8 %)"
    assert lines["top-1 accuracy"] == "70.00 %, network 71.00 %"
    assert lines["mean logit difference"] == "1.20e-02 standard deviations"
    assert lines["largest logit difference"] == "5.00e-01 standard deviations"
    assert lines["mean difference to float64"] == "1.00e-02 standard deviations"
    assert lines["the same of the float network"] == "1.00e-07 standard deviations"
    assert lines["lowered graph, largest difference"] == "0"
    assert lines["last layers alone, largest"] == "2.00e-06 standard deviations"
    assert lines["equal codes"] == "97.500 % of 4,000"
    assert lines["equal codes, each layer alone"] == "99.950 %"
    assert lines["largest difference, each alone"] == "1 step, 0.0312 of a step from the tie"
    assert lines["size of the file"] == "1.00 MiB, 1/5.0 of float (5.00 MiB)"
    assert lines["batch of 1, 1 thread"] == "2.00 ms, float 5.00 ms: 2.50x"
    assert lines["in floating point"] == "head: excluded"
    assert lines["weight scale raised"] == "stem: 7 channels, up to 32x"
    assert lines["share another's quantizer"] == "third"
    assert "more than a tie apart" not in lines


def test_the_table_has_a_line_for_each_quantizer() -> None:
    lines = lines_of(REPORT)
    assert lines["stem"].split() == ["W8A8", "3,000", "100.000", "0", "100.000", "0", "0.0000"]
    assert lines["fc"].split() == ["W4A8", "1,000", "90.000", "3", "99.800", "1", "0.0312"]
    console = Console(width=120, record=True, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        console.print(REPORT.table(), REPORT.summary())
    for word in ("alone: largest", "99.800", "same top-1 class"):
        assert word in captured.get()


def test_an_output_has_bits_of_its_codes_alone() -> None:
    point = dataclasses.replace(FIRST, point="block.output_quantizers.0", weight_bits=None)
    report = dataclasses.replace(REPORT, layers=(point,))
    assert lines_of(report)["block.output_quantizers.0"].split()[0] == "A8"


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"tie_distance": NEAR_TIE}, True),
        ({"tie_distance": 1.01 * NEAR_TIE}, False),
        ({"alone_largest": 2}, False),
        ({"largest": 200}, True),
    ],
)
def test_what_a_layer_may_do_alone(changes: dict[str, float], holds: bool) -> None:
    row = dataclasses.replace(SECOND, **changes)
    report = dataclasses.replace(REPORT, layers=(FIRST, row))
    assert report.broken == (() if holds else (row,))
    assert lines_of(report).get("more than a tie apart") == (None if holds else "fc")


def test_what_was_not_measured_is_not_shown() -> None:
    logits = dataclasses.replace(
        LOGITS, accuracy=None, file_accuracy=None, float_noise=None, agreeing=None
    )
    report = dataclasses.replace(REPORT, layers=(), logits=logits, float_size=None, speed=None)
    lines = lines_of(report)
    assert lines["size of the file"] == "1.00 MiB"
    hidden = ("top-1 accuracy", "the same of the float network", "equal codes", "stem")
    assert not set(hidden) & set(lines)
    assert (logits.agreement, logits.agreement_interval) == (None, None)


def test_markdown_has_both_tables() -> None:
    text = REPORT.markdown()
    assert "| mean logit difference | 1.20e-02 standard deviations |" in text
    assert "| fc | W4A8 | 1,000 | 90.000 | 3 | 99.800 | 1 | 0.0312 |" in text
    assert "## Codes" not in dataclasses.replace(REPORT, layers=()).markdown()


@pytest.mark.parametrize(("agreeing", "low", "high"), [(98, 92.96, 99.76), (100, 96.38, 100.0)])
def test_the_interval_is_the_exact_one(agreeing: int, low: float, high: float) -> None:
    # Tables of Clopper-Pearson intervals; of 100 in 100 the lower limit is 0.025^(1/100).
    interval = dataclasses.replace(LOGITS, agreeing=agreeing).agreement_interval
    assert interval == pytest.approx((low, high), abs=0.005)
