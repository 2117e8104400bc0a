"""Warnings that point at the user's own line."""

import inspect
import sys
import warnings
from pathlib import Path

import equinox
import jax

#: Folders whose functions may be between the user's line and the warning.
PACKAGES = (
    str(Path(__file__).parents[1]),
    *(str(Path(inspect.getfile(module)).parent) for module in (equinox, jax)),
)


def warn_user(message: str) -> None:
    """Issues a warning at the innermost line outside of the package.

    Python shows a warning once per line, so that checks which are made several times
    in one call show one.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
