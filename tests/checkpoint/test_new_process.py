"""The promise of the room: what was saved computes the same in a process that never saw it, in every form."""

from __future__ import annotations

import json
import random
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
NETWORKS = {
    "plain": (8, {}),
    "test_resnet": (64, {}),
    "mobilenetv2_035": (32, {"num_classes": 10}),
    "densenet121": (32, {"growth_rate": 4, "block_config": (2, 2), "num_classes": 10}),
    "test_convnext": (64, {}),
    "test_nfnet": (64, {}),
    "test_vit": (160, {}),
    "eva02_tiny_patch14_224": (28, {"img_size": 28, "depth": 2, "num_classes": 10}),
    "swinv2_tiny_window8_256": (
        32,
        {
            "img_size": 32,
            "window_size": 4,
            "embed_dim": 12,
            "depths": (1, 1),
            "num_heads": (2, 2),
            "num_classes": 10,
        },
    ),
}
FORMS = {
    "training": {},
    "fixed": {"packed": True, "coding": "fixed"},
    "zstd": {"packed": True, "coding": "zstd"},
}
BITS = (2, 3, 8)
RANDOM = 20


def _requests(model: anyprec.ConvertedModel) -> list[anyprec.BitConfig | int | None]:
    """Floating point, every uniform precision, and random ones."""
    draw = random.Random(0)
    return [
        None,
        *BITS,
        *(
            anyprec.BitConfig({
                path: (draw.choice(offered.weight), draw.choice(offered.activation))
                for path, offered in model.candidates.items()
            })
            for _ in range(RANDOM)
        ),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, request) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """What this process computes before saving, and a new one after loading."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("files")
    conftest = request.config.pluginmanager.get_plugin(str(HERE / "conftest.py"))
    here = {}
    for name, (size, arguments) in NETWORKS.items():
        network = (
            conftest.plain_network()
            if name == "plain"
            else timm.create_model(name, **arguments).eval()
        )
        for parameter in network.parameters():
            if not parameter.any():  # the norms of Swin-V2 start at zero, and then no block counts
                torch.nn.init.normal_(parameter)
        images = torch.randn(2, 3, size, size)
        model = anyprec.convert(network, bits=BITS, example_input=images[:1])
        anyprec.calibrate(model, [images])
        requests = _requests(model)
        for form, options in FORMS.items():
            known = {
                "configs": {"last": requests[-1]},
                "model_args": {} if name == "plain" else arguments,
            }
            anyprec.save(model, folder / f"{name}.{form}", **known, **options)
        save_file({"images": images}, folder / f"{name}.images")
        plain = [one.to_json() if isinstance(one, anyprec.BitConfig) else one for one in requests]
        (folder / f"{name}.json").write_text(json.dumps(plain))
        here[name] = []
        for precision in requests:
            model.set_bits(precision)
            with torch.no_grad():
                here[name].append(model(images))
    script = [
        HERE / "load_in_new_process.py",
        folder,
        HERE / "conftest.py",
        torch.get_num_threads(),
    ]
    subprocess.run([sys.executable, *map(str, script)], check=True, timeout=300)
    return here, load_file(folder / "outputs")


@pytest.mark.parametrize("form", [*FORMS, "single"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_loaded_network_computes_the_same_bits_in_a_new_process(outputs, name, form):
    here, there = outputs
    first = {"training": 0, "single": len(here[name]) - 1}.get(
        form, 1
    )  # a packed network has no floating point
    for number in range(first, len(here[name])):
        assert torch.equal(here[name][number], there[f"{name} {form} {number}"]), number


def test_the_precisions_compared_are_different_ones(outputs):
    here, _ = outputs
    for kinds in here.values():  # with few layers two random configurations may be one
        distinct = {tuple(one.flatten().tolist()) for one in kinds}
        assert len(distinct) > 0.6 * len(kinds)
