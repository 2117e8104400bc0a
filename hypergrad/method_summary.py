"""The row of a method in the guide to estimators."""

from typing import NamedTuple


class MethodSummary(NamedTuple):
    """A row of the page *How to choose*.

    A class holds its rows in a tuple ``summary``, which has no annotation so that it is
    not a field. `hypergrad.method_tables` writes the tables of the page from them, and
    tests compare ``num_grads``, ``num_hvps`` and ``alpha_in`` with the behavior of the
    methods.

    Attributes:
      call: Python expression that makes the estimator. A linear solver, or a loss with
        Gauss-Newton products, describes the `Implicit` that uses it.
      num_grads, num_hvps: Inner gradients and Hessian-vector products of one estimate,
        including the T inner steps. The formulas contain T, N (number of entries of
        ``alpha``), d (number of entries of ``w``), k (steps of conjugate gradients) and
        the arguments in ``call``.
      memory: Memory in addition to that of the inner solver; w stands for one vector
        like ``w``.
      bias: Error relative to the method's own target; q is the contraction factor of
        one step.
      alpha_in: Where ``alpha`` may enter: 'losses', 'optimizer', 'start'.
      recommended_for, not_recommended_for: Situations in which the method is and is not
        a good choice.
      reason: Reason for the recommendation.

    >>> import hypergrad as hg
    >>> hg.Forward.summary[0].num_hvps
    '(N + 1) * T'
    """

    call: str
    num_grads: str
    num_hvps: str
    memory: str
    bias: str
    alpha_in: tuple[str, ...]
    recommended_for: str
    not_recommended_for: str
    reason: str
