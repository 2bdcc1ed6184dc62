"""How many kernels quantization launches on an accelerator, counted on the meta device.

A fused operation counts as one launch. What a step costs on a GPU is launches, long before it is
bandwidth.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks.speed.launch_counts import LaunchCounts, count_launches
from benchmarks.speed.operations import Launches, launches
from benchmarks.speed.small_networks import make_pair

FORWARD, BACKWARD, EVALUATION = 1, 3, 1
"""Launches of a layer beyond those of the float network, at most."""

ROUNDING = 1e-9

SET_BITS = 1
"""Launches of a switch of the whole network, at most."""

NETWORKS = {"test_resnet": 0, "test_efficientnet": 0, "test_vit": 1}
"""Networks, with the inputs of layers that lie in memory with gaps: these are copied before.

The classifier of a ViT reads one token of each image.
"""


@pytest.fixture(scope="module", params=NETWORKS)
def counts(request: pytest.FixtureRequest) -> LaunchCounts:
    pair = make_pair(request.param, bits=(4, 8))
    counted = count_launches(pair)
    copies = NETWORKS[request.param] / len(pair.model.quantized_layers)
    return dataclasses.replace(
        counted, forward=counted.forward - copies, evaluation=counted.evaluation - copies
    )


def test_a_forward_pass_launches_one_kernel_a_layer_more(counts: LaunchCounts) -> None:
    assert 0 < counts.forward <= FORWARD + ROUNDING


def test_a_backward_pass_launches_three_kernels_a_layer_more(counts: LaunchCounts) -> None:
    assert 0 < counts.backward <= BACKWARD


def test_in_eval_mode_a_layer_launches_one_kernel_more(counts: LaunchCounts) -> None:
    assert 0 < counts.evaluation <= EVALUATION + ROUNDING


def test_a_switch_of_the_whole_network_launches_one_kernel(counts: LaunchCounts) -> None:
    assert counts.set_bits <= SET_BITS


def test_launches_are_counted_and_views_and_allocations_are_not() -> None:
    values = torch.ones(2, 3, device="meta")
    with Launches() as counted:
        torch.empty_like(values).detach().view(-1)[None].expand(4, 6)
    assert counted.count == 0
    with Launches() as counted:
        nn.functional.relu(values + 1).mul_(2).t().contiguous()
    assert counted.names == {"add": 1, "relu": 1, "mul_": 1, "clone": 1}
    with Launches() as counted:
        on_host = torch.zeros(2) + 1
        values[0, :2].copy_(on_host)
    assert counted.names == {"copy_": 1}
    assert not launches(torch.ops.aten.slice.Tensor)
    assert launches(torch.ops.aten.fill_.Scalar)
