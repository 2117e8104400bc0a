"""The identity in place of the inverse Hessian."""

from typing import Any

import lineax as lx
from jaxtyping import PyTree

from ..method_summary import MethodSummary
from .base import SymmetricSolver


class Identity(SymmetricSolver):
    """``v = b``, which replaces the Hessian by the identity.

    Cost: none.
    Memory: none.
    Bias:
      ``||b - H^-1 b||``, at most ``max |lambda - 1|`` relative to the adjoint. If ``H``
      is positive definite, ``v`` and the adjoint enclose less than 90 degrees.

    Source: Luketina et al. 2016, arXiv:1511.06727, equation 4.

    >>> import hypergrad as hg
    >>> hg.Identity().error_bound(0.5, 1.5)
    0.5
    """

    citations = ("luketina2016",)
    summary = (
        MethodSummary(
            "Implicit(solver, hg.Identity())",
            num_grads="T",
            num_hvps="1",
            memory="none",
            bias="replaces H by the identity",
            alpha_in=("losses",),
            recommended_for="a first experiment; a baseline",
            not_recommended_for="uses that need the length of the hypergradient",
            reason="the relative error of the adjoint is up to max abs(lambda - 1)",
        ),
    )

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Returns ``max |lambda - 1|`` over the eigenvalues in [eig_min, eig_max]."""
        return max(abs(eig_min - 1.0), abs(eig_max - 1.0))

    def compute(
        self, state: lx.AbstractLinearOperator, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """Returns ``(b, result, stats)``."""
        del state, options
        return vector, lx.RESULTS.successful, {"num_products": 0}
