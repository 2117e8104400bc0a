"""Checks of a problem that are made before anything is compiled."""
