"""Differences between the versions of JAX and of lineax, and optional packages."""

import importlib
from typing import Any

import jax
import lineax as lx

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:  # jax 0.7
    from jax.experimental import enable_x64  # pyright: ignore

#: Whether `lineax.Normal` with `lineax.Cholesky` forms ``H`` once instead of twice.
NORMAL_CHOLESKY_FORMS_H_ONCE = lx.__version__ != "0.1.0"

__all__ = ["NORMAL_CHOLESKY_FORMS_H_ONCE", "enable_x64", "import_optional"]


def import_optional(module: str, need: str, extra: str) -> Any:
    """Imports a module of a package that an extra of this package installs.

    Args:
      module: Name of the module.
      need: Beginning of the error, such as "TPE needs optuna".
      extra: Name of the extra.

    Raises:
      ImportError: The module is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{need}. Install it with pip install 'hypergrad-jax[{extra}]'."
        ) from error
