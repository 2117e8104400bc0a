"""The table that times trainings side by side."""

import itertools

import jax
import numpy as np
import pytest

import hypergrad as hg
from benchmarks import population


@pytest.mark.slow
def test_three_ways_make_the_same_trainings(monkeypatch, tmp_path):
    """At a tiny size: all cells, their figure, and ``w`` of the solver alone."""
    monkeypatch.setattr(population, "SIZES", {"tiny": ((3, 2, 2), 3)})
    monkeypatch.setattr(population, "TURNS", 1)
    cells = population.plan("small", 2)
    rows = [cell | population.measure(cell) for cell in cells]
    for row in rows:
        assert row["parameters"] == 3 * 2 + 2 * 2
        assert min(row[name] for name in row if name.endswith(("_compile", "map"))) > 0
        assert row["difference"] < 1e-12
    assert not any(verdict.failed for verdict in population.judge(rows))
    text = population.markdown(population.TABLE, rows, "the command")
    assert "| 10 | 3 |" in text
    population.plot(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size
    rows[0]["difference"] = 1e-3
    assert any(verdict.failed for verdict in population.judge(rows))
    w, alpha, data, keys = population.members((3, 2, 2), 0)
    solver = hg.Descent(population.OPTIMIZER, 3)
    for run in (population.side_by_side, population.in_a_loop, population.one_by_one):
        trained, _ = run(3, w, alpha, data, keys)
        for i in (0, 15):
            expected, _ = solver.solve(
                population.inner_loss, jax.tree.map(lambda x, i=i: x[i], w), alpha[i],
                hg.Batches(data, population.BATCH), keys[i],
            )  # fmt: skip
            for layer, expected_layer in zip(trained, expected, strict=True):
                np.testing.assert_allclose(layer[i], expected_layer, rtol=1e-12)


def test_sizes_are_those_of_the_protocol():
    counts = [
        sum(a * b for a, b in itertools.pairwise(sizes))
        for sizes, _ in population.SIZES.values()
    ]
    assert counts == [1_036, 101_504, 988_880]
