"""Estimators that never solve the inner problem: a few products a step, jointly."""

from .soba import SOBA

__all__ = ["SOBA"]
