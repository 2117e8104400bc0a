"""Differences between the supported versions of JAX and of lineax."""

import jax
import lineax as lx

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:  # jax 0.7
    from jax.experimental import enable_x64  # pyright: ignore

#: Whether `lineax.Normal` with `lineax.Cholesky` forms ``H`` once instead of twice.
NORMAL_CHOLESKY_FORMS_H_ONCE = lx.__version__ != "0.1.0"

__all__ = ["NORMAL_CHOLESKY_FORMS_H_ONCE", "enable_x64"]
