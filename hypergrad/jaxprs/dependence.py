"""The dependence of a value in a jaxpr on the inputs, and the derivatives it lost."""

from typing import Any, NamedTuple

from .stopped_shifts import NO_SHIFT, Shift


class LostDerivative(NamedTuple):
    """A derivative that JAX takes for zero.

    Attributes:
      leaf: Index of the input leaf.
      operation: Name of the operation, such as "stop_gradient".
      location: File, line and function of the operation.
    """

    leaf: int
    operation: str
    location: str


class Dependence(NamedTuple):
    """The dependence of a value on the inputs.

    Attributes:
      leaves: Input leaves from which a derivative arrives.
      lost: Derivatives that were lost on the way. The value of an integer depends on
        the inputs through these only.
      selectors: Derivatives that predicates and indices have lost.
      is_maximum: True if the value is a maximum, whose stopped gradient may be the
        shift of a stable softmax.
      shift: The stopped maxima that have not cancelled in the value.
      identity: Identity of the value, which equal values share, or None.
      constant: The value, if all its elements are the same literal.
      repeated: Axes along which a broadcast has repeated the value.
    """

    leaves: frozenset[int] = frozenset()
    lost: frozenset[LostDerivative] = frozenset()
    selectors: frozenset[LostDerivative] = frozenset()
    is_maximum: bool = False
    shift: Shift = NO_SHIFT
    identity: Any = None
    constant: float | None = None
    repeated: frozenset[int] = frozenset()

    @property
    def is_constant(self) -> bool:
        """True if no derivative arrives, and none was lost or stopped on the way."""
        return not (self.leaves or self.lost or self.shift.terms)

    def with_stopped(self) -> "Dependence":
        """Returns the dependence with the derivatives that stopped maxima have lost."""
        stopped = (value.lost for value, _ in self.shift.terms)
        return self._replace(lost=self.lost.union(*stopped), shift=NO_SHIFT)

    def selected_by(self, other: "Dependence") -> "Dependence":
        """Returns the dependence of a value that an integer or a predicate selects.

        If the value has no derivative of its own, such as the 0 and 1 of a count, it
        depends on the inputs through the choice alone, whose derivative is lost. A sort
        order is an exception: weights that are sorted by scores belong to the scores
        that are sorted with them. The ranks of scores are numbers (`as_ranks`).
        """
        choices = other.selectors | other.lost
        if not (self.leaves or self.shift.terms):
            orders = {x for x in choices if x.operation == "sort"}
            return self._replace(
                lost=self.lost | (choices - orders), selectors=self.selectors | orders
            )
        return self._replace(selectors=self.selectors | choices)

    def as_ranks(self) -> "Dependence":
        """Returns the dependence of ranks that are made from an order.

        Ranks are the order of an order, or numbers that are scattered to an order.
        """
        to_rank = lambda x: x._replace(operation="rank") if x.operation == "sort" else x
        return self._replace(selectors=frozenset(map(to_rank, self.selectors)))

    def as_number(self) -> "Dependence":
        """Returns the dependence of an integer that is cast to a float."""
        ranks = {x for x in self.selectors if x.operation != "sort"}
        return self._replace(lost=self.lost | ranks, selectors=self.selectors - ranks)


NONE = Dependence()
