"""The promise of the room: what was saved computes the same in a process that never saw it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import anyprec

HERE = Path(__file__).parent
NETWORKS = {"test_resnet": 64, "test_efficientnet": 64, "test_vit": 160, "plain": 8}
REQUESTS = [None, 4, [2, 8], "mixed"]


def _mixed(model: anyprec.ConvertedModel) -> anyprec.BitConfig:
    """Every layer another precision than its neighbour."""
    choices = {
        path: (offered.lowest, offered.highest, (offered.weight[0], offered.activation[-1]))
        for path, offered in model.candidates.items()
    }
    return anyprec.BitConfig({path: three[number % 3] for number, (path, three) in enumerate(choices.items())})


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, request) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What this process computes before saving, and a new one after loading."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("files")
    conftest = request.config.pluginmanager.get_plugin(str(HERE / "conftest.py"))
    here = {}
    for name, size in NETWORKS.items():
        network = conftest.plain_network() if name == "plain" else timm.create_model(name).eval()
        images = torch.randn(2, 3, size, size)
        model = anyprec.convert(network, bits=(2, 4, 8), example_input=images[:1])
        anyprec.calibrate(model, [images])
        anyprec.save(model, folder / f"{name}.net", configs={"mixed": _mixed(model)})
        save_file({"images": images}, folder / f"{name}.images")
        for precision in REQUESTS:
            model.set_bits(tuple(precision) if isinstance(precision, list) else precision)
            with torch.no_grad():
                here[f"{name} {precision}"] = model(images)
    (folder / "requests.json").write_text(json.dumps(REQUESTS))
    script = [HERE / "load_in_new_process.py", folder, HERE / "conftest.py", torch.get_num_threads()]
    subprocess.run([sys.executable, *map(str, script)], check=True, timeout=300)
    return here, load_file(folder / "outputs")


@pytest.mark.parametrize("precision", REQUESTS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_loaded_network_computes_the_same_bits_in_a_new_process(outputs, name, precision):
    here, there = outputs
    key = f"{name} {precision}"
    assert torch.equal(here[key], there[key])


def test_the_precisions_compared_are_different_ones(outputs):
    here, _ = outputs
    for name in NETWORKS:
        kinds = [here[f"{name} {precision}"] for precision in REQUESTS]
        assert not any(torch.equal(a, b) for number, a in enumerate(kinds) for b in kinds[:number])
