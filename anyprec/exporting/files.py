"""Writing an exported file: as a whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anyprec.errors import ExportError
from anyprec.runtime.storage import replacing


def write_bytes(content: bytes, path: Path) -> None:
    """Write a file; `path` holds the old content or the new one.

    Raises:
        ExportError: It cannot be written.
    """
    with refusing_to_write(path, OSError), replacing(path) as temporary:
        Path(temporary).write_bytes(content)


@contextmanager
def refusing_to_write(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """In the block, these errors mean that `path` cannot be written.

    Raises:
        ExportError: One of them was raised.
    """
    try:
        yield
    except errors as error:
        msg = f"cannot write {str(path)!r} ({type(error).__name__}: {error}); what stood there "
        msg += "before is unchanged"
        raise ExportError(msg) from error
