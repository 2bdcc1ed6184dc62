"""What a comparison of an exported file with its network found: values, text, table and plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from anyprec.bits import BitConfig
from anyprec.exporting.biases import RaisedScale
from anyprec.report.agreement import agreement_plot
from anyprec.runtime.tables import TableContent

NEAR_TIE = 0.1
"""Steps between a value and the tie of two codes, at most, where runtimes may choose either code.

A bias that becomes an integer loses up to half a unit of the accumulator, which is the more of a
step the fewer the inputs of a channel and their bits: 0.003 for the first layer of a ResNet, 0.05
for inputs of two bits. The rest is float32.
"""


@dataclass(frozen=True)
class CodeParity:
    """Codes of one activation quantizer.

    Attributes:
        point: Path of the layer whose input it quantizes (`path:2` in its second call), or of what
            has its output quantized.
        weight_bits: Of that layer; None if the point is no layer's input.
        bits: Of the codes.
        codes: How many were compared.
        equal: Share of equal codes, when the whole network runs.
        largest: Largest difference, in steps.
        alone_equal: Share of equal codes where what is before the quantizer gets equal codes.
        alone_largest: Largest difference there, in steps.
        tie_distance: By how much of a step the values of differing codes are from the tie, at most,
            there.
    """

    point: str
    weight_bits: int | None
    bits: int
    codes: int
    equal: float
    largest: int
    alone_equal: float
    alone_largest: int
    tie_distance: float

    @property
    def holds(self) -> bool:
        """Whether equal input codes gave codes at most one step apart, and only near ties."""
        return self.alone_largest <= 1 and self.tie_distance <= NEAR_TIE


@dataclass(frozen=True)
class LogitParity:
    """Outputs of the network. Differences are in standard deviations of its logits.

    Attributes:
        images: How many were compared.
        mean: Mean difference of file and network.
        largest: Their largest difference.
        lowered_largest: Largest difference of the lowered graph and the network; 0 is promised.
        alone_largest: Largest difference where the last layers get equal codes; None if the file
            tells no codes.
        noise: Mean difference of the network at this configuration in float32 and float64.
        float_noise: That of the float network; None if there are no float weights.
        agreeing: Images with the same top-1 class; None if the outputs are no logits.
        accuracy: Top-1 of the network in percent; None without labels.
        file_accuracy: Top-1 of the file.
        pairs: Logits of network and file, at most a few thousand.
    """

    images: int
    mean: float
    largest: float
    lowered_largest: float
    alone_largest: float | None
    noise: float
    float_noise: float | None
    agreeing: int | None
    accuracy: float | None
    file_accuracy: float | None
    pairs: tuple[tuple[float, float], ...] = field(repr=False)

    @property
    def agreement(self) -> float | None:
        """Images with the same top-1 class, in percent."""
        return None if self.agreeing is None else 100 * self.agreeing / self.images

    @property
    def agreement_interval(self) -> tuple[float, float] | None:
        """Exact 95 % interval of the agreement, in percent (Clopper and Pearson, 1934)."""
        if self.agreeing is None:
            return None
        from scipy.stats import binomtest  # noqa: PLC0415 (slow to import)

        interval = binomtest(self.agreeing, self.images).proportion_ci(0.95, method="exact")
        return 100 * float(interval.low), 100 * float(interval.high)


@dataclass(frozen=True)
class SpeedParity:
    """Time of a batch, file and float network in turns.

    Attributes:
        seconds: Median of the file.
        float_seconds: Median of the float network, in the same format and runtime.
        batch_size: Images of the batch.
        threads: How many the runtime could use.
    """

    seconds: float
    float_seconds: float
    batch_size: int
    threads: int

    @property
    def ratio(self) -> float:
        """How many times as fast as the float network the file is."""
        return self.float_seconds / self.seconds


@dataclass(frozen=True)
class ParityReport:
    """What `check_export` found.

    Attributes:
        path: The file.
        runtime: What ran it, with its version.
        config: Precision of each layer.
        layers: Codes of each quantizer in the file; empty for files that tell none (OpenVINO).
        logits: The outputs.
        size: Bytes of the file, with those of files beside it.
        float_size: The same of the float network; None if it was not written.
        speed: None if it was not measured.
        shared: Quantizers that the file does not have, since an equal one does their work.
        floating: Layers that stay in floating point, with the reason.
        raised: Layers with channels of another weight scale, so that their bias fits into int32.
    """

    path: Path
    runtime: str
    config: BitConfig = field(repr=False)
    layers: tuple[CodeParity, ...] = field(repr=False)
    logits: LogitParity
    size: int
    float_size: int | None
    speed: SpeedParity | None
    shared: tuple[str, ...]
    floating: dict[str, str]
    raised: tuple[RaisedScale, ...]

    @property
    def broken(self) -> tuple[CodeParity, ...]:
        """Quantizers at which the file does not do what the network does (`CodeParity.holds`)."""
        return tuple(row for row in self.layers if not row.holds)

    def table(self) -> Table:
        """Codes of each layer, for `rich.print`."""
        return _layer_table(self).rich()

    def summary(self) -> Table:
        """Everything else, for `rich.print`."""
        return _summary_table(self).rich()

    def markdown(self) -> str:
        """Both tables in Markdown."""
        parts = [f"## {_title(self)}", _summary_table(self).markdown()]
        if self.layers:
            parts += ["## Codes", _layer_table(self).markdown()]
        return "\n\n".join(parts) + "\n"

    def __str__(self) -> str:
        parts = [_summary_table(self).text()]
        if self.layers:
            parts.append(_layer_table(self).text())
        return "\n\n".join(parts)

    def plot(self, path: str | Path) -> None:
        """Plot the share of equal codes of each layer, and logits of file against network.

        Args:
            path: File to write; its suffix determines the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        agreement_plot(
            {row.point: (100 * row.equal, 100 * row.alone_equal) for row in self.layers},
            self.logits.pairs,
            path,
            title=_title(self),
        )


def _title(report: ParityReport) -> str:
    images = f"{report.logits.images} image{'s' if report.logits.images != 1 else ''}"
    return f"{report.path.name} in {report.runtime} against the network, {images}"


def _summary_table(report: ParityReport) -> TableContent:
    rows = [
        *_logit_rows(report.logits),
        *_code_rows(report),
        *_cost_rows(report),
        *_exception_rows(report),
    ]
    return TableContent(("what", "measured"), rows, (), _title(report))


def _logit_rows(logits: LogitParity) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if logits.agreeing is not None and logits.agreement_interval is not None:
        low, high = logits.agreement_interval
        share = f"{logits.agreement:.1f} % ({logits.agreeing} of {logits.images}; "
        rows.append(("same top-1 class", f"{share}95 % interval {low:.1f} to {high:.1f} %)"))
    if logits.accuracy is not None:
        accuracies = f"{logits.file_accuracy:.2f} %, network {logits.accuracy:.2f} %"
        rows.append(("top-1 accuracy", accuracies))
    rows += [
        ("mean logit difference", _deviations(logits.mean)),
        ("largest logit difference", _deviations(logits.largest)),
        ("mean difference to float64", _deviations(logits.noise)),
    ]
    if logits.float_noise is not None:
        rows.append(("the same of the float network", _deviations(logits.float_noise)))
    rows.append(("lowered graph, largest difference", _deviations(logits.lowered_largest)))
    if logits.alone_largest is not None:
        rows.append(("last layers alone, largest", _deviations(logits.alone_largest)))
    return rows


def _code_rows(report: ParityReport) -> list[tuple[str, str]]:
    if not report.layers:
        return []
    codes = sum(row.codes for row in report.layers)
    equal = sum(row.equal * row.codes for row in report.layers) / codes
    alone = sum(row.alone_equal * row.codes for row in report.layers) / codes
    distance = max(row.tie_distance for row in report.layers)
    largest = max(row.alone_largest for row in report.layers)
    rows = [
        ("equal codes", f"{100 * equal:.3f} % of {codes:,}"),
        ("equal codes, each layer alone", f"{100 * alone:.3f} %"),
        (
            "largest difference, each alone",
            f"{_steps(largest)}, {distance:.4f} of a step from the tie",
        ),
    ]
    if report.broken:
        names = ", ".join(row.point for row in report.broken)
        rows.append(("more than a tie apart", names))
    return rows


def _cost_rows(report: ParityReport) -> list[tuple[str, str]]:
    size = f"{report.size / 2**20:.2f} MiB"
    if report.float_size is not None:
        size += f", 1/{report.float_size / report.size:.1f} of float "
        size += f"({report.float_size / 2**20:.2f} MiB)"
    rows = [("size of the file", size)]
    speed = report.speed
    if speed is not None:
        threads = f"{speed.threads} thread{'s' if speed.threads != 1 else ''}"
        times = f"{1e3 * speed.seconds:.2f} ms, float {1e3 * speed.float_seconds:.2f} ms: "
        rows.append((f"batch of {speed.batch_size}, {threads}", f"{times}{speed.ratio:.2f}x"))
    return rows


def _exception_rows(report: ParityReport) -> list[tuple[str, str]]:
    rows = [("in floating point", f"{path}: {why}") for path, why in report.floating.items()]
    for change in report.raised:
        what = f"{change.layer}: {change.channels} channels, up to {change.largest:g}x"
        rows.append(("weight scale raised", what))
    if report.shared:
        rows.append(("share another's quantizer", ", ".join(report.shared)))
    return rows


def _layer_table(report: ParityReport) -> TableContent:
    numbers = (
        "codes",
        "equal %",
        "largest",
        "alone: equal %",
        "alone: largest",
        "from the tie",
    )
    rows: list[tuple[str, ...]] = []
    for row in report.layers:
        bits = f"A{row.bits}" if row.weight_bits is None else f"W{row.weight_bits}A{row.bits}"
        rows.append(
            (
                row.point,
                bits,
                f"{row.codes:,}",
                f"{100 * row.equal:.3f}",
                str(row.largest),
                f"{100 * row.alone_equal:.3f}",
                str(row.alone_largest),
                f"{row.tie_distance:.4f}",
            )
        )
    return TableContent(("input of", "bits", *numbers), rows, numbers)


def _deviations(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e} standard deviations"


def _steps(number: int) -> str:
    return f"{number} step{'s' if number != 1 else ''}"
