"""Files as the version that introduced their format wrote them: all later ones compute the same.

Files and expected outputs lie beside this test. They are never made anew; a changed format gets new
ones (call `make_golden` with other names). They are of format 2: training form, packed `fixed`,
packed `zstd`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec.runtime.storage import read_file

HERE = Path(__file__).parent
FORMS = {
    "golden-v2": {},
    "golden-v2-fixed": {"packed": True, "coding": "fixed"},
    "golden-v2-zstd": {"packed": True, "coding": "zstd"},
}
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
    for request in REQUESTS[1:] if model.is_packed else REQUESTS:
        model.set_bits(request)
        with torch.no_grad():
            outputs[str(request)] = model(golden_images()).tolist()
    return outputs


def make_golden(folder: Path = HERE) -> None:
    """Write the files of the present format and their expected outputs."""
    torch.manual_seed(0)
    images = golden_images()
    model = anyprec.convert(
        golden_network(), bits=(2, 4), first_last_bits=None, norm="shared", example_input=images
    )
    anyprec.calibrate(model, [images])
    mixed = anyprec.BitConfig({"0": (4, 2), "3": (2, 4)})
    anyprec.update_norms(model, [images], mixed)
    for name, form in FORMS.items():
        anyprec.save(model, folder / f"{name}.safetensors", configs={"mixed": mixed}, **form)
        (folder / f"{name}.json").write_text(json.dumps(golden_outputs(model), indent=1) + "\n")


def load_golden(name: str) -> anyprec.ConvertedModel:
    return anyprec.load(HERE / f"{name}.safetensors", golden_network())


@pytest.mark.parametrize("name", FORMS)
def test_golden_files_still_load_and_compute_the_same(name):
    expected = json.loads((HERE / f"{name}.json").read_text())
    found = golden_outputs(load_golden(name))
    assert found.keys() <= expected.keys()
    assert len(found) >= len(REQUESTS) - 1
    for request, values in found.items():
        # Another machine may sum a convolution in another order, an error of some 1e-7 of values
        # near 1. No input of a quantizer lies so close to a rounding border that this could move it
        # to another code.
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(expected[request]), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("name", FORMS)
def test_no_input_of_the_golden_network_lies_on_a_rounding_border(name):
    model = load_golden(name)
    ratios = []

    def watch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        step = layer.input_quantizer.step[
            layer.input_quantizer.candidates.index(layer.bits.activation)
        ]
        ratios.append((args[0] / step).flatten())

    for layer in model.quantized_layers.values():
        layer.register_forward_pre_hook(watch)
    for request in REQUESTS[1:]:
        model.set_bits(request)
        model(golden_images())
    distance = (torch.cat(ratios) % 1 - 0.5).abs()
    assert distance.min() > 1e-5


@pytest.mark.parametrize("name", FORMS)
def test_the_present_format_is_still_what_is_written(tmp_path, name):
    anyprec.save(load_golden(name), tmp_path / "again", **FORMS[name])
    (old, old_text), (new, new_text) = (
        read_file(HERE / f"{name}.safetensors"),
        read_file(tmp_path / "again"),
    )
    assert {**json.loads(new_text), "version": None} == {**json.loads(old_text), "version": None}
    assert list(json.loads(new_text)) == list(json.loads(old_text))
    assert new.keys() == old.keys()
    frames = (
        json.loads(old_text).get("packing", {}).get("coding") == "zstd"
    )  # another Zstandard may make other frames
    assert all(
        torch.equal(new[name], tensor)
        for name, tensor in old.items()
        if not frames or tensor.dtype != torch.uint8
    )


def test_the_script_that_made_the_golden_files_still_runs(tmp_path):
    make_golden(tmp_path)
    for name in FORMS:
        old, new = (read_file(folder / f"{name}.safetensors") for folder in (HERE, tmp_path))
        assert new[0].keys() == old[0].keys()
        assert json.loads(new[1]).keys() == json.loads(old[1]).keys()
