"""`integer(model)` against onnxruntime's integer run of the exported file, bit for bit."""

from __future__ import annotations

import argparse
from typing import Any

import timm
import torch

import anyprec
from anyprec.exporting.integer import integer_network
from anyprec.exporting.integers import to_integers
from anyprec.exporting.lowering import lower
from anyprec.exporting.onnx_file import onnx_model
from benchmarks.deployment.families import mixed_bits, run_in_onnxruntime

NETWORKS = (
    "resnet18",
    "tf_efficientnet_lite0",
    "mobilenetv2_100",
    "regnety_002",
    "convnext_atto",
    "densenet121",
)


def compare(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare a network of random weights at W8A8, W4A4 and a random mixed precision.

    Returns:
        A record for each: whether outputs are equal, how far they are apart in standard deviations,
        and how many operators compute with codes, here and in onnxruntime.
    """
    torch.manual_seed(0)
    size = options.img_size
    images = torch.randn(8, 3, size, size)
    network = timm.create_model(name)
    network.train()(images)
    model = anyprec.convert(
        network.eval(), bits=(2, 4, 8), placement="integer", example_input=images[:2]
    )
    anyprec.calibrate(model, [images])
    records = []
    for label, bits in (("W8A8", 8), ("W4A4", 4), ("mixed", mixed_bits(model, seed=0))):
        graph = to_integers(lower(model, bits, example_input=images[:2]))
        made = integer_network(graph)
        (found,), kinds = run_in_onnxruntime(onnx_model(graph), images)
        computed = made(images)
        record = {
            "name": name,
            "bits": label,
            "equal": torch.equal(computed, found),
            "difference": float((computed - found).abs().max() / found.std()),
            "integer_operators": len(made.integer_operators),
            "floating_operators": len(made.floating_operators),
            "onnxruntime_operators": kinds,
        }
        records.append(record)
    return records
