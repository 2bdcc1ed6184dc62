"""The examples, as a user runs them, with the smallest settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import processes

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICKSTART = EXAMPLES / "quickstart.py"


def test_the_quickstart_tells_its_whole_story(tmp_path: Path) -> None:
    settings = {
        "--model": "test_resnet",
        "--bits": "4 8",
        "--budgets": "W4A8",
        "--train-images": "64",
        "--search-images": "32",
        "--held-out-images": "64",
        "--float-epochs": "1",
        "--epochs": "1",
        "--max-evaluations": "12",
        "--output": str(tmp_path),
    }
    arguments = ["--control"]
    for name, value in settings.items():
        arguments += [name, *value.split(" ")]
    printed = processes.run_script(QUICKSTART, *arguments, output=tmp_path / "printed.txt")
    for line in (
        "converted: 16 of 16 layers",
        "search W4A8:",
        "a new process gives bit-identical logits from it",
    ):
        assert line in printed
    assert (tmp_path / "test_resnet.safetensors").stat().st_size > 1_000_000
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "results.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "float", "float, trained as long", "W4A4", "W8A8", "searched W4A8",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2])
def test_the_loop_with_accelerate_trains_in_one_process_or_several(
    count: int, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="needs the extra 'accelerate'")
    script = EXAMPLES / "accelerate_loop.py"
    settings = ["--epochs", "2", "--images", "200"]
    if count == 1:
        printed = processes.run_script(script, *settings, output=tmp_path / "printed.txt")
    else:
        launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num-machines", "1"]
        printed = processes.launch(*launcher, "--num-processes", str(count), script, *settings)
    lines = [line for line in printed.splitlines() if line.startswith("W")]
    assert [line.split(":")[0] for line in lines] == ["W8A8", "W4A4", "W3A3", "W2A2"]
    assert all(0 < float(line.split()[1].rstrip("%")) <= 100 for line in lines)
