"""The search file: every score that was measured, a line each.

A search goes on from it where it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

import msgspec

from anyprec.bits import BitConfig, Bits
from anyprec.errors import SearchError
from anyprec.runtime.processes import is_first_process, of_first_process

_FORMAT = "anyprec-search-1"


class _Head(msgspec.Struct):
    format: str
    fingerprint: str
    layers: list[str]


class _Entry(msgspec.Struct):
    bits: list[tuple[int, int]]
    score: float | None  # None is an infinite one: JSON has no such number


class Memo:
    """Scores on disk. The first process writes; all read the same.

    Args:
        file: File of JSON lines, made if it does not exist; None stores nothing.
        fingerprint: What the scores depend on; a file with another one is refused.
        layers: Paths of the layers, in the order of the file's bits.

    Attributes:
        scores: Those that the file had.

    Raises:
        SearchError: The file is no search file, is of another search, or cannot be read or written.
    """

    def __init__(self, file: str | Path | None, *, fingerprint: str, layers: Iterable[str]) -> None:
        self._file = None if file is None else Path(file)
        self._head = _Head(_FORMAT, fingerprint, list(layers))
        self._stream: TextIO | None = None
        scores: dict[BitConfig, float] = {}
        problem = None
        if self._file is not None and is_first_process():
            try:
                scores = self._open(self._file)
            except SearchError as error:
                problem = str(error)
        # Every process must refuse the file if the first one does, or the others would wait for it.
        self.scores, problem = of_first_process((scores, problem))
        if problem is not None:
            raise SearchError(problem)

    def write(self, config: BitConfig, score: float) -> None:
        """Add a score; it is on its way to the disk when this returns."""
        if self._stream is None:
            return
        bits = as_pairs(config, self._head.layers)
        try:
            self._write_line(_Entry(bits, score if math.isfinite(score) else None))
        except OSError as error:
            msg = f"cannot write to the search file {self._file}: {error.strerror}"
            raise SearchError(msg) from error

    def __enter__(self) -> Memo:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def _open(self, file: Path) -> dict[BitConfig, float]:
        """Open the file to write at its end; the scores that it has."""
        try:
            exists = file.exists()
            text = file.read_text("utf-8") if exists else ""
            *lines, cut_off = text.split("\n")
            if cut_off and not lines:
                raise _foreign(file)
            scores = self._read(file, lines) if lines else {}
            self._stream = file.open("r+" if exists else "x", encoding="utf-8", newline="\n")
            # A line without its end was cut off when the process died: it is written over.
            self._stream.seek(len(text.encode()) - len(cut_off.encode()))
            self._stream.truncate()
            if not lines:
                self._write_line(self._head)
        except OSError as error:
            msg = f"cannot open the search file {file}: {error.strerror}"
            raise SearchError(msg) from error
        except UnicodeDecodeError as error:
            raise _foreign(file) from error
        return scores

    def _read(self, file: Path, lines: list[str]) -> dict[BitConfig, float]:
        scores = {}
        try:
            self._require_same(file, msgspec.json.decode(lines[0], type=_Head))
            decoder = msgspec.json.Decoder(_Entry)
            for line in lines[1:]:
                entry = decoder.decode(line)
                score = math.inf if entry.score is None else entry.score
                scores[from_pairs(entry.bits, self._head.layers)] = score
        except SearchError:
            raise
        except (msgspec.DecodeError, ValueError) as error:
            raise _foreign(file) from error
        return scores

    def _require_same(self, file: Path, head: _Head) -> None:
        if head.format != _FORMAT:
            raise _foreign(file)
        if head != self._head:
            msg = f"the search file {file} belongs to another search: the network, its weights, "
            msg += "the images, the objective or the norms are not the same; "
            msg += "use another file, or delete it"
            raise SearchError(msg)

    def _write_line(self, entry: _Head | _Entry) -> None:
        if self._stream is not None:
            self._stream.write(msgspec.json.encode(entry).decode() + "\n")
            self._stream.flush()


def as_pairs(config: BitConfig, paths: Sequence[str]) -> list[tuple[int, int]]:
    """A configuration for JSON: weight and activation bits of each layer, in order of `paths`."""
    return [(config[path].weight, config[path].activation) for path in paths]


def from_pairs(pairs: Sequence[tuple[int, int]], paths: Sequence[str]) -> BitConfig:
    """The configuration that `as_pairs` wrote.

    Raises:
        BitsError, ValueError: It is none of these layers.
    """
    return BitConfig({path: Bits(*pair) for path, pair in zip(paths, pairs, strict=True)})


def _foreign(file: Path) -> SearchError:
    msg = f"{file} is no search file, or is damaged: name a new file, or one that search wrote"
    return SearchError(msg)
