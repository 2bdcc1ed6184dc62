"""Libraries that are not installed with anyprec: asked for where they are used."""

from __future__ import annotations

from importlib.util import find_spec

from anyprec.errors import ExportError


def require_extra(*modules: str, extra: str) -> None:
    """Refuse to go on without these libraries.

    Args:
        modules: Names under which they are imported.
        extra: The extra of anyprec that installs them.

    Raises:
        ExportError: One is missing.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        msg = f"{' and '.join(missing)} must be installed for this: "
        msg += f"pip install 'anyprec[{extra}]'"
        raise ExportError(msg)
