"""Time and size of exported networks against the float32 network, in the same runtime."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import timm
import torch
from torch import nn

import anyprec
from anyprec.exporting.timing import times_in_turns

NETWORKS = (
    "resnet18",
    "mobilenetv2_100",
    "tf_efficientnet_lite0",
    "vit_tiny_patch16_224",
)
PRECISIONS = ((8, 8), (4, 8), (2, 8))

Run = Callable[[], Any]


def measure(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Records of one network: a line for each runtime, placement and precision.

    All files of a runtime are run in turn, `options.rounds` times; the record has the median time
    and the median of the ratios to the float32 network's time in the same round.
    """
    torch.manual_seed(0)
    size = options.img_size
    images = torch.randn(8, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        files = dict(_files(name, images, Path(folder)))
        for runtime, session in (("onnxruntime", _onnxruntime), ("openvino", _openvino)):
            image = images[:1].numpy()
            runs = {}
            for key, file in files.items():
                # OpenVINO reads no codes of two bits; its own file has them in four.
                ir = file.with_suffix(".xml")
                is_ir = runtime == "openvino" and ir.exists()
                runs[key] = session(ir if is_ir else file, image, options.threads)
            times = times_in_turns(runs, rounds=options.rounds)
            for key, file in files.items():
                ratios = [b / a for a, b in zip(times[key], times["float32"], strict=True)]
                yield {
                    "name": name,
                    "runtime": runtime,
                    "network": key,
                    "milliseconds": round(1e3 * statistics.median(times[key]), 3),
                    "speedup": round(statistics.median(ratios), 3),
                    "bytes": file.stat().st_size,
                    "smaller": round(files["float32"].stat().st_size / file.stat().st_size, 2),
                    "size": size,
                    "threads": options.threads,
                    "rounds": options.rounds,
                }


def _files(name: str, images: torch.Tensor, folder: Path) -> Iterator[tuple[str, Path]]:
    network = _network(name, images)
    yield "float32", _float_file(network, images, folder / "float32.onnx")
    for placement in ("layers", "integer"):
        model = _converted(name, images, placement)
        for weight, activation in PRECISIONS:
            bits = anyprec.Bits(weight=weight, activation=activation)
            file = folder / f"{placement}-{bits}.onnx"
            anyprec.export(model, file, bits=bits)
            if weight < 4:
                anyprec.export(model, file.with_suffix(".xml"), bits=bits, target="openvino")
            yield f"{placement} {bits}", file


def _network(name: str, images: torch.Tensor) -> nn.Module:
    """A network with random weights, and norms that fit them."""
    torch.manual_seed(0)
    network = timm.create_model(name, **_image_size(name, images))
    with torch.no_grad():
        network.train()(images)
    return network.eval()


def _image_size(name: str, images: torch.Tensor) -> dict[str, Any]:
    if "vit" in name:
        return {"img_size": images.shape[-1]}
    return {}


def _converted(name: str, images: torch.Tensor, placement: str) -> anyprec.ConvertedModel:
    model = anyprec.convert(
        _network(name, images), bits=(2, 4, 8), placement=placement, example_input=images[:1]
    )
    anyprec.calibrate(model, [images])
    return model


def _float_file(network: nn.Module, images: torch.Tensor, file: Path) -> Path:
    torch.onnx.export(
        network,
        (images[:2],),
        str(file),
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        input_names=["images"],
        opset_version=21,
        verbose=False,
    )
    return file


def _onnxruntime(file: Path, image: Any, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options)
    (entry,) = session.get_inputs()
    return lambda: session.run(None, {entry.name: image})


def _openvino(file: Path, image: np.ndarray[Any, Any], threads: int) -> Run:
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1})
    model = core.read_model(file)
    model.reshape(list(image.shape))
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda: request.infer({0: image})
