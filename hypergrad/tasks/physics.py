"""Physics-informed networks: weights of the terms of the loss, and optimal control.

A network u(x; w) solves a differential equation by least squares (Raissi et al. 2019),

    L(w, alpha) = alpha_r mean |residual|² + alpha_b mean |u - boundary|²
                  + alpha_d mean |u - sensor|²,

where the sensor readings are noisy. In the variants ``poisson`` and ``burgers`` the
weights alpha are learned on the readings of other sensors. (The weights of McClenny &
Braga-Neto 2023, arXiv 2009.04544, increase along the gradient of the training loss.)

In the variant ``control``, alpha are the boundary values of y'' = 2, and the outer loss
is the squared distance of y to x². This is the demonstration of Hao et al. 2023 (arXiv
2209.07075), with a hypergradient in closed form.

A network has more parameters than it needs. The Hessian of L is therefore nearly
singular, and has negative eigenvalues unless all residuals are zero. `Implicit` is
nevertheless correct to three digits on ``control``. A certificate detects the negative
curvature and does not trust any of these estimates.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from .. import datasets, spaces
from ..inner import LBFGS, Descent
from ..metrics import Metric
from ..problem import Bilevel
from ..validation import as_key, is_traced
from . import mlp
from .task import (
    Task,
    check_booleans,
    check_choice,
    frozen_array,
    has_held_out,
    loss_metric,
    sizes_of,
)

VISCOSITY = 0.01 / np.pi
TERMS = ("residual", "boundary", "data")
SOLVER = Descent(optax.adam(1e-2), num_steps=50)


def network(w: PyTree, x: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Returns the values of the network at points."""
    return mlp.apply(w, x)[:, 0]


def derivative(f: Callable[[Array], Array], axis: int) -> Callable[[Array], Array]:
    """Returns the function ``df/dx_axis`` of points, by one tangent for all points."""

    def derivative_fn(x: Array) -> Array:
        unit = jnp.eye(x.shape[1], dtype=x.dtype)[axis]
        return jax.jvp(f, (x,), (jnp.broadcast_to(unit, x.shape),))[1]

    return derivative_fn


def poisson_solution(x: Float[Array, "n 1"]) -> Float[Array, " n"]:
    """Returns ``u(x) = sin(pi x) + sin(4 pi x) / 2`` on [0, 1]."""
    return jnp.sin(jnp.pi * x[:, 0]) + 0.5 * jnp.sin(4 * jnp.pi * x[:, 0])


def poisson_residual(w: PyTree, x: Float[Array, "n 1"]) -> Float[Array, " n"]:
    """Returns ``u_xx - f`` with the f of `poisson_solution`."""
    u_xx = derivative(derivative(functools.partial(network, w), 0), 0)
    sin_pi, sin_4pi = jnp.sin(jnp.pi * x[:, 0]), jnp.sin(4 * jnp.pi * x[:, 0])
    return u_xx(x) + jnp.pi**2 * (sin_pi + 8 * sin_4pi)


def burgers_residual(w: PyTree, x: Float[Array, "n 2"]) -> Float[Array, " n"]:
    """Returns ``u_t + u u_x - (0.01 / pi) u_xx`` at points ``(x, t)``."""
    u = functools.partial(network, w)
    u_x = derivative(u, 0)
    diffusion = VISCOSITY * derivative(u_x, 0)(x)
    return derivative(u, 1)(x) + u(x) * u_x(x) - diffusion


def control_residual(w: PyTree, x: Float[Array, "n 1"]) -> Float[Array, " n"]:
    """Returns ``y'' - 2``."""
    return derivative(derivative(functools.partial(network, w), 0), 0)(x) - 2.0


def loss_terms(
    residual_fn: Callable[[PyTree, Array], Array], w: PyTree, batch: PyTree
) -> dict[str, Array]:
    """Returns the mean squares of the residual, the boundary and the data."""
    return {
        "residual": jnp.mean(residual_fn(w, batch["collocation"]) ** 2),
        "boundary": misfit(w, None, batch["boundary"]),
        "data": misfit(w, None, batch["data"]),
    }


def misfit(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """Returns the mean of ``|u(x) - u|²`` over the points whose ``use`` is 1."""
    del alpha
    error = network(w, batch["x"]) - batch["u"]
    return jnp.average(error**2, weights=batch.get("use"))


def weighted_loss(
    residual_fn: Callable[[PyTree, Array], Array],
    w: PyTree,
    alpha: PyTree,
    batch: PyTree,
) -> Array:
    """Returns ``sum_k alpha_k L_k(w)``."""
    terms = loss_terms(residual_fn, w, batch)
    return sum((alpha[name] * terms[name] for name in TERMS), jnp.zeros(()))


poisson_loss = functools.partial(weighted_loss, poisson_residual)
burgers_loss = functools.partial(weighted_loss, burgers_residual)


def control_loss(w: PyTree, alpha: Float[Array, "2"], batch: PyTree) -> Array:
    """Returns ``mean |y'' - 2|² + |y(0) - alpha_0|² + |y(1) - alpha_1|²``."""
    residual = control_residual(w, batch["collocation"])
    boundary_error = network(w, batch["boundary"]) - alpha
    return jnp.mean(residual**2) + jnp.sum(boundary_error**2)


def control_cost(w: PyTree, alpha: Float[Array, "2"], batch: PyTree) -> Array:
    """Returns ``M = integral over [0, 1] of (y - x²)²``, by Gauss-Legendre."""
    del alpha
    error = network(w, batch["x"]) - batch["x"][:, 0] ** 2
    return jnp.sum(batch["weight"] * error**2)


def exact_control(alpha: Float[Array, "2"]) -> Float[Array, "2"]:
    """Returns the hypergradient in closed form for ``alpha = (t0, t1)``.

    The solution is ``y = x² + (t1 - t0 - 1) x + t0``, so that
    ``M = (t0² + t1² + t0 t1 - 2 t1 - t0 + 1) / 3``, whose minimum is at (0, 1).
    """
    t0, t1 = alpha
    return jnp.stack([2 * t0 + t1 - 1, t0 + 2 * t1 - 2]) / 3


def relative_error(solution: PyTree, w: PyTree, alpha: PyTree, key: Array) -> Array:
    """Returns ``|u - u*| / |u*|`` over the points of a grid."""
    del alpha, key
    error = network(w, solution["x"]) - solution["u"]
    return jnp.linalg.norm(error) / jnp.linalg.norm(solution["u"])


def cole_hopf(x: np.ndarray, t: np.ndarray, num_nodes: int = 500) -> np.ndarray:
    """Returns the solution of Burgers' equation for the initial values ``-sin(pi x)``.

    ``u = -E[sin(pi y) f(y)] / E[f(y)]`` with ``log f(y) = -cos(pi y) / (2 pi nu)`` and
    ``y ~ N(x, 2 nu t)`` (Basdevant et al. 1986), by the trapezoidal rule.

    Args:
      x, t: Positions and times, arrays of shape ``[n]``.
      num_nodes: Number of nodes of the quadrature.
    """
    z = np.linspace(-14.0, 14.0, num_nodes)
    y = x[:, None] - np.sqrt(2 * VISCOSITY * t)[:, None] * z
    log_weight = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY) - z**2 / 2
    weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
    return -(np.sin(np.pi * y) * weight).sum(axis=1) / weight.sum(axis=1)


@functools.cache
def cole_hopf_grid() -> dict[str, np.ndarray]:
    """Returns ``{"x", "t", "u"}`` of `cole_hopf` on the grid of the reference file."""
    x, t = np.linspace(-1, 1, 256), np.linspace(0, 0.99, 100)
    grid_x, grid_t = np.meshgrid(x, t, indexing="ij")
    u = cole_hopf(grid_x.ravel(), grid_t.ravel()).reshape(256, 100)
    return {"x": frozen_array(x), "t": frozen_array(t), "u": frozen_array(u)}


def burgers_reference(data_dir: str | None) -> dict[str, np.ndarray]:
    """Returns the solution ``{"x", "t", "u"}`` of Burgers' equation.

    It is the file of Raissi et al. 2019 in ``data_dir``. It is computed by quadrature
    if ``data_dir`` is empty, or if it is None and the file is not found.

    Raises:
      FileNotFoundError: The file is not in ``data_dir``.
    """
    if data_dir == "":
        return cole_hopf_grid()
    try:
        return datasets.load("burgers", data_dir)
    except FileNotFoundError:
        if data_dir is None:
            return cole_hopf_grid()
        raise


def even_points(num_points: int) -> Float[Array, "n 1"]:
    """Returns evenly spaced points of [0, 1], both ends included."""
    return jnp.linspace(0.0, 1.0, num_points)[:, None]


def poisson_data(sizes: dict[str, int], key: Array) -> dict[str, PyTree]:
    """Returns even collocation points, the boundary, random sensors and a test grid."""
    evaluate = lambda x: {"x": x, "u": poisson_solution(x)}
    num_sensors = sizes["num_sensors"] + sizes["num_held_out"]
    return {
        "collocation": even_points(sizes["num_collocation"]),
        "boundary": evaluate(even_points(2)),
        "sensors": evaluate(jax.random.uniform(key, (num_sensors, 1))),
        "test": evaluate(even_points(500)),
    }


def burgers_data(
    sizes: dict[str, int], key: Array, data_dir: str | None
) -> dict[str, PyTree]:
    """Returns random collocation points, initial and boundary values, and sensors.

    Every fourth position and time of the reference is for testing. The sensors are at
    other points of the reference.
    """
    keys = jax.random.split(key, 4)
    reference = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, float), burgers_reference(data_dir)
    )
    grid = jnp.stack(jnp.meshgrid(reference["x"], reference["t"], indexing="ij"), -1)
    is_test = np.zeros(grid.shape[:2], bool)
    is_test[::4, ::4] = True
    select = lambda mask: {"x": grid[mask], "u": reference["u"][mask]}
    candidates = select(~is_test)
    num_sensors = sizes["num_sensors"] + sizes["num_held_out"]
    if num_sensors > len(candidates["u"]):
        raise ValueError(
            "num_sensors + num_held_out must be at most the "
            f"{len(candidates['u'])} points of the reference that are not for "
            f"testing; got {num_sensors}."
        )
    indices = jax.random.choice(
        keys[0], len(candidates["u"]), (num_sensors,), replace=False
    )
    low, high = jnp.array([-1.0, 0.0]), jnp.array([1.0, 1.0])
    collocation = jax.random.uniform(
        keys[1], (sizes["num_collocation"], 2), minval=low, maxval=high
    )
    num_boundary = sizes["num_boundary"]
    init_x = jax.random.uniform(keys[2], (num_boundary,), minval=-1.0)
    times = jax.random.uniform(keys[3], (num_boundary,))
    boundary_x = jnp.where(jnp.arange(num_boundary) % 2 == 0, -1.0, 1.0)
    boundary = jnp.concatenate(
        [
            jnp.stack([init_x, jnp.zeros_like(init_x)], axis=1),
            jnp.stack([boundary_x, times], axis=1),
        ]
    )
    u = jnp.where(boundary[:, 1] == 0, -jnp.sin(jnp.pi * boundary[:, 0]), 0.0)
    return {
        "collocation": collocation,
        "boundary": {"x": boundary, "u": u},
        "sensors": jax.tree.map(lambda leaf: leaf[indices], candidates),
        "test": select(is_test),
    }


def make_weights(
    key: Array,
    variant: str,
    sizes: dict[str, Any],
    data_dir: str | None,
    hold_out: Array | bool,
) -> Task:
    """Returns the task with one positive weight per term, which is 1 initially."""
    data_key, noise_key, net_key = jax.random.split(key, 3)
    if variant == "poisson":
        points, loss = poisson_data(sizes, data_key), poisson_loss
    else:
        points, loss = burgers_data(sizes, data_key, data_dir), burgers_loss
    sensors = points["sensors"]
    noise = sizes["noise"] * jax.random.normal(noise_key, sensors["u"].shape)
    sensors = sensors | {"u": sensors["u"] + noise}
    num_sensors = sizes["num_sensors"]
    train_sensors = jax.tree.map(lambda leaf: leaf[:num_sensors], sensors)
    val_sensors = jax.tree.map(lambda leaf: leaf[num_sensors:], sensors)
    num_val = sizes["num_held_out"]
    is_third = jnp.arange(num_val) % 3 == 0
    val_sensors["use"] = jnp.where(is_third & jnp.asarray(hold_out), 0.0, 1.0)
    train = {name: points[name] for name in ("collocation", "boundary")}
    train["data"] = train_sensors
    num_inputs = points["collocation"].shape[1]
    metrics: dict[str, Metric] = {
        "relative_error": jax.tree_util.Partial(relative_error, points["test"])
    }
    # The loss of no sensors, if a traced hold_out is False, would be NaN.
    if has_held_out(hold_out, -(-num_val // 3), num_val) and not is_traced(hold_out):
        held_out = val_sensors | {"use": 1 - val_sensors["use"]}
        metrics["held_out_loss"] = loss_metric(misfit, held_out)
    return Task(
        paradigm="physics-informed",
        problem=Bilevel(loss, misfit, train, val_sensors),
        solver=SOLVER,
        w=mlp.init(net_key, (num_inputs, *sizes["hidden"], 1)),
        alpha={name: jnp.ones(()) for name in TERMS},
        space={name: spaces.Interval(1e-3, 1e3, log=True) for name in TERMS},
        metrics=metrics,
    )


def make_control(key: Array, sizes: dict[str, Any]) -> Task:
    """Returns the control of ``y'' = 2``, with (1, 1) as initial boundary values."""
    nodes, weights = np.polynomial.legendre.leggauss(10)
    batch = {
        "collocation": even_points(sizes["num_collocation"]),
        "boundary": even_points(2),
    }
    # Nodes and weights on [0, 1].
    quadrature = {"x": (nodes[:, None] + 1) / 2, "weight": weights / 2}
    quadrature = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.result_type(float)), quadrature
    )
    return Task(
        paradigm="physics-informed",
        problem=Bilevel(control_loss, control_cost, batch, quadrature),
        solver=LBFGS(max_steps=2000),
        w=mlp.init(key, (1, *sizes["hidden"], 1)),
        alpha=jnp.ones(2),
        space=spaces.Real(),
        metrics={"tracking_error": loss_metric(control_cost, quadrature)},
        exact=jax.tree_util.Partial(exact_control),
    )


SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "poisson": {
        "small": {
            "num_collocation": 64, "num_sensors": 20, "num_held_out": 40,
            "noise": 0.01, "hidden": (20, 20),
        },
        "paper": {
            "num_collocation": 256, "num_sensors": 50, "num_held_out": 50,
            "noise": 0.1, "hidden": (50,) * 4,
        },
    },
    "burgers": {
        "small": {
            "num_collocation": 256, "num_boundary": 50, "num_sensors": 50,
            "num_held_out": 40, "noise": 0.01, "hidden": (20, 20),
        },
        "paper": {
            "num_collocation": 10_000, "num_boundary": 100, "num_sensors": 100,
            "num_held_out": 100, "noise": 0.1, "hidden": (20,) * 8,
        },
    },
    "control": {
        "small": {"num_collocation": 16, "hidden": (8,)},
        "paper": {"num_collocation": 64, "hidden": (50,) * 4},
    },
}  # fmt: skip


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    variant: str = "poisson",
    hold_out: Array | bool = False,
    **sizes: Any,
) -> Task:
    """Returns the task of a differential equation and a network that solves it.

    Args:
      key: PRNG key of the network, the sensors, their noise and random points.
      scale: 'small', the scale of the table of `hypergrad run physics`, or 'paper'.
      data_dir: Folder of the solution of Burgers' equation; see
        `hypergrad.datasets.load`. The solution is computed by quadrature if the folder
        is empty (``""``), or if it is None and no file is found.
      variant: 'poisson', 'burgers' or 'control'.
      hold_out: Whether a third of the held-out sensors is not in the outer loss but,
        unless it is traced, in the metric ``held_out_loss``, for model selection; not
        used by 'control'. Defaults to False.
      sizes: Replacements of the entries of `SCALES`, by their names.

    Raises:
      FileNotFoundError: The solution of Burgers' equation is not in ``data_dir``.
      ValueError: The scale or the variant is unknown, a number of ``sizes`` is out of
        range, or ``hold_out`` holds out all of the sensors.
      TypeError: A size is not in `SCALES`, its type is not that of the entry, or
        ``hold_out`` is not boolean.
    """
    check_choice("variant", variant, SCALES)
    check_choice("scale", scale, SCALES[variant])
    check_booleans(hold_out=hold_out)
    key, chosen = as_key(key), sizes_of("physics", SCALES[variant][scale], sizes)
    if variant == "control":
        return make_control(key, chosen)
    return make_weights(key, variant, chosen, data_dir, hold_out)
