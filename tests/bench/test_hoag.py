"""The problem of the table `hoag`, and its search by golden sections."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from benchmarks import hoag


def test_the_loss_of_sparse_rows_is_that_of_the_matrix():
    """The second row is empty."""
    x = np.array([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    y, w = np.array([1.0, -1.0, -1.0]), np.array([0.3, -0.2, 0.5])
    rows, columns = np.nonzero(x)
    batch = {"values": x[rows, columns], "rows": rows, "columns": columns, "y": y}
    expected = np.sum(np.log1p(np.exp(-y * (x @ w))))
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    np.testing.assert_allclose(
        hoag.logistic_loss(jnp.asarray(w), batch), expected, rtol=1e-6
    )
    actual = hoag.inner_loss(jnp.asarray(w), jnp.asarray(0.7), batch)
    expected += 0.5 * np.exp(0.7) * w @ w
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_golden_sections_enclose_the_minimum_of_a_parabola():
    evaluations = []

    def value(alpha):
        evaluation = hoag.Evaluation(alpha, (alpha + 4.5) ** 2, 0.0)
        evaluations.append(evaluation)
        return evaluation.value

    trainer = SimpleNamespace(value=value, evaluations=evaluations)
    assert abs(hoag.golden_section(trainer) + 4.5) < 0.05
    assert len(evaluations) == 14
