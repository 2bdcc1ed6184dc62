"""How dense code is: figures of a source tree, to hold beside those of other projects.

    python -m benchmarks.readability                                # anyprec, benchmarks and tests
    python -m benchmarks.readability .venv/lib/python3*/site-packages/httpx

Blank lines, comments and docstrings are no lines of code. A comprehension is nested if it stands inside another one or
has several loops. Names are those that code gives: of variables, arguments, functions and classes, each counted where it
is bound. Complexity is McCabe's as radon counts it: comprehensions and boolean operators are branches, too.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from radon.complexity import cc_visit
from radon.visitors import Function
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TREES = ("anyprec", "benchmarks", "tests")

VAGUE = frozenset(
    ["found", "own", "one", "every", "known", "parts", "seen", "kept", "place", "here", "other"]
)
"""Names that do not say what a thing is."""

LONGEST_LINE = 100
COMPLEX = 10
"""Complexity above which a function is counted."""

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
)


@dataclass
class Figures:
    """Counts over all files of a tree.

    Attributes:
        lines: Lines, blank ones included.
        code: Lines of code.
        comments: Lines that hold nothing but a comment.
        long: Lines over `LONGEST_LINE` characters.
        comprehensions: All comprehensions and generator expressions.
        nested: Those inside another one, once for each, and those with several loops.
        ternaries: Conditional expressions.
        names: Names that are bound.
        vague: Those among `VAGUE`.
        complex: Functions over `COMPLEX`.
    """

    lines: int = 0
    code: int = 0
    comments: int = 0
    long: int = 0
    comprehensions: int = 0
    nested: int = 0
    ternaries: int = 0
    names: int = 0
    vague: int = 0
    complex: int = 0


def measure(tree: Path) -> Figures:
    """The figures of all Python files below a folder."""
    figures = Figures()
    for path in sorted(tree.rglob("*.py")):
        text = path.read_text()
        _count_lines(text, figures)
        _count_expressions(ast.parse(text), figures)
        figures.complex += sum(block.complexity > COMPLEX for block in _functions(text))
    return figures


def _functions(text: str) -> Iterator[Function]:
    for block in cc_visit(text):
        if isinstance(block, Function):
            yield block


def _count_lines(text: str, figures: Figures) -> None:
    code_lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            figures.comments += 1
        if token.type not in _NO_CODE:
            code_lines.update(range(token.start[0], token.end[0] + 1))
    code_lines -= _docstring_lines(ast.parse(text))
    lines = text.splitlines()
    figures.lines += len(lines)
    figures.code += len(code_lines & set(range(1, len(lines) + 1)))
    figures.long += sum(len(line) > LONGEST_LINE for line in lines)


def _docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def _count_expressions(tree: ast.Module, figures: Figures) -> None:
    for node in ast.walk(tree):
        if isinstance(node, _COMPREHENSIONS):
            figures.comprehensions += 1
            inner = sum(isinstance(child, _COMPREHENSIONS) for child in ast.walk(node)) - 1
            figures.nested += inner + (len(node.generators) > 1)
        figures.ternaries += isinstance(node, ast.IfExp)
    for name in _bound_names(tree):
        figures.names += 1
        figures.vague += name.strip("_") in VAGUE


def _bound_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def rows(figures: Figures) -> list[str]:
    """The figures as text, in the order of `LABELS`."""
    thousands = figures.code / 1000
    return [
        f"{figures.lines:,}",
        f"{figures.code:,}",
        f"{figures.comprehensions / thousands:.0f} ({figures.nested / thousands:.1f})",
        f"{figures.ternaries / thousands:.0f}",
        f"{100 * figures.long / figures.lines:.1f} %",
        f"{100 * figures.comments / figures.lines:.1f} %",
        f"{1000 * figures.vague / figures.names:.1f}",
        f"{figures.complex}",
    ]


LABELS = (
    "lines",
    "lines of code",
    "comprehensions per 1,000 lines of code (nested)",
    "ternaries per 1,000 lines of code",
    f"lines over {LONGEST_LINE} characters",
    "comment lines",
    "vague names per 1,000 names",
    f"functions over complexity {COMPLEX}",
)


def main(arguments: Iterable[str] | None = None) -> None:
    """Print a column for each tree."""
    parser = argparse.ArgumentParser(description="How dense the code of source trees is.")
    parser.add_argument("trees", nargs="*", type=Path, default=[ROOT / name for name in TREES])
    trees = parser.parse_args(None if arguments is None else list(arguments)).trees
    table = Table("", *(tree.name for tree in trees))
    columns = [rows(measure(tree)) for tree in trees]
    for label, *cells in zip(LABELS, *columns, strict=True):
        table.add_row(label, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
