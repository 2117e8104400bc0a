"""What a method says of itself to a person who has to choose one."""

from typing import NamedTuple


class MethodSummary(NamedTuple):
    """A row of the page *How to choose*.

    A class carries its rows as a tuple ``guide`` (without annotation, so that it is no
    field), and `hypergrad.choose` makes the tables. Tests hold ``gradients``, ``hvps``
    and ``sees`` against what the method does.

    Attributes:
      call: how it is written; a part describes the `Implicit` that it makes.
      gradients, hvps: inner gradients and Hessian-vector products of one estimate, the
        T inner steps included: formulas in T, N (numbers in ``alpha``), d (numbers in
        ``w``), k (steps of conjugate gradients) and what ``call`` names.
      memory: beside the inner solver's; w is a vector like it.
      bias: relative to the method's own target; q is the contraction of a step.
      sees: where ``alpha`` may enter: 'losses', 'optimizer', 'start'.
      use, avoid, why: recommended for, not recommended for, and the reason.

    >>> import hypergrad as hg
    >>> [summary.num_hvps for summary in hg.Forward.summary]
    ['N * T']
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
