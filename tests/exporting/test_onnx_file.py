from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anyprec
from anyprec.errors import ExportError
from anyprec.exporting.integers import IntegerGraph, to_integers
from anyprec.exporting.lowering import lower
from tests.conftest import SmallNet
from tests.exporting.networks import converted
from tests.test_networks import Mixture

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from anyprec.exporting.onnx_file import onnx_model  # noqa: E402 (needs onnx)
from anyprec.exporting.onnx_storage import store_narrow_weights  # noqa: E402


def run(model: Any, images: Tensor) -> Tensor:
    """What onnxruntime computes, operator by operator: fused ones round otherwise."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = model if isinstance(model, str) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(result)


def operators(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def integers(model: anyprec.ConvertedModel, bits: Any, **settings: Any) -> IntegerGraph:
    return to_integers(lower(model, bits, **settings))


def require_close(network: IntegerGraph, model: Any, images: Tensor) -> None:
    with torch.no_grad():
        expected = network.lowered.graph(images)
    # Both compute with the same codes; sums of floats may be made in another order.
    assert torch.allclose(run(model, images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [(8, 8), (2, 4)])
def test_the_file_computes_what_the_graph_computes(bits: Any, images: Tensor) -> None:
    network = integers(converted(SmallNet(), images), bits)
    require_close(network, onnx_model(network), images)


def test_sequences_are_multiplied_by_the_codes_as_they_are_stored() -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 48, 48)
    vit = timm.create_model("test_vit", img_size=48, depth=1, num_classes=5)
    network = integers(converted(vit, images), (4, 8))
    model = onnx_model(network)
    require_close(network, model, images)
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    producers = {name: node for node in model.graph.node for name in node.output}
    weights = [node.input[1] for node in products if node.input[1] in producers]
    dequantized = [producers[name].op_type for name in weights].count("DequantizeLinear")
    assert dequantized == 4  # qkv, proj and two of the MLP; the rest is attention


class Padded(nn.Module):
    """Padding of several kinds before a convolution."""

    def __init__(self, mode: str = "constant", value: float = 0.0) -> None:
        super().__init__()
        self.mode, self.value = mode, value
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        value = self.value if self.mode == "constant" else None
        return self.conv(nn.functional.pad(x, (0, 1, 2, 1), mode=self.mode, value=value))


@pytest.mark.parametrize(
    ("mode", "value", "left"), [("constant", 0.0, 0), ("constant", 1.0, 1), ("reflect", None, 1)]
)
def test_padding_with_zeros_is_that_of_the_convolution(
    mode: str, value: float, left: int, images: Tensor
) -> None:
    network = integers(converted(Padded(mode, value), images), 8)
    model = onnx_model(network)
    require_close(network, model, images)
    assert operators(model)["Pad"] == left
    pads = [list(a.ints) for n in model.graph.node for a in n.attribute if a.name == "pads"]
    assert ([2, 0, 1, 1] in pads) == (left == 0)


def dequantizing(codes: Any) -> Any:
    """A model that dequantizes a weight with these codes."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    node = helper.make_node("DequantizeLinear", ["codes", "scale"], ["weight"], axis=0)
    tensors = [numpy_helper.from_array(codes.numpy(), "codes")]
    tensors.append(numpy_helper.from_array(torch.rand(len(codes)).numpy(), "scale"))
    added = helper.make_node("Add", ["weight", "images"], ["sum"])
    value = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, tuple(codes.shape))
        for name in ("images", "sum")
    ]
    graph = helper.make_graph([node, added], "weights", value[:1], value[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(
    ("low", "high", "narrowest", "kind"),
    [
        (-2, 1, 2, "INT2"),
        (-2, 1, 4, "INT4"),
        (-2, 2, 2, "INT4"),
        (-3, 1, 2, "INT4"),
        (-8, 7, 2, "INT4"),
        (-8, 7, 8, "INT8"),
        (-9, 7, 2, "INT8"),
        (-8, 8, 2, "INT8"),
    ],
)
def test_weights_are_stored_in_as_few_bits_as_they_have(
    low: int, high: int, narrowest: int, kind: str
) -> None:
    codes = torch.randint(low, high + 1, (5, 7), dtype=torch.int8)
    codes[0, 0], codes[-1, -1] = low, high
    model = dequantizing(codes)
    images = torch.randn(5, 7)
    expected = run(model, images)
    store_narrow_weights(model, narrowest=narrowest)
    onnx.checker.check_model(model)
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == "codes")
    assert onnx.TensorProto.DataType.Name(stored.data_type) == kind
    # Through a Cast, or runtimes would dequantize them in every pass.
    readers = [node.op_type for node in model.graph.node if "codes" in node.input]
    assert readers == (["DequantizeLinear"] if kind == "INT8" else ["Cast"])
    assert torch.equal(run(model, images), expected)


@pytest.mark.parametrize("factors", [[1, 1, 1, 1, 1], [16, 16, 16, 16, 16], [16, 4, 64, 1, 2]])
def test_what_codes_were_multiplied_by_is_stored_beside_them(factors: list[int]) -> None:
    codes = torch.randint(-2, 2, (5, 7), dtype=torch.int8)
    # An odd code in each channel, so that the factor is what they have in common.
    codes[:, 0], codes[0, 1:] = 1, -2
    whole = codes * torch.tensor(factors, dtype=torch.int8)[:, None]
    model = dequantizing(whole)
    images = torch.randn(5, 7)
    expected = run(model, images)
    store_narrow_weights(model, narrowest=2)
    onnx.checker.check_model(model)
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    assert torch.equal(torch.from_numpy(stored["codes"].astype("int8")), codes)
    assert torch.equal(run(model, images), expected)


def test_channels_of_zeros_have_the_factor_of_the_others() -> None:
    codes = torch.randint(-2, 2, (5, 7), dtype=torch.int8)
    codes[:, 0], codes[2] = 1, 0
    model = dequantizing(codes * 16)
    store_narrow_weights(model, narrowest=2)
    stored = {each.name: each for each in model.graph.initializer}
    assert onnx.TensorProto.DataType.Name(stored["codes"].data_type) == "INT2"
    assert onnx.numpy_helper.to_array(stored["codes_factor"]).tolist() == [[16]]


def test_a_weight_of_eight_bits_stays_though_its_codes_fit_into_fewer(images: Tensor) -> None:
    network = SmallNet()
    nn.init.zeros_(network.depthwise_norm.weight)  # as networks begin that are trained to be deep
    model = converted(network, images)
    written = onnx_model(integers(model, 8))
    kinds = {onnx.TensorProto.DataType.Name(t.data_type) for t in written.graph.initializer}
    assert not kinds & {"INT2", "INT4"}
    assert written.opset_import[0].version == 21


def test_a_file_of_few_bits_is_small() -> None:
    images = torch.randn(2, 3, 8, 8)
    layers = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    model = converted(layers, images, first_last_bits=None)
    network = integers(model, (2, 8))
    narrow, wide = onnx_model(network), onnx_model(network, narrowest=8)
    # To int32, where they are multiplied, and to int8.
    assert operators(narrow)["Cast"] == 2 * len(model.quantized_layers)
    assert torch.equal(run(narrow, images), run(wide, images))
    bytes_of_codes = sum(layer.weight.numel() for layer in model.quantized_layers.values())
    saved = wide.ByteSize() - narrow.ByteSize()
    # Three of four bits, less the nodes that cast and multiply.
    assert saved > 0.75 * bytes_of_codes - 300 * len(model.quantized_layers)


def test_codes_of_fewer_bits_are_clipped(images: Tensor) -> None:
    network = integers(converted(SmallNet(), images), (8, 4))
    model = onnx_model(network)
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    constants = {n.output[0]: n.attribute[0].t for n in model.graph.node if n.op_type == "Constant"}
    constants |= {tensor.name: tensor for tensor in model.graph.initializer}
    highest = {int(onnx.numpy_helper.to_array(constants[clip.input[2]])) for clip in clips}
    assert highest == {15}


def test_batches_of_any_size_or_of_one(images: Tensor) -> None:
    model = converted(SmallNet(), images)
    for dynamic, batches in ((True, (1, 2, 7)), (False, (1,))):
        network = integers(model, 8, dynamic_batch=dynamic)
        written = onnx_model(network)
        for count in batches:
            assert run(written, images[:count]).shape == (count, 5)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        run(written, images[:3])


def test_an_operator_that_onnx_has_not_is_named(images: Tensor) -> None:
    experts = torch.randn(4, 3, 24, 24)
    model = converted(Mixture(), experts)
    with pytest.raises(ExportError, match=r"aten.conv2d.*pass dynamic_batch=False"):
        onnx_model(integers(model, 8))
    network = integers(model, 8, dynamic_batch=False)
    require_close(network, onnx_model(network), experts[:1])


def test_export_says_what_it_made(images: Tensor, tmp_path: Path) -> None:
    model = converted(SmallNet(), images, exclude="head")
    model.set_bits(4)
    exported = anyprec.export(model, tmp_path / "network.onnx")
    assert exported.path == tmp_path / "network.onnx"
    assert exported.target == "onnx"
    assert exported.config == model.bits
    assert exported.size == exported.path.stat().st_size
    assert exported.floating == {"head": "excluded by 'head'"}
    assert exported.raised == ()
    found = run(str(exported.path), images)
    with torch.no_grad():
        assert torch.allclose(found, model(images), atol=0.05)


def test_refusals_leave_the_old_file(images: Tensor, tmp_path: Path) -> None:
    model = converted(SmallNet(), images)
    file = tmp_path / "network.onnx"
    file.write_bytes(b"old")
    with pytest.raises(ExportError, match="'onx' is not known: use one of .*did you mean 'onnx'"):
        anyprec.export(model, file, bits=4, target="onx")
    with pytest.raises(ExportError, match="ends with '.xml', got 'network.onnx'"):
        anyprec.export(model, file, bits=4, target="openvino")
    with pytest.raises(ExportError, match="there is no folder"):
        anyprec.export(model, tmp_path / "none" / "network.onnx", bits=4)
    with pytest.raises(ExportError, match="call set_bits first"):
        anyprec.export(model, file)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_cannot_be_written_is_named(images: Tensor, tmp_path: Path) -> None:
    model = converted(SmallNet(), images)
    folder = tmp_path / "network.onnx"
    folder.mkdir()
    with pytest.raises(ExportError, match=r"cannot write .*network.onnx.*before is unchanged"):
        anyprec.export(model, folder, bits=4)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_missing_library_is_named_with_its_extra(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted(SmallNet(), images)
    monkeypatch.setattr("anyprec.exporting.extras.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"onnx and onnxscript .* pip install 'anyprec\[onnx\]'"):
        anyprec.export(model, tmp_path / "network.onnx", bits=4)


def test_openvino_computes_the_same(images: Tensor, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = converted(SmallNet(), images)
    exported = anyprec.export(model, tmp_path / "network.xml", bits=(2, 8), target="openvino")
    assert exported.size > exported.path.with_suffix(".bin").stat().st_size > 0
    compiled = openvino.Core().compile_model(
        str(exported.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = torch.from_numpy(compiled([images.numpy()])[0])
    network = integers(model, (2, 8))
    with torch.no_grad():
        expected = network.lowered.graph(images)
    assert (found - expected).abs().max() < 0.05 * expected.std()


class Limited(nn.Module):
    """Several layers that clamp one value by tensors, as Gemma's do; some limits are infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.register_buffer("low", torch.tensor(-0.5))
        self.register_buffer("high", torch.tensor([0.75]))
        self.register_buffer("none", torch.tensor(math.inf))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        first = self.layers[0](torch.clamp(x, self.low, self.high))
        second = self.layers[1](torch.clamp(x, -self.none, self.none))
        third = self.layers[2](torch.maximum(self.low, torch.minimum(x, self.high)))
        return torch.cat([first, second, third, torch.clamp(x, self.low, self.high)], dim=1)


def test_limits_that_are_tensors_become_numbers() -> None:
    images = torch.randn(4, 6)
    model = converted(Limited(), images)
    lowered = lower(model, 8, example_input=images)
    calls = [str(node.target) for node in lowered.graph.graph.nodes if node.op == "call_function"]
    # Two of both limits, and one of each by minimum and maximum; none by infinite ones.
    limiting = [call for call in calls if "clamp" in call or "imum" in call]
    assert limiting == ["aten.clamp.default"] * 4
    with model.using_bits(8), torch.no_grad():
        assert torch.equal(lowered.graph(images), model(images))
    network = to_integers(lowered)
    require_close(network, onnx_model(network), images)


class Windows(nn.Module):
    """Attention over five axes, in windows as Hiera's, with the mask that it is given."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        split = self.qkv(x).reshape(batch, 3, 4, 3, 2, 4).permute(3, 0, 4, 1, 2, 5)
        query, key, value = split.unbind(0)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask).flatten(1)


@pytest.mark.parametrize(
    "mask",
    [None, torch.tensor([True, False, True, True]), torch.tensor([0.0, -1.0, 0.5, 0.0])],
    ids=["no mask", "mask of yes and no", "mask that is added"],
)
def test_attention_in_windows_is_written_out(mask: Tensor | None) -> None:
    images = torch.randn(3, 12, 8)
    network = integers(converted(Windows(mask), images), 8)
    require_close(network, onnx_model(network), images)
