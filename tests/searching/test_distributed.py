"""Two processes under torchrun search as one does."""

from __future__ import annotations

from pathlib import Path

import pytest

import anyprec
from tests.searching import distributed_search


@pytest.fixture(scope="module")
def folders(under_torchrun: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    alone = tmp_path_factory.mktemp("alone")
    distributed_search.search(*distributed_search.prepare(), folder=alone)
    return alone, under_torchrun


@pytest.mark.parametrize("objective", ["loss", "error", "divergence"])
def test_two_processes_find_what_one_finds_bit_for_bit(
    objective: str, folders: tuple[Path, Path]
) -> None:
    one = anyprec.SearchResult.load(folders[0] / f"{objective}-0.json")
    assert len(set(one.evaluated.values())) > 1
    for rank in (0, 1):
        two = anyprec.SearchResult.load(folders[1] / f"{objective}-{rank}.json")
        assert two.config == one.config
        assert list(two.evaluated.items()) == list(one.evaluated.items())
        assert two.accuracies == one.accuracies
        assert 0 < two.layer_runs < one.layer_runs


def test_the_search_file_is_written_once(folders: tuple[Path, Path]) -> None:
    one, two = ((folder / "loss.jsonl").read_text() for folder in folders)
    assert one == two


def test_an_interrupt_of_one_process_stops_both_at_the_same_place(
    folders: tuple[Path, Path],
) -> None:
    stopped, resumed = (
        [anyprec.SearchResult.load(folders[1] / f"{name}-{rank}.json") for rank in (0, 1)]
        for name in ("stopped", "resumed")
    )
    assert [result.stopped for result in stopped] == ["interrupted"] * 2
    assert [result.evaluations for result in stopped] == [7, 7]
    assert stopped[0].evaluated == stopped[1].evaluated
    assert [result.stopped for result in resumed] == ["finished"] * 2
    assert resumed[0].evaluated == resumed[1].evaluated
    assert list(resumed[0].evaluated.items())[:7] == list(stopped[0].evaluated.items())
