"""Exported files run in the runtime that they are made for: ONNX Runtime, OpenVINO, on the CPU.

Both libraries are imported on use. Images and results are torch tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyprec.errors import ExportError
from anyprec.exporting.extras import require_extra


class Runtime(ABC):
    """A network that a runtime has loaded.

    Attributes:
        name: The runtime, with its version.
        batch_size: Images that a batch must have; None for any number.
    """

    name: str
    batch_size: int | None

    @abstractmethod
    def run(self, images: Tensor) -> Tensor:
        """The network's (first) output for a batch of images in float32.

        Raises:
            ExportError: The runtime fails, for example since the images do not fit.
        """


def onnx_session(source: str | bytes, *, threads: int, **settings: Any) -> Any:
    """A session of onnxruntime on the CPU.

    Args:
        source: Path of a model, or the model.
        threads: How many it may use.
        settings: Further attributes of onnxruntime's `SessionOptions`.
    """
    import onnxruntime  # noqa: PLC0415 (optional)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for name, value in settings.items():
        setattr(options, name, value)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class OnnxRuntime(Runtime):
    """An ONNX model in ONNX Runtime.

    Args:
        model: A file, or the model as bytes.
        threads: How many it may use.

    Attributes:
        first_output: Its name.

    Raises:
        ExportError: onnxruntime is not installed, or does not load the model.
    """

    def __init__(self, model: Path | bytes, *, threads: int = 1) -> None:
        require_extra("onnxruntime", extra="onnxruntime")
        import onnxruntime  # noqa: PLC0415 (optional)

        source = str(model) if isinstance(model, Path) else model
        try:
            session = onnx_session(source, threads=threads)
        except Exception as error:
            msg = _not_loaded("onnxruntime", model, error)
            raise ExportError(msg) from error
        self.name = f"onnxruntime {onnxruntime.__version__}"
        self._session: Any = session
        images = session.get_inputs()[0]
        self._images_name = images.name
        self.first_output: str = session.get_outputs()[0].name
        self.batch_size = images.shape[0] if isinstance(images.shape[0], int) else None

    def run(self, images: Tensor) -> Tensor:
        """See `Runtime`."""
        return self.run_named(images, [self.first_output])[self.first_output]

    def run_named(
        self, images: Tensor, outputs: Iterable[str], *, more: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Several outputs by name.

        Args:
            images: A batch.
            outputs: Names of outputs.
            more: Values of the other inputs by name.

        Raises:
            ExportError: as `run`.
        """
        names = list(outputs)
        feeds = {self._images_name: images.numpy()}
        for name, value in (more or {}).items():
            feeds[name] = value.numpy()
        try:
            values = self._session.run(names, feeds)
        except Exception as error:
            msg = _failed("onnxruntime", images, error)
            raise ExportError(msg) from error
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


class OpenVino(Runtime):
    """A file in OpenVINO: its own IR, or ONNX.

    Args:
        file: The file.
        threads: How many it may use.

    Raises:
        ExportError: openvino is not installed, or does not load the file.
    """

    def __init__(self, file: Path, *, threads: int = 1) -> None:
        require_extra("openvino", extra="openvino")
        import openvino  # noqa: PLC0415 (optional)

        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # Some CPUs would compute what is left in floating point with 16 bits.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        try:
            model = openvino.Core().read_model(file)
            compiled = openvino.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            msg = _not_loaded("OpenVINO", file, error)
            raise ExportError(msg) from error
        self.name = f"OpenVINO {openvino.__version__.partition('-')[0]}"
        self._request = compiled.create_infer_request()
        batch = model.inputs[0].partial_shape[0]
        self.batch_size = None if batch.is_dynamic else batch.get_length()

    def run(self, images: Tensor) -> Tensor:
        """See `Runtime`."""
        try:
            results = self._request.infer({0: images.numpy()})
        except RuntimeError as error:
            msg = _failed("OpenVINO", images, error)
            raise ExportError(msg) from error
        return torch.from_numpy(results[0].copy())


_RUNTIMES: dict[str, type[OnnxRuntime] | type[OpenVino]] = {".onnx": OnnxRuntime, ".xml": OpenVino}


def load_in_runtime(file: Path, *, threads: int = 1) -> Runtime:
    """Load a file in the runtime that its name tells: `.onnx` or `.xml`.

    Raises:
        ExportError: There is no such file, no runtime for it here, the runtime is not installed, or
            does not load it.
    """
    if not file.is_file():
        msg = f"there is no file {str(file)!r}: export the network first"
        raise ExportError(msg)
    if file.suffix not in _RUNTIMES:
        msg = f"no runtime here runs {file.name!r}: a check needs a file that ends with "
        msg += f"{' or '.join(map(repr, _RUNTIMES))}"
        raise ExportError(msg)
    return _RUNTIMES[file.suffix](file, threads=threads)


def _not_loaded(runtime: str, model: Path | bytes, error: Exception) -> str:
    name = repr(str(model)) if isinstance(model, Path) else "the model"
    return f"{runtime} does not load {name} ({_last_line(error)}): export it again"


def _failed(runtime: str, images: Tensor, error: Exception) -> str:
    msg = f"{runtime} does not run images of shape {tuple(images.shape)} ({_last_line(error)}): "
    return msg + "pass images of the size that the network was exported for"


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"
