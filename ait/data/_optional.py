"""Packages that the data sets need and ``import ait`` does not."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, what: str) -> ModuleType:
    """Imports an optional module, or says what needs it and which extra installs it.

    Args:
        module: full name, such as ``"sklearn.datasets"``.
        what: what needs it, such as ``"the digits"``.

    Raises:
        ImportError: it is not installed, or does not import.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f'{what}: cannot import {module} ({error}); pip install "associative-transformer[data]"'
        raise ImportError(message, name=module) from error
