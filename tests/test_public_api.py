"""The public names, their documentation, and the promise that importing is quiet."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.metadata
import inspect
import itertools
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    aliases = documented_aliases()
    for name in anyprec.__all__:
        assert name in aliases or inspect.getdoc(getattr(anyprec, name)), name


OPTIONAL = {"anyprec.exporting.executorch_file": "executorch"}
"""Modules that import a library that is not among those for development."""


@pytest.mark.parametrize(
    "module", [module for _, module, _ in pkgutil.walk_packages(anyprec.__path__, "anyprec.")]
)
def test_examples_in_docstrings_run(module: str) -> None:
    if module in OPTIONAL:
        pytest.importorskip(OPTIONAL[module])
    result = doctest.testmod(
        importlib.import_module(module), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def test_every_function_that_people_call_has_an_example() -> None:
    for name in ("convert", "calibrate", "fit", "search", "save", "cost_of", "OneShot"):
        assert ">>>" in inspect.getdoc(getattr(anyprec, name)), name


def test_importing_does_not_import_what_only_some_need() -> None:
    heavy = ("timm", "matplotlib", "sklearn", "onnx")
    code = f"import anyprec, sys; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


INSIDE = {
    "ActivePrecision",
    "BackwardGuard",
    "Chosen",
    "ConversionRecord",
    "Observers",
    "Present",
    "Structure",
    "WeightSource",
}
"""Types of attributes of networks and layers that are how they work, not for users."""


def names_in(annotation: Any) -> set[str]:
    """Names that an annotation uses; annotations are text, as the package postpones them."""
    if not isinstance(annotation, str):
        return set()
    tree = ast.parse(annotation, mode="eval")
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def functions_of(value: type) -> Iterator[Any]:
    """Constructor, public methods and properties of a class."""
    for name, member in vars(value).items():
        function = member
        if isinstance(member, property):
            function = member.fget
        elif isinstance(member, (classmethod, staticmethod)):
            function = member.__func__
        if inspect.isfunction(function) and (name == "__init__" or not name.startswith("_")):
            yield function


def annotations_of(value: Any) -> Iterator[Any]:
    functions = [value]
    if inspect.isclass(value):
        for name, annotation in vars(value).get("__annotations__", {}).items():
            if not name.startswith("_"):
                yield annotation
        functions = list(functions_of(value))
    for function in functions:
        if inspect.isfunction(function):
            for name, annotation in function.__annotations__.items():
                if not name.startswith("_"):
                    yield annotation


def modules_of_the_package() -> Iterator[ast.Module]:
    for file in Path(anyprec.__file__).parent.rglob("*.py"):
        yield ast.parse(file.read_text())


def assigned_names(node: ast.stmt) -> set[str]:
    if not isinstance(node, ast.Assign):
        return set()
    return {target.id for target in node.targets if isinstance(target, ast.Name)}


def documented_aliases() -> set[str]:
    """Names of types that are assigned, with a docstring on the line behind."""
    names = set()
    for module in modules_of_the_package():
        for node, following in itertools.pairwise(module.body):
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                names |= assigned_names(node)
    return names


def names_defined_in_the_package() -> set[str]:
    names = set()
    for module in modules_of_the_package():
        for node in module.body:
            names |= {node.name} if isinstance(node, ast.ClassDef) else assigned_names(node)
    return names


def test_every_type_of_a_public_signature_is_public() -> None:
    defined = names_defined_in_the_package()
    for public in anyprec.__all__:
        for annotation in annotations_of(getattr(anyprec, public)):
            private = names_in(annotation) & defined - set(anyprec.__all__) - INSIDE
            assert not private, f"{public} uses {private}"


def test_the_version_is_that_of_the_installed_package() -> None:
    assert anyprec.__version__ == importlib.metadata.version("anyprec")
