"""Peers beside hypergrad: the same work, the same accuracy, in one run."""
