"""How dense code is: figures of a source tree, to hold beside those of other projects.

    python -m benchmarks.readability                        # anyprec, benchmarks and tests
    python -m benchmarks.readability .venv/lib/python3*/site-packages/httpx

What each figure means:

- *lines*: all lines of all Python files.
- *lines of code*: those that hold code. Blank lines, comments and docstrings do not count.
- *comprehensions*: list, set and dict comprehensions and generator expressions, per 1,000 lines of
  code. In brackets how often they are *nested*: each pair of a comprehension and one inside it
  counts, and so does each comprehension with several loops.
- *ternaries*: conditional expressions (`a if b else c`), per 1,000 lines of code.
- *lines over 100 characters*: percent of all lines.
- *comment lines*: lines that hold nothing but a comment, in percent of all lines.
- *vague names*: names such as `found` or `own`, which do not say what a thing is, per 1,000 names
  that the code binds. Names are those of variables, attributes, arguments, functions and classes;
  each is counted wherever it is bound. Underscores around a name do not matter.
- *functions over complexity 10*: complexity is McCabe's, as radon counts it: comprehensions and
  boolean operators are branches too.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from radon.complexity import cc_visit
from radon.visitors import Function
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TREES = [ROOT / "anyprec", ROOT / "benchmarks", ROOT / "tests"]

VAGUE = frozenset(
    ["found", "own", "one", "every", "known", "parts", "seen", "kept", "place", "here", "other"]
)
"""Names that do not say what a thing is."""

LONGEST_LINE = 100
COMPLEX = 10
"""Complexity above which a function is counted."""

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)


@dataclass
class Figures:
    """Counts over all files of a tree; the module's docstring says what each means.

    Attributes:
        lines: All lines.
        code: Lines of code.
        comments: Lines that hold nothing but a comment.
        long: Lines over `LONGEST_LINE` characters.
        comprehensions: Comprehensions and generator expressions.
        nested: Pairs of one inside another, and those with several loops.
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

    def add_source(self, text: str) -> None:
        """Count what is in the text of one file."""
        tree = ast.parse(text)
        self._add_lines(text, tree)
        for node in ast.walk(tree):
            if isinstance(node, _COMPREHENSIONS):
                self.comprehensions += 1
                self.nested += _comprehensions_inside(node) + (len(node.generators) > 1)
            elif isinstance(node, ast.IfExp):
                self.ternaries += 1
        for name in _bound_names(tree):
            self.names += 1
            self.vague += name.strip("_") in VAGUE
        for block in cc_visit(text):
            if isinstance(block, Function) and block.complexity > COMPLEX:
                self.complex += 1

    def _add_lines(self, text: str, tree: ast.Module) -> None:
        for line in text.splitlines():
            self.lines += 1
            self.long += len(line) > LONGEST_LINE
        # Tokens, since a line of a string may look like a comment or be blank.
        code_lines: set[int] = set()
        comment_lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type not in _NO_CODE:
                code_lines.update(range(token.start[0], token.end[0] + 1))
            elif token.type == tokenize.COMMENT:
                comment_lines.add(token.start[0])
        self.comments += len(comment_lines - code_lines)
        self.code += len(code_lines - _docstring_lines(tree))


def measure(tree: Path) -> Figures:
    """The figures of all Python files below a folder."""
    figures = Figures()
    for file in sorted(tree.rglob("*.py")):
        figures.add_source(file.read_text())
    return figures


def _comprehensions_inside(comprehension: ast.AST) -> int:
    count = -1  # the walk starts with the comprehension itself
    for node in ast.walk(comprehension):
        count += isinstance(node, _COMPREHENSIONS)
    return count


def _docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines of docstrings, those below attributes included."""
    numbers: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            numbers.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return numbers


def _bound_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, _DEFINITIONS):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def rows(figures: Figures) -> dict[str, str]:
    """The figures as text, by label. A tree without code has none."""
    thousands = figures.code / 1000 or 1.0
    percent = figures.lines / 100 or 1.0
    names = figures.names / 1000 or 1.0
    nested = f"{figures.nested / thousands:.1f}"
    return {
        "lines": f"{figures.lines:,}",
        "lines of code": f"{figures.code:,}",
        "comprehensions per 1,000 lines of code (nested)": (
            f"{figures.comprehensions / thousands:.0f} ({nested})"
        ),
        "ternaries per 1,000 lines of code": f"{figures.ternaries / thousands:.0f}",
        f"lines over {LONGEST_LINE} characters": f"{figures.long / percent:.1f} %",
        "comment lines": f"{figures.comments / percent:.1f} %",
        "vague names per 1,000 names": f"{figures.vague / names:.1f}",
        f"functions over complexity {COMPLEX}": f"{figures.complex}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a column for each tree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trees", nargs="*", type=Path, default=TREES, help="folders")
    table = Table("")
    columns = []
    for tree in parser.parse_args(arguments).trees:
        table.add_column(tree.name)
        columns.append(rows(measure(tree)))
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
