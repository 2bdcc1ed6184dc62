"""`anyprec` on the command line.

What was asked for goes to standard output, errors to standard error with exit status 1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from anyprec.bits import BitConfig
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
    if as_json:
        typer.echo(json.dumps(info, default=_json_value, indent=1))
    else:
        typer.echo(str(info))


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
