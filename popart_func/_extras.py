"""Optional packages: the error for one that is missing says which extra to install."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

__all__ = ["require"]


def require(caller: str, extra: str, packages: Iterable[str]) -> None:
    """Raises unless packages are installed.

    Args:
        caller: what needs them.
        extra: the extra of popart_func that installs them.
        packages: their import names.

    Raises:
        ModuleNotFoundError: one is missing.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"{caller} needs {package!r}, which is not installed: pip install 'popart-func[{extra}]'", name=package
            )
