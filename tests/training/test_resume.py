"""A run that was killed goes on as if it had not been: bit for bit on a CPU."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import anyprec
from anyprec.errors import CheckpointError, TrainingError
from anyprec.training.snapshot import read_snapshot, write_snapshot
from tests import processes
from tests.training import resumable


def same(left: Any, right: Any) -> bool:
    """Whether two trees are equal, tensors bit for bit."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            same(value, right[key]) for key, value in left.items()
        )
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return left == right


def without_times(snapshot: dict[str, Any]) -> dict[str, Any]:
    history = [
        {**record, "seconds": 0, "images_per_second": 0}
        for record in snapshot["position"]["history"]
    ]
    return {**snapshot, "position": {**snapshot["position"], "history": history}}


@pytest.mark.parametrize(
    "own_generator", [False, True], ids=["global randomness", "the loader's own generator"]
)
def test_a_killed_run_ends_as_if_it_had_not_been_killed(
    tmp_path: Path, own_generator: bool
) -> None:
    def run(name: str, kill_at: int | None = None) -> int:
        snapshot, result = tmp_path / f"{name}.run", tmp_path / f"{name}.pt"
        return processes.run(resumable.train, snapshot, result, kill_at, own_generator)

    assert run("whole") == 0
    # In the second epoch after a snapshot; then, resumed, in the next step; then in the last
    # epoch: 15 steps in all.
    for step in (8, 1, 6):
        assert run("killed", step) == -signal.SIGKILL
        assert not (tmp_path / "killed.pt").exists()
    assert run("killed") == 0
    whole, killed = (read_snapshot(tmp_path / f"{name}.run") for name in ("whole", "killed"))
    assert whole["oneshot"]["steps_done"] == 15
    assert same(without_times(whole), without_times(killed))
    results = [
        torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("whole", "killed")
    ]
    # A run that was resumed has not drawn what the script drew before `fit`.
    for state in results:
        state.pop("after")
    assert same(*results)


def small_run(net: anyprec.ConvertedModel, path: Path, **changes: Any) -> list[anyprec.EpochRecord]:
    loader = [(torch.randn(4, 3, 16, 16), torch.arange(4)) for _ in range(2)]
    return anyprec.fit(net, loader, snapshot=path, **{"epochs": 1, "random_paths": 1, **changes})


def test_a_finished_run_is_not_trained_again(net: anyprec.ConvertedModel, tmp_path: Path) -> None:
    first = small_run(net, tmp_path / "run")
    state = {name: value.clone() for name, value in net.state_dict().items()}
    assert small_run(net, tmp_path / "run", norm_batches=0) == first
    names = dict(net.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in names.items())


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"epochs": 2}, "epochs"), ({"lr": 0.5}, "recipe"), ({"seed": 3, "accumulation": 2}, "seed")],
)
def test_the_snapshot_of_another_run_is_refused(
    net: anyprec.ConvertedModel, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    small_run(net, tmp_path / "run")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(
        TrainingError, match=rf"is that of another run, which differs in .*{what}.*: delete it"
    ):
        small_run(net, tmp_path / "run", **changes)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_damaged_snapshots_are_refused(net: anyprec.ConvertedModel, tmp_path: Path) -> None:
    path = tmp_path / "run"
    small_run(net, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="is damaged, or no safetensors file"):
        small_run(net, path)
    path.write_bytes(content[:-3] + b"abc")
    with pytest.raises(
        CheckpointError, match="does not match its digest; delete it to train from the beginning"
    ):
        small_run(net, path)
    anyprec.save(net, path, rebuildable=False)
    with pytest.raises(CheckpointError, match=r"anyprec\.save wrote: read it with"):
        small_run(net, path)
    with pytest.raises(CheckpointError, match="there is no folder"):
        small_run(net, tmp_path / "missing" / "run")


def test_any_tree_of_plain_values_and_tensors_survives(tmp_path: Path) -> None:
    tree = {
        0: (1, 2.5, None, True, "text", float("inf"), -0.1),
        "nested": [
            {"a": torch.arange(3), "b": ()},
            torch.tensor(2.0, dtype=torch.float64),
            torch.zeros(0),
        ],
        "flags": torch.tensor([True, False]),
        "state": torch.get_rng_state(),
    }
    write_snapshot(tmp_path / "tree", tree)
    assert same(read_snapshot(tmp_path / "tree"), tree)
    with pytest.raises(TrainingError, match=r"holds a set at 'state.x.0', which cannot be written"):
        write_snapshot(tmp_path / "tree", {"x": [{1, 2}]})
    assert same(read_snapshot(tmp_path / "tree"), tree)


def test_a_forged_snapshot_is_refused(tmp_path: Path) -> None:
    from anyprec.runtime.storage import write_file  # noqa: PLC0415

    for text in (
        {"state": {"dict": 3}},
        {"state": {"tensor": "missing"}},
        {"nothing": 0},
        {"state": {"a": 1, "b": 2}},
    ):
        write_file(tmp_path / "forged", {}, json.dumps(text), key="anyprec.training")
        with pytest.raises(CheckpointError, match="is no state of a training run"):
            read_snapshot(tmp_path / "forged")
