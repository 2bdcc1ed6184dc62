"""`check_export`: an exported file, run in its runtime, against the network that it was made of."""

from __future__ import annotations

import copy
import itertools
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyprec.bits import BitConfig
from anyprec.errors import BatchError, ExportError
from anyprec.exporting.extras import require_extra
from anyprec.exporting.float_network import write_float_network
from anyprec.exporting.integers import to_integers
from anyprec.exporting.lowering import Lowered, lower
from anyprec.exporting.parity_images import Piece, pieces_of
from anyprec.exporting.parity_logits import Outputs, compare_logits, joined
from anyprec.exporting.parity_report import ParityReport, SpeedParity
from anyprec.exporting.reference import PointValues, Reference, first_output
from anyprec.exporting.runtimes import Runtime, load_in_runtime
from anyprec.exporting.timing import median_times
from anyprec.exporting.writing import Exported, size_of
from anyprec.model.converted import BitsRequest, ConvertedModel, require_converted
from anyprec.runtime.batches import Batch

if TYPE_CHECKING:
    from anyprec.exporting.parity_codes import CodeComparison

CHECKED_TARGETS = ("onnx", "openvino")
"""Targets whose files a runtime here runs as integers."""


def check_export(
    model: ConvertedModel,
    exported: Exported | str | os.PathLike[str],
    images: Tensor | Iterable[Batch],
    *,
    bits: BitsRequest = None,
    labels: Tensor | None = None,
    speed: bool = True,
    threads: int = 1,
) -> ParityReport:
    """Run an exported file in its runtime and compare it with the network at its configuration.

    Codes are compared at every quantizer of an ONNX file: in the whole network, and with each layer
    alone, fed with the codes that it has in torch. There, codes at most one step apart and near a
    tie are the freedom of every runtime; `ParityReport.broken` has the layers that do more. Outputs
    are compared for every format, with what float64 changes of the same network beside it: rounding
    differs between any two programs, and quantizers make it larger.

    Args:
        model: The network that was exported, with the same weights; not changed.
        exported: What `export` returned, or the file (`.onnx` in ONNX Runtime, `.xml` in OpenVINO).
        images: Real images as the network takes them: a tensor, or a loader.
        bits: The configuration of a file that is given by path, as `set_bits` takes it; None is
            that of `exported`, or the one that is set.
        labels: Class of each image, in order; by default those of a loader's batches, if they have
            any.
        speed: Measure time and size of the float network in the same format and runtime.
        threads: How many the runtime may use.

    Raises:
        ExportError: There is no such file, no runtime for it, it is not installed or fails, or the
            file was not made of this network.
        BatchError: There are no images, or not a label for each.
        BitsError, NotCalibratedError: as `set_bits`.

    Example:
        >>> import timm, torch, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet").eval(), bits=(4, 8))
        >>> images = torch.randn(8, 3, 160, 160)
        >>> anyprec.calibrate(model, [images])
        >>> exported = anyprec.export(model, "network.onnx", bits=8)  # doctest: +SKIP
        >>> report = anyprec.check_export(model, exported, images)  # doctest: +SKIP
        >>> report.logits.agreement  # doctest: +SKIP
        100.0
    """
    require_converted(model, purpose="check_export")
    file = _file_of(exported)
    runtime = load_in_runtime(file, threads=threads)
    pieces = pieces_of(images, batch_size=runtime.batch_size)
    first = next(pieces, None)
    if first is None:
        msg = "there are no images: a file is compared with its network on real ones"
        raise BatchError(msg)
    if bits is None and isinstance(exported, Exported):
        bits = exported.config
    is_dynamic = runtime.batch_size is None
    lowered = lower(model, bits, example_input=first.images, dynamic_batch=is_dynamic)
    comparison = _Comparison(model, lowered, runtime, file=file, threads=threads)
    for piece in itertools.chain([first], pieces):
        comparison.add(piece)
    raised = exported.raised if isinstance(exported, Exported) else to_integers(lowered).raised
    float_size = measured = None
    if speed and comparison.has_float_weights:
        float_size, measured = _costs(model, lowered, runtime, file=file, threads=threads)
    return ParityReport(
        path=file,
        runtime=runtime.name,
        config=lowered.config,
        layers=() if comparison.codes is None else comparison.codes.layers(),
        logits=compare_logits(
            joined(comparison.outputs), comparison.labels if labels is None else labels
        ),
        size=size_of(file),
        float_size=float_size,
        speed=measured,
        shared=() if comparison.codes is None else comparison.codes.missing,
        floating=lowered.floating,
        raised=raised,
    )


def _file_of(exported: Exported | str | os.PathLike[str]) -> Path:
    if not isinstance(exported, Exported):
        return Path(exported)
    if exported.target not in CHECKED_TARGETS:
        msg = f"a file for target {exported.target!r} has no runtime here: one for "
        msg += f"{' or '.join(map(repr, CHECKED_TARGETS))} can be compared with the network"
        raise ExportError(msg)
    return exported.path


class _Comparison:
    """Runs pieces of images in all ways that are compared.

    Attributes:
        codes: Comparison of the codes; None if the file is none of ONNX, or before the first piece.
        outputs: Of each piece.
        has_float_weights: Whether the float network can run.
    """

    def __init__(
        self,
        model: ConvertedModel,
        lowered: Lowered,
        runtime: Runtime,
        *,
        file: Path,
        threads: int,
    ) -> None:
        self._lowered = lowered
        self._reference = Reference(lowered)
        self._runtime = runtime
        self._file = file
        self._threads = threads
        self._single = copy.deepcopy(model).cpu().eval()
        self._double = copy.deepcopy(self._single).double()
        self.codes: CodeComparison | None = None
        self.outputs: list[Outputs] = []
        self.has_float_weights = not model.is_packed
        self._labels: list[Tensor] = []

    @property
    def labels(self) -> Tensor | None:
        """Class of each image, if all batches had them."""
        return torch.cat(self._labels) if len(self._labels) == len(self.outputs) else None

    @torch.no_grad()
    def add(self, piece: Piece) -> None:
        """Run the images of a piece."""
        lowered, points = self._reference.run(piece.images)
        alone = None
        if self._file.suffix == ".onnx":
            if self.codes is None:
                self.codes = self._comparison_of_codes(points)
            alone = self.codes.add(piece.images, points)
        config = self._lowered.config
        computed = {
            "network": _run(self._single, piece.images, config),
            "lowered": lowered,
            "file": self._runtime.run(piece.images),
            "alone": alone,
            "double": _run(self._double, piece.images.double(), config),
            "floating": None,
            "floating_double": None,
        }
        if self.has_float_weights:
            computed["floating"] = _run(self._single, piece.images, None)
            computed["floating_double"] = _run(self._double, piece.images.double(), None)
        # Images that only fill up a batch are no part of what is compared.
        for name, output in computed.items():
            computed[name] = None if output is None else output[: piece.number]
        self.outputs.append(Outputs(**computed))  # type: ignore[arg-type]
        if piece.labels is not None:
            self._labels.append(piece.labels)

    def _comparison_of_codes(self, points: dict[str, PointValues]) -> CodeComparison:
        require_extra("onnx", extra="onnxruntime")
        from anyprec.exporting.parity_codes import CodeComparison  # noqa: PLC0415 (imports onnx)

        return CodeComparison(
            self._file,
            self._lowered,
            points=points,
            grids=self._reference.grids,
            threads=self._threads,
        )


def _run(model: ConvertedModel, images: Tensor, config: BitConfig | None) -> Tensor:
    with model.using_bits(config):
        return first_output(model(images))


def _costs(
    model: ConvertedModel, lowered: Lowered, runtime: Runtime, *, file: Path, threads: int
) -> tuple[int, SpeedParity]:
    """Size of the float network's file, and the time of both."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / f"float{file.suffix}"
        write_float_network(
            model, written, example=lowered.example, dynamic_batch=lowered.dynamic_batch
        )
        size = size_of(written)
        floating = load_in_runtime(written, threads=threads)
        batch = runtime.batch_size or 1
        images = lowered.example[:batch]
        calls = {"file": lambda: runtime.run(images), "float": lambda: floating.run(images)}
        times = median_times(calls)
    return size, SpeedParity(times["file"], times["float"], batch, threads)
