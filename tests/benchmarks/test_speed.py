"""The benchmarks of speed, end to end on small networks: the times mean nothing."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from anyprec.kernels import FusedKernel
from benchmarks.speed import accelerator, host_times, launch_counts, page, proxies, same_training
from benchmarks.speed.small_networks import make_pair
from benchmarks.speed.step_cost import naive_chain


@pytest.fixture
def run_command(monkeypatch):
    def run(module, *arguments):
        monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
        module.main()

    return run


def test_gaps_are_times_in_which_the_device_runs_nothing() -> None:
    events = [
        {"cat": "kernel", "name": "a", "ts": 0, "dur": 10},
        {"cat": "kernel", "name": "d", "ts": 100, "dur": 5},
        {"cat": "cpu_op", "name": "on the host", "ts": 20, "dur": 50},
        {"cat": "kernel", "name": "long", "ts": 12, "dur": 40},
        {"cat": "gpu_memcpy", "name": "inside", "ts": 20, "dur": 5},
    ]
    found = accelerator.on_device(events)
    gaps = accelerator.gaps_of(found)
    assert gaps.to_numpy().tolist() == [["long", "d", "48"], ["a", "long", "2"]]
    assert len(accelerator.gaps_of(found, count=1)) == 1


def test_kernels_are_those_that_take_longest_together() -> None:
    durations = {"often": (3, 4, 5), "once": (10,), "short": (1, 1)}
    events = [{"name": name, "dur": each} for name, all_ in durations.items() for each in all_]
    kernels = accelerator.kernels_of(events, count=2)
    assert kernels.to_numpy().tolist() == [["often", "3", "12"], ["once", "1", "10"]]


def test_the_command_for_accelerators_runs_without_one(run_command, capsys, tmp_path) -> None:
    results = tmp_path / "speed.jsonl"
    arguments = ("--device", "cpu", "--tiny", "--arithmetic", "float32", "TF32")
    run_command(accelerator, *arguments, "--results", results)
    printed = capsys.readouterr().out
    assert "whether they wait is only known on CUDA" in printed
    assert "no TF32, which needs CUDA" in printed
    assert printed.count("| naive chain |") == len(accelerator.TINY)
    assert not results.exists()


def test_times_of_the_host_are_those_of_one_thread() -> None:
    torch.manual_seed(0)
    times = host_times.measure(make_pair("test_resnet", bits=(4, 8)), rounds=3)
    assert times.layers == 16
    assert 0 < times.float_pass < times.path
    assert 0 < times.float_step < times.oneshot_step
    assert 0 < times.float_evaluation < times.evaluation
    assert 0 < times.set_bits < times.path
    excess = times.path - times.float_pass
    assert times.microseconds_per_layer == pytest.approx(1e6 * excess / 16)


def test_proxies_are_recorded_and_end_up_on_the_page(
    run_command, monkeypatch, capsys, tmp_path
) -> None:
    pair = make_pair("test_resnet", bits=(4, 8))
    counts = launch_counts.count_launches(pair)
    monkeypatch.setattr(proxies, "make_pair", lambda *_, **__: pair)
    monkeypatch.setattr(launch_counts, "count_launches", lambda _: counts)
    parts = ("set_bits", "forward", "loss", "backward", "OneShot.step")
    waits = dict.fromkeys((*parts, "fit", "evaluation", "calibrate", "update_norms"), 7)
    monkeypatch.setattr(proxies, "count_waits", lambda: waits)
    results, written = tmp_path / "speed.jsonl", tmp_path / "speed.md"
    run_command(proxies, "--rounds", 2, "--results", results)
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "launches a layer over float, eval" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["6", "1"]
    assert cells[3] == " / ".join([f"{counts.evaluation:.1f}"] * 3)
    waits_row = next(line for line in printed.splitlines() if "waits in set_bits" in line)
    assert waits_row.split()[-2] == "35"  # of all parts of a step
    page.write_page(written, page.records.read(results))
    assert row in written.read_text()
    page.write_page(written, page.records.read(results))
    assert written.read_text().count(row) == 1


def test_ratios_of_an_accelerator_are_rendered() -> None:
    ratio = {"network": "resnet18", "arithmetic": "TF32", "variant": "eager"}
    table = page.accelerator_table({"ratios": [{**ratio, "step": 1.5, "eval": 1.234}]})
    assert table.to_numpy().tolist() == [["resnet18", "TF32", "eager", "1.50", "1.23"]]
    table = page.accelerator_table({"ratios": [{**ratio, "step": 1.5, "step on device": 1.25}]})
    assert table.columns.tolist()[3:] == ["step", "step on device"]


def test_the_same_code_trains_the_same_weights(run_command, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(same_training, "STEPS", 2)
    monkeypatch.delitem(same_training.RECIPES, "all terms")
    file = tmp_path / "weights.safetensors"
    run_command(same_training, "--networks", "test_resnet", "--output", file)
    digests = capsys.readouterr().out
    assert len(set(digests.split())) > len(same_training.RECIPES)
    run_command(same_training, "--networks", "test_resnet", "--against", file)
    again, _, table = capsys.readouterr().out.partition("| network")
    assert again == digests
    assert "0.0e+00" in table
    assert "e-0" not in table
    noisy = ("--networks", "test_resnet", "--against", file, "--noise", "1e-4")
    run_command(same_training, *noisy)
    again, _, table = capsys.readouterr().out.partition("| network")
    assert again != digests
    assert "e-0" in table
    assert "test_resnet|plain|fc.weight" in load_file(file)


def test_differences_are_relative_to_the_largest_magnitude() -> None:
    reference = torch.tensor([1.0, -4.0, math.nan])
    assert same_training.relative_difference(reference, reference.clone()) == 0
    changed = torch.tensor([1.5, -4.0, math.nan])
    assert same_training.relative_difference(reference, changed) == 0.125
    assert same_training.relative_difference(reference, changed.nan_to_num()) == math.inf


@pytest.mark.parametrize("training", [False, True])
def test_the_naive_chain_takes_no_kernel(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair("test_resnet", bits=(4, 8))
    pair.model.set_bits(4)
    pair.model.train(training)
    with torch.set_grad_enabled(training):
        expected = pair.model(pair.images)
        for name in ("quantize", "quantize_pair"):
            monkeypatch.setattr(FusedKernel, name, None)
        with naive_chain():
            found = pair.model(pair.images)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
