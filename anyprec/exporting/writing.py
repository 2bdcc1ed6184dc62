"""`export`: a network at one configuration to a file that a runtime accepts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from anyprec.bits import BitConfig
from anyprec.errors import ExportError
from anyprec.exporting.biases import RaisedScale
from anyprec.exporting.lowering import lower
from anyprec.exporting.targets import Target, target_of
from anyprec.model.converted import BitsRequest, ConvertedModel, require_converted
from anyprec.model.fitting import grid_problems, hardware_problems
from anyprec.model.hardware import hardware as find_hardware

_MOST_NAMED = 3
"""Layers that an error names."""


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        path: The file.
        target: What it was made for.
        config: Precision of each layer.
        size: Bytes of the file, with those of files beside it.
        floating: Layers that stay in floating point, with the reason.
        raised: Layers with channels of another weight scale, so that their bias fits into int32.
        notes: What the target's tools may not take, in words.
    """

    path: Path
    target: str
    config: BitConfig
    size: int
    floating: dict[str, str]
    raised: tuple[RaisedScale, ...]
    notes: tuple[str, ...]


def export(
    model: ConvertedModel,
    path: str | os.PathLike[str],
    *,
    bits: BitsRequest = None,
    target: str | None = None,
    hardware: str | None = None,
    example_input: Tensor | None = None,
    dynamic_batch: bool = True,
) -> Exported:
    """Write a network at one configuration as a file of integers for a runtime.

    Args:
        model: A calibrated network in float32; not changed.
        path: Where to write; its folder must exist. The old content stays if anything fails.
        bits: As `set_bits` takes it; None is the precision that is set.
        target: What the file is for: `"onnx"` (QDQ, for onnxruntime and whatever reads ONNX),
            `"openvino"` (IR), `"qonnx"` (Quant nodes, for FINN and hls4ml; batches of one),
            `"encodings"` (float ONNX with AIMET's encodings beside it, for Qualcomm) or
            `"executorch"` (XNNPACK; batches of one). None is what the hardware needs, or `"onnx"`.
        hardware: Refuse what this target cannot run, layer by layer; see `anyprec.hardware`. None
            is the one that the network was converted for, if any.
        example_input: A batch that the network accepts, by default of the size that it was
            converted on.
        dynamic_batch: Accept batches of any size; False fixes it to that of the example.

    Raises:
        ExportError: No precision is set, the target or the file's name is not known, the hardware
            cannot run a layer's precision or grid, the network has no such form, a library is
            missing, or the file cannot be written.
        HardwareError: The hardware is not known.
        BitsError, NotCalibratedError: as `set_bits`.

    Example:
        >>> import timm, torch, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet").eval(), bits=(4, 8))
        >>> anyprec.calibrate(model, [torch.randn(8, 3, 160, 160)])
        >>> exported = anyprec.export(model, "network.onnx", bits=(4, 8))  # doctest: +SKIP
    """
    require_converted(model, purpose="export")
    hardware = hardware or model.anyprec_record.settings.hardware
    chosen, file = _target(target, hardware), Path(path)
    if file.suffix != chosen.suffix:
        msg = f"a file for target {chosen.name!r} ends with {chosen.suffix!r}, got {file.name!r}"
        raise ExportError(msg)
    if not file.parent.is_dir():
        msg = f"cannot write {str(file)!r}: there is no folder {str(file.parent)!r}; create it "
        msg += "first"
        raise ExportError(msg)
    if hardware is not None:
        require_runnable(model, bits, hardware)
    lowered = lower(model, bits, example_input=example_input, dynamic_batch=dynamic_batch)
    network = chosen.write(lowered, file)
    return Exported(
        path=file,
        target=chosen.name,
        config=lowered.config,
        size=size_of(file, chosen.beside),
        floating=lowered.floating,
        raised=network.raised,
        notes=network.notes,
    )


def require_runnable(model: ConvertedModel, bits: BitsRequest, hardware: str) -> None:
    """Refuse a configuration that a target cannot run.

    Raises:
        ExportError: It cannot; the message names the layers, their precision and the nearest that
            can run.
        HardwareError: The target is not known.
    """
    problems = [str(problem) for problem in hardware_problems(model, bits, hardware).values()]
    problems += grid_problems(model, hardware).values()
    if problems:
        listed = "; ".join(problems[:_MOST_NAMED])
        if len(problems) > _MOST_NAMED:
            listed += f"; and {len(problems) - _MOST_NAMED} more"
        msg = f"{hardware} cannot run this configuration: {listed}"
        raise ExportError(msg)


def _target(target: str | None, hardware: str | None) -> Target:
    if target is not None:
        return target_of(target)
    if hardware is None:
        return target_of("onnx")
    preset = find_hardware(hardware)
    if not preset.export:
        msg = f"no target here makes files for {hardware!r} ({preset.route}): pass target=..."
        raise ExportError(msg)
    return target_of(preset.export)


def size_of(file: Path, beside: tuple[str, ...] = ()) -> int:
    """Bytes of a file, and of those that some formats put beside it.

    Args:
        file: The file; OpenVINO's operators have their weights beside them.
        beside: How the names of more files end.
    """
    weights = (".bin",) if file.suffix == ".xml" else ()
    files = [file, *(file.with_suffix(suffix) for suffix in (*weights, *beside))]
    return sum(each.stat().st_size for each in files)
