"""What was saved computes the same in a process that never saw it, in every form."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
RANDOM = 6


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


def _save_all(name: str, network: nn.Module, folder: Path) -> list[Tensor]:
    """Save a network in every form; its outputs at all requests, which are stored too."""
    size, arguments = NETWORKS[name]
    for parameter in network.parameters():
        if not parameter.any():  # the norms of Swin-V2 start at zero, and then no block counts
            torch.nn.init.normal_(parameter)
    images = torch.randn(2, 3, size, size)
    model = anyprec.convert(network, bits=BITS, example_input=images[:1])
    anyprec.calibrate(model, [images])
    requests = _requests(model)
    for form, options in FORMS.items():
        anyprec.save(
            model,
            folder / f"{name}.{form}",
            configs={"last": requests[-1]},
            model_args={} if name == "plain" else arguments,
            **options,
        )
    save_file({"images": images}, folder / f"{name}.images")
    plain = [
        request.to_json() if isinstance(request, anyprec.BitConfig) else request
        for request in requests
    ]
    (folder / f"{name}.json").write_text(json.dumps(plain))
    outputs = []
    for request in requests:
        model.set_bits(request)
        with torch.no_grad():
            outputs.append(model(images))
    return outputs


def _differing(name: str, form: str, before: list[Tensor], after: dict[str, Tensor]) -> list[int]:
    """Numbers of the requests at which a loaded network computes something else, or nothing."""
    # A packed network has no floating point; one of a single configuration has that alone.
    first = {"training": 0, "single": len(before) - 1}.get(form, 1)
    differing = []
    for number in range(first, len(before)):
        output = after.get(f"{name} {form} {number}")
        if output is None or not torch.equal(before[number], output):
            differing.append(number)
    return differing


def test_loaded_networks_compute_the_same_bits_in_a_new_process(tmp_path, request):
    conftest = request.config.pluginmanager.get_plugin(str(HERE / "conftest.py"))
    before = {}
    for name, (_, arguments) in NETWORKS.items():
        if name == "plain":
            network = conftest.plain_network()
        else:
            network = timm.create_model(name, **arguments).eval()
        before[name] = _save_all(name, network, tmp_path)
    # One process for all cases: importing torch and timm takes longer than most of them.
    script = [HERE / "load_in_new_process.py", tmp_path, HERE / "conftest.py"]
    command = [sys.executable, *map(str, script), str(torch.get_num_threads())]
    subprocess.run(command, check=True, timeout=300)
    after = load_file(tmp_path / "outputs")
    cases, differing = 0, {}
    for name, outputs in before.items():
        for form in (*FORMS, "single"):
            cases += 1
            numbers = _differing(name, form, outputs, after)
            if numbers:
                differing[f"{name}, {form}"] = numbers
    assert cases == 36
    assert differing == {}
    for name, outputs in before.items():
        # With few layers two random configurations may be one.
        distinct = {tuple(output.flatten().tolist()) for output in outputs}
        assert len(distinct) > 0.6 * len(outputs), name
