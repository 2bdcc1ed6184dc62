"""The figures of readability, on a source text small enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.readability import Figures, main, measure, rows

SOURCE = '''"""A docstring of two lines:
# its second line looks like a comment."""

import math

# A comment.
TEXT = """a string of two lines
# which is code"""  # a comment beside code

SQUARES = [value**2 for value in range(9)]
PAIRS = {(row, column) for row in range(2) for column in range(2)}
TABLE = [[cell for cell in range(3)] for line in range(3)]


class Box:
    """A docstring."""

    size = 1
    """A docstring of an attribute."""

    def find(self, other):
        _found = math.inf if other else 0
        self.own = _found
        return _found
'''

COMPLEX = """
def choose(x):
    if x == 1 and x or x:
        return [y for y in x]
    if x == 2 and x or x:
        return 2
    if x == 3 and x or x:
        return 3
    return 4
"""


@pytest.fixture
def figures() -> Figures:
    counted = Figures()
    counted.add_source(SOURCE)
    return counted


def test_lines(figures: Figures) -> None:
    assert figures.lines == 24
    assert figures.comments == 1
    # import, two of TEXT, three comprehensions, class, size, def and its three lines
    assert figures.code == 12
    assert figures.long == 0


def test_a_line_is_long_from_101_characters() -> None:
    counted = Figures()
    counted.add_source("x" * 100 + "\n" + "x" * 101 + "\n")
    assert counted.long == 1


def test_expressions(figures: Figures) -> None:
    assert figures.comprehensions == 4  # SQUARES, PAIRS, and two in TABLE
    assert figures.nested == 2  # PAIRS has two loops, TABLE holds one inside another
    assert figures.ternaries == 1


def test_names(figures: Figures) -> None:
    # TEXT, SQUARES, value, PAIRS, row, column, TABLE, cell, line, Box, size, find, self, other,
    # _found, own
    assert figures.names == 16
    assert figures.vague == 3


def test_a_deeper_comprehension_is_nested_in_each_around_it() -> None:
    counted = Figures()
    counted.add_source("[[[a for a in b] for b in c] for c in d]")
    assert (counted.comprehensions, counted.nested) == (3, 3)


def test_complexity_counts_comprehensions_and_boolean_operators() -> None:
    # 1 for the function, 3 ifs, 2 operators in each, 1 comprehension: 11.
    counted = Figures()
    counted.add_source(COMPLEX)
    assert counted.complex == 1
    counted = Figures()
    counted.add_source(COMPLEX.replace("[y for y in x]", "1"))
    assert counted.complex == 0


def test_methods_are_functions() -> None:
    method = COMPLEX.replace("\n", "\n    ")
    counted = Figures()
    counted.add_source(f"class Chooser:{method}")
    assert counted.complex == 1


def test_figures_are_relative_to_what_they_are_counted_in(figures: Figures) -> None:
    assert rows(figures) == {
        "lines": "24",
        "lines of code": "12",
        "comprehensions per 1,000 lines of code (nested)": "333 (166.7)",
        "ternaries per 1,000 lines of code": "83",
        "lines over 100 characters": "0.0 %",
        "comment lines": "4.2 %",
        "vague names per 1,000 names": "187.5",
        "functions over complexity 10": "0",
    }


def test_all_files_of_a_tree_are_added_up(
    tmp_path: Path, figures: Figures, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "one.py").write_text(SOURCE)
    (tmp_path / "inner" / "two.py").write_text(SOURCE)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "notes.txt").write_text("x")
    assert measure(tmp_path).names == 2 * figures.names
    main([str(tmp_path), str(tmp_path / "inner")])
    printed = capsys.readouterr().out
    assert "48" in printed
    assert "24" in printed


def test_a_tree_without_code_has_figures() -> None:
    assert rows(Figures())["comment lines"] == "0.0 %"
