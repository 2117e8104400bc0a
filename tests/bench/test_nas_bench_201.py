"""The searchers of the table `nas_bench_201`."""

import jax
import numpy as np

from benchmarks import nas_bench_201 as nas


def test_a_mutation_changes_one_edge_of_the_best_member_by_node():
    """Nodes are chosen uniformly, so that the edge into the first has 1 / 3."""
    searcher, members = nas.Evolution(population_size=2, sample_size=9), 2
    state = searcher.init(nas.SPACE, jax.random.key(0))
    for value in range(3):  # the first member is the oldest, and leaves
        state = searcher.tell(state, np.full(nas.NUM_EDGES, value), value)
    assert [len(state.cells), *state.values] == [members, 1, 2]
    keys = jax.random.split(jax.random.key(1), 3000)
    changed = np.array([searcher.ask(state, key)[0] != 1 for key in keys])
    one_edge = changed[changed.sum(axis=1) == 1]
    assert len(one_edge) > 2950  # the worse member is in all nine samples at 1 / 512
    expected = np.array([1 / 3, 1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9])
    np.testing.assert_allclose(one_edge.mean(axis=0), expected, atol=0.03)


def test_the_policy_moves_by_the_rate_towards_better_cells():
    """Adam's first step after a nonzero gradient has the size of the rate."""
    searcher = nas.Reinforce()
    state = searcher.init(nas.SPACE, jax.random.key(0))
    first = searcher.tell(state, np.zeros(nas.NUM_EDGES, int), -50.0)
    np.testing.assert_array_equal(first.logits, state.logits)  # the baseline is equal
    cell = np.arange(nas.NUM_EDGES) % nas.NUM_OPERATIONS
    better = searcher.tell(first, cell, -60.0)
    chosen = np.eye(nas.NUM_OPERATIONS)[cell] > 0
    np.testing.assert_array_equal(better.logits - first.logits > 0, chosen)
    baseline = (0.9 * 0.1 * -50 + 0.1 * -60) / (0.9 * 0.1 + 0.1)
    np.testing.assert_allclose(better.value_sum / better.weight_sum, baseline)
