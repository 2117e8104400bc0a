"""How ``dM/dalpha`` is estimated."""

from .implicit import Implicit
from .protocol import Estimate, Estimator
from .unrolled import Unrolled

__all__ = ["Estimate", "Estimator", "Implicit", "Unrolled"]
