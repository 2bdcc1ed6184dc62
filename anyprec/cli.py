"""`anyprec` on the command line.

What was asked for goes to standard output, errors to standard error with exit status 1.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from anyprec.bits import BitConfig
from anyprec.checkpoint.inspection import inspect as inspect_file
from anyprec.checkpoint.loading import load
from anyprec.errors import AnyprecError, ExportError
from anyprec.exporting.parity import check_export
from anyprec.exporting.targets import target_of
from anyprec.exporting.writing import Exported
from anyprec.exporting.writing import export as export_model
from anyprec.integrations.image_files import read_images

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """One set of weights for every bit-width."""


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint that anyprec.save wrote.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what is inside a checkpoint, without building its network."""
    try:
        info = inspect_file(file)
    except AnyprecError as error:
        typer.echo(f"anyprec: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(info, default=_json_value, indent=1))
    else:
        typer.echo(str(info))


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A checkpoint that anyprec.save wrote.")],
    output: Annotated[Path, typer.Argument(help="File to write.")],
    *,
    target: Annotated[str, typer.Option(help="What the file is for.")] = "onnx",
    bits: Annotated[
        str, typer.Option(help="W4A8, 4, or the name of a stored configuration.")
    ] = "W8A8",
    images: Annotated[
        Path | None,
        typer.Option(
            help="Compare the file with the network on these: a folder of pictures, a .npy file of "
            "images as the network takes them, or a .npz file with 'images' and 'labels'."
        ),
    ] = None,
    most_images: Annotated[int, typer.Option(min=1, help="How many of them to use.")] = 256,
    report: Annotated[
        Path | None, typer.Option(help="Write the comparison to this Markdown file.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the comparison to this file.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="For the runtime.")] = 1,
    speed: Annotated[
        bool, typer.Option(help="Measure time and size of the float network, too.")
    ] = True,
) -> None:
    """Export a checkpoint at one precision for a runtime, and compare the two on images."""
    try:
        if images is None and (report is not None or plot is not None):
            msg = "--report and --plot show a comparison: pass the images for it, --images ..."
            raise ExportError(msg)
        model = load(file).eval()
        request = int(bits) if bits.isdecimal() else bits
        exported = export_model(model, output, bits=request, target=target)
        typer.echo(_exported_text(exported))
        if images is None:
            return
        chosen, labels = read_images(images, model, limit=most_images)
        found = check_export(model, exported, chosen, labels=labels, threads=threads, speed=speed)
        typer.echo(f"\n{found}")
        if report is not None:
            report.write_text(found.markdown())
        if plot is not None:
            found.plot(plot)
    except (AnyprecError, ImportError, OSError) as error:
        typer.echo(f"anyprec: {error}", err=True)
        raise typer.Exit(1) from error


def _exported_text(exported: Exported) -> str:
    """What an export made, for people."""
    counts = Counter(str(bits) for bits in exported.config.values())
    layers = ", ".join(f"{number} at {bits}" for bits, number in counts.most_common())
    size = f"{exported.size / 2**20:.2f} MiB"
    lines = [f"{exported.path}: {target_of(exported.target).title}, {size}", f"  layers  {layers}"]
    lines += [f"  in floating point  {path}: {why}" for path, why in exported.floating.items()]
    for change in exported.raised:
        channels = f"{change.channels} channels, up to {change.largest:g}x"
        lines.append(f"  weight scale raised  {change.layer}: {channels}")
    lines += [f"  note  {note}" for note in exported.notes]
    return "\n".join(lines)


def _json_value(value: Any) -> Any:
    """What JSON can hold of a value that it cannot."""
    if isinstance(value, BitConfig):
        return value.to_json()
    if dataclasses.is_dataclass(value):
        return vars(value)
    if isinstance(value, Mapping):
        return dict(value)
    msg = f"{type(value).__name__} has no JSON form"
    raise TypeError(msg)


if __name__ == "__main__":
    app()
