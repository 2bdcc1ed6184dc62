"""Networks trained one-shot with integer placement on CIFAR-10: the runtime's integer run.

They are the networks, images and recipe of the study's track S, with `placement="integer"`. For
each configuration the norm statistics are re-estimated, the network is exported to ONNX, and
onnxruntime classifies the images of the report.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import anyprec
from anyprec.bits import uniform
from anyprec.exporting.runtimes import OnnxRuntime
from benchmarks.common.images import Images, batches
from benchmarks.study.grid import TRACKS, Run, Track, tiny
from benchmarks.study.methods import methods
from benchmarks.study.runs import Data, Workspace, start_network, trained

TRACK = TRACKS["S"]
METHOD = "ours"
UNIFORM = ((8, 8), (6, 8), (4, 8), (3, 8), (2, 8), (4, 4))
SEARCHED = ((4, 8), (3, 8), (4, 4))
"""Uniform pairs whose BitOPs are the budgets of the search."""


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record for each network and configuration: top-1 in torch and in onnxruntime."""
    track = tiny(TRACK) if options.tiny else TRACK
    workspace = Workspace(options.data, options.cache)
    data = workspace.images(track)
    for name in options.networks:
        for seed in options.seeds:
            model = _trained(name, seed, track, workspace)
            for label, config in _configurations(model, track, data):
                compared = _compared(model, config, data, track)
                cost = anyprec.cost_of(model, config)
                stamp = {"name": name, "seed": seed, "bits": label, "bitops": cost.bitops}
                yield {**stamp, **compared}


def _trained(name: str, seed: int, track: Track, workspace: Workspace) -> anyprec.ConvertedModel:
    """The network of the study's own method, but with quantizers on outputs too."""
    ours = methods(track.bits)[METHOD]
    convert = {**ours.convert, "placement": "integer"}
    method = dataclasses.replace(ours, name=f"{METHOD}-integer", convert=convert)
    run = Run(dataclasses.replace(track, searches=(method.name,)), name, method, seed)
    data = workspace.images(track)
    loader = batches(data.train, track.batch_size, training=True, seed=seed)
    start = start_network(run, workspace, data)
    model, _ = trained(start, loader, run, workspace, data)
    return model


def _configurations(
    model: anyprec.ConvertedModel, track: Track, data: Data
) -> Iterator[tuple[str, anyprec.BitConfig]]:
    """Uniform ones, then one searched for the BitOPs of each of `SEARCHED`."""
    for weight, activation in UNIFORM:
        yield f"W{weight}A{activation}", uniform((weight, activation), model.candidates)
    images = list(batches(data.search, 128, training=False))
    for weight, activation in SEARCHED:
        limit = anyprec.cost_of(model, (weight, activation)).bitops
        result = anyprec.search(
            model,
            images,
            anyprec.Budget(bitops=limit),
            objective="divergence",
            norms=track.search_norms,
            max_evaluations=track.search_evaluations,
            show_progress=False,
        )
        yield f"searched, BitOPs of W{weight}A{activation}", result.config


@torch.no_grad()
def _compared(
    model: anyprec.ConvertedModel, config: anyprec.BitConfig, data: Data, track: Track
) -> dict[str, Any]:
    """Top-1 of the network and of its file on the same images, and how often they agree."""
    training = batches(data.train, track.batch_size, training=True, seed=1)
    anyprec.update_norms(model, training, config, batches=track.norm_batches)
    report: Images = data.report
    right = file_right = agreeing = count = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        example = data.report[0][:2].float()
        exported = anyprec.export(model, path, bits=config, example_input=example)
        runtime = OnnxRuntime(path)
        with model.using_bits(config):
            for images, labels in batches(report, 250, training=False):
                expected = model(images).argmax(dim=1)
                found = runtime.run(images.contiguous()).argmax(dim=1)
                right += int((expected == labels).sum())
                file_right += int((found == labels).sum())
                agreeing += int((expected == found).sum())
                count += len(labels)
    return {
        "images": count,
        "accuracy": 100 * right / count,
        "file_accuracy": 100 * file_right / count,
        "agreeing": agreeing,
        "bytes": exported.size,
    }
