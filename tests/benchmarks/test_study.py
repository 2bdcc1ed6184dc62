"""The study's harness, end to end on noise: the numbers mean nothing, the bookkeeping matters."""

import argparse
import dataclasses
import inspect
import itertools
import re
import subprocess
import sys
import time
from operator import attrgetter, itemgetter
from pathlib import Path

import pandas as pd
import pytest
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet

import anyprec
from anyprec.bits import LayerCandidates
from benchmarks.common import records
from benchmarks.study import any_precision, networks, workers
from benchmarks.study import command as study
from benchmarks.study import figures as study_figures
from benchmarks.study import grid as study_grid
from benchmarks.study import methods as study_methods
from benchmarks.study import page as study_page
from benchmarks.study import plots as study_plots
from benchmarks.study import runs as study_runs
from benchmarks.study import tables as study_tables

pytest.importorskip("matplotlib")

TRACK = study_grid.Track(
    name="S",
    title="from noise",
    networks=("small",),
    seeds=(0, 1),
    fewer={"interference": (0,), "ablation": (0,), "weight": (), "variant": ()},
    bits=(2, 3, 4),
    size=32,
    images=16,
    search_images=8,
    report_images=16,
    mixed_images=8,
    batch_size=8,
    start_epochs=1,
    start_lr=0.05,
    epochs=1,
    lr=0.05,
    weight_decay=1e-4,
    norm_batches=1,
    mixed=2,
    search_evaluations=12,
)


def small_network(num_classes: int) -> torch.nn.Module:
    """Five layers, a depthwise convolution among them."""
    blocks = decode_arch_def([["ds_r1_k3_s2_c8"]])
    return EfficientNet(blocks, num_classes=num_classes, num_features=16, stem_size=8)


def noise(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % 10


@pytest.fixture
def options(tmp_path, monkeypatch):
    """The command line's options for a grid of one track on noise, in this process."""
    monkeypatch.setitem(networks.NETWORKS, "small", small_network)
    monkeypatch.setattr(study, "TRACKS", {"S": TRACK})
    data = study_runs.Data(noise(16), noise(8), noise(17))
    monkeypatch.setattr(study_runs, "cifar10", lambda *_: data)
    return argparse.Namespace(
        track=["S"],
        only=None,
        group=None,
        seeds=1,
        workers=0,
        threads=1,
        device="cpu",
        tiny=False,
        data=tmp_path,
        results=tmp_path / "study.jsonl",
        minutes=float("inf"),
        dry_run=False,
        page=tmp_path / "results.md",
        pictures=tmp_path / "images",
    )


def runs_of(track, seeds=None):
    """The runs of a track by name."""
    return {run.name: run for run in study_grid.grid([track], seeds=seeds)}


def names_left(track, results):
    """The runs of a track's first seed that have no result."""
    left = study.unfinished(study_grid.grid([track], seeds=1), results)
    return set(map(attrgetter("name"), left))


def test_a_grid_runs_resumes_and_renders_what_is_there(options, capsys):
    options.only = ["*/float/0", "*/dedicated-2/0"]
    assert study.run(options) == 0
    options.page.write_text("# Results\n\nbefore\n")
    study.render(options)
    partial = options.page.read_text()
    assert "2 of " in partial
    assert "not run yet" in partial
    assert not (options.pictures / "study-bitops.png").exists()

    options.only = [
        "*/float/*",
        "*/dedicated-[24]/*",
        "*/full/*",
        "*/ours/*",
        "*/any-precision/*",
        "*/random*/*",
    ]
    first = options.results.read_text()
    assert study.run(options) == 0
    measured = records.read(options.results)
    names = list(map(itemgetter("run"), measured))
    assert options.results.read_text().startswith(first)  # what was done is not done again
    assert len(names) == len(set(names)) == 8
    assert study.run(options) == 0
    assert capsys.readouterr().out.rstrip().endswith("0 runs to do")
    assert not list(options.results.parent.glob("*.snapshot"))

    by_method = {record["method"]: record for record in measured}
    full = by_method["full"]
    assert full["steps"] == 2
    assert full["passes"] == 8
    assert len(full["trace"]) == 1
    assert len(full["mixed"]) == 2
    assert set(full["searched"]) == {"W4A4", "W3A3", "W2.5A2.5"}
    mixed = by_method["any-precision"]["mixed"]
    assert list(map(itemgetter("bitops"), full["mixed"])) == list(map(itemgetter("bitops"), mixed))

    study.render(options)  # replaces the first page
    page = options.page.read_text()
    assert page.startswith("# Results\n\nbefore\n")
    assert (
        page.count("<!-- study: written by benchmarks.study render -->")
        == page.count("<!-- end of the study -->")
        == 1
    )
    assert f"8 of {len(study_grid.grid([TRACK]))} runs" in page.replace("\n", " ")
    for name in ("bitops", "interference", "instability"):
        assert (options.pictures / f"study-{name}.png").stat().st_size > 1000


def test_a_run_is_the_same_when_it_is_done_again(options, monkeypatch):
    # A network that is searched would be loaded, not trained again.
    monkeypatch.setattr(study, "TRACKS", {"S": dataclasses.replace(TRACK, searches=())})
    options.only = ["*/full/0"]
    study.run(options)
    options.results = options.results.with_name("again.jsonl")
    study.run(options)
    (again,), (first,) = map(records.read, sorted(options.results.parent.glob("*.jsonl")))
    for key in ("configs", "mixed", "losses", "trace"):
        assert first[key] == again[key]


def test_a_killed_run_goes_on_as_if_it_had_not_been(options, monkeypatch):
    longer = dataclasses.replace(TRACK, epochs=2, searches=())
    run = runs_of(longer)["S/small/full/0"]
    workspace = study_runs.Workspace(options.data, options.data / "unbroken")
    unbroken = study_runs.perform(run, workspace)

    epochs = []

    def dies_after_the_second_epoch(model):
        epochs.append(len(epochs))
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return study_runs_instability(model)

    study_runs_instability = study_runs.instability
    monkeypatch.setattr(study_runs, "instability", dies_after_the_second_epoch)
    workspace = study_runs.Workspace(options.data, options.data / "broken")
    with pytest.raises(KeyboardInterrupt):
        study_runs.perform(run, workspace)
    assert len(list(workspace.cache.glob("*.snapshot"))) == 1
    resumed = study_runs.perform(run, workspace)
    assert len(epochs) == 3  # the first epoch was not trained again
    assert (unbroken["resumed"], resumed["resumed"]) == (False, True)
    for key in ("configs", "mixed", "losses", "trace"):
        assert resumed[key] == unbroken[key]
    (start,) = workspace.cache.iterdir()
    assert start.suffix == ".pt"


def test_a_network_that_is_searched_is_trained_once_and_evaluated_as_often_as_wanted(
    options, monkeypatch
):
    run = runs_of(TRACK)["S/small/ours/0"]
    workspace = study_runs.Workspace(options.data, options.data / "cache")
    first = study_runs.perform(run, workspace)
    monkeypatch.delattr(study_runs, "train")
    again = study_runs.perform(run, workspace)
    for key in ("configs", "mixed", "losses", "trace", "training", "trained_at"):
        assert first[key] == again[key]
    assert set(first["searched"]) == set(again["searched"])
    for budget, entry in first["searched"].items():
        assert entry["config"] == again["searched"][budget]["config"]
    shorter = dataclasses.replace(TRACK, search_evaluations=6, report_images=8)
    searched = study_runs.perform(dataclasses.replace(run, track=shorter), workspace)["searched"]
    for entry in searched.values():
        assert entry["evaluations"] <= 6
    longer = dataclasses.replace(run, track=dataclasses.replace(TRACK, epochs=2))
    with pytest.raises(NameError, match="train"):
        study_runs.perform(longer, workspace)
    monkeypatch.setattr(study_runs, "REVISION", study_grid.REVISION + 1)
    with pytest.raises(NameError, match="train"):
        study_runs.perform(run, workspace)


def test_results_of_other_settings_are_not_this_study(options):
    options.only = ["*/float/0"]
    study.run(options)
    longer = dataclasses.replace(TRACK, epochs=3)
    runs = study_grid.grid([longer], seeds=1)
    assert len(study.unfinished(runs, options.results)) == len(runs)
    assert study_figures.Study(records.read(options.results), [longer]).records == []
    assert len(study_figures.Study(records.read(options.results), [TRACK]).records) == 1


def test_results_of_another_revision_are_not_this_study_but_for_the_float_networks(
    options, monkeypatch
):
    options.only = ["*/float/0", "*/dedicated-2/0"]
    study.run(options)
    monkeypatch.setattr(study_grid, "REVISION", study_grid.REVISION + 1)
    left = names_left(TRACK, options.results)
    assert "S/small/dedicated-2/0" in left
    assert "S/small/float/0" not in left


def test_runs_of_one_seed_that_start_from_different_networks_are_not_mixed(options):
    options.only = ["*/float/0"]
    study.run(options)
    measured = records.read(options.results)[0]
    options.only = ["*/dedicated-2/0"]
    options.results.write_text("")
    records.append(options.results, {**measured, "start": measured["start"] + 1})
    with pytest.raises(ValueError, match="the start network of S/small/0 has"):
        study.run(options)
    assert len(records.read(options.results)) == 1
    options.results.write_text("")
    # On another device the same network can judge an image or two of thousands differently.
    records.append(options.results, {**measured, "start": measured["start"] + 0.04})
    study.run(options)
    assert len(records.read(options.results)) == 2


def test_runs_that_train_one_start_network_side_by_side_take_that_of_the_first(
    options, monkeypatch
):
    run = study_grid.Run(TRACK, "small", study_methods.methods(TRACK.bits)["float"], 0)
    workspace = study_runs.Workspace(options.data, options.data / "cache")
    name = next(iter(small_network(10).state_dict()))
    trained = study_runs.train_float

    def train_beside_another(network, *arguments, **settings):
        trained(network, *arguments, **settings)
        if not list(workspace.cache.glob("*.pt")):
            monkeypatch.setattr(study_runs, "train_float", trained)
            beside = study_runs.start_network(run, workspace, workspace.images(TRACK))
            first.update(beside.state_dict())
        with torch.no_grad():
            network.get_parameter(name).add_(1.0)

    first = {}
    monkeypatch.setattr(study_runs, "train_float", train_beside_another)
    second = study_runs.start_network(run, workspace, workspace.images(TRACK))
    assert torch.equal(second.get_parameter(name), first[name])
    assert len(list(workspace.cache.iterdir())) == 1


def test_a_method_may_train_at_another_learning_rate(options):
    runs = runs_of(TRACK, seeds=1)
    for name, rate in (("ours", 0.05), ("ours-half-rate", 0.025), ("ours-double-rate", 0.1)):
        assert study_runs._recipe(runs[f"S/small/{name}/0"]).lr == rate
    options.only = ["*/dedicated-2/0", "*/dedicated-2-*-rate/0"]
    study.run(options)
    options.page.write_text("")
    study.render(options)
    (row,) = re.findall(r"\| S/small +\| 2 +\| dedicated.*", options.page.read_text())
    assert "not run yet" not in row


def test_ours_are_the_defaults_of_anyprec():
    ours = study_methods.methods((2, 4, 8))["ours"]
    assert anyprec.Recipe().changed(**ours.recipe) == anyprec.Recipe()
    defaults = inspect.signature(anyprec.convert).parameters
    for name, value in ours.convert.items():
        assert value == defaults[name].default


def record(name, seed=0, *, track=TRACK, processor="this", cpu_seconds=60.0, **top1):
    """Of a run, with the same top-1 for both kinds of statistics, or (stored, re-estimated)."""
    run = runs_of(track)[f"S/small/{name}/{seed}"]
    configs = {}
    for width, value in top1.items():
        pair = value if isinstance(value, tuple) else (value, value)
        configs[width[1:]] = dict(zip(("stored", "own"), pair, strict=True))
    return {
        "run": run.name,
        "track": "S",
        "network": "small",
        "method": name,
        "seed": seed,
        "settings": run.settings,
        "machine": {**records.machine(), "processor": processor},
        "commit": "abc",
        "frozen": [],
        "training": {"cpu_seconds": cpu_seconds},
        "configs": configs,
        "mixed": [],
    }


def study_of(*measured, track=TRACK):
    """The study of made-up records, and its only workload."""
    result = study_figures.Study(measured, [track])
    return result, result.workloads[0]


def test_the_worst_bit_width_of_stored_statistics_is_that_of_the_mean_over_seeds():
    first = record("ours", 0, w2=(50.0, 51.5), w3=(58.0, 58.6), w4=(60.0, 60.0))
    second = record("ours", 1, w2=(51.0, 49.5), w3=(58.0, 58.4), w4=(60.0, 60.1))
    worst, added = study_figures.worst_reestimation(*study_of(first, second), "ours")
    assert worst == 3
    assert added.to_dict() == pytest.approx({0: 0.6, 1: 0.4})


def test_minutes_are_of_the_machine_that_trained_ours_and_methods_are_compared_by_seed():
    slow = {"processor": "elsewhere", "cpu_seconds": 6e6}
    measured = study_of(
        record("ours", 0, w2=50.0, w3=58.0, w4=60.0),
        record("ours", 1, w2=52.0, w3=60.0, w4=62.0),
        record("plain", 1, w2=49.0, w3=60.0, w4=62.0, **slow),
    )
    table = study_tables.method_table(*measured, ["plain", "ours"], against="plain")
    assert table[["over plain", "minutes"]].to_numpy().tolist() == [["", ""], ["1.0", "1.0 ± 0.0"]]


def test_dedicated_networks_count_together_only_if_all_are_there():
    dedicated = []
    for width, seed in itertools.product((2, 3, 4), (0, 1)):
        top1 = {f"w{width}": 50.0 + width + seed}
        dedicated.append(record(f"dedicated-{width}", seed, **top1))
    measured = study_of(record("ours", 0, w2=53.0, w3=54.0, w4=55.0), *dedicated[:-1])
    table = study_tables.method_table(*measured, ["ours"], against="ours", references=True)
    shown = table.loc["dedicated", ["passes", "2", "4", "mean 2 to 4", "over ours", "minutes"]]
    assert shown.to_list() == ["3 x 1", "52.5 ± 0.7", "54.0", "53.0", "-1.0", "3.0"]


def test_variants_stand_beside_ours_of_the_same_seeds():
    track = dataclasses.replace(TRACK, fewer={**TRACK.fewer, "variant": (0,)})
    measured = study_of(
        record("ours", 0, w2=50.0, w3=58.0, w4=60.0),
        record("ours", 1, w2=52.0, w3=60.0, w4=62.0),
        record("ours-per-tensor", 0, track=track, w2=49.0, w3=57.0, w4=59.0),
        track=track,
    )
    title = study_methods.methods(TRACK.bits)["ours"].title
    assert [title, "4", "51.0 ± 1.4", "59.0 ± 1.4", "61.0 ± 1.4"] in cells(
        study_page._methods_section(*measured), "| ours"
    )
    assert [title, "4", "50.0", "58.0", "60.0"] in cells(
        study_page._variants_section(*measured), "| ours"
    )


def cells(lines, start):
    """The first five cells of the rows of tables that begin with a text."""
    rows = re.findall(rf"^{re.escape(start)}.*", "\n".join(lines), flags=re.MULTILINE)
    return [list(map(str.strip, row.split("|")))[1:6] for row in rows]


def test_learning_rates_are_compared_on_the_seeds_that_they_have():
    track = dataclasses.replace(TRACK, fewer={**TRACK.fewer, "rate": (0,)})
    measured, _ = study_of(
        record("ours", 0, w2=50.0, w4=60.0),
        record("ours", 1, w2=52.0, w4=62.0),
        record("ours-half-rate", 0, w2=49.0, w4=59.0),
        track=track,
    )
    shown = study_tables.rate_table(measured)[["0.5 times", "1 times", "2 times"]]
    assert ["49.0", "50.0", "not run yet"] in shown.to_numpy().tolist()
    names = map(itemgetter("run"), study_tables.records_of_rates(measured))
    assert sorted(names) == ["S/small/ours-half-rate/0", "S/small/ours/0"]


def test_interference_is_drawn_on_the_seeds_that_it_has():
    measured = study_of(
        record("dedicated-4", 0, w4=60.0),
        record("dedicated-4", 1, w4=64.0),
        record("ours", 0, w4=61.0),
        record("ours", 1, w4=66.0),
        record("random-3-up", 0, w3=57.0, w4=58.0),
    )
    trained, ours = study_plots.interference(*measured)
    assert trained["4"].dropna().to_dict() == {"4": 60.0, "3": 58.0}
    assert trained["3"].dropna().to_dict() == {"3": 57.0}
    assert list(trained.index) == ["4", "3", "2"]  # ours are drawn at the last
    assert list(trained.columns) == ["4", "3"]
    assert ours.dropna().to_dict() == {"4": 61.0}


def test_points_over_dedicated_networks_are_bold_where_they_are_too_few():
    measured, _ = study_of(
        record("ours", w2=49.1, w4=59.9),
        record("dedicated-2", w2=50.0),
        record("dedicated-4", w4=60.0),
    )
    table = study_tables.dedicated_table(measured)
    assert list(table.columns[2:]) == [
        "4 bits (at least 0)",
        "3 bits (at least -0.3)",
        "2 bits (at least -1)",
    ]
    assert table.to_numpy().tolist() == [
        ["S/small", "ours", "**-0.10**", "", "-0.90"],
        ["S/small", "full method", "not run yet", "", ""],
    ]


def test_what_is_not_searched_does_not_depend_on_how_others_are(options):
    options.only = ["*/float/0", "*/dedicated-2/0"]
    study.run(options)
    changed = dataclasses.replace(TRACK, search_evaluations=13, search_norms="stored", mixed=3)
    assert not names_left(changed, options.results) & {"S/small/float/0", "S/small/dedicated-2/0"}
    run = runs_of(TRACK)["S/small/ours/0"]
    assert run.settings != dataclasses.replace(run, track=changed).settings


def test_a_track_says_whose_budgets_are_searched(options):
    fewer = dataclasses.replace(TRACK, searches=("ours",))
    both, ours = runs_of(TRACK), runs_of(fewer)
    assert ours["S/small/ours/0"].settings == both["S/small/ours/0"].settings
    plain = ours["S/small/plain/0"]
    assert plain.settings != both["S/small/plain/0"].settings
    workspace = study_runs.Workspace(options.data, options.data)
    assert study_runs.perform(plain, workspace)["searched"] == {}
    asked = study_tables.search_table(study_figures.Study([], [fewer]))
    assert list(asked["method"]) == [ours["S/small/ours/0"].method.title]


def test_the_tracks_norms_judge_in_the_search(options, monkeypatch):
    asked = []

    def refuses(*_, norms, **__):
        asked.append(norms)
        msg = "nothing fits"
        raise study_runs.anyprec.BudgetError(msg)

    monkeypatch.setattr(study_runs.anyprec, "search", refuses)
    options.only = ["*/ours/0"]
    study.run(options)
    assert asked == ["batch"] * 3


def test_no_run_begins_when_time_is_over(options):
    options.minutes = 0
    assert study.run(options) == 0
    assert records.read(options.results) == []


def test_the_most_valuable_runs_come_first():
    track = study_grid.TRACKS["S"]
    groups = [(run.method.group, run.seed) for run in study_grid.grid([track])]
    assert groups == sorted(groups, key=groups.index)
    assert groups[0] == ("core", track.seeds[0])
    ablation = groups.index(("ablation", track.seeds_of("ablation")[0]))
    variant = groups.index(("variant", track.seeds_of("variant")[0]))
    assert groups.index(("core", track.seeds[-1])) < ablation < variant
    rate_seeds = {seed for group, seed in groups if group == "rate"}
    assert rate_seeds == set(track.seeds_of("rate")) < set(track.seeds)
    runs = study_grid.grid(list(study_grid.TRACKS.values()))
    assert len(set(map(attrgetter("name"), runs))) == len(runs)


def test_a_line_that_was_cut_off_is_no_record_and_spoils_no_other(tmp_path):
    file = tmp_path / "records.jsonl"
    records.append(file, {"run": "a"})
    with file.open("a") as stream:
        stream.write('{"run": "b", "conf')
    records.append(file, {"run": "c"})
    assert records.read(file) == [{"run": "a"}, {"run": "c"}]


def test_verdicts_are_computed():
    first, second = pd.Series({0: 3.0, 1: 5.0}), pd.Series({1: 4.0, 2: 9.0})
    assert study_figures.verdict(pd.Series([1.0, 2.0]), 0.5) == "met by 1.00"
    assert study_figures.verdict(pd.Series([-1.0]), -0.3) == "**missed by 0.70**"
    assert study_figures.verdict(pd.Series([0.1 + 0.2 - 0.0001]), 0.3) == "met by 0.00"
    assert study_figures.verdict(pd.Series(dtype=float), 0.0) == "not run yet"
    assert study_figures.cell(first - second) == "1.0"  # of the seed that both have


def test_distillation_is_recursive():
    criterion = any_precision.RecursiveDistillation(2)
    logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([1])
    first = float(torch.nn.functional.cross_entropy(logits, labels))
    assert float(criterion(logits, labels)) == pytest.approx(first)
    # The same prediction as the higher bit-width's.
    assert float(criterion(logits, labels)) == pytest.approx(0.0)
    assert float(criterion(logits, labels)) > 1  # the labels again, in the next step


def test_any_precision_takes_each_uniform_bit_width_once_the_highest_first():
    candidates = {
        "conv": LayerCandidates((2, 4, 8), (2, 4, 8)),
        "depthwise": LayerCandidates((4, 8), (4, 8)),
    }
    sampler = any_precision.DescendingWidths((2, 4, 8))
    drawn = sampler.draw(candidates, 2, generator=torch.Generator(), instability={})
    # After the max path, which is W8A8.
    assert list(map(str, map(itemgetter("conv"), drawn))) == ["W4A4", "W2A2"]
    assert list(map(str, map(itemgetter("depthwise"), drawn))) == ["W4A4", "W4A4"]


def test_the_commands_say_what_they_would_do(tmp_path, capsys):
    command = ["run", "--data", str(tmp_path), "--dry-run", "--only", "S/mobile/full/0"]
    command += ["--results", str(tmp_path / "none")]
    assert study.main(command) == 0
    assert capsys.readouterr().out.splitlines() == ["1 runs to do", "S/mobile/full/0"]
    with pytest.raises(SystemExit, match="no run matches"):
        study.main([*command, "--group", "variant"])
    with pytest.raises(SystemExit):
        study.main([*command[:3], "--tiny"])
    assert "--tiny needs --results" in capsys.readouterr().err


_POOL = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
sys.path.insert(0, sys.argv[1])
from benchmarks.study.workers import begin_worker
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, mp_context=context, initializer=begin_worker, initargs=(1,))
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600).result()
"""


def lives(process):
    """Whether a process, a folder of /proc, has not ended: a zombie has."""
    return process.exists() and "Z" not in (process / "stat").read_text()


@pytest.mark.skipif(not Path("/proc").exists(), reason="asks /proc whether a process lives")
def test_workers_end_with_the_process_that_began_them(tmp_path):
    assert study.begin_worker is workers.begin_worker  # what the pool below begins with
    script = tmp_path / "pool.py"
    script.write_text(_POOL)
    root = Path(study.__file__).parents[2]
    begun = subprocess.Popen([sys.executable, script, root], stdout=subprocess.PIPE, text=True)
    worker = Path("/proc") / begun.stdout.readline().strip()
    assert worker.exists()
    begun.kill()
    begun.wait()
    begun.stdout.close()
    end = time.monotonic() + 30
    while lives(worker) and time.monotonic() < end:
        time.sleep(0.1)
    assert not lives(worker)
