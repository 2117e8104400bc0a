"""The outer loop as one call, for tests that vary its options."""

import inspect
from typing import Any

import hypergrad as hg

RUN_OPTIONS = {*inspect.signature(hg.OuterLoop.run).parameters} - {"self", "state"}


def run_loop(problem, estimator, optimizer, w, alpha, *, key=None, **options: Any):
    """Returns the trace of an `hg.OuterLoop` with the options of it and of its run."""
    run_options = {name: options.pop(name) for name in RUN_OPTIONS & options.keys()}
    loop = hg.OuterLoop(problem, estimator, optimizer, **options)
    return loop.run(loop.init(w, alpha, key), **run_options)
