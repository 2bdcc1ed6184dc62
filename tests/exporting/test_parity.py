"""An exported file against its network: what is compared, and that what is broken is found."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec.errors import BatchError, BitsError, ExportError
from tests.conftest import SmallNet
from tests.exporting.networks import converted

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@dataclass
class Case:
    model: anyprec.ConvertedModel
    exported: anyprec.Exported
    images: Tensor


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    network = SmallNet()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(16, 3, 16, 16))
        # So that images are of several classes.
        network.fc.bias -= network.eval()(torch.randn(64, 3, 16, 16)).mean(0)
    model = converted(network, torch.randn(8, 3, 16, 16))
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    return Case(model, anyprec.export(model, path, bits=8), torch.randn(11, 3, 16, 16))


@pytest.fixture(scope="module")
def report(case: Case) -> anyprec.ParityReport:
    return anyprec.check_export(case.model, case.exported, case.images)


def inputs_of_layers(case: Case) -> dict[str, Tensor]:
    """What each layer gets, at the configuration of the file."""
    inputs: dict[str, Tensor] = {}
    handles = []
    for path, layer in case.model.quantized_layers.items():
        note: Callable[..., None] = lambda _, args, path=path: inputs.update({path: args[0]})  # noqa: E731
        handles.append(layer.register_forward_pre_hook(note))
    with torch.no_grad(), case.model.using_bits(case.exported.config):
        case.model(case.images)
    for handle in handles:
        handle.remove()
    return inputs


def test_a_file_keeps_the_promise(report: anyprec.ParityReport) -> None:
    assert report.broken == ()
    assert report.logits.lowered_largest == 0
    # The bias of the last layer is rounded to its accumulator.
    assert 0 < report.logits.alone_largest < 5e-4
    for row in report.layers:
        assert row.alone_largest <= 1
        assert 0 <= row.tie_distance < 0.05
        assert 0.9 < row.equal <= 1
        assert 0.99 < row.alone_equal <= 1
    assert report.logits.agreeing == report.logits.images == 11
    assert report.logits.mean < 0.05
    assert report.logits.mean <= report.logits.largest


def test_every_code_of_every_layer_is_compared(case: Case, report: anyprec.ParityReport) -> None:
    expected = {path: values.numel() for path, values in inputs_of_layers(case).items()}
    assert {row.point: row.codes for row in report.layers} == expected
    assert [row.point for row in report.layers] == list(case.model.quantized_layers)
    for row in report.layers:
        assert (row.weight_bits, row.bits) == (8, 8)
    assert report.shared == ()
    assert report.config == case.exported.config


def test_noise_is_that_of_float64(case: Case, report: anyprec.ParityReport) -> None:
    outputs = {}
    for bits in (None, 8):
        for kind in (torch.float32, torch.float64):
            # A network in float64 has no way back: another one each time.
            again = converted_again(case).to(kind)
            with torch.no_grad(), again.using_bits(bits):
                outputs[bits, kind] = again(case.images.to(kind)).double()
    for bits, noise in ((None, report.logits.float_noise), (8, report.logits.noise)):
        single, double = outputs[bits, torch.float32], outputs[bits, torch.float64]
        expected = (single - double).abs().mean() / double.std()
        # Batches of eight and of eleven are added up in another order.
        assert noise == pytest.approx(expected.item(), rel=0.2, abs=1e-7)
    assert report.logits.float_noise < 1e-6


def converted_again(case: Case) -> anyprec.ConvertedModel:
    again = anyprec.convert(SmallNet().eval(), bits=(2, 4, 8), example_input=case.images[:1])
    again.load_state_dict(case.model.state_dict())
    return again.eval()


def parts_of_layer(model: Any, path: str) -> dict[str, Any]:
    """Initializers or constants of a layer: input scale, weight codes and scale, bias codes."""
    producers = {name: node for node in model.graph.node for name in node.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, node in producers.items():
        if node.op_type == "Constant":
            tensors[name] = node.attribute[0].t
    quantize = producers[f"{path}.input_codes"]
    (dequantize,) = (node for node in model.graph.node if quantize.output[0] in node.input)
    (layer,) = (node for node in model.graph.node if dequantize.output[0] in node.input[:1])
    weight, bias = (producers[name] for name in layer.input[1:3])
    return {
        "input scale": tensors[quantize.input[1]],
        "weight code": tensors[weight.input[0]],
        "weight scale": tensors[weight.input[1]],
        "bias code": tensors[bias.input[0]],
    }


@pytest.mark.parametrize(
    ("part", "change", "broken"),
    [
        ("weight code", 40, ["fc"]),
        ("weight scale", 1.05, ["fc"]),
        ("bias code", 1.1, ["fc"]),
        # It is that of the quantizer and of what reads the codes.
        ("input scale", 1.02, ["head", "fc"]),
    ],
)
def test_a_changed_file_is_found_at_its_layer(
    part: str, change: float, broken: list[str], case: Case, tmp_path: Path
) -> None:
    model = onnx.load(case.exported.path)
    tensor = parts_of_layer(model, "head")[part]
    values = onnx.numpy_helper.to_array(tensor).copy()
    if part == "weight code":
        values.flat[0] += change if values.flat[0] < 0 else -change
    else:
        values = (values * change).astype(values.dtype)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "changed.onnx")
    report = anyprec.check_export(
        case.model, tmp_path / "changed.onnx", case.images, bits=8, speed=False
    )
    assert [row.point for row in report.broken] == broken
    assert re.search(rf"more than a tie apart +{broken[0]}", str(report))


def test_a_changed_last_layer_is_found_in_the_logits(case: Case, tmp_path: Path) -> None:
    model = onnx.load(case.exported.path)
    tensor = parts_of_layer(model, "fc")["weight code"]
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] = -values.flat[0]
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "changed.onnx")
    report = anyprec.check_export(
        case.model, tmp_path / "changed.onnx", case.images, bits=8, speed=False
    )
    assert report.broken == ()
    assert report.logits.alone_largest > 1e-3


def test_the_configuration_of_a_file_must_be_the_one_compared(case: Case) -> None:
    report = anyprec.check_export(
        case.model, case.exported.path, case.images, bits=(2, 8), speed=False
    )
    assert report.broken
    with pytest.raises(ExportError, match="runs in floating point"):
        anyprec.check_export(case.model, case.exported.path, case.images)
    with pytest.raises(BitsError):
        anyprec.check_export(case.model, case.exported.path, case.images, bits=5.5)


def test_size_and_time_are_beside_those_of_the_float_network(
    case: Case, report: anyprec.ParityReport
) -> None:
    assert report.size == case.exported.path.stat().st_size
    weights = sum(parameter.numel() for parameter in SmallNet().parameters())
    assert report.float_size > 4 * weights
    speed = report.speed
    assert (speed.batch_size, speed.threads) == (1, 1)
    assert speed.seconds > 0
    assert speed.ratio == speed.float_seconds / speed.seconds


def test_the_model_stays_as_it_was(case: Case) -> None:
    case.model.train()
    with case.model.using_bits(4):
        anyprec.check_export(case.model, case.exported, case.images[:2], speed=False)
        assert set(map(str, case.model.bits.values())) > {"W4A4"}
    assert all(module.training for module in case.model.modules())
    case.model.eval()
    assert case.model.bits is None


def test_labels_come_from_the_loader_or_are_given(case: Case) -> None:
    with torch.no_grad(), case.model.using_bits(8):
        classes = case.model(case.images).argmax(1)
    labels = classes.clone()
    labels[:2] = (labels[:2] + 1) % 5
    # Eight run together, so these labels must be taken apart as the images are.
    images = case.images[classes.argsort()]
    loader = [(images[:10], classes.sort()[0][:10]), (images[10:], classes.sort()[0][10:])]
    assert classes.min() < classes.max()

    def logits(images: Any, **settings: Any) -> anyprec.LogitParity:
        checked = anyprec.check_export(case.model, case.exported, images, speed=False, **settings)
        return checked.logits

    found = logits(loader)
    assert (found.images, found.accuracy) == (11, 100.0)
    found = logits(case.images, labels=labels)
    assert found.accuracy == found.file_accuracy == pytest.approx(100 * 9 / 11)
    with pytest.raises(BatchError, match=r"labels of shape \(3,\)"):
        logits(case.images, labels=labels[:3])


def test_a_file_of_one_batch_size_is_filled_up(case: Case, tmp_path: Path) -> None:
    exported = anyprec.export(
        case.model,
        tmp_path / "fixed.onnx",
        bits=8,
        example_input=case.images[:4],
        dynamic_batch=False,
    )
    report = anyprec.check_export(case.model, exported, case.images, speed=False)
    assert report.logits.images == 11
    assert report.broken == ()
    assert report.logits.mean < 0.05
    # Three batches of four.
    assert report.layers[0].codes == 12 * case.images[0].numel()


def test_a_packed_network_has_no_float_network_beside_it(case: Case, tmp_path: Path) -> None:
    anyprec.save(case.model, tmp_path / "packed", packed=True)
    packed = anyprec.load(tmp_path / "packed", SmallNet())
    report = anyprec.check_export(packed, case.exported, case.images)
    assert report.broken == ()
    assert (report.logits.float_noise, report.float_size, report.speed) == (None, None, None)


def test_openvino_is_compared_by_its_outputs(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    exported = anyprec.export(case.model, tmp_path / "net.xml", bits=8, target="openvino")
    report = anyprec.check_export(case.model, exported, case.images)
    assert report.runtime.startswith("OpenVINO 20")
    assert report.layers == ()
    assert report.logits.alone_largest is None
    assert 0 < report.logits.mean < 0.05
    assert report.size == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert report.float_size > 0


class Twins(nn.Module):
    """Two layers with the same input and, in the test, the same grid."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.first(x) * self.second(x)).mean(dim=(2, 3)))


def test_quantizers_that_are_one_in_the_file_are_named(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 8, 8)
    model = converted(Twins(), images)
    layers = model.quantized_layers
    layers["second"].input_quantizer.load_state_dict(layers["first"].input_quantizer.state_dict())
    exported = anyprec.export(model, tmp_path / "twins.onnx", bits=8)
    report = anyprec.check_export(model, exported, images, speed=False)
    assert [row.point for row in report.layers] == ["first", "fc"]
    assert report.shared == ("second",)
    other = converted(nn.Sequential(nn.Conv2d(3, 3, 3)), images)
    with pytest.raises(ExportError, match=r"has none of the network's quantizers .*'0\.input"):
        anyprec.check_export(other, exported.path, images, bits=8)


def test_refusals(case: Case, tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="there are no images"):
        anyprec.check_export(case.model, case.exported, [])
    with pytest.raises(BatchError, match="cannot find images"):
        anyprec.check_export(case.model, case.exported, [(1, 2)])
    other = dataclasses.replace(case.exported, target="qonnx")
    with pytest.raises(ExportError, match="a file for target 'qonnx' has no runtime here"):
        anyprec.check_export(case.model, other, case.images)
    with pytest.raises(ExportError, match="there is no file"):
        anyprec.check_export(case.model, tmp_path / "none.onnx", case.images, bits=8)
    (tmp_path / "net.json").touch()
    with pytest.raises(ExportError, match=r"ends with '\.onnx' or '\.xml'"):
        anyprec.check_export(case.model, tmp_path / "net.json", case.images, bits=8)
    (tmp_path / "net.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match="onnxruntime does not load"):
        anyprec.check_export(case.model, tmp_path / "net.onnx", case.images, bits=8)
    with pytest.raises(ExportError, match=r"onnxruntime does not run images of shape \(2, 1, 16"):
        anyprec.exporting.runtimes.load_in_runtime(case.exported.path).run(case.images[:2, :1])
