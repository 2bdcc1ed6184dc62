"""The search file: a search that was stopped goes on from it as if it had never been stopped."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import anyprec
from anyprec.bits import BitConfig
from anyprec.errors import SearchError
from anyprec.searching.measuring.memo import Memo


class Objective:
    """Cheap, and counts what it is asked; interrupts at a chosen call."""

    def __init__(self, *, interrupt_at: int | None = None) -> None:
        self.seen: list[BitConfig] = []
        self._interrupt_at = interrupt_at

    def __call__(self, model: anyprec.ConvertedModel) -> float:
        if len(self.seen) == self._interrupt_at:
            raise KeyboardInterrupt
        self.seen.append(model.bits)
        return sum(
            (index + 1) % 3 * 3.0**-bits.weight + index % 4 * 4.0**-bits.activation
            for index, bits in enumerate(model.bits.values())
        )


def search(
    net: anyprec.ConvertedModel, objective: object, path: Path | None, **options: object
) -> anyprec.SearchResult:
    return anyprec.search(
        net, [], "W3A3", objective=objective, resume=path, show_progress=False, **options
    )


def same(one: anyprec.SearchResult, other: anyprec.SearchResult) -> bool:
    return one.config == other.config and list(one.evaluated.items()) == list(
        other.evaluated.items()
    )


@pytest.mark.parametrize("algorithm", ["combined", "lazy", "evolution"])
def test_a_search_goes_on_where_max_evaluations_stopped_it(
    algorithm: str, net: anyprec.ConvertedModel, tmp_path: Path
) -> None:
    options = {"algorithm": algorithm, "max_evaluations": 60}
    whole, first, second = Objective(), Objective(), Objective()
    uninterrupted = search(net, whole, None, **options)
    path = tmp_path / "scores"
    if algorithm == "evolution":  # its number of evaluations is part of what it does
        first = Objective(interrupt_at=20)
        assert search(net, first, path, **options).stopped == "interrupted"
    else:
        stopped = search(net, first, path, algorithm=algorithm, max_evaluations=20)
        assert stopped.stopped == "max_evaluations"
        assert stopped.evaluations == 20
    assert same(search(net, second, path, **options), uninterrupted)
    assert first.seen + second.seen == whole.seen
    third = Objective()
    assert same(search(net, third, path, **options), uninterrupted)
    assert third.seen == []


@pytest.mark.parametrize("at", [7, 25])
def test_a_search_goes_on_where_the_user_interrupted_it(
    at: int, net: anyprec.ConvertedModel, tmp_path: Path
) -> None:
    whole, first, second = Objective(), Objective(interrupt_at=at), Objective()
    uninterrupted = search(net, whole, None)
    stopped = search(net, first, tmp_path / "scores")
    assert stopped.stopped == "interrupted"
    assert stopped.score == min(
        s
        for config, s in stopped.evaluated.items()
        if stopped.costs.total("bitops", config) <= stopped.budget.bitops
    )
    resumed = search(net, second, tmp_path / "scores")
    assert same(resumed, uninterrupted)
    assert resumed.stopped == "finished"
    assert first.seen + second.seen == whole.seen


def test_an_interrupt_before_anything_that_fits_is_passed_on(
    net: anyprec.ConvertedModel, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        search(net, Objective(interrupt_at=0), tmp_path / "scores")


def test_scores_of_the_network_itself_are_the_same_after_resuming(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "scores"

    def run(resume: Path | None, limit: int) -> anyprec.SearchResult:
        return anyprec.search(net, [(images, labels)], "W3A3", max_evaluations=limit, resume=resume)

    whole = run(None, 40)
    run(path, 15)
    resumed = run(path, 40)
    assert same(resumed, whole)
    assert 0 < resumed.layer_runs < whole.layer_runs


def test_another_budget_uses_the_same_file(net: anyprec.ConvertedModel, tmp_path: Path) -> None:
    first, second = Objective(), Objective()
    path = tmp_path / "scores"
    search(net, first, path)
    anyprec.search(net, [], "W4A4", objective=second, resume=path)
    assert second.seen
    assert not set(first.seen) & set(second.seen)


def test_a_line_that_was_cut_off_is_measured_again(
    net: anyprec.ConvertedModel, tmp_path: Path
) -> None:
    path = tmp_path / "scores"
    whole, again = Objective(), Objective()
    uninterrupted = search(net, whole, path)
    text = path.read_text()
    path.write_text(text[:-9])
    assert same(search(net, again, path), uninterrupted)
    assert again.seen == whole.seen[-1:]
    assert path.read_text() == text


def _foreign(text: str) -> str:
    return "Dear diary,\n" + text


def _no_json_line(text: str) -> str:
    return text.replace("\n", "\n{\n", 1)


def _other_format(text: str) -> str:
    return text.replace("anyprec-search-1", "anyprec-search-99", 1)


def _missing_score(text: str) -> str:
    return text + '{"bits": [[2, 2]]}\n'


def _too_few_bits(text: str) -> str:
    return text + '{"bits": [[2, 2]], "score": 1.0}\n'


def _strange_bits(text: str) -> str:
    lines = text.splitlines()
    entry = json.loads(lines[1])
    entry["bits"][0] = [99, 2]
    return "\n".join([lines[0], json.dumps(entry)]) + "\n"


def _list_head(_text: str) -> str:
    return "[]\n"


def _no_line_end(_text: str) -> str:
    return "a letter"


@pytest.mark.parametrize(
    "damage",
    [
        _foreign,
        _no_json_line,
        _other_format,
        _missing_score,
        _too_few_bits,
        _strange_bits,
        _list_head,
        _no_line_end,
    ],
)
def test_a_foreign_or_damaged_file_is_refused_and_left_as_it_is(
    damage: Callable[[str], str], net: anyprec.ConvertedModel, tmp_path: Path
) -> None:
    path = tmp_path / "scores"
    search(net, Objective(), path, max_evaluations=10)
    path.write_text(damage(path.read_text()))
    text = path.read_text()
    with pytest.raises(SearchError, match="is no search file, or is damaged: name a new file"):
        search(net, Objective(), path)
    assert path.read_text() == text


def test_a_file_of_bytes_is_refused(net: anyprec.ConvertedModel, tmp_path: Path) -> None:
    path = tmp_path / "scores"
    path.write_bytes(b"\xff\xfe\x00\n" * 10)
    with pytest.raises(SearchError, match="is no search file"):
        search(net, Objective(), path)


def test_a_folder_or_a_missing_folder_is_refused(
    net: anyprec.ConvertedModel, tmp_path: Path
) -> None:
    for path in (tmp_path, tmp_path / "missing" / "scores"):
        with pytest.raises(SearchError, match="cannot open the search file"):
            search(net, Objective(), path)


@pytest.mark.parametrize(
    "what", ["weights", "images", "labels", "objective", "norms", "layers", "statistics"]
)
def test_a_file_of_another_search_is_refused(
    what: str,
    net: anyprec.ConvertedModel,
    images: Tensor,
    labels: Tensor,
    tmp_path: Path,
    small_net: Callable,
) -> None:
    path = tmp_path / "scores"
    anyprec.search(net, [(images, labels)], "W3A3", resume=path, max_evaluations=8)
    other, pictures, classes, options = copy.deepcopy(net), images, labels, {}
    if what == "weights":
        with torch.no_grad():
            other.fc.bias[0] += 1e-3
    elif what == "statistics":
        other.stem_norm.running_mean += 1e-3
    elif what == "images":
        pictures = images.flip(3)
    elif what == "labels":
        classes = labels.flip(0)
    elif what == "layers":
        other = anyprec.convert(
            small_net(), bits=(2, 3, 4, 8), example_input=images[:1], exclude=["head"]
        )
        anyprec.calibrate(other, [images])
    else:
        options = {"objective": "divergence"} if what == "objective" else {"norms": "batch"}
    with pytest.raises(
        SearchError, match="belongs to another search: the network, its weights, the images"
    ):
        anyprec.search(other, [(pictures, classes)], "W3A3", resume=path, **options)


def test_infinite_scores_survive_the_file(tmp_path: Path) -> None:
    configs = [BitConfig({"a": (2, w), "b": (4, 4)}) for w in (2, 3, 4)]
    scores = [math.inf, 0.1 + 0.2, -1e300]
    with Memo(tmp_path / "scores", fingerprint="x", layers=["a", "b"]) as memo:
        assert memo.scores == {}
        for config, score in zip(configs, scores, strict=True):
            memo.write(config, score)
    with Memo(tmp_path / "scores", fingerprint="x", layers=["a", "b"]) as memo:
        assert memo.scores == dict(zip(configs, scores, strict=True))


def test_without_a_file_nothing_is_kept() -> None:
    with Memo(None, fingerprint="", layers=["a"]) as memo:
        memo.write(BitConfig({"a": (2, 2)}), 1.0)
        assert memo.scores == {}
