"""One network of each family of timm, lowered, exported to ONNX and run by onnxruntime."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import anyprec
from anyprec.exporting.integers import to_integers
from anyprec.exporting.lowering import Lowered, lower
from anyprec.exporting.onnx_file import onnx_model, write_onnx
from benchmarks.common import records

_TRAINING = ("drop_rate", "drop_path_rate", "patch_drop_rate", "size")
"""Arguments of the zoo's trials that change nothing here."""

_INTEGER = ("QLinear", "MatMulInteger", "QGemm")
"""How operators of onnxruntime are named that multiply or add codes."""


def networks_of_families(zoo: Path) -> dict[str, str]:
    """The smallest network of each family, by family, from the zoo's results."""
    smallest: dict[str, dict[str, Any]] = {}
    for record in records.read(zoo):
        family = record.get("family")
        if family is None or "arguments" not in record or record["name"].startswith("test_"):
            continue
        if record["name"] not in timm.list_models():
            continue
        known = smallest.get(family)
        if known is None or record["parameters"] < known["parameters"]:
            smallest[family] = record
    return {family: smallest[family]["name"] for family in sorted(smallest)}


def arguments_of(name: str, zoo: Path) -> tuple[dict[str, Any], int]:
    """Arguments for timm and the size of images, with which the zoo's trials ran this network."""
    found = [record for record in records.read(zoo) if record["name"] == name]
    arguments = dict(found[-1]["arguments"]) if found else {}
    size = int(arguments.get("size", 0)) or timm.get_pretrained_cfg(name).input_size[-1]
    for argument in _TRAINING:
        arguments.pop(argument, None)
    return arguments, size


def mixed_bits(model: anyprec.ConvertedModel, seed: int) -> anyprec.BitConfig | None:
    """A random candidate for each layer."""
    generator = random.Random(seed)
    chosen = {}
    for path, candidates in model.candidates.items():
        weight = generator.choice(candidates.weight)
        chosen[path] = (weight, generator.choice(candidates.activation))
    return model.resolve_bits(chosen)


def try_export(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Lower, export and run one network at a mixed precision.

    Returns:
        The record: times in seconds, whether the graph equals the network bit for bit, how far
        onnxruntime's outputs are from those of the integer graph, in standard deviations of these.
    """
    torch.manual_seed(0)
    arguments, size = arguments_of(name, options.zoo)
    channels = timm.get_pretrained_cfg(name).input_size[0]
    images = torch.randn(4, channels, size, size)
    network = timm.create_model(name, **arguments).eval()
    model = anyprec.convert(network, bits=(2, 4, 8), example_input=images[:1])
    anyprec.calibrate(model, [images])
    model.set_bits(mixed_bits(model, seed=0))
    record: dict[str, Any] = {"name": name, "size": size, "layers": len(model.quantized_layers)}
    try:
        record |= _exported(model, images)
    except anyprec.ExportError as error:
        record["error"] = str(error)
    return record


def _exported(model: anyprec.ConvertedModel, images: Tensor) -> dict[str, Any]:
    start = time.perf_counter()
    lowered, batch = _lowered(model)
    images = images[: len(lowered.example)]
    lowered_seconds = time.perf_counter() - start
    with torch.no_grad():
        expected = tree_leaves(model(images))
        graph_outputs = tree_leaves(lowered.graph(images))
        integer = to_integers(lowered)
        written = onnx_model(integer)
        integer_outputs = tree_leaves(integer.lowered.graph(images))
    seconds = time.perf_counter() - start
    found, kinds = run_in_onnxruntime(written, images)
    equal = all(map(torch.equal, expected, graph_outputs))
    return {
        "batch": batch,
        "equal": equal and len(expected) == len(graph_outputs),
        "difference": max(map(_difference, found, integer_outputs)),
        "lowered_seconds": round(lowered_seconds, 1),
        "seconds": round(seconds, 1),
        "bytes": written.ByteSize(),
        "integer_operators": kinds,
    }


def _lowered(model: anyprec.ConvertedModel) -> tuple[Lowered, str]:
    """The network for batches of any size, or of one if it has to be."""
    try:
        return lower(model), "any"
    except anyprec.ExportError:
        return lower(model, dynamic_batch=False), "1"


def run_in_onnxruntime(model: Any, images: Tensor) -> tuple[list[Tensor], int]:
    """Outputs of onnxruntime, and how many of its operators have integer operands."""
    import onnx  # noqa: PLC0415 (as onnxruntime's models)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        file, optimized = Path(folder) / "network.onnx", Path(folder) / "optimized.onnx"
        write_onnx(model, file)
        options.optimized_model_filepath = str(optimized)
        session = onnxruntime.InferenceSession(str(file), options)
        nodes = onnx.load(optimized, load_external_data=False).graph.node
        kinds = sum(
            node.op_type.startswith(("QLinear", "MatMulInteger", "QGemm")) for node in nodes
        )
        outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return [torch.from_numpy(output) for output in outputs], kinds


def _difference(found: Tensor, expected: Tensor) -> float:
    spread = float(expected.std()) if expected.numel() > 1 else 1.0
    return float((found - expected).abs().max()) / (spread or 1.0)
