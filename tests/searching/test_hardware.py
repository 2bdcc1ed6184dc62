"""Searches that choose only what a target runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn

import anyprec
from anyprec.bits import Bits
from anyprec.errors import BitsError, HardwareError


def evaluated_pairs(result: anyprec.SearchResult, path: str) -> set[str]:
    return {str(config[path]) for config in result.evaluated}


def search(
    model: anyprec.ConvertedModel, images: Tensor, budget: str | None, **arguments: object
) -> anyprec.SearchResult:
    return anyprec.search(
        model, [images], budget, objective="divergence", show_progress=False, **arguments
    )


@pytest.mark.parametrize("algorithm", ["combined", "greedy", "evolution", "random"])
def test_only_pairs_of_the_target_are_tried(
    float_net: nn.Module, images: Tensor, algorithm: str
) -> None:
    model = anyprec.convert(
        float_net, bits=(2, 4, 8), first_last_bits=None, example_input=images[:1]
    )
    anyprec.calibrate(model, [images])
    result = search(
        model, images, "70% of W8A8", hardware="ti-c2000", algorithm=algorithm, max_evaluations=60
    )
    assert result.utilisation <= 1
    for config in result.evaluated:
        assert anyprec.hardware_problems(model, config, "ti-c2000") == {}
    # The pairs are no full product: W2A4 and W8A4 are candidates, but do not run.
    assert evaluated_pairs(result, "pointwise") <= {"W2A8", "W4A4", "W4A8", "W8A8"}
    assert Bits(2, 4) in model.candidates["pointwise"]
    assert len(evaluated_pairs(result, "pointwise")) > 1


def test_the_target_of_the_conversion_is_that_of_its_searches_also_after_loading(
    float_net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    network = type(float_net)().eval()
    model = anyprec.convert(float_net, hardware="ti-c2000", example_input=images[:1])
    anyprec.calibrate(model, [images])
    anyprec.save(model, tmp_path / "net")
    loaded = anyprec.load(tmp_path / "net", network)
    for subject in (model, loaded):
        result = search(subject, images, None, max_evaluations=40)
        assert evaluated_pairs(result, "pointwise") <= {"W2A8", "W4A4", "W4A8", "W8A8"}
        assert len(evaluated_pairs(result, "pointwise")) > 1
        assert anyprec.hardware_problems(subject, result.config, "ti-c2000") == {}


def test_a_layer_that_the_target_cannot_run_is_named_before_anything_is_measured(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    with pytest.raises(BitsError, match="max78000 can run no precision that layer 'depthwise'"):
        search(net, images, None, hardware="max78000")
    with pytest.raises(HardwareError, match="no hardware 'abacus'"):
        search(net, images, None, hardware="abacus")
