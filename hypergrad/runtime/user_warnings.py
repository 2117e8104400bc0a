"""Warnings that point at the user's own line."""

import contextlib
import inspect
import os
import sys
import warnings
from pathlib import Path

import equinox
import jax

#: Folders, and a file, whose functions may be between the user's line and the warning.
FOLDERS = (
    str(Path(__file__).parents[1]) + os.sep,
    *(str(Path(inspect.getfile(x)).parent) + os.sep for x in (equinox, jax)),
    contextlib.__file__,
)


def warn_user(message: str) -> None:
    """Issues a warning at the innermost line outside of hypergrad, equinox and jax.

    Python shows a warning once per line, so that checks which are made several times
    in one call show one. From Python 3.12 on, ``skip_file_prefixes`` does the same.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(FOLDERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
