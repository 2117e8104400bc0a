"""What a searcher is."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, PyTree


@runtime_checkable
class Searcher(Protocol):
    """Proposes ``alpha`` without gradients; what it has seen is its state.

    One that can be told K values, of K outer losses, says so by an attribute
    ``takes_several = True``.
    """

    def init(self, space: PyTree, key: Array) -> Any:
        """The state before any trial."""
        ...

    def ask(self, state: Any, key: Array) -> tuple[PyTree, Any]:
        """The next ``alpha`` to try, also before those asked for earlier are told.

        StopIteration where none is left, as of a grid, or none until those that were
        asked for are told, as of a generation.
        """
        ...

    def tell(self, state: Any, alpha: PyTree, value: Array) -> Any:
        """Takes the value of a tried ``alpha``, or ``[K]``; lower is better.

        A trial with a value that is not finite failed.
        """
        ...
