"""The benchmarks of the search, end to end on noise: the numbers mean nothing."""

import json
import re

import pytest
import torch
from torch import nn

import anyprec
from benchmarks.search import cases as search_cases
from benchmarks.search import command as search
from benchmarks.search import page as search_page

pytest.importorskip("matplotlib")


def small_case(*_: object, **__: object) -> search_cases.Case:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    batches = [(torch.randn(8, 3, 8, 8), torch.arange(8)) for _ in range(2)]
    model = anyprec.convert(network, bits=(2, 3, 8), example_input=batches[0][0])
    anyprec.calibrate(model, batches)
    return search_cases.Case(model, batches, batches)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command line on a small network."""
    monkeypatch.setitem(search_cases.CASES, "small", small_case)
    monkeypatch.setattr(search, "untrained", small_case)
    results = tmp_path / "search.jsonl"

    def command(*arguments: str) -> list[dict]:
        assert search.main(["--results", str(results), *arguments]) == 0
        return list(map(json.loads, results.read_text().splitlines()))

    return command


def test_every_measurement_ends_up_on_the_page(run, tmp_path):
    run("work", "--networks", "small", "--budget", "W3A3")
    run("frontier", "--case", "small")
    comparison = ["compare", "--case", "small", "--seeds", "0", "1"]
    comparison += ["--budgets", "W3A3", "70% of W8A8"]
    records = run(*comparison)
    again = run(*comparison)
    assert again == records  # nothing is measured twice

    work = {record["algorithm"]: record for record in records if record["kind"] == "work"}
    greedy = work["greedy"]
    assert greedy["layers"] == 4
    assert greedy["layer_runs"] < greedy["asked"] * greedy["layers"] * greedy["batches"]
    assert 0 < work["lazy"]["passes_of_macs"] < greedy["passes_of_macs"] < greedy["asked"]

    compared = [record for record in records if record["kind"] == "compare"]
    assert len(compared) == 2 * 2 * len(search.ALGORITHMS)
    for record in compared:
        assert record["utilisation"] <= 1
        assert record["score"] <= record["uniform"]
        assert record["trace"][-1][1] == record["score"]
        assert record["trace"] == sorted(record["trace"], key=lambda step: -step[1])

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text("# Results\n\nbefore\n")
    for shown in (list(work.values()), records):  # the second page replaces the first
        search_page.write_page(shown, tmp_path / "docs")
    page = (tmp_path / "docs" / "results.md").read_text()
    assert page.startswith("# Results\n\nbefore\n")
    assert page.count("## The search") == 1
    (naive,) = re.findall(r"\| naive +\|.*", page)
    numbers = list(map(str.strip, naive.split("|")))[2:5]
    assert numbers == [str(greedy["asked"]), str(greedy["asked"] * 8), "1"]
    assert {path.name for path in (tmp_path / "docs" / "images").iterdir()} == {
        "search-algorithms.png",
        "search-frontiers.png",
    }


def test_a_network_whose_images_were_not_given_says_which_option_is_missing(run):
    with pytest.raises(SystemExit, match="lite0 needs --imagenet"):
        run("frontier", "--case", "lite0")
    with pytest.raises(SystemExit, match="need --cifar10"):
        run("compare", "--case", "cifar-mobile")
