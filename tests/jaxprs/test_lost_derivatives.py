"""Tests of the search for lost derivatives, on functions with known answers."""

import re

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from jax import lax
from jax.scipy.ndimage import map_coordinates

import hypergrad as hg
from hypergrad.jaxprs.inspection import constant_bytes
from hypergrad.jaxprs.lost_derivatives import find_lost_derivatives
from hypergrad.trees import without_derivative
from tests.surrogates.surrogate_cases import CASES, sample

LABELS = np.array([0, 1])
X = jax.random.normal(jax.random.key(0), (2, 3))


@jax.custom_vjp
def straight_through(x):
    return jnp.sign(x)


straight_through.defvjp(lambda x: (jnp.sign(x), None), lambda _, g: (g,))


def square_or_negative(x):
    return lax.cond(x > 0, lambda x: x**2, lambda x: -x, x)


def square_negative_or_scaled(kind, x, scale):
    branches = [lambda x: x**2, lambda x: -x, lambda x: scale * x]
    return lax.switch(kind, branches, x)


KINDS = np.arange(3)


def attention(x):
    heads = x[None, :, None, :]
    return jax.nn.dot_product_attention(heads, heads, heads).sum()


def scan(step, x):
    return lax.scan(lambda carry, _: (step(carry), carry), x, length=3)[1].sum()


def repeat_while(step, x):
    loop = lambda carry: (step(carry[0]), carry[1] + 1)
    return lax.while_loop(lambda carry: carry[1] < 3, loop, (x, 0))[0].sum()


COMPLETE = {
    "cross entropy": lambda x: optax.softmax_cross_entropy_with_integer_labels(
        x, LABELS
    ).mean(),
    "softmax": lambda x: jax.nn.softmax(x)[0, 0] + jax.nn.log_softmax(x)[0, 0],
    "logsumexp": jax.nn.logsumexp,
    "attention": attention,
    "layer norm": lambda x: jax.nn.standardize(x)[0, 0],
    "relu": lambda x: jax.nn.relu(x).sum(),
    "abs and clip": lambda x: (jnp.abs(x) + jnp.clip(x, -0.5, 0.5)).sum(),
    "max": jnp.max,
    "where": lambda x: jnp.where(x > 0, x, 2 * x).sum(),
    "sort": lambda x: jnp.sort(x, axis=1)[0, 0] + jnp.median(x),
    "index by argsort": lambda x: x[0, jnp.argsort(x[0])[0]],
    "top k": lambda x: lax.top_k(x, 2)[0].sum(),
    "mean without NaN": jnp.nanmean,
    "dropout": lambda x: jnp.where(
        jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x, 0
    ).sum(),
    "huber": lambda x: optax.huber_loss(x).sum(),
    "solve": lambda x: jnp.linalg.solve(x @ x.T + jnp.eye(2), x).sum(),
    "determinant": lambda x: jnp.linalg.slogdet(x @ x.T + jnp.eye(2))[1],
    "eigenvalues": lambda x: jnp.linalg.eigh(x @ x.T)[0].sum(),
    "straight-through sign": lambda x: straight_through(x).sum(),
    "interpolation": lambda x: jnp.sum(x - without_derivative(jnp.floor(x))),
    "unused sign": lambda x: (jnp.sign(x), x.sum())[1],
    "scan": lambda x: scan(lambda c: 2 * c, x),
    "while": lambda x: repeat_while(lambda c: 2 * c, x),
    "cond": lambda x: lax.cond(x[0, 0] > 0, jnp.sum, lambda x: (x**2).sum(), x),
    "where with a constant": lambda x: jnp.where(x > 0, x, 0.0).sum(),
    "while until a bound": lambda x: (
        lax.while_loop(
            lambda carry: carry[0].sum() < 100,
            lambda carry: (2 * carry[0] + 1, carry[1]),
            (x**2, 3.0),
        )[1]
        * x.sum()
    ),
    "scatter": lambda x: jnp.zeros(3).at[jnp.argsort(x[0])].add(x[0])[0],
    "update of a slice": lambda x: lax.dynamic_update_slice(
        x, jnp.ones((1, 1)), (0, jnp.argmax(x[0]))
    ).sum(),
    "weights in the order of scores": lambda x: jnp.sum(
        jnp.sort(x[0]) * jnp.arange(3.0)[jnp.argsort(x[0])]
    ),
    "values at ranks": lambda x: jnp.arange(3.0) @ x[0, jnp.argsort(jnp.argsort(x[0]))],
    "labels in the order of scores": lambda x: (
        jnp.sort(x[0]) @ (jnp.array([1, 0, 1])[jnp.argsort(x[0])] == 1).astype(float)
    ),
    "sort with values": lambda x: lax.sort((x[0], x[1]), num_keys=1)[1][0] + x.sum(),
}


@pytest.mark.parametrize("f", COMPLETE.values(), ids=COMPLETE)
def test_a_complete_derivative_is_not_reported(f):
    assert find_lost_derivatives(f, X) == ({0}, frozenset())


# Functions of JAX that round, compare or choose, with complete derivatives.

TABLE = jnp.arange(9.0) ** 2
coordinates = lambda x, order: map_coordinates(TABLE, [x.ravel() + 4], order)
PIECEWISE_SMOOTH = {
    "jnp.interp": lambda x: jnp.interp(x, jnp.arange(-4.0, 5.0), TABLE).sum(),
    "table of interp": lambda x: jnp.interp(0.3, jnp.sort(x[0]), x[1] ** 2),
    "map_coordinates": lambda x: coordinates(x, 1).sum(),
    "sinc": lambda x: jnp.sinc(x).sum(),
    "expm": lambda x: jax.scipy.linalg.expm(x @ x.T)[0, 1],
    "derivative of maximum": lambda x: jnp.sum(
        jax.grad(lambda x: jnp.sum(jnp.maximum(x, 0) ** 2 * x))(x)
    ),
    "derivative of abs": lambda x: jnp.sum(
        jax.grad(lambda x: jnp.sum(jnp.abs(x)))(x) * x
    ),
    "derivative of clip": lambda x: jnp.sum(
        jax.grad(lambda x: jnp.sum(jnp.clip(x, -1, 1) ** 2 * x))(x)
    ),
    "derivative of max": lambda x: jnp.sum(jax.grad(lambda x: jnp.max(x) ** 3)(x)),
    "lineax": lambda x: (
        lx.linear_solve(lx.MatrixLinearOperator(x @ x.T + jnp.eye(2)), x[:, 0]).value
    ).sum(),
    "lineax, CG": lambda x: (
        lx.linear_solve(
            lx.FunctionLinearOperator(
                lambda v: (1 + x[0] ** 2) * v,
                jax.eval_shape(lambda: x[1]),
                lx.positive_semidefinite_tag,
            ),
            x[1],
            lx.CG(1e-10, 1e-10),
        ).value
    ).sum(),
    "gamma function": lambda x: jax.scipy.special.gamma(x).sum(),
    "beta function": lambda x: jax.scipy.special.beta(x**2, 2.0).sum(),
    "batched cond": lambda x: jax.vmap(square_or_negative)(x[0]).sum(),
    "twice batched cond": lambda x: jax.vmap(jax.vmap(square_or_negative), in_axes=1)(
        x
    ).sum(),
    "batched cond in jit": lambda x: (
        jax.vmap(jax.jit(square_or_negative))(x[0]).sum()
        + jax.vmap(jax.checkpoint(square_or_negative))(x[1]).sum()
    ),
    "batched cond in a loop": lambda x: jax.vmap(lambda x: scan(square_or_negative, x))(
        x[0]
    ).sum(),
    "batched cond of a maximum": lambda x: jax.vmap(
        lambda top: lax.cond(top > 0, lambda top: top**2, lambda top: -top, top)
    )(jnp.max(x, axis=1)).sum(),
    "batched cond of an integer": lambda x: jax.vmap(
        lambda x, n: lax.cond(x > 0, lambda x, n: n * x, lambda x, n: -n * x, x, n)
    )(x[0], KINDS + 1).sum(),
    "batched switch": lambda x: jax.vmap(square_negative_or_scaled)(
        KINDS, x[0], x[1]
    ).sum(),
    "batched switch of one scale": lambda x: jax.vmap(
        square_negative_or_scaled, (0, 0, None)
    )(KINDS, x[0], 2.0).sum(),
    "twice batched switch of one scale": lambda x: jax.vmap(
        jax.vmap(square_negative_or_scaled, (0, 0, None)), (None, 0, None)
    )(KINDS, x, x[0, 0] ** 2).sum(),
    "jnp.piecewise": lambda x: jnp.piecewise(
        x, [x < 0, x >= 0], [lambda x: -x, lambda x: x**2]
    ).sum(),
}


@pytest.mark.parametrize("f", PIECEWISE_SMOOTH.values(), ids=PIECEWISE_SMOOTH)
def test_functions_of_jax_whose_derivatives_are_right(f):
    """Against central differences, away from the ends of the pieces."""
    assert find_lost_derivatives(f, X) == ({0}, frozenset())
    along = jnp.ones_like(X).at[0, 0].set(-2.0)
    differences = (f(X + 1e-6 * along) - f(X - 1e-6 * along)) / 2e-6
    actual = jax.jvp(f, (X,), (along,))[1]
    assert abs(actual) > 1e-3
    np.testing.assert_allclose(actual, differences, rtol=1e-5)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: coordinates(x, 0).sum() + x.sum(),
        lambda x: jnp.sinc(jnp.round(x) + x).sum(),
        lambda x: jax.jit(sinc)(x).sum(),
    ],
    ids=["nearest coordinates", "rounded argument", "function of the user"],
)
def test_a_loss_in_or_before_a_recognized_function_is_reported(f):
    assert find_lost_derivatives(f, X)[1]


def sinc(x):
    return x * jnp.round(x)


# A stopped maximum, which is the shift of a stable softmax or another quantity.


def row_max(x):
    return lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))


def top(x):
    return lax.stop_gradient(jnp.max(x))


def shifted(x):
    return x - top(x)


def normalized(x, guard=0.0):
    return x / (jnp.sum(x, axis=-1, keepdims=True) + guard)


def log_sum_exp(x):
    shift = row_max(x)
    total = jnp.sum(jnp.exp(x - shift), axis=-1, keepdims=True)
    return jnp.log(total) + shift


def cross_entropy(x):
    shifted = x - row_max(x)
    normalizer = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
    return jnp.mean(normalizer - jnp.sum(jnp.eye(3)[LABELS] * shifted, axis=-1))


TEMPERATURE = jnp.array(0.7)
MASK = np.array([[True, False, True], [True, True, False]])
STABLE = {
    "softmax": lambda x: normalized(jnp.exp(x - row_max(x)))[0, 0],
    "softmax with a guard": lambda x: normalized(jnp.exp(x - row_max(x)), 1e-9)[0, 0],
    "bound of a sum": lambda x: (
        jnp.log(jnp.maximum(jnp.sum(jnp.exp(shifted(x) / 2)), 1e-9)) + top(x) / 2
    ),
    "finite mask": lambda x: (
        jnp.log(jnp.sum(jnp.exp(jnp.where(MASK, shifted(x), -1e5)))) + top(x)
    ),
    "temperature": lambda x: normalized(jnp.exp((x - row_max(x)) / x[1, 1] ** 2))[0, 0],
    "softmin": lambda x: normalized(jnp.exp(-x - row_max(-x)))[0, 0],
    "mask": lambda x: normalized(jnp.where(MASK, jnp.exp(x - row_max(x)), 0))[0, 0],
    "attention": lambda x: jnp.sum(normalized(jnp.exp(x - row_max(x))) @ x.T),
    "log-sum-exp": lambda x: jnp.sum(log_sum_exp(x)),
    "log-softmax": lambda x: (x - row_max(x) - log_sum_exp(x - row_max(x)))[0, 0],
    "cross entropy": cross_entropy,
    "derivative": lambda x: jnp.sum(jax.grad(cross_entropy)(x) ** 2),
    "rows of a loop": lambda x: lax.map(log_sum_exp, x).sum(),
    "batched": lambda x: jax.vmap(jax.nn.logsumexp)(x).sum(),
    "jax, derivative": lambda x: jax.jvp(jax.nn.logsumexp, (x,), (x,))[1],
    "jax, curvature": lambda x: jnp.sum(jax.hessian(jax.nn.logsumexp)(x)),
    "jax, weights": lambda x: jax.nn.logsumexp(x, b=MASK + 1.0, axis=-1).sum(),
    "jax, where": lambda x: (
        jax.nn.logsumexp(x, where=MASK, axis=1, keepdims=True).sum()
        + jax.nn.softmax(x, where=MASK)[0, 0]
        + jnp.where(MASK, jax.nn.log_softmax(x, where=MASK), 0).sum()
    ),
    "two stops of one maximum": lambda x: (
        jnp.log(jnp.sum(jnp.exp(shifted(x)))) + lax.stop_gradient(jnp.max(x))
    ),
    "temperature, all of it": lambda x: (
        0.5 * jnp.log(jnp.sum(jnp.exp(shifted(x) / 0.5))) + top(x)
    ),
    "temperature of a batch": lambda x: jnp.sum(
        jnp.log(jnp.sum(jnp.exp((x - row_max(x)) * TEMPERATURE), axis=1, keepdims=True))
        + row_max(x) * TEMPERATURE
    ),
    "powers of 2": lambda x: (
        jnp.log(jnp.sum(jnp.exp2(x[0] - row_max(x[0])))) / np.log(2) + row_max(x[0])[0]
    ),
    "sum of rows": lambda x: (
        jnp.sum(jnp.log(jnp.sum(jnp.exp(x - row_max(x)), axis=1)))
        + jnp.sum(row_max(x)[:, 0])
    ),
    "mean of differences": lambda x: jnp.mean(x - row_max(x)) + jnp.mean(row_max(x)),
    "masked after the shift": lambda x: normalized(
        jnp.exp(jnp.where(MASK, x - row_max(x), -jnp.inf))
    )[0, 0],
    "columns": lambda x: normalized(jnp.exp(x.T - row_max(x.T)))[0, 0],
    "label by its index": lambda x: jnp.sum(
        jnp.take_along_axis(x - row_max(x), LABELS[:, None], 1)
        - jnp.log(jnp.sum(jnp.exp(x - row_max(x)), axis=1, keepdims=True))
    ),
    "contrastive": lambda x: optax.losses.ntxent(
        x @ jnp.ones((3, 2)) + x[:, 1:], LABELS
    ),
    "optax": lambda x: (
        optax.softmax_cross_entropy(x, jnp.eye(3)[LABELS]).mean()
        + optax.losses.poly_loss_cross_entropy(x, jnp.eye(3)[LABELS]).mean()
    ),
}


@pytest.mark.parametrize("f", STABLE.values(), ids=STABLE)
def test_a_shift_that_cancels_loses_nothing(f):
    assert find_lost_derivatives(f, X) == ({0}, frozenset())


def normalized_over_other_axis(x):
    powers = jnp.exp(x - row_max(x))
    return jnp.sum((powers / jnp.sum(powers, axis=0, keepdims=True)) ** 2)


NOT_STABLE = {
    "normalized by it": lambda x: jnp.sum(x**2) / row_max(x.ravel())[0],
    "power": lambda x: jnp.sum((x - lax.stop_gradient(jnp.max(jnp.abs(x)))) ** 3),
    "square": lambda x: jnp.sum((x - lax.stop_gradient(jnp.max(x))) ** 2),
    "exponential": lambda x: jnp.sum(jnp.exp(x - row_max(x))),
    "difference": lambda x: jnp.sum(x - row_max(x)),
    "absolute difference": lambda x: jnp.sum(jnp.abs(x - row_max(x))),
    "logarithm without the shift": lambda x: jnp.sum(
        jnp.log(jnp.sum(jnp.exp(x - row_max(x)), axis=-1))
    ),
    "logarithm of 1 and the sum": lambda x: jnp.sum(
        jnp.log(1 + jnp.sum(jnp.exp(x - row_max(x)), axis=-1)) + row_max(x)[:, 0]
    ),
    "distance of two": lambda x: jnp.sum((shifted(x) - shifted(3 * x)) ** 2),
    "ratio of two": lambda x: (
        jnp.sum(jnp.exp(shifted(x))) / jnp.sum(jnp.exp(shifted(x**2)))
    ),
    "two calls of a jitted helper": lambda x: jnp.sum(
        (jax.jit(shifted)(x) - jax.jit(shifted)(x**2)) ** 2
    ),
    "normalized over the other axis": normalized_over_other_axis,
    "all rows normalized as one": lambda x: jnp.sum(
        jnp.exp(x - row_max(x))[:, 0] / jnp.sum(jnp.exp(x - row_max(x)))
    ),
    "transposed": lambda x: jnp.sum(
        (x.T @ x - row_max(x.T @ x) + row_max(x.T @ x).T) ** 2
    ),
    "reversed": lambda x: jnp.sum((x - row_max(x) + row_max(x)[::-1]) ** 2),
    "temperature of the sum alone": lambda x: (
        jnp.log(jnp.sum(jnp.exp(shifted(x) / 2))) + top(x)
    ),
    "sum with one maximum": lambda x: jnp.sum(shifted(x)) + top(x),
    "multiple": lambda x: jnp.mean(2 * shifted(x)) + top(x),
    "constant logit": lambda x: (
        jnp.log(jnp.sum(jnp.exp(jnp.append(shifted(x), 0.0)))) + top(x)
    ),
    "masked by 0": lambda x: (
        jnp.log(jnp.sum(jnp.exp(jnp.where(MASK, shifted(x), 0.0)))) + top(x)
    ),
    "branches": lambda x: (
        lax.cond(x[0, 0] > 9, shifted, jnp.zeros_like, x).sum() + 6 * top(x)
    ),
    "difference from 0": lambda x: jnp.sum(0.0 - shifted(x) + top(x)),
    "guard of one exponential": lambda x: (
        jnp.log(jnp.exp(x[0, 0] - top(x) - 20.0) + 1e-7) + top(x)
    ),
    "guard of a small sum": lambda x: (
        jnp.log(jnp.sum(jnp.exp(shifted(x) - 20.0)) + 1e-7) + top(x)
    ),
    "bound below a sum": lambda x: (
        jnp.log(jnp.sum(jnp.minimum(jnp.exp(shifted(x)), 1e-7))) + top(x)
    ),
    "mask without an exponential": lambda x: (
        jnp.sum(jnp.where(MASK, shifted(x), -1e5)) + 6 * top(x)
    ),
    "bounded mask": lambda x: (
        jnp.sum(jnp.maximum(jnp.where(MASK, shifted(x), -1e5), -1e5)) + 6 * top(x)
    ),
    "maximum of a masked row": lambda x: (
        jnp.sum(jnp.max(jnp.where(np.eye(2, 3) > 2, shifted(x), -1e5), 1)) + 2 * top(x)
    ),
    "weighted mask": lambda x: (
        jnp.where(MASK, shifted(x), -1e5).ravel() @ jnp.arange(6.0) + top(x)
    ),
    "clipped": lambda x: jnp.sum(
        jnp.exp(jnp.maximum(shifted(x), 0.0)) * jnp.exp(top(x))
    ),
    "complex exponential": lambda x: jnp.real(
        jnp.sum(jnp.exp(1j * shifted(x))) + jnp.sum(x) * 1j
    ),
    "sum in a loop": lambda x: (
        lax.scan(lambda c, row: (c - row_max(row)[0], None), 0.0, x)[0] + x.sum()
    ),
}


@pytest.mark.parametrize("f", NOT_STABLE.values(), ids=NOT_STABLE)
def test_a_stopped_maximum_that_does_not_cancel_is_lost(f):
    leaves, lost = find_lost_derivatives(f, X)
    assert leaves == {0}
    assert {x.operation for x in lost} == {"stop_gradient"}
    along = jax.random.normal(jax.random.key(5), X.shape)
    differences = f(X + 1e-6 * along) - f(X - 1e-6 * along)
    derivative = jax.jvp(f, (X,), (along,))[1]
    assert abs(differences / 2e-6 - derivative) > 1e-3


LOST = {
    "stop_gradient": lambda x: jnp.sum((x - lax.stop_gradient(x @ x.T)[0, 0]) ** 2),
    "sign": lambda x: jnp.sum(x * jnp.sign(x)),
    "round": lambda x: jnp.sum(x + jnp.round(x)),
    "gt": lambda x: jnp.sum(x * (x > 0)),
    "floor": lambda x: repeat_while(lambda c: c + jnp.floor(c), x),
    "ceil": lambda x: lax.cond(
        x[0, 0] > 0, lambda x: jnp.sum(jnp.ceil(x)), lambda x: jnp.sum(x), x
    ),
    "convert_element_type": lambda x: jnp.sum(x) + x.astype(int).astype(float).sum(),
    "bitcast_convert_type": lambda x: jnp.sum(
        lax.bitcast_convert_type(x, jnp.float32)[..., 1].astype(float) * x
    ),
    "argmax": lambda x: jnp.sum(x) + jnp.eye(3)[jnp.argmax(x[0]), 0],
    "sort": lambda x: jnp.sum(x**2) + jnp.arange(3.0)[jnp.argsort(x[0])][0],
    "lt": lambda x: jnp.sum(x) + count_doublings(x[0, 0]),
}


@jax.jit
def stopped_if_negative(x):
    return jnp.where(x > 0, x, lax.stop_gradient(x))


#: Selections between a value and the same value without its derivative.
STOPPED = {
    "where": lambda x: jnp.sum(jnp.where(x > 0, x, lax.stop_gradient(x))),
    "select": lambda x: jnp.sum(lax.select(x > 0, x, lax.stop_gradient(x))),
    "batched": lambda x: jax.vmap(stopped_if_negative)(x[0]).sum(),
    "in batched cond": lambda x: jax.vmap(
        lambda x: lax.cond(x < 2, stopped_if_negative, lambda x: x, x)
    )(x[0]).sum(),
    "branch of batched cond": lambda x: jax.vmap(
        lambda x: lax.cond(x > 0, lambda x: x, lax.stop_gradient, x)
    )(x[0]).sum(),
    "other branch of batched cond": lambda x: jax.vmap(
        jax.jit(lambda x: lax.cond(x > 0, lax.stop_gradient, lambda x: x, x))
    )(x[0]).sum(),
    "operand of batched cond": lambda x: jax.vmap(
        lambda x: square_or_negative(lax.stop_gradient(x) * x)
    )(x[0]).sum(),
}


@pytest.mark.parametrize("f", STOPPED.values(), ids=STOPPED)
def test_a_stop_of_the_user_beside_a_selection_is_lost(f):
    leaves, lost = find_lost_derivatives(f, X)
    assert leaves == {0}
    assert {x.operation for x in lost} == {"stop_gradient"}
    assert all(__file__ in x.location for x in lost)


HIDDEN = {
    "operator of a solve": lambda x: jnp.sum(
        jax.scipy.sparse.linalg.cg(lambda v: (1 + jnp.round(x[0]) ** 2) * v, x[1])[0]
    ),
    "integer power": lambda x: jnp.sum(jnp.abs(x) ** jnp.round(4 * x).astype(int)),
    "power of 2": lambda x: jnp.sum(jnp.ldexp(x, jnp.round(4 * x).astype(int))),
    "initial value of no iterations": lambda x: lax.while_loop(
        lambda carry: carry[1] < 0,
        lambda carry: (jnp.sum(x), carry[1] + 1),
        (jnp.sum(x * jnp.round(x)), 0),
    )[0],
}


@pytest.mark.parametrize("f", HIDDEN.values(), ids=HIDDEN)
def test_a_rounding_in_an_operand_that_is_not_an_index_is_lost(f):
    leaves, lost = find_lost_derivatives(f, X)
    assert leaves == {0}
    # Earlier versions of JAX write ldexp as a rule of its own, which is named too.
    operations = {(x.leaf, x.operation) for x in lost}
    assert operations - {(0, "custom_jvp_call")} == {(0, "round")}


def test_the_losses_of_a_user_before_a_solve_of_lineax_are_reported():
    def f(x):
        operator = lx.DiagonalLinearOperator(1 + lax.stop_gradient(x[0]) ** 2)
        return jnp.sum(lx.linear_solve(operator, x[1]).value)

    assert {x.operation for x in find_lost_derivatives(f, X)[1]} == {"stop_gradient"}


def test_a_comparison_at_the_place_of_no_maximum_is_lost():
    """The comparisons of the derivative of a maximum are at its own place only."""
    f = lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(x * (x > 0) * x))(x))
    g = lambda x: jnp.sum(jnp.maximum(x, 0) + jnp.mean(jnp.where(x > 0, 1.0, 0.0)))
    for function in (f, g):
        assert {x.operation for x in find_lost_derivatives(function, X)[1]} == {"gt"}


@pytest.fixture
def simplified_constants():
    """Makes JAX write what a function closes over into the jaxpr, as newer ones do."""
    name = "jax_use_simplified_jaxpr_constants"
    if not hasattr(jax.config, name):
        pytest.skip("no such option in this version of JAX")
    value = getattr(jax.config, name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, value)


@pytest.mark.usefixtures("simplified_constants")
def test_literal_arrays_are_constants():
    f = lambda x: jnp.sum(normalized(jnp.exp(x - row_max(x) + X))[0]) + 1j
    assert find_lost_derivatives(lambda x: f(x).real, X) == ({0}, frozenset())


@pytest.mark.usefixtures("simplified_constants")
def test_literal_arrays_count_among_the_bytes_of_a_function():
    """Each array counts once, though a jaxpr has it at each of its uses."""
    array = jnp.ones((2, 3))
    assert constant_bytes(lambda x: jax.jit(lambda x: x * array)(x) + array, X) == 48
    assert constant_bytes(lambda x: 2 * x, X) == 0


def count_doublings(bound):
    step = lambda carry: (carry[0] + 1.0, 2 * carry[1])
    return lax.while_loop(lambda carry: carry[1] < bound, step, (0.0, 0.1))[0]


COUNTS = {
    "where": lambda x: jnp.mean(jnp.where(x > 0, 1.0, 0.0)),
    "cond": lambda x: lax.cond(x[0, 0] > 0, lambda: 1.0, lambda: 0.0),
    "batched cond": lambda x: jax.vmap(
        lambda x: lax.cond(x > 0, lambda: 1.0, lambda: 0.0)
    )(x[0]).sum(),
    "histogram": lambda x: jnp.sum(jnp.histogram(x, bins=5, range=(-3, 3))[0] ** 2.0),
    "one-hot accuracy": lambda x: jnp.eye(3)[LABELS, jnp.argmax(x, axis=1)].mean(),
    "table": lambda x: lax.dynamic_slice(
        jnp.arange(9.0) ** 2, (jnp.argmax(x[0]),), (1,)
    ).sum(),
    "scatter": lambda x: jnp.zeros(3).at[jnp.argmax(x[0])].add(1.0)[0],
    "while": lambda x: count_doublings(x[0, 0]),
    "precision at 2": lambda x: jnp.sum(
        jnp.where(jnp.argsort(jnp.argsort(x[0])) < 2, jnp.arange(3.0), 0.0)
    ),
    "ranks": lambda x: jnp.argsort(jnp.argsort(x[0])).astype(float) @ jnp.arange(3.0),
    "scattered ranks": lambda x: (
        jnp.zeros(3).at[jnp.argsort(x[0])].set(jnp.arange(3.0)) @ jnp.arange(3.0)
    ),
    "scattered integers": lambda x: (
        jnp.zeros(3, int).at[jnp.argsort(x[0])].set(jnp.arange(3)).astype(float)
        @ jnp.arange(3.0)
    ),
}


@pytest.mark.parametrize("f", COUNTS.values(), ids=COUNTS)
def test_a_count_is_lost_next_to_a_penalty_that_has_a_derivative(f):
    """A selection among constants, beside a term through which the input enters too."""
    leaves, lost = find_lost_derivatives(lambda x: f(x) + jnp.sum(x**2), X)
    assert leaves == {0}
    assert {x.leaf for x in lost} == {0}
    assert not np.any(jax.grad(f)(X))


@pytest.mark.parametrize("operation", LOST)
def test_a_partly_lost_derivative_names_its_operation(operation):
    leaves, lost = find_lost_derivatives(LOST[operation], X)
    assert leaves == {0}
    assert {(x.leaf, x.operation) for x in lost} == {(0, operation)}


def test_the_place_of_a_lost_derivative_is_in_the_code_of_the_user():
    """`jax.numpy.round` is jitted, so that its operations have no such place."""

    @jax.jit
    def own(x):
        return x * jnp.floor(x)

    functions = [jnp.sign, jnp.round, jnp.ceil, own, lambda x: jnp.argmax(x) * 1.0]
    for f in functions:
        _, lost = find_lost_derivatives(lambda x, f=f: jnp.sum(x * f(x)), X)
        assert lost
        assert all(__file__ in x.location for x in lost), f


def test_a_second_call_of_a_jitted_function_has_its_own_place():
    """JAX keeps the trace of the first call, with its place or with none."""

    def round_once(x):
        return jnp.sum(x * jnp.round(x))

    def round_again(x):
        return jnp.sum(x * jnp.round(x))

    for f in (round_once, round_again):
        _, lost = find_lost_derivatives(f, X)
        line = f.__code__.co_firstlineno + 1
        assert [f":{line}:" in x.location for x in lost] == [True]


@pytest.mark.parametrize(
    "f",
    [
        lambda x: jnp.mean((jnp.argmax(x, 1) == LABELS).astype(float)),
        lambda x: jax.checkpoint(lambda x: jnp.sum(jnp.sign(x)))(x),
        lambda x: jax.jit(jnp.round)(x).sum(),
        lambda x: scan(jnp.sign, jnp.sign(x)),
        lambda x: jnp.sum(jnp.arange(3.0) ** 2 * jnp.arange(3.0)[jnp.argsort(x[0])]),
        lambda x: lax.sort((x[0], jnp.arange(3.0)), num_keys=1)[1][0],
    ],
    ids=["accuracy", "checkpoint", "jit", "scan", "index", "sorted constants"],
)
def test_nothing_is_left_of_a_derivative_that_is_zero(f):
    leaves, lost = find_lost_derivatives(f, X)
    assert not leaves
    assert lost
    assert not np.any(jax.grad(f)(X))


MATRIX, SAMPLE = 2 * jnp.eye(3) + 0.1, jnp.array([0.3, 2.0, 0.9, 1.7])


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (
            lambda x: jax.scipy.linalg.lu_solve(
                jax.scipy.linalg.lu_factor(MATRIX * x), jnp.arange(3.0)
            ).sum(),
            1.5,
        ),
        (lambda x: jnp.quantile(SAMPLE, x), 0.4),
        (lambda x: jnp.percentile(SAMPLE, x), 40.0),
        (
            lambda x: jax.random.truncated_normal(jax.random.key(0), x, 2.0, (5,))[0],
            -1.0,
        ),
        (
            lambda x: jnp.sum(
                jnp.prod(jnp.stack(lax.optimization_barrier((x, jnp.ones(()) * 2))))
            ),
            1.5,
        ),
    ],
    ids=["pivots", "quantile", "percentile", "truncated normal", "barrier"],
)
def test_a_level_a_bound_or_a_pivot_loses_nothing(f, x):
    assert find_lost_derivatives(f, x) == ({0}, frozenset())
    difference = (f(x + 1e-4) - f(x - 1e-4)) / 2e-4
    np.testing.assert_allclose(jax.grad(f)(x), difference, rtol=1e-4)


def test_an_index_beside_a_number_at_a_barrier_loses_nothing():
    def f(x):
        x, index = lax.optimization_barrier((x, jnp.array([2, 0, 1])))
        return jnp.sum(jnp.arange(3.0)[index] * x)

    assert find_lost_derivatives(f, X[0]) == ({0}, frozenset())


def test_a_count_on_a_batch_is_lost():
    """The weights of the examples are constants, though the loss takes them."""
    outer = lambda w, alpha, batch: (
        jnp.mean(jnp.where(batch["x"] * w[0] > 0.5, batch["weights"], 0.0))
        + jnp.sum(w**2)
    )
    batch = {"x": jnp.linspace(-1, 1, 9), "weights": jnp.ones(9)}
    problem = hg.Bilevel(ridge_loss, outer, outer_data=batch)
    estimate = hg.hypergradient(problem, hg.Implicit(hg.Newton()))(W2, ALPHA2)
    assert estimate.flags["lost_derivative"]


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="needs mutable arrays")
@pytest.mark.parametrize("is_in_loop", [False, True])
def test_what_is_stored_in_a_mutable_array_is_followed(is_in_loop):
    def f(x):
        total = jax.new_ref(jnp.zeros(()))
        add = lambda i, _: total.__setitem__(
            ..., total[...] + jnp.sign(x).sum() * x[0, 0]
        )
        jax.lax.fori_loop(0, 2, add, None) if is_in_loop else add(0, None)
        return total[...] + jnp.sum(x)

    leaves, lost = find_lost_derivatives(f, X)
    assert leaves == {0}
    assert {x.leaf for x in lost} == {0}


def test_a_leaf_that_only_selects_among_others_has_lost_its_derivative():
    f = lambda x, y: jnp.sum(jnp.where(x > 0, y, 2 * y))
    leaves, lost = find_lost_derivatives(f, X, X)
    assert (leaves, {(x.leaf, x.operation) for x in lost}) == ({1}, {(0, "gt")})


def test_leaves_are_told_apart():
    f = lambda w, batch: jnp.sum(w["a"] * jnp.sign(w["b"])) + batch[0]
    w = {"a": X, "b": X, "c": jnp.arange(3)}
    leaves, lost = find_lost_derivatives(f, w, (1.0, 2))
    assert (leaves, {x.leaf for x in lost}) == ({0, 3}, {1})


@pytest.mark.parametrize("name", CASES)
def test_surrogates_have_complete_derivatives(name):
    """By scores and weights."""
    scores, targets = sample(CASES[name].kind, np.random.default_rng(0))[:2]
    weights = jnp.ones(scores.shape if CASES[name].kind == "masks" else len(scores))
    smooth = lambda scores, weights: CASES[name].surrogate(
        scores, targets, temperature=0.5, weights=weights
    )
    expected = {0, 1}, frozenset()
    assert find_lost_derivatives(smooth, jnp.asarray(scores), weights) == expected


# Estimates of problems that lose a derivative.


def stopped_loss(w, alpha, batch):
    """Its minimum is ``p = s = alpha``, but ``s`` has no derivative by ``p``."""
    return 0.5 * (w["p"] - alpha) ** 2 + 0.5 * (w["s"] - lax.stop_gradient(w["p"])) ** 2


STOPPED = hg.Bilevel(stopped_loss, lambda w, alpha, batch: 0.5 * (w["s"] - 1) ** 2)
W = {"p": jnp.array(3.0), "s": jnp.array(3.0)}
DESCENT = hg.Descent(optax.sgd(0.5), 60)
ESTIMATORS = {
    "Implicit": hg.Implicit(DESCENT),
    "Implicit, certified": hg.Implicit(DESCENT, certify=True),
    "Implicit, rtol": hg.Implicit(DESCENT, rtol=1e-3),
    "Unrolled": hg.Unrolled(DESCENT),
    "Forward": hg.Forward(DESCENT),
    "Reversible": hg.Reversible(0.2, 0.5, 100),
    "FixedPoint": hg.FixedPoint(DESCENT, 60),
    "FiniteDifference": hg.FiniteDifference(DESCENT),
    "Penalty": hg.Penalty(DESCENT, 100.0),
}


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_an_estimate_without_a_lost_derivative_is_not_trusted(estimator):
    """The hypergradient is 2, and the estimate 0."""
    estimate = hg.hypergradient(STOPPED, estimator)(W, 3.0)
    assert abs(estimate.hypergradient) < 1e-6
    assert estimate.flags["lost_derivative"]
    assert not estimate.trusted


def test_central_differences_see_a_lost_derivative():
    estimate = hg.hypergradient(STOPPED, hg.CentralDifference(DESCENT))(W, 3.0)
    np.testing.assert_allclose(estimate.hypergradient, 2, rtol=1e-6)


ridge_loss = lambda w, alpha, batch: jnp.sum((w - alpha) ** 2)
accuracy = lambda w, alpha, batch: jnp.mean((w > 0.5).astype(float))
W2, ALPHA2 = jnp.zeros(2), jnp.ones(2)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_an_outer_loss_without_a_derivative_is_an_error(estimator):
    problem = hg.Bilevel(ridge_loss, accuracy)
    with pytest.raises(ValueError, match=r"outer_loss .* gt"):
        hg.hypergradient(problem, estimator)(W2, ALPHA2)


def test_estimators_without_derivatives_accept_a_count_as_the_outer_loss():
    problem = hg.Bilevel(ridge_loss, accuracy)
    estimate = hg.hypergradient(problem, hg.Evolution(DESCENT, 0.1, 4))(W2, ALPHA2)
    assert jnp.isfinite(estimate.value)


@pytest.mark.parametrize(
    ("optimizer", "is_lost"),
    [
        (optax.sgd(0.1, momentum=0.9), False),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)), False),
        (optax.rmsprop(0.1), False),
        (optax.lion(0.1), True),
        (optax.sign_sgd(0.1), True),
        (optax.contrib.muon(0.1), False),
    ],
    ids=["sgd", "adamw", "rmsprop", "lion", "sign_sgd", "muon"],
)
def test_an_optimizer_that_uses_signs_is_not_trusted(optimizer, is_lost):
    problem = hg.Bilevel(ridge_loss, lambda w, alpha, batch: jnp.sum(w**2))
    estimator = hg.Unrolled(hg.Descent(optimizer, 5))
    estimate = hg.hypergradient(problem, estimator)(W2, ALPHA2)
    assert bool(estimate.flags.get("lost_derivative", False)) == is_lost
    assert estimate.trusted == (not is_lost)


# The starting point of a run that is differentiated.

LOSING_STARTS = {
    "stop_gradient": lambda w, alpha: lax.stop_gradient(alpha),
    "round": lambda w, alpha: jnp.round(alpha),
    "where": lambda w, alpha: jnp.where(alpha > 0.5, 1.0, w),
}
RUNS = {
    "Unrolled": hg.Unrolled(hg.Descent(optax.sgd(0.1), 3)),
    "Forward": hg.Forward(hg.Descent(optax.sgd(0.1), 3)),
    "Reversible": hg.Reversible(0.1, 0.5, 3),
}
centred_loss = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1) ** 2)


@pytest.mark.parametrize("name", ["learning_rate", "momentum"])
def test_a_rate_that_loses_a_derivative_is_not_trusted(name):
    """The derivative by ``alpha`` through a rounding is missing, not that through L."""
    settings = {"learning_rate": 0.1, "momentum": 0.5, "min_momentum": 0.25}
    lose = lambda alpha: settings[name] + 0.1 * jnp.round(alpha[0])
    keep = lambda alpha: settings[name] + 0.1 * alpha[0]
    problem = hg.Bilevel(ridge_loss, lambda w, alpha, batch: jnp.sum(w**2))
    alpha = jnp.array([0.4, 0.6])
    rounded, smooth = (
        hg.Reversible(num_steps=3, **settings | {name: fn}) for fn in (lose, keep)
    )
    estimate = hg.hypergradient(problem, rounded)(W2, alpha)
    assert estimate.flags["lost_derivative"]
    assert not estimate.trusted
    assert hg.hypergradient(problem, smooth)(W2, alpha).trusted
    (sentence,) = hg.diagnose(problem, rounded, W2, alpha)
    assert re.match(r"learning_rate or momentum loses derivatives in round", sentence)


@pytest.mark.parametrize("estimator", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("init_fn", LOSING_STARTS.values(), ids=LOSING_STARTS)
def test_a_starting_point_that_loses_a_derivative_is_not_trusted(estimator, init_fn):
    """The run starts at ``alpha``, on which the outer loss depends otherwise too."""
    outer = lambda w, alpha, batch: jnp.sum(w**2) + 1e-3 * jnp.sum(alpha**2)
    estimates = [
        hg.hypergradient(hg.Bilevel(centred_loss, outer, init_fn=f), estimator)(
            W2, jnp.array([0.4, 0.6])
        )
        for f in (init_fn, lambda w, alpha: alpha)
    ]
    lost, complete = estimates
    assert lost.flags["lost_derivative"]
    assert not lost.trusted
    assert complete.trusted
    assert "init_fn" in lost.reasons[0]


@pytest.mark.parametrize("estimator", RUNS.values(), ids=RUNS)
def test_a_starting_point_without_any_derivative_is_an_error(estimator):
    """No derivative by alpha is left, neither of the losses nor of the start."""
    outer = lambda w, alpha, batch: jnp.sum(w**2)
    init_fn = LOSING_STARTS["stop_gradient"]
    problem = hg.Bilevel(centred_loss, outer, init_fn=init_fn)
    with pytest.raises(ValueError, match=r"alpha .* stop_gradient"):
        hg.hypergradient(problem, estimator)(W2, ALPHA2)


def test_implicit_differentiation_does_not_depend_on_the_starting_point():
    problem = hg.Bilevel(ridge_loss, ridge_loss, init_fn=LOSING_STARTS["stop_gradient"])
    estimate = hg.hypergradient(problem, hg.Implicit(hg.Newton()))(W2, ALPHA2 / 2)
    assert "lost_derivative" not in estimate.flags
