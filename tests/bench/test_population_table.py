"""Tests of the table that times trainings side by side."""

import jax
import numpy as np
import pytest

import hypergrad as hg
from benchmarks import population


@pytest.mark.slow
def test_three_programs_make_the_same_trainings(monkeypatch, tmp_path):
    """At a tiny size: all cells, their figure, and ``w`` of the solver alone."""
    monkeypatch.setattr(population, "SIZES", {"tiny": ((3, 2, 2), 3)})
    monkeypatch.setattr(population, "NUM_TURNS", 1)
    rows = [
        cell | population.measure_cell(cell, [])
        for cell in population.cells("small", 2)
    ]
    for row in rows:
        assert row["parameters"] == 3 * 2 + 2 * 2
        assert min(row[name] for name in row if name.endswith(("_compile", "map"))) > 0
        assert row["difference"] < 1e-12
    assert not any(finding.failed for finding in population.findings(rows))
    assert any("| 10 | 3 |" in line for line in population.body(rows))
    population.plot(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size
    w, alpha, data, keys = population.make_members((3, 2, 2), 0)
    solver = hg.Descent(population.OPTIMIZER, 3)
    for train in (
        population.train_by_vmap,
        population.train_by_map,
        population.train_one_by_one,
    ):
        trained, _ = train(3, w, alpha, data, keys)
        for i in (0, 15):
            expected, _ = solver.solve(
                population.inner_loss, jax.tree.map(lambda x, i=i: x[i], w), alpha[i],
                hg.Batches(data, population.BATCH), keys[i],
            )  # fmt: skip
            for layer, expected_layer in zip(trained, expected, strict=True):
                np.testing.assert_allclose(layer[i], expected_layer, rtol=1e-12)


@pytest.mark.parametrize("difference", [1e-3, None])
def test_programs_that_disagree_fail(difference):
    """A difference that is not a number fails as well."""
    row = {"method": "1e6", "seed": 0, "vmap": 1.0, "map": 1.0}
    rows = [row | {"difference": 1e-7}, row | {"difference": difference}]
    assert [x.outcome for x in population.findings(rows[:1])] == [None, None, "holds"]
    assert population.findings(rows)[-1].failed
