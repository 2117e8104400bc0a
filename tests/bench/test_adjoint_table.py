"""The reverse pass of the adjoint table equals that of autodiff on every problem."""

import jax
import numpy as np
import pytest

from benchmarks import adjoint
from hypergrad.bench import Finding


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", adjoint.STORES.values())
@pytest.mark.parametrize("name", adjoint.WORKLOADS)
def test_adjoint_equals_autodiff(name, checkpoint):
    """Both agree to 1e-12 in float64, on 12 inputs and 30 examples."""
    work = adjoint.WORKLOADS[name]
    layers = (12, *(min(width, 7) for width in work.layers[1:]))
    work = work._replace(
        layers=layers, examples=30, batch=work.batch and 8, steps=11,
        penalties=12 if len(layers) == 2 else work.penalties,
    )  # fmt: skip
    data, w, alpha = adjoint.sample_arrays(work, jax.random.key(0))
    results = [
        jax.jit(adjoint.hypergradient, static_argnums=(0, 1, 2))(
            work, method, checkpoint, data, w, alpha, jax.random.key(1)
        )
        for method in adjoint.METHODS
    ]
    for autodiff, actual in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(actual, autodiff, rtol=1e-12, atol=1e-12)
        assert np.abs(autodiff).max() > 1e-6


def test_both_ratios_are_printed_and_nothing_is_claimed():
    """The finding has no outcome."""
    row = {
        "method": "a", "stores": "b", "autodiff_gradients": 2.0,
        "adjoint_gradients": 2.5, "autodiff_scratch": 10, "adjoint_scratch": 4,
    }  # fmt: skip
    text = "a, b: 1.25 of autodiff's operations, 0.40 of its scratch"
    assert adjoint.findings([row]) == [Finding(text)]
