"""A file of format 1, as the first version wrote it: every later version must read it and compute the same.

The file and its expected outputs lie beside this test. They are never made anew for format 1; a changed format gets a
second pair (call `make_golden` with another name).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

import anyprec
from anyprec.storage import read_file

HERE = Path(__file__).parent
GOLDEN = "golden-v1"
REQUESTS = [None, 2, 4, "W2A4", "mixed"]


def golden_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, bias=False),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Conv2d(2, 3, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).eval()


def golden_images() -> Tensor:
    return torch.sin(torch.arange(128, dtype=torch.float32)).reshape(2, 1, 8, 8)


def golden_outputs(model: anyprec.ConvertedModel) -> dict[str, list[list[float]]]:
    outputs = {}
    for request in REQUESTS:
        model.set_bits(request)
        with torch.no_grad():
            outputs[str(request)] = model(golden_images()).tolist()
    model.set_bits(None)
    return outputs


def make_golden(name: str, folder: Path = HERE) -> None:
    """Write the file and its expected outputs; how `golden-v1` was made."""
    torch.manual_seed(0)
    images = golden_images()
    model = anyprec.convert(golden_network(), bits=(2, 4), first_last_bits=None, example_input=images)
    anyprec.calibrate(model, [images])
    mixed = anyprec.BitConfig({"0": (4, 2), "3": (2, 4)})
    anyprec.save(model, folder / f"{name}.safetensors", configs={"mixed": mixed})
    (folder / f"{name}.json").write_text(json.dumps(golden_outputs(model), indent=1) + "\n")


def test_the_first_format_still_loads_and_computes_the_same():
    expected = json.loads((HERE / f"{GOLDEN}.json").read_text())
    found = golden_outputs(anyprec.load(HERE / f"{GOLDEN}.safetensors", golden_network()))
    assert found.keys() == expected.keys()
    for request, values in expected.items():
        # Another machine may sum a convolution in another order, an error of some 1e-7 of values near 1. No input of
        # a quantizer lies so close to a rounding border that this could move it to another code.
        torch.testing.assert_close(torch.tensor(found[request]), torch.tensor(values), rtol=1e-5, atol=1e-6)


def test_no_input_of_the_golden_network_lies_on_a_rounding_border():
    model = anyprec.load(HERE / f"{GOLDEN}.safetensors", golden_network())
    ratios = []

    def watch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        step = layer.input_quantizer.step[layer.input_quantizer.candidates.index(layer.bits.activation)]
        ratios.append((args[0] / step).flatten())

    for layer in model.quantized_layers.values():
        layer.register_forward_pre_hook(watch)
    for request in REQUESTS[1:]:
        model.set_bits(request)
        model(golden_images())
    distance = (torch.cat(ratios) % 1 - 0.5).abs()
    assert distance.min() > 1e-5


def test_the_first_format_is_still_what_is_written(tmp_path):
    anyprec.save(anyprec.load(HERE / f"{GOLDEN}.safetensors", golden_network()), tmp_path / "again")
    (old, old_text, _), (new, new_text, _) = read_file(HERE / f"{GOLDEN}.safetensors"), read_file(tmp_path / "again")
    assert {**json.loads(new_text), "version": None} == {**json.loads(old_text), "version": None}
    assert list(json.loads(new_text)) == list(json.loads(old_text))
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())


def test_the_script_that_made_the_golden_file_still_runs(tmp_path):
    make_golden("net", tmp_path)
    old, new = (read_file(folder / f"{name}.safetensors") for folder, name in ((HERE, GOLDEN), (tmp_path, "net")))
    assert new[0].keys() == old[0].keys()
    assert json.loads(new[1]).keys() == json.loads(old[1]).keys()
