"""What the tests of the export share."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_table_of_operators() -> Iterator[None]:
    """Let torch's ONNX exporter read its operators once: it parses 500 functions in each export.

    The table is the same each time, and to make it takes as long as all else of a small export.
    Where torch has no such table any more, the tests only take longer.
    """
    try:
        from torch.onnx._internal.exporter import _registration  # noqa: PLC0415 (optional)

        apis = _registration.onnxscript_apis
        read_operators = apis.get_torchlib_ops
    except (ImportError, AttributeError):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apis, "get_torchlib_ops", functools.cache(read_operators))
        yield
