"""Chosen models that are kept: ``(w, alpha)`` in versions, and what made each."""

from .store import Model, export, find, get, load, save

__all__ = ["Model", "export", "find", "get", "load", "save"]
