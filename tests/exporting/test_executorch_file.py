from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec.errors import ExportError
from anyprec.exporting.lowering import lower
from anyprec.exporting.targets import target_of
from tests.exporting.networks import converted

runtime = pytest.importorskip("executorch.runtime")

from anyprec.exporting.executorch_file import _decompose, to_xnnpack  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # ExecuTorch's own


class Chain(nn.Module):
    """Layers behind which there is nothing but a quantizer, and one whose result is the output."""

    def __init__(self, low: float = 0.5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16, 5)
        nn.init.uniform_(self.norm.weight, low, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = nn.functional.relu6(self.depthwise(x))
        x = self.head(x)
        return self.fc(x.mean(dim=(2, 3)))


def run(path: Path, images: Tensor) -> Tensor:
    method = runtime.Runtime.get().load_program(path).load_method("forward")
    result: Tensor = method.execute([images])[0]
    return result


@pytest.mark.parametrize(("bits", "low"), [(8, 0.5), ((2, 4), -1.5)])
def test_the_program_computes_what_set_bits_computes(
    bits: Any, low: float, images: Tensor, tmp_path: Path
) -> None:
    model = converted(Chain(low), images)
    exported = anyprec.export(model, tmp_path / "net.pte", bits=bits, target="executorch")
    with torch.no_grad(), model.using_bits(bits):
        expected = model(images[:1])
    found = run(exported.path, images[:1])
    # Biases are int32 on the scale of the accumulator, and codes next to a tie may differ by one.
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


def test_layers_that_run_in_floating_point_are_named(images: Tensor) -> None:
    (note,) = to_xnnpack(lower(converted(Chain(), images), 8)).notes
    assert note == (
        "2 layers run in floating point, since no quantizer alone reads their results "
        "(convert with placement='integer'): head, fc"
    )


def test_each_reader_has_a_dequantize_of_its_own(images: Tensor) -> None:
    graph = to_xnnpack(lower(converted(Chain(), images), 4)).lowered.graph
    with torch.no_grad():
        expected = graph(images)
    _decompose(graph)
    with torch.no_grad():
        assert torch.equal(graph(images), expected)
    calls: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if "dequantize" in node.name:
            calls["dequantize"] += 1
            assert len(node.users) == 1
    # Four inputs, and the weights of the two layers that run on codes.
    assert calls["dequantize"] == 6


def test_weights_on_codes_are_stored_as_codes(images: Tensor) -> None:
    model = converted(Chain(-1.5), images)
    graph = to_xnnpack(lower(model, 8)).lowered.graph
    _decompose(graph)
    tensors = dict(graph.named_buffers())
    scales = [tensor for name, tensor in tensors.items() if name.startswith("scale")]
    assert scales
    assert all(bool((scale > 0).all()) for scale in scales)
    assert any(tensor.dtype == torch.int8 for tensor in tensors.values())


def test_a_network_that_is_not_taken_is_refused(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"ends with '.pte'"):
        anyprec.export(converted(Chain(), images), tmp_path / "net.onnx", target="executorch")
    assert target_of("executorch").suffix == ".pte"
