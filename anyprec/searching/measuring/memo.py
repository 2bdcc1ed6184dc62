"""The search file: every score that was measured, a line each, so that a search goes on where it was stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from anyprec.bits import BitConfig, Bits
from anyprec.errors import BitsError, SearchError
from anyprec.runtime.processes import is_first_process, of_first_process

_FORMAT = "anyprec-search-1"


class Memo:
    """Scores on disk. The first process writes; all read the same.

    Args:
        path: File of JSON lines, made if it does not exist; None keeps nothing.
        fingerprint: What the scores depend on; a file with another one is refused.
        layers: Paths of the layers, in the order of the file's bits.

    Attributes:
        known: The scores that the file had.

    Raises:
        SearchError: The file is no search file, is of another search, or cannot be read or written.
    """

    def __init__(self, path: str | Path | None, *, fingerprint: str, layers: Iterable[str]) -> None:
        self._path = None if path is None else Path(path)
        self._fingerprint = fingerprint
        self._layers = list(layers)
        self._file: TextIO | None = None
        self.known: dict[BitConfig, float] = {}
        problem = None
        if self._path is not None and is_first_process():
            try:
                self._open(self._path)
            except SearchError as error:
                problem = str(error)
        self.known, problem = of_first_process((self.known, problem))
        if problem is not None:
            raise SearchError(problem)

    def write(self, config: BitConfig, score: float) -> None:
        """Add a score; it is on its way to the disk when this returns."""
        if self._file is None:
            return
        entry = {
            "bits": as_pairs(config, self._layers),
            "score": score if math.isfinite(score) else None,
        }
        try:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        except OSError as error:
            msg = f"cannot write to the search file {self._path}: {error.strerror}"
            raise SearchError(msg) from error

    def __enter__(self) -> Memo:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self, path: Path) -> None:
        head = {"format": _FORMAT, "fingerprint": self._fingerprint, "layers": self._layers}
        try:
            lines = path.read_text("utf-8").split("\n") if path.exists() else []
            whole, rest = lines[:-1], lines[-1:]  # a line without its end was cut off
            if whole:
                self._read(path, whole)
            elif "".join(rest):
                raise _foreign(path)
            kept = "".join(line + "\n" for line in whole)
            self._file = path.open("r+" if path.exists() else "x", encoding="utf-8", newline="\n")
            self._file.seek(len(kept.encode()))
            self._file.truncate()
            if not whole:
                self._file.write(json.dumps(head) + "\n")
                self._file.flush()
        except OSError as error:
            msg = f"cannot open the search file {path}: {error.strerror}"
            raise SearchError(msg) from error
        except UnicodeDecodeError as error:
            raise _foreign(path) from error

    def _read(self, path: Path, lines: list[str]) -> None:
        try:
            head, *entries = [json.loads(line) for line in lines]
            if head["format"] != _FORMAT:
                raise _foreign(path)
            if head["layers"] != self._layers or head["fingerprint"] != self._fingerprint:
                msg = f"the search file {path} belongs to another search: the network, its weights, the images, the objective "
                msg += "or the norms are not the same; use another file, or delete it"
                raise SearchError(msg)
            for entry in entries:
                score = math.inf if entry["score"] is None else float(entry["score"])
                self.known[from_pairs(entry["bits"], self._layers)] = score
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, BitsError) as error:
            if isinstance(error, SearchError):
                raise
            raise _foreign(path) from error


def as_pairs(config: BitConfig, paths: Sequence[str]) -> list[list[int]]:
    """A configuration for JSON: weight and activation bits of each layer, in the order of `paths`."""
    return [[config[path].weight, config[path].activation] for path in paths]


def from_pairs(pairs: Sequence[Sequence[int]], paths: Sequence[str]) -> BitConfig:
    """The configuration that `as_pairs` wrote.

    Raises:
        BitsError, TypeError, ValueError: It is none of these layers.
    """
    return BitConfig({path: Bits(*pair) for path, pair in zip(paths, pairs, strict=True)})


def _foreign(path: Path) -> SearchError:
    msg = f"{path} is no search file, or is damaged: name a new file, or one that search wrote"
    return SearchError(msg)
