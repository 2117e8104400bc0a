"""What our linear solvers share: they see a symmetric operator by products only."""

from typing import Any

import lineax as lx


class SymmetricSolver(lx.AbstractLinearSolver):
    """lineax's interface for a solver of ``H v = b`` with real symmetric ``H``.

    Subclasses write ``compute``; the state is the operator, its own transpose.
    """

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> Any:
        """Keeps the operator; raises ValueError unless it is tagged symmetric."""
        del options
        if not lx.is_symmetric(operator):
            raise ValueError(
                f"{type(self).__name__} needs a symmetric operator; tag it with "
                "lineax.symmetric_tag or lineax.positive_semidefinite_tag"
            )
        return operator

    def transpose(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict]:
        """A symmetric operator is its own transpose."""
        return state, options

    def conj(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict]:
        """A real operator is its own conjugate."""
        return state, options

    def assume_full_rank(self) -> bool:
        """A Hessian at a strict minimum is invertible."""
        return True
