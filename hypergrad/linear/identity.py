"""The cheapest inverse: none."""

from typing import Any

import lineax as lx
from jaxtyping import PyTree

from ..method_summary import MethodSummary
from .base import SymmetricSolver


class Identity(SymmetricSolver):
    """``v = b``: the Hessian taken for the identity.

    Cost: nothing. Memory: nothing. Bias: ``||b - H^-1 b||``, at most
    ``max |lambda - 1|`` of the adjoint; the sign is right where ``H`` is positive.

    Source: Luketina et al. 2016 (arXiv 1511.06727), equation 4.

    >>> import hypergrad as hg
    >>> hg.Identity().error_bound(0.5, 1.5)
    0.5
    """

    citations = ("luketina2016",)
    exact = False
    summary = (
        MethodSummary(
            "Implicit(solver, hg.Identity())",
            num_grads="T",
            num_hvps="1",
            memory="nothing",
            bias="takes H for the identity",
            alpha_in=("losses",),
            recommended_for="a first look, a baseline",
            not_recommended_for="wherever the length of the hypergradient matters",
            reason="the adjoint is wrong by up to max abs(lambda - 1), relatively",
        ),
    )

    def error_bound(self, eig_min: float, eig_max: float) -> float:
        """Relative error of the adjoint for a spectrum in [eig_min, eig_max]."""
        return max(abs(eig_min - 1.0), abs(eig_max - 1.0))

    def compute(
        self, state: lx.AbstractLinearOperator, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """``(b, result, stats)``."""
        del state, options
        return vector, lx.RESULTS.successful, {"num_products": 0}
