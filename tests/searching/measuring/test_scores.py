"""What scores are made of: labels, logits and numbers are checked before the search begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import anyprec
from anyprec.errors import BatchError, SearchError
from anyprec.searching.measuring.evaluator import Evaluator
from anyprec.searching.measuring.scores import number_of

CLASSES = 5


def searched(net: anyprec.ConvertedModel, images: Tensor, labels: Any, objective: str) -> None:
    anyprec.search(net, [(images, labels)], "W4A4", objective=objective)


def texts(labels: Tensor) -> tuple[str, ...]:
    return tuple(map(str, labels.tolist()))


def with_label(label: int) -> Callable[[Tensor], Tensor]:
    return lambda labels: torch.cat((labels[:-1], labels.new_tensor([label])))


@pytest.mark.parametrize("objective", ["loss", "error"])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            lambda y: y.float(),
            SearchError,
            r"dtype torch.float32 .*class index \(labels.long\(\)\)",
        ),
        (lambda y: y > 2, SearchError, r"dtype torch.bool .*class index \(labels.long\(\)\)"),
        (lambda y: y[:, None], SearchError, r"labels.squeeze\(1\)"),
        (lambda y: torch.eye(CLASSES)[y], SearchError, r"labels.argmax\(dim=1\)"),
        (lambda y: torch.eye(CLASSES).long()[y], SearchError, r"labels.argmax\(dim=1\)"),
        (lambda y: y[:-1], SearchError, r"labels of shape \(7,\) .* for 8 images"),
        (lambda y: y[0], SearchError, r"a tensor of shape \(8,\)"),
        (with_label(-1), SearchError, "a label is -1, and the network has 5 classes"),
        (with_label(-100), SearchError, "a label is -100, and the network has 5 classes"),
        (with_label(255), SearchError, "a label is 255, and the network has 5 classes"),
        (with_label(5), SearchError, "a label is 5, .* needs labels from 0 to 4"),
        (texts, BatchError, r"batch of type tuple \(Tensor, tuple\).* tensor"),
        (lambda y: None, BatchError, r"batch of type tuple \(Tensor, NoneType\)"),
        (lambda y: y.numpy(), BatchError, r"torch.from_numpy\(array\)"),
        (lambda y: y.tolist(), BatchError, r"torch.tensor\(numbers\)"),
    ],
)
def test_labels_of_another_kind_are_refused_before_anything_is_evaluated(
    change: Callable[[Tensor], Any],
    error: type[Exception],
    text: str,
    objective: str,
    net: anyprec.ConvertedModel,
    images: Tensor,
    labels: Tensor,
) -> None:
    with pytest.raises(error, match=text):
        searched(net, images, change(labels), objective)


def test_a_loader_of_bare_images_has_no_labels(net: anyprec.ConvertedModel, images: Tensor) -> None:
    with pytest.raises(BatchError, match="cannot find labels in a batch of type Tensor"):
        anyprec.search(net, [images], "W4A4")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_every_dtype_of_integers_holds_class_indices(
    dtype: torch.dtype, net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    config = net.resolve_bits(4)
    for objective in ("loss", "error"):
        expected = Evaluator(net.eval(), [(images, labels)], objective)(config)
        assert Evaluator(net, [(images, labels.to(dtype))], objective)(config) == expected


def test_the_report_loader_is_checked_before_the_search(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    calls = []

    def objective(_model: anyprec.ConvertedModel) -> float:
        calls.append(1)
        return 0.0

    with pytest.raises(SearchError, match="a label is 9"):
        anyprec.search(
            net, [images], "W4A4", objective=objective, report_loader=[(images, labels * 0 + 9)]
        )
    assert not calls


@pytest.mark.parametrize(
    "score",
    [
        None,
        True,
        1j,
        "0.5",
        torch.ones(2),
        torch.tensor([True]),
        torch.tensor(1j),
        [0.5],
        np.ones(2),
    ],
)
def test_a_score_that_is_no_real_number_is_refused(
    score: object, net: anyprec.ConvertedModel, images: Tensor
) -> None:
    with pytest.raises(SearchError, match=r"the objective returned .*: return one real number"):
        anyprec.search(net, [images], "W4A4", objective=lambda _: score)


@pytest.mark.parametrize(
    "score",
    [
        1,
        1.0,
        Fraction(1),
        np.float32(1),
        np.int64(1),
        np.array(1.0),
        torch.ones(1, 1),
        torch.tensor(1),
    ],
)
def test_numbers_of_every_kind_are_scores(score: object) -> None:
    assert number_of(score) == 1.0


def test_numbers_that_are_not_finite_stay_what_they_are() -> None:
    assert math.isnan(number_of(torch.tensor(math.nan)))
    assert number_of(-math.inf) == -math.inf


@pytest.mark.parametrize("objective", [None, 5, ["loss"]])
def test_an_objective_that_is_neither_a_name_nor_a_function_is_refused(
    objective: Any, net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(SearchError, match="is unknown: use one of"):
        anyprec.search(net, [(images, labels)], "W4A4", objective=objective)


@pytest.mark.parametrize("batches", [0, -1, 2.5])
def test_a_search_on_no_batch_is_refused(
    batches: Any, net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(SearchError, match=f"batches={batches} leaves no batch"):
        anyprec.search(net, [(images, labels)], "W4A4", batches=batches)


def test_a_search_of_an_unusable_network_says_what_to_check(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    with torch.no_grad():
        net.fc.bias.fill_(math.nan)
    with pytest.raises(
        SearchError, match=r"with the score nan\. Check whether the network's output"
    ):
        anyprec.search(net, [(images, labels)], "W4A4")
