from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, fx, nn

import anyprec
from anyprec.errors import ExportError
from anyprec.exporting.lowering import lower
from anyprec.exporting.norms import fold_norms
from anyprec.exporting.operators import FAKE_QUANTIZE_WEIGHT
from anyprec.exporting.signs import make_scales_positive
from tests.conftest import SmallNet
from tests.exporting.networks import converted, graph_of
from tests.test_networks import Mixture

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from anyprec.exporting.encodings_file import write_encodings  # noqa: E402 (needs onnx)


def network_with_norms(low: float) -> nn.Module:
    """A network whose norms have scales from `low` to 1.5."""
    network = SmallNet().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, low, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return network


def encodings_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.with_suffix(".encodings").read_text())
    return content


def parameters_of(model: Any) -> dict[str, Any]:
    return {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}


def codes(numbers: Any, encoding: dict[str, Any]) -> Any:
    """What numbers become on a chip: codes, from which the offset is not taken away."""
    scale = np.array(encoding["scale"], np.float32)
    offset = np.array(encoding["offset"], np.int64)
    if len(scale) > 1:  # the output channels are along the axis of this length
        axis = numbers.shape.index(len(scale))
        shape = [-1 if dimension == axis else 1 for dimension in range(numbers.ndim)]
        scale, offset = scale.reshape(shape), offset.reshape(shape)
    rounded = np.rint(numbers.astype(np.float64) / scale).astype(np.int64)
    return np.clip(rounded - offset, 0, 2 ** encoding["bw"] - 1) + offset


def quantize_activations(model: Any, encodings: Iterable[dict[str, Any]]) -> Any:
    """The model with what the encodings say done to each tensor, for onnxruntime."""
    helper = onnx.helper
    for encoding in encodings:
        name, (scale,), (offset,) = encoding["name"], encoding["scale"], encoding["offset"]
        for node in model.graph.node:
            node.input[:] = [f"{name}/q" if each == name else each for each in node.input]
        numbers = {"scale": scale, "low": offset, "high": offset + 2 ** encoding["bw"] - 1}
        for key, number in numbers.items():
            tensor = np.array(number, np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(tensor, f"{name}/{key}"))
        steps = [
            helper.make_node("Div", [name, f"{name}/scale"], [f"{name}/a"]),
            helper.make_node("Round", [f"{name}/a"], [f"{name}/b"]),
            helper.make_node("Clip", [f"{name}/b", f"{name}/low", f"{name}/high"], [f"{name}/c"]),
            helper.make_node("Mul", [f"{name}/c", f"{name}/scale"], [f"{name}/q"]),
        ]
        made_by = [number for number, node in enumerate(model.graph.node) if name in node.output]
        at = made_by[0] + 1 if made_by else 0
        for number, node in enumerate(steps):
            model.graph.node.insert(at + number, node)
    return model


def run(model: Any, images: Tensor) -> Any:
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"images": images.numpy()})
    return result


def require_what_set_bits_computes(model: Any, exported: anyprec.Exported, images: Tensor) -> None:
    content = encodings_of(exported.path)
    file = quantize_activations(onnx.load(exported.path), content["activation_encodings"])
    with torch.no_grad(), model.using_bits(exported.config):
        expected = model(images).numpy()
    # Norms are folded, and sums made in another order: the rounding of float32 differs.
    assert np.abs(run(file, images) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [8, 2, {"depthwise": (4, 8), "pointwise": (2, 4), "head": (8, 2)}])
def test_file_and_encodings_are_the_network(bits: Any, images: Tensor, tmp_path: Path) -> None:
    model = converted(network_with_norms(0.5), images)
    exported = anyprec.export(model, tmp_path / "net.onnx", bits=bits, target="encodings")
    require_what_set_bits_computes(model, exported, images)
    assert exported.notes == ()

    # The numbers in the file round to the codes that were trained, and are fixed points.
    parameters = parameters_of(onnx.load(exported.path))
    content = {each["name"]: each for each in encodings_of(exported.path)["param_encodings"]}
    model.set_bits(exported.config)
    for path, layer in model.quantized_layers.items():
        name = f"{path}.weight"
        stored = codes(parameters[name], content[name])
        assert np.array_equal(stored, layer.weight_codes(layer.weight_index).numpy()), path
        assert content[name]["bw"] == exported.config[path].weight
        scale = np.array(content[name]["scale"], np.float32).reshape(-1, *[1] * (stored.ndim - 1))
        assert np.array_equal(stored.astype(np.float32) * scale, parameters[name])


def test_every_layer_has_its_encodings(images: Tensor, tmp_path: Path) -> None:
    model = converted(network_with_norms(0.5), images)
    exported = anyprec.export(model, tmp_path / "net.onnx", bits=(2, 4), target="encodings")
    content = encodings_of(exported.path)
    assert content["version"] == "1.0.0"
    activations = {each["name"]: each for each in content["activation_encodings"]}
    layers = list(model.quantized_layers)
    # The first one reads the input of the network, which keeps its name.
    assert list(activations) == ["images", *(f"{path}.input" for path in layers[1:])]
    for path in layers[1:]:
        layer = model.quantized_layers[path]
        with model.using_bits((2, 4)):
            index = layer.input_index
        encoding = activations[f"{path}.input"]
        assert encoding["bw"] == exported.config[path].activation
        assert encoding["offset"] == [layer.input_quantizer.limits(index)[0]]
    weights = [each["name"] for each in content["param_encodings"]]
    assert weights == [f"{path}.weight" for path in layers]
    assert exported.size == sum(
        (tmp_path / name).stat().st_size for name in ("net.onnx", "net.encodings")
    )


def test_negative_norms_are_exact_with_positive_scales(images: Tensor, tmp_path: Path) -> None:
    model = converted(network_with_norms(-1.5), images)
    exported = anyprec.export(model, tmp_path / "net.onnx", bits=2, target="encodings")
    for encoding in encodings_of(exported.path)["param_encodings"]:
        assert min(encoding["scale"]) > 0
    (note,) = exported.notes
    assert "signs are multiplied behind them: stem, depthwise, pointwise" in note
    require_what_set_bits_computes(model, exported, images)


def test_transformers_have_encodings_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 16, 16)
    network = VisionTransformer(16, 8, embed_dim=16, depth=1, num_heads=2, num_classes=5)
    model = converted(network, images)
    exported = anyprec.export(model, tmp_path / "net.onnx", bits=4, target="encodings")
    require_what_set_bits_computes(model, exported, images)
    axis_of_outputs = parameters_of(onnx.load(exported.path))["blocks.0.attn.qkv.weight"].shape
    assert axis_of_outputs == (16, 48)


def test_computed_weights_are_activations(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(1, 3, 16, 16)
    model = converted(Mixture(), images)
    exported = anyprec.export(
        model, tmp_path / "net.onnx", bits=4, target="encodings", dynamic_batch=False
    )
    require_what_set_bits_computes(model, exported, images)
    names = [each["name"] for each in encodings_of(exported.path)["activation_encodings"]]
    assert names.count("mixed.input") == names.count("mixed.input_2") == 1


def test_a_computed_weight_with_scales_by_channel_is_refused(images: Tensor) -> None:
    lowered = lower(converted(network_with_norms(0.5), images), 4)

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        operands = x, graph.get_attr("scale")
        return graph.call_function(FAKE_QUANTIZE_WEIGHT, (*operands, 4, "mixed"))

    graph = graph_of(build, scale=torch.rand(3, 1, 1))
    with pytest.raises(ExportError, match="layer 'mixed': its weight .W4. depends on the network"):
        write_encodings(dataclasses.replace(lowered, graph=graph), Path("net.onnx"))


def test_scales_along_two_axes_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 4, 8, 8)
    network = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(400, 3))
    model = converted(network, images)
    with pytest.raises(ExportError, match="layer '0': the scales of its weight"):
        anyprec.export(model, tmp_path / "net.onnx", bits=8, target="encodings")
    assert not list(tmp_path.iterdir())


def test_graphs_compute_the_same_with_positive_scales(images: Tensor) -> None:
    for bits, allowed in ((4, None), (4, 8), (8, None)):
        graph = lower(converted(network_with_norms(-1.5), images), bits).graph
        fold_norms(graph)
        before = graph(images)
        signed = make_scales_positive(graph, code_bits=allowed)
        assert torch.allclose(graph(images), before, rtol=1e-6, atol=1e-6)
        # With more bits than they need, codes of four bits can all be negated.
        assert ("pointwise" in signed) == (allowed is None)
