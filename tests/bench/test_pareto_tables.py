"""The table `pareto`: the network, its costs, the methods and the claims."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypergrad as hg
from benchmarks import pareto
from benchmarks.shared import pareto_methods as methods
from benchmarks.shared import pareto_network as network
from benchmarks.shared.pareto_network import Gates

KNOTS = tuple(np.array(axis, float) for axis in network.KNOTS)
LATENCY = hg.objectives.LatencyTable(KNOTS, 1 + np.outer(*KNOTS) ** 0.5)


@pytest.fixture
def mask(key):
    """Some of the pixels and units."""
    first, second = jax.random.split(key)
    bernoulli = Gates(
        jax.random.bernoulli(first, 0.4, (network.PIXELS,)),
        jax.random.bernoulli(second, 0.4, (network.HIDDEN,)),
    )
    return jax.tree.map(lambda x: x.astype(float), bernoulli)


def sliced(w, mask):
    """The network that is left."""
    n, m = (np.flatnonzero(x) for x in mask)
    return {"first": w["first"][n][:, m], "second": w["second"][m]}


def smaller(w, x):
    return jnp.tanh(x @ w["first"]) @ w["second"]


# The network.


def test_gates_of_zero_and_one_are_the_smaller_network(key, mask):
    """Its scores, to rounding."""
    w, x = network.init_w(0), jax.random.normal(key, (5, network.PIXELS))
    left = sliced(w, mask)
    expected = smaller(left, x[:, np.flatnonzero(mask.pixels)])
    np.testing.assert_allclose(network.scores(w, mask, x), expected, rtol=1e-12)


def test_costs_are_those_of_the_smaller_network(mask):
    """Operations as counted in its program, tanh apart; bytes of its arrays."""
    left = sliced(network.init_w(0), mask)
    n, m = left["first"].shape
    flops, seconds, num_bytes = network.costs(*network.widths(mask), LATENCY)
    counted = hg.cost.flops(smaller, left, jnp.ones((1, n)))
    assert flops == counted.total() - m
    single = lambda *shape: np.zeros(shape, np.float32).nbytes
    arrays = [(n, m), (m, 10), (network.BATCH, n), (network.BATCH, m)]
    assert num_bytes == sum(single(*shape) for shape in arrays)
    np.testing.assert_allclose(seconds, LATENCY(float(n), float(m)), rtol=1e-12)


def test_between_zero_and_one_operations_are_products_of_gates(key):
    """Summed over all pairs; shares are 0 and 1 at the ends."""
    soft = Gates(*(jax.random.uniform(key, x.shape) for x in network.ALL))
    pairs = sum(2 * g * h for g in soft.pixels for h in soft.hidden)
    flops = network.costs(*network.widths(soft), LATENCY)[0]
    np.testing.assert_allclose(flops, pairs + 20 * sum(soft.hidden), rtol=1e-12)
    whole = jax.tree.map(jnp.ones_like, soft)
    np.testing.assert_allclose(network.cost_fractions(whole, LATENCY), 1, rtol=1e-12)
    one = jax.tree.map(lambda x: jnp.zeros_like(x).at[3].set(1.0), whole)
    np.testing.assert_allclose(network.cost_fractions(one, LATENCY), 0, atol=1e-12)


def test_as_many_are_kept_as_the_gates_sum_to():
    """The largest; and one where they sum to none."""
    networks = network.round_gates(
        Gates(jnp.array([0.9, 0.2, 0.6, 0.4]), jnp.full(3, 0.1))
    )
    assert networks.pixels.tolist() == [1, 0, 1, 0]
    assert networks.hidden.sum() == 1


def test_networks_are_trained_as_if_the_rest_had_never_been(mask):
    """From the rest of the start, by the same steps."""
    parts, w = network.split(0), network.init_w(0)
    n = np.flatnonzero(mask.pixels)
    few = {name: {"x": part["x"][:, n], "y": part["y"]} for name, part in parts.items()}
    ones = Gates(jnp.ones(n.size), jnp.ones(int(mask.hidden.sum())))
    end, _ = methods.TRAINING.solve(
        network.inner_loss, sliced(w, mask), ones, few["train"], jax.random.key(0)
    )
    ours = methods.train(w, jax.tree.map(lambda x: x[None], mask), parts)
    for name, networks in zip(("val", "test"), ours, strict=True):
        wrong = np.argmax(smaller(end, few[name]["x"]), axis=1) != few[name]["y"]
        # A digit may change sides by rounding; a training that differs moves dozens.
        assert abs(float(networks[0]) * wrong.size - wrong.sum()) <= 1


def test_parts_are_apart():
    """Every digit is in one of them."""
    parts = network.split(1)
    assert [len(part["y"]) for part in parts.values()] == [400, 400, 997]
    every = np.concatenate([part["x"] for part in parts.values()]).sum(axis=0)
    other = np.concatenate([part["x"] for part in network.split(2).values()]).sum(
        axis=0
    )
    np.testing.assert_allclose(every, other, rtol=1e-5)


# Searchers and pruning.


def test_the_genetic_searcher_that_keeps_its_study_proposes_what_nsga2_does(key):
    """Five generations of four in six axes."""
    space = {"a": hg.spaces.Unit((5,)), "b": hg.spaces.Interval(0.1, 1.0, log=True)}
    ours, theirs = methods.CachedNSGA2(4), hg.searchers.NSGA2(4)
    mine, other = ours.init(space, key), theirs.init(space, key)
    for i in range(20):
        each = jax.random.fold_in(key, i)
        (here, mine), (there, other) = ours.ask(mine, each), theirs.ask(other, each)
        jax.tree.map(np.testing.assert_array_equal, here, there)
        value = jnp.stack([jnp.sum(here["a"]), jnp.sum((here["a"] - here["b"]) ** 2)])
        mine, other = ours.tell(mine, here, value), theirs.tell(other, there, value)


def test_a_proposal_keeps_what_its_order_says():
    """Of all at keep 1; those below it otherwise."""
    order = {"pixels": jnp.array([0.1, 0.4, 0.9]), "hidden": jnp.array([0.5, 0.99])}
    networks = methods.proposed_gates(order | {"keep": jnp.array([0.4, 1.0])})
    assert networks.pixels.tolist() == [1, 0, 0]
    assert networks.hidden.tolist() == [1, 1]


def test_pruning_keeps_so_many_of_the_largest():
    """And a pixel that is always dark passes nothing."""
    networks = methods.keep_largest(
        jnp.array([1.0, 3.0, 2.0]), np.array([1.0, 2.0, 3.0])
    )
    assert networks.tolist() == [[0, 1, 0], [0, 1, 1], [1, 1, 1]]
    parts = network.split(0)
    passes = methods.signal_sizes(network.init_w(0), parts["train"])
    dark = np.asarray(parts["train"]["x"]).max(axis=0) == 0
    assert dark.any()
    assert np.all(np.asarray(passes.pixels)[dark] == 0)


def test_a_search_trains_the_networks_that_it_proposes(monkeypatch):
    """Two networks, by the same steps as those of the other rows; what they cost."""
    monkeypatch.setattr(methods, "BUDGET", 2.5 * methods.TRIAL_COST)
    monkeypatch.setattr(methods, "committed_latency", lambda: LATENCY)
    networks = methods.search("random", 0, "memory", 0.1)
    assert networks.cost == pytest.approx(2 * methods.TRIAL_COST)
    assert set(np.unique(networks.gates.pixels)) == {0, 1}
    ours = methods.train(network.init_w(0), networks.gates, network.split(0))
    # A digit may change sides by rounding.
    np.testing.assert_allclose(networks.val, ours[0], atol=1.01 / 400)
    np.testing.assert_allclose(networks.test, ours[1], atol=1.01 / 997)


def test_pruning_counts_all_that_it_spends(monkeypatch):
    """A training and a pass forward say what is kept; each network is a trial."""
    monkeypatch.setattr(methods, "train", lambda w, gates, parts: (jnp.zeros(4),) * 2)
    networks = methods.prune(0, 0.1, 2)
    assert networks.gates.pixels.shape == (4, network.PIXELS)
    by_hand = (60 + 1 / 3) + 4 * (60 + 2 / 3)
    assert networks.cost == pytest.approx(by_hand, rel=1e-12)


# A front.


def make_networks(*networks):
    """Of (pixels, hidden, val, test)."""
    open_ = lambda size, n: jnp.arange(size) < n
    pixels = jnp.stack([open_(network.PIXELS, row[0]) for row in networks])
    hidden = jnp.stack([open_(network.HIDDEN, row[1]) for row in networks])
    val, test = (jnp.array([row[i] for row in networks]) for i in (2, 3))
    return methods.Networks(Gates(pixels * 1.0, hidden * 1.0), val, test, 100.0)


def test_a_front_is_picked_on_validation_and_measured_by_hand():
    """The third is dominated on validation alone, the last is beyond the reference."""
    networks = make_networks(
        (8, 4, 0.3, 0.35), (16, 8, 0.1, 0.2), (16, 9, 0.2, 0.01), (64, 32, 0.05, 0.06)
    )
    row = methods.front_row(networks, "flops", LATENCY)
    assert row["val"] == pytest.approx([0.3, 0.1, 0.05])
    assert row["test"] == pytest.approx([0.35, 0.2, 0.06])
    count = lambda n, m: 2 * n * m + 20 * m
    share = lambda n, m: (count(n, m) - count(1, 1)) / (count(64, 32) - count(1, 1))
    first, second = share(8, 4), share(16, 8)
    assert row["fraction"] == pytest.approx([first, second, 1.0])
    by_hand = (second - first) * 0.2 + (0.5 - second) * 0.4
    assert row["val_volume"] == pytest.approx(by_hand)
    by_hand = (second - first) * 0.15 + (0.5 - second) * 0.3
    assert row["test_volume"] == pytest.approx(by_hand)
    assert row["small_error"] == pytest.approx(0.2 if second <= 0.1 else 0.35)
    assert (row["pixels"], row["hidden"]) == ([8, 16, 64], [4, 8, 32])


# Latencies.


def test_the_median_pass_counts_at_each_knot():
    """The table of latencies has the median over the passes at each knot."""
    first, second, third = np.ones((3, 5, 5))
    second[2, 3], third[2, 3], third[0, 0] = 1.5, 2.0, 1.25
    rows = [{"seconds": each.tolist()} for each in (third, first, second)]
    expected = np.ones((5, 5))
    expected[2, 3] = 1.5
    np.testing.assert_array_equal(network.latency_table(rows).seconds, expected)


# Findings.


def make_rows(volumes: dict) -> list[dict]:
    """Returns all planned rows; a method has volume 0.1 or a function of the seed."""
    volume = lambda cell: volumes.get(cell["method"], lambda seed: 0.1)(cell["seed"])
    return [
        cell
        | {
            "test_volume": volume(cell), "val_volume": 0.1, "best": "EPO",
            "small_error": 0.2, "fraction": [0.1], "test": [0.5 - volume(cell)],
            "pixels": [8], "hidden": [4], "gradient_equivalents": 9.0,
            "networks": 3, "setting": 0.1, "tuning_cost": 1.0,
        }
        for cell in pareto.table.cells("small", 5)
    ]  # fmt: skip


def test_the_claim_is_against_the_better_search_on_each_seed():
    """A mean above that of either search is not enough."""
    first = lambda rows: pareto.table.findings(rows)[0]
    ahead = make_rows({"EPO": lambda seed: 0.12 + 0.001 * seed})
    assert first(ahead).outcome == "supported"
    alternating = {
        "EPO": lambda seed: 0.12 + 0.001 * seed,
        "NSGA-II": lambda seed: 0.2 if seed % 2 else 0.05,
        "random": lambda seed: 0.05 if seed % 2 else 0.2,
    }
    assert first(make_rows(alternating)).outcome == "contradicted"


def test_a_front_beyond_the_budget_fails():
    """The check of the budget fails if one row exceeds it."""
    rows = make_rows({})
    (check,) = pareto.table.checks
    assert check.evaluate(rows).outcome == "holds"
    rows[7]["gradient_equivalents"] = methods.BUDGET + 1.0
    assert check.evaluate(rows).outcome == "FAILED"


def test_the_ratio_at_other_references():
    """By hand, for one network each: 0.9 of the fraction times the error's rest."""
    rows = make_rows({"EPO": lambda seed: 0.2})
    lines = [x for x in pareto.table.findings(rows) if "below error" in x.text]
    assert len(lines) == 2 * len(network.COSTS)
    corner, wide = lines[:2]
    assert "error 1 and fraction 1: 1.167 [1.167, 1.167]" in corner.text  # 0.7 / 0.6
    assert "error 0.5 and fraction 1: 2.000 [2.000, 2.000]" in wide.text  # 0.2 / 0.1
    assert all(line.outcome is None for line in lines)


def test_the_ratio_by_each_pass_of_the_latencies(monkeypatch):
    """By hand, for one network each; the searches' one is slower in the second pass."""
    one = np.outer(*KNOTS) ** 0.5
    slow = one.copy()
    slow[2:, :] += one.max() / 5  # from 16 pixels on
    tables = [hg.objectives.LatencyTable(KNOTS, 1 + each) for each in (one, slow)]
    monkeypatch.setattr(pareto, "committed_passes", lambda: tuple(tables))
    rows = make_rows({})
    for row in rows:
        row["pixels"] = [8] if row["method"] == "EPO" else [16]
    at = lambda n, table: float(network.cost_fractions_of(n, 4.0, table)[1])
    ratios = [(0.5 - at(8.0, t)) / (0.5 - at(16.0, t)) for t in tables]
    text = pareto.passes_finding(rows, "EPO").text
    assert f"2 passes: {min(ratios):.3f} to {max(ratios):.3f} times" in text
    assert text.endswith(f"from {min(ratios):.3f} on")
    assert max(ratios) > 1.1 * min(ratios)


def test_a_setting_of_two_numbers_is_at_an_edge_by_either():
    """A single number is compared directly."""
    sizes = methods.SEARCH_METHODS["NSGA-II"].settings
    assert not pareto.is_at_edge([20, 0.1], sizes)
    assert pareto.is_at_edge([20, 0.05], sizes)
    assert pareto.is_at_edge([40, 0.1], sizes)
    assert pareto.is_at_edge(0.2, [0.05, 0.1, 0.2])
    assert not pareto.is_at_edge(0.1, [0.05, 0.1, 0.2])


def test_seeds_without_a_number_are_left_out_and_counted():
    """The text states how many of the seeds have a number."""
    rows = [{"small_error": value} for value in (0.25, None, 0.75)]
    text = pareto.VOLUMES[-1].text
    assert text(rows[::2]) == "50.0% ± 35.4%"
    assert text(rows) == "50.0% ± 35.4% (2 of 3)"
    assert text(rows[1:2]) == "-"
