"""`anyprec` on the command line. Messages go to standard output, errors to standard error with exit status 1."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from anyprec.checkpoint.inspection import CheckpointInfo
from anyprec.checkpoint.inspection import inspect as inspect_file
from anyprec.errors import AnyprecError

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
    typer.echo(json.dumps(_plain(info), indent=1) if as_json else str(info))


def _plain(info: CheckpointInfo) -> dict[str, Any]:
    return {
        **{field.name: getattr(info, field.name) for field in dataclasses.fields(info)},
        "architecture": None
        if info.architecture is None
        else dataclasses.asdict(info.architecture),
        "settings": {
            **{name: value for name, value in vars(info.settings).items() if name != "only"},
            "only": None if info.settings.only is None else info.settings.only.to_json(),
        },
        "layers": {path: dataclasses.asdict(layer) for path, layer in info.layers.items()},
        "configs": {name: config.to_json() for name, config in info.configs.items()},
        "notes": {
            name: {**vars(note), "found": dict(note.found)} for name, note in info.notes.items()
        },
        "frozen": info.frozen.to_json(),
        "statistics": [config.to_json() for config in info.statistics],
    }


if __name__ == "__main__":
    app()
