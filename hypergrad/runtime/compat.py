"""Names that differ between the supported versions of JAX."""

import jax

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:  # jax 0.7
    from jax.experimental import enable_x64  # pyright: ignore

__all__ = ["enable_x64"]
