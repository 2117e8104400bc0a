"""Saved models: ``(w, alpha)`` in versions, with their metrics and their origin."""

from .store import Model, export, find, get, load, save

__all__ = ["Model", "export", "find", "get", "load", "save"]
