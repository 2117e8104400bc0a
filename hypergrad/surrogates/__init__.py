"""Smooth metrics, each beside the exact one.

``surrogate(scores, targets, *, temperature, where=None, weights=None)`` is
differentiable, ``surrogate.exact(scores, targets, *, where=None, weights=None)`` is
what people report; both in the metric's own orientation.
"""

from .protocol import Surrogate

__all__ = ["Surrogate"]
