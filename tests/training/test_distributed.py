"""Two processes under torchrun against one process on the joined batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import distributed_training


@pytest.fixture(scope="module")
def runs(under_torchrun: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    alone = tmp_path_factory.mktemp("alone") / "training.pt"
    distributed_training.train(*distributed_training.prepare(), result=alone)
    files = {"one": alone, "two": under_torchrun / "training.pt"}
    return {name: torch.load(file, weights_only=False) for name, file in files.items()}


def test_two_processes_reach_the_weights_of_one_on_the_joined_batch(runs: dict[str, Any]) -> None:
    one, two = runs["one"]["group norm"], runs["two"]["group norm"]
    assert one.keys() == two.keys()
    start = runs["one"]["group norm, calibrated"]
    moved = max(
        float((one[name] - start[name]).abs().max())
        for name in one
        if one[name].is_floating_point()
    )
    assert moved > 0.05
    for name, value in one.items():
        # Gradients are summed in another order. In float64 that is below 1e-15 at each of the 12
        # steps, too little to flip a rounding. In float32 that happens, and is worth 1e-4.
        torch.testing.assert_close(two[name], value, rtol=1e-10, atol=1e-10)
    assert runs["two"]["group norm, frozen"] == runs["one"]["group norm, frozen"]


def test_sharded_parameters_end_as_whole_ones_do(runs: dict[str, Any]) -> None:
    one, two = runs["one"]["sharded"], runs["two"]["sharded"]
    assert one.keys() == two.keys()
    assert any(
        not torch.equal(value, runs["one"]["group norm, calibrated"][name])
        for name, value in one.items()
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-10, atol=1e-10)


def test_calibration_and_norm_statistics_see_the_images_of_all_processes(
    runs: dict[str, Any],
) -> None:
    one, two = runs["one"]["batch norm, calibrated"], runs["two"]["batch norm, calibrated"]
    for name, value in one.items():
        if "bank.running" in name:
            torch.testing.assert_close(
                two[name], value, rtol=0.05, atol=0.02
            )  # step sizes come from another sample
    steps = [name for name in one if name.endswith("input_quantizer.step")]
    assert steps
    for name in steps:
        torch.testing.assert_close(two[name], one[name], rtol=0.1, atol=0.0)
    for path, statistics in runs["one"]["group norm, statistics"].items():
        for here, there in zip(
            statistics, runs["two"]["group norm, statistics"][path], strict=True
        ):
            torch.testing.assert_close(here, there)


def test_all_processes_end_with_the_same_model(runs: dict[str, Any]) -> None:
    agreement = runs["two"]["agreement"]
    # A process reports losses of its own images; in a user's loop also its own statistics.
    assert {name for name, agrees in agreement.items() if not agrees} <= {
        "group norm, losses", "batch norm, losses", "own loop",
    }  # fmt: skip
    assert agreement["batch norm"]
    assert agreement["batch norm, statistics"]


def test_gradients_are_reduced_once_for_each_optimizer_step(runs: dict[str, Any]) -> None:
    assert runs["two"]["reductions"] == 8
