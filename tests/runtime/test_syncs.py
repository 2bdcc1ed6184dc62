"""The host never waits for an accelerator in training, and once an evaluation in a search.

The networks are on the meta device, where no value can be read: each read is counted.
"""

from __future__ import annotations

import pytest
import torch

import anyprec
from benchmarks.speed import launch_counts
from benchmarks.speed.launch_counts import on_meta, small_convolutions
from benchmarks.speed.operations import Waits, accepting_meta
from benchmarks.speed.small_networks import Pair, make_pair

NETWORKS = ("test_resnet", "test_vit")


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return make_pair(request.param, bits=(2, 8))


@pytest.fixture(scope="module")
def small() -> Pair:
    return small_convolutions()


def test_no_part_of_a_one_shot_step_waits(pair: Pair) -> None:
    waits = launch_counts.count_step_waits(pair)
    assert waits == dict.fromkeys(
        ("set_bits", "forward", "loss", "backward", "paths", "OneShot.step"), 0
    )


def test_a_step_with_all_terms_of_the_method_does_not_wait(small: Pair) -> None:
    recipe = anyprec.Recipe(
        feature_weight=0.01, error_weight=0.1, error_start=0.0, spare_decay=True, clip_norm=1.0
    )
    placed = on_meta(small)
    model = placed.model.train()
    optimizer = torch.optim.SGD(anyprec.param_groups(model, lr=0.1, weight_decay=0.1))
    oneshot = anyprec.OneShot(model, total_steps=4, recipe=recipe)
    oneshot.exempt_from_decay(optimizer)
    with Waits() as waits:
        for _ in range(2):
            for path in oneshot.paths():
                output = model(placed.images)
                path.loss(output, placed.labels, torch.nn.functional.cross_entropy).backward()
            recipe.clip_gradients(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            oneshot.step()
    assert waits.count == 0


def test_an_event_of_the_scheduler_waits_once(small: Pair) -> None:
    model = on_meta(small).model.train()
    scheduler = anyprec.BitWidthScheduler(start=0.0, period=1.0, first_ratio=1.0, last_ratio=1.0)
    oneshot = anyprec.OneShot(model, total_steps=4, scheduler=scheduler)
    with Waits() as event:
        oneshot.step()
    with Waits() as no_event:
        oneshot.step()
    assert (event.count, no_event.count) == (1, 0)
    assert model.frozen


def test_fit_does_not_wait(small: Pair) -> None:
    assert launch_counts.count_fit_waits(small, steps=3) == 0


def test_fit_accumulates_without_a_wait(small: Pair) -> None:
    model = on_meta(small).model
    loader = [(small.images, small.labels)] * 4
    with accepting_meta(), Waits() as waits:
        history = anyprec.fit(
            model, loader, epochs=2, accumulation=2, norm_batches=0, show_progress=False
        )
    assert waits.count == 0
    assert waits.queued == 4  # the losses of each step, in one copy
    assert [len(record.losses) for record in history] == [4, 4]


@pytest.mark.parametrize("objective", ["loss", "error", "divergence"])
def test_an_evaluation_in_a_search_waits_once(objective: str, small: Pair) -> None:
    waits = launch_counts.count_evaluation_waits(small, batches=3, objective=objective)
    assert waits == 1


def test_calibration_waits_for_whole_passes_and_not_for_layers(small: Pair) -> None:
    waits = launch_counts.count_calibration_waits(small, batches=2)
    assert waits == {"calibrate": 6, "update_norms": 1}


def test_a_wait_is_counted_whatever_reads_the_value() -> None:
    value = torch.ones(2, device="meta")
    reads = {
        "item": value[0].item,
        "float": lambda: float(value[0]),
        "bool": lambda: bool((value > 0).all()),
        "list": value.tolist,
        "cpu": value.cpu,
        "copy": lambda: torch.zeros(2).copy_(value),
        "equal": lambda: torch.equal(value, value),
        "nonzero": value.nonzero,
    }
    for name, read in reads.items():
        with Waits() as waits:
            read()
        assert waits.count == 1, name
    with Waits() as waits:
        value.to("cpu", non_blocking=True)
        (value + 1).sum().sqrt_()
    assert (waits.count, waits.queued) == (0, 1)
