"""Settings that are not the numbers that they should be are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad import number_checks, objectives, searchers
from hypergrad import surrogates as sg
from hypergrad.spaces import relaxations

ONES = jnp.ones(2)
KEY = jax.random.key(0)
make_pair = lambda x: jnp.array([1.0, x])
FIELDS = {
    "threshold of Accuracy": lambda x: sg.Accuracy(x),
    "threshold of FBeta": lambda x: sg.FBeta(threshold=x),
    "threshold of Dice": lambda x: sg.Dice(x),
    "threshold of Coverage": lambda x: sg.Coverage(0.5, threshold=x),
    "threshold of match_boxes": lambda x: sg.match_boxes(
        jnp.ones((1, 1, 4)), jnp.ones((1, 1)), jnp.ones((1, 1, 4)), threshold=x
    ),
    "max_fpr of AUC": lambda x: sg.AUC(x),
    "num_true of DetectionAP": lambda x: sg.DetectionAP(x),
    "low of FastAP": lambda x: sg.FastAP(20, low=x),
    "high of FastAP": lambda x: sg.FastAP(20, high=x),
    "gap of temperature_from_scores": lambda x: sg.temperature_from_scores(
        jnp.arange(4.0), gap=x
    ),
    "threshold of temperature_from_scores": lambda x: sg.temperature_from_scores(
        jnp.arange(4.0), threshold=x
    ),
    "temperature of SmoothTchebycheff": lambda x: objectives.SmoothTchebycheff(ONES, x),
    "ideal of SmoothTchebycheff": lambda x: objectives.SmoothTchebycheff(ONES, ideal=x),
    "tolerance of EPO": lambda x: objectives.EPO(ONES, tolerance=x),
    "ideal of EPO": lambda x: objectives.EPO(ONES, ideal=x),
    "penalty of AugmentedLagrangian": lambda x: objectives.AugmentedLagrangian(
        1.0, penalty=x
    ),
    "step_size of CMAES": lambda x: searchers.CMAES(x),
    "step_size of Reinforce": lambda x: searchers.Reinforce(step_size=x),
    "decay of Reinforce": lambda x: searchers.Reinforce(decay=x),
    "noise of GaussianProcess": lambda x: searchers.GaussianProcess(noise=x),
    "perturbation of PopulationBasedTraining": lambda x: (
        searchers.PopulationBasedTraining(4, perturbation=x)
    ),
    "quantile_fraction of PopulationBasedTraining": lambda x: (
        searchers.PopulationBasedTraining(4, x)
    ),
    "temperature of gumbel_softmax": lambda x: relaxations.gumbel_softmax(ONES, KEY, x),
    "rtol of CG": lambda x: hg.CG(rtol=x),
    "step_size of StocBiO": lambda x: hg.StocBiO(optax.sgd(0.1), 2, 2, step_size=x),
    "strength of Penalty": lambda x: hg.Penalty(hg.Newton(), x),
    "sigma of Evolution": lambda x: hg.Evolution(hg.Newton(), sigma=x),
}
BAD = {"nan": np.nan, "inf": np.inf, "text": "a", "complex": jnp.array(1j)}
WEIGHTED = {
    "WeightedSum": objectives.WeightedSum,
    "SmoothTchebycheff": objectives.SmoothTchebycheff,
    "EPO": objectives.EPO,
}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("field", FIELDS)
def test_a_setting_that_is_no_finite_number_is_refused_by_name(field, value):
    name = field.split(" of ")[0]
    with pytest.raises((TypeError, ValueError), match=rf"^{name}"):
        FIELDS[field](value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1j], ids=["nan", "inf", "complex"])
@pytest.mark.parametrize("make", WEIGHTED.values(), ids=WEIGHTED)
def test_weights_of_losses_are_finite_real_numbers(make, value):
    with pytest.raises((TypeError, ValueError), match=r"^weights"):
        make(make_pair(value))


SOLVER = hg.Descent(optax.sgd(0.1), 2)
FLAGS = {
    "balanced of Accuracy": lambda x: sg.Accuracy(balanced=x),
    "log of Interval": lambda x: hg.spaces.Interval(1.0, 2.0, log=x),
    "with_key of Batches": lambda x: hg.Batches(jnp.arange(4.0), 2, with_key=x),
    "certify of Implicit": lambda x: hg.Implicit(SOLVER, certify=x),
    "estimate_error of Implicit": lambda x: hg.Implicit(SOLVER, estimate_error=x),
    "warm_start of Implicit": lambda x: hg.Implicit(SOLVER, warm_start=x),
    "warm_start of FixedPoint": lambda x: hg.FixedPoint(SOLVER, 5, warm_start=x),
    "symmetric of Penalty": lambda x: hg.Penalty(SOLVER, 1.0, symmetric=x),
    "warm_start of Penalty": lambda x: hg.Penalty(SOLVER, 1.0, warm_start=x),
    "warm_start of Evolution": lambda x: hg.Evolution(SOLVER, warm_start=x),
    "warm_start of FiniteDifference": lambda x: hg.FiniteDifference(
        SOLVER, warm_start=x
    ),
    "record_alphas of OuterLoop": lambda x: hg.OuterLoop(
        hg.Bilevel(lambda w, alpha, batch: w, lambda w, alpha, batch: w),
        hg.Unrolled(SOLVER), optax.sgd(0.1), record_alphas=x,
    ),
}  # fmt: skip
OPTIONAL_FLAGS = {
    "warm_start of Unrolled": lambda x: hg.Unrolled(SOLVER, warm_start=x),
    "checkpoint of Unrolled": lambda x: hg.Unrolled(SOLVER, checkpoint=x),
    "warm_start of Forward": lambda x: hg.Forward(SOLVER, warm_start=x),
}


@pytest.mark.parametrize("value", ["no", 0, 10], ids=["text", "zero", "ten"])
@pytest.mark.parametrize("field", FLAGS | OPTIONAL_FLAGS)
def test_a_flag_is_true_or_false(field, value):
    """The text 'no' would count as true, as would 10 steps between certificates."""
    make, name = (FLAGS | OPTIONAL_FLAGS)[field], field.split(" of ")[0]
    with pytest.raises(TypeError, match=rf"^{name} must be True or False"):
        make(value)
    make(np.bool_(False))


@pytest.mark.parametrize("field", FLAGS | OPTIONAL_FLAGS)
def test_only_a_flag_with_a_default_of_its_own_may_be_none(field):
    if field in OPTIONAL_FLAGS:
        OPTIONAL_FLAGS[field](None)
        return
    with pytest.raises(TypeError, match="must be True or False; got None"):
        FLAGS[field](None)


LIMITS = "budget", "time_limit", "memory_limit"


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_of_a_run_may_be_infinite_and_not_nan(name):
    loss = lambda w, alpha, batch: (w - alpha) ** 2
    problem, estimator = hg.Bilevel(loss, loss), hg.Implicit(hg.Newton())
    loop = hg.OuterLoop(problem, estimator, optax.sgd(0.1))
    run = lambda limit: loop.run(loop.init(0.0, 1.0), num_steps=2, **{name: limit})
    assert len(run(np.inf).value) == 2
    with pytest.raises(ValueError, match=name):
        run(np.nan)


def test_traced_numbers_are_not_checked():
    """Their values are not known before the program runs."""
    convert = number_checks.positive("step_size")
    assert jax.jit(lambda x: convert(x))(-1.0) == -1.0
