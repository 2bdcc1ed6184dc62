"""The public names, their documentation, and the promise that importing is quiet."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import anyprec


def test_public_names_are_exact_and_sorted() -> None:
    assert anyprec.__all__ == sorted(anyprec.__all__)
    found = {
        name
        for name, value in vars(anyprec).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert found == set(anyprec.__all__)


def test_no_public_name_hides_a_module() -> None:
    modules = {name for _, name, _ in pkgutil.iter_modules(anyprec.__path__)}
    assert not modules & set(anyprec.__all__)


def test_every_public_name_is_documented() -> None:
    for name in anyprec.__all__:
        assert inspect.getdoc(getattr(anyprec, name)), name


@pytest.mark.parametrize(
    "module", [module for _, module, _ in pkgutil.walk_packages(anyprec.__path__, "anyprec.")]
)
def test_examples_in_docstrings_run(module: str) -> None:
    result = doctest.testmod(
        importlib.import_module(module), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def test_every_function_that_people_call_has_an_example() -> None:
    for name in ("convert", "calibrate", "fit", "search", "save", "cost_of", "OneShot"):
        assert ">>>" in inspect.getdoc(getattr(anyprec, name)), name


def test_importing_does_not_import_what_only_some_need() -> None:
    code = "import anyprec, sys; print([m for m in ('timm', 'matplotlib', 'sklearn', 'onnx') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
