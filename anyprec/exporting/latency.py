"""How long each layer takes at each precision, measured in the runtime that is to run it.

The network is exported at every uniform precision that its layers have, and run by turns. The
runtime's own profile says how long each operator took; quantizers, additions and copies count for
the layer that reads their result next. So the times of all layers add up to that of the network.
What a table of layers cannot know is what two neighbours of different precision cost each other.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from anyprec.bits import BitConfig, Bits, BitsLike
from anyprec.errors import ExportError
from anyprec.exporting.extras import require_extra
from anyprec.exporting.integers import to_integers
from anyprec.exporting.lowering import lower
from anyprec.exporting.onnx_profile import layer_of_operators
from anyprec.exporting.runtimes import onnx_session
from anyprec.model.converted import ConvertedModel, require_converted
from anyprec.model.hardware import hardware as hardware_of

MEASURABLE = ("onnxruntime",)
"""Targets whose runtime measures here."""

LatencyTable = dict[str, dict[BitsLike, float]]
"""Seconds of each layer, by path and precision: `costs={"latency": table}` of `search`."""


def measure_latency(
    model: ConvertedModel,
    *,
    hardware: str = "onnxruntime",
    example_input: Tensor | None = None,
    rounds: int = 30,
    threads: int = 1,
) -> LatencyTable:
    """Measure how long each layer takes at each precision that the target runs.

    Args:
        model: A calibrated network; not changed.
        hardware: The target, one whose runtime is installed here: `"onnxruntime"`.
        example_input: One image or a batch, whose time is measured; by default one image of the
            size that the network was converted on.
        rounds: How often every precision is run; the median counts.
        threads: How many the runtime may use.

    Returns:
        Seconds by path and precision. They add up to the time of the whole network at any uniform
        precision. Pass it to `search(costs={"latency": ...})`, whose budget may then be `"2.5 ms"`.

    Raises:
        HardwareError: The target is not known.
        ExportError: Its runtime cannot be measured here, or a library is missing.
        NotCalibratedError: as `set_bits`.

    Example:
        >>> import timm, torch, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet").eval(), bits=8)
        >>> anyprec.calibrate(model, [torch.randn(2, 3, 160, 160)])
        >>> table = anyprec.measure_latency(model, rounds=3)
        >>> sorted(table) == sorted(model.candidates)
        True
    """
    require_converted(model, purpose="measure_latency")
    preset = hardware_of(hardware)
    if preset.name not in MEASURABLE:
        msg = f"times of {hardware!r} cannot be measured here, only those of "
        msg += (
            f"{', '.join(map(repr, MEASURABLE))}: measure on the device, and pass search a table "
        )
        msg += 'of your own, costs={"latency": {path: {"W8A8": seconds}}}'
        raise ExportError(msg)
    require_extra("onnx", "onnxscript", extra="onnx")
    require_extra("onnxruntime", extra="onnxruntime")
    if example_input is None:
        _, *shape = model.anyprec_record.facts.example_shape
        example_input = torch.zeros(1, *shape)
    configs = _configs(model)
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for bits, config in configs.items():
            runs[bits] = _ProfiledRun(
                model, config, example_input, Path(folder) / str(bits), threads
            )
        for _ in range(rounds):
            for run in runs.values():
                run.time_once()
        measured = {bits: run.seconds_of_layers() for bits, run in runs.items()}
    return _table(model, configs, measured)


def _configs(model: ConvertedModel) -> dict[Bits, BitConfig]:
    """A uniform configuration for each pair of bit-widths that any layer has."""
    pairs: dict[Bits, None] = {}
    for candidates in model.candidates.values():
        for weight in candidates.weight:
            for activation in candidates.activation:
                pairs[Bits(weight, activation)] = None
    configs: dict[Bits, BitConfig] = {}
    for bits in sorted(pairs, key=lambda pair: (pair.weight, pair.activation)):
        chosen: dict[str, Bits] = {}
        for path, candidates in model.candidates.items():
            weight = min(candidates.weight, key=lambda width: abs(width - bits.weight))
            activation = min(candidates.activation, key=lambda width: abs(width - bits.activation))
            chosen[path] = Bits(weight, activation)
        configs[bits] = BitConfig(chosen)
    return configs


def _table(
    model: ConvertedModel,
    configs: Mapping[Bits, BitConfig],
    measured: Mapping[Bits, Mapping[str, float]],
) -> LatencyTable:
    """The times of each layer at each of its precisions, the median where there are several."""
    table: LatencyTable = {}
    for path in model.candidates:
        times: dict[Bits, list[float]] = defaultdict(list)
        for bits, config in configs.items():
            times[config[path]].append(measured[bits].get(path, 0.0))
        table[path] = {bits: statistics.median(values) for bits, values in times.items()}
    return table


class _ProfiledRun:
    """One exported configuration, which onnxruntime times operator by operator."""

    def __init__(
        self,
        model: ConvertedModel,
        config: BitConfig,
        images: Tensor,
        prefix: Path,
        threads: int,
    ) -> None:
        # Imported on use: both need libraries that are not installed with anyprec.
        import onnx  # noqa: PLC0415

        from anyprec.exporting.onnx_file import onnx_model, write_onnx  # noqa: PLC0415

        self._layers = list(config)
        self._feeds = {"images": images.numpy()}
        file, optimized = prefix.with_suffix(".onnx"), prefix.with_suffix(".optimized.onnx")
        write_onnx(onnx_model(to_integers(lower(model, config, example_input=images))), file)
        self._plain = onnx_session(str(file), threads=threads)
        self._profiled = onnx_session(
            str(file),
            threads=threads,
            optimized_model_filepath=str(optimized),
            enable_profiling=True,
            profile_file_prefix=str(prefix),
        )
        self._operators = layer_of_operators(onnx.load(optimized), self._layers)
        self._seconds: list[float] = []

    def time_once(self) -> None:
        """Run both sessions, one timed as a whole and one operator by operator."""
        start = time.perf_counter()
        self._plain.run(None, self._feeds)
        self._seconds.append(time.perf_counter() - start)
        self._profiled.run(None, self._feeds)

    def seconds_of_layers(self) -> dict[str, float]:
        """Seconds of each layer, with what belongs to it; they add up to the whole run."""
        events = json.loads(Path(self._profiled.end_profiling()).read_text())
        durations: dict[str, list[float]] = defaultdict(list)
        for event in events:
            name = event["name"].removesuffix("_kernel_time")
            if event.get("cat") == "Node" and name != event["name"]:
                durations[name].append(event["dur"])
        seconds: dict[str, float] = dict.fromkeys(self._layers, 0.0)
        for name, microseconds in durations.items():
            seconds[self._operators[name]] += statistics.median(microseconds)
        # Profiling costs time of its own.
        whole = statistics.median(self._seconds)
        factor = whole / sum(seconds.values())
        return {path: factor * value for path, value in seconds.items()}
