"""The one exception that a user is meant to read."""

from __future__ import annotations

import importlib
from typing import Any


class InputError(ValueError):
    """Something that the user gave is wrong: a file, a value, a name.

    The message names the thing and the remedy, in one or two sentences. The tools print it without a traceback and
    leave with exit code 2; library users catch it as a ValueError.
    """


def require(*modules: str, package: str, what: str) -> Any:
    """Import modules that not everybody has installed; the last of them.

    Args:
        modules: their names.
        package: what to install for them: a package, or an extra of this one, "[onnx]".
        what: what needs them: the beginning of the message.

    Raises:
        InputError: one is not installed.
    """
    try:
        return [importlib.import_module(name) for name in modules][-1]
    except ImportError as error:
        package = f"'light-head-detector{package}'" if package.startswith("[") else package
        missing = error.name or modules[-1]
        raise InputError(f"{what} needs {missing}, which is not installed: pip install {package}.") from error
