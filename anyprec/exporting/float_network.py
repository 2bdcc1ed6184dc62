"""The float network in the format of an exported file, to compare size and speed with it."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from anyprec.exporting.extras import require_extra
from anyprec.exporting.lowering import traced
from anyprec.model.conversion import revert
from anyprec.model.converted import ConvertedModel


def write_float_network(
    model: ConvertedModel, path: Path, *, example: Tensor, dynamic_batch: bool = True
) -> None:
    """Write a network without any quantizer, as `set_bits(None)` runs it.

    Args:
        model: The network, with float weights; not changed.
        path: `.onnx` or `.xml`.
        example: A batch that it accepts; of at least two images if its size is to be dynamic.
        dynamic_batch: Accept batches of any size.

    Raises:
        ExportError: It cannot be traced or translated, a library is missing, or the file cannot be
            written.
        PackedError: It has integer codes only.
    """
    require_extra("onnx", "onnxscript", extra="onnx")
    from anyprec.exporting.onnx_file import translated, write_onnx  # noqa: PLC0415 (optional)

    network = copy.deepcopy(model).cpu().eval()
    network.set_bits(None)
    revert(network)
    with torch.no_grad():
        graph = traced(network, example, dynamic_batch=dynamic_batch)
    translation = translated(graph, example, dynamic_batch=dynamic_batch)
    if path.suffix == ".xml":
        require_extra("openvino", extra="openvino")
        from anyprec.exporting.openvino_file import write_ir  # noqa: PLC0415 (optional)

        write_ir(translation, path)
    else:
        write_onnx(translation, path)
