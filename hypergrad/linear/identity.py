"""The cheapest inverse: none."""

from typing import Any

import lineax as lx
from jaxtyping import PyTree

from ..guide import Guide
from .symmetric import SymmetricSolver


class Identity(SymmetricSolver):
    """``v = b``: the Hessian taken for the identity.

    Cost: nothing. Memory: nothing. Bias: ``||b - H^-1 b||``, at most
    ``max |lambda - 1|`` of the adjoint; the sign is right where ``H`` is positive.

    Source: Luketina et al. 2016 (arXiv 1511.06727), equation 4.

    >>> import hypergrad as hg
    >>> hg.Identity().error_factor(0.5, 1.5)
    0.5
    """

    citations = ("luketina2016",)
    exact = False
    guide = (
        Guide(
            "Implicit(solver, hg.Identity())",
            gradients="T",
            hvps="1",
            memory="nothing",
            bias="takes H for the identity",
            sees=("losses",),
            use="a first look, a baseline",
            avoid="wherever the length of the hypergradient matters",
            why="the adjoint is wrong by up to max abs(lambda - 1), relatively",
        ),
    )

    def error_factor(self, smallest: float, largest: float) -> float:
        """Relative error of the adjoint for a spectrum in [smallest, largest]."""
        return max(abs(smallest - 1.0), abs(largest - 1.0))

    def compute(
        self, state: lx.AbstractLinearOperator, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """``(b, result, stats)``."""
        del state, options
        return vector, lx.RESULTS.successful, {"num_products": 0}
