"""What a computation costs."""

from .ledger import HVP, VALUE, ledger, outer_weight

__all__ = ["HVP", "VALUE", "ledger", "outer_weight"]
