"""Physics-informed networks: weights of the loss's terms, and a control.

A network u(x; w) solves a differential equation by least squares (Raissi et al. 2019),

    L(w, alpha) = alpha_r mean |residual|² + alpha_b mean |u - boundary|²
                  + alpha_d mean |u - sensor|²,

where the sensors' readings are noisy. ``poisson`` and ``burgers``: the weights alpha
are learned on the readings of other sensors (after McClenny & Braga-Neto 2023, arXiv
2009.04544, whose weights rise on the training loss itself).

``control``: the boundary values of y'' = 2 are alpha, and the outer loss is how far y
is from x²; the demonstration of Hao et al. 2023 (arXiv 2209.07075), with a closed form.

A network has more parameters than it needs, so the Hessian of L is nearly singular, and
negative along some direction wherever a residual is left. `Implicit` is right on
``control`` to three digits even so, but the probe of a certificate meets the negative
curvature: it trusts none of these estimates.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from .. import datasets as datasets
from .. import spaces
from ..inner import LBFGS, Descent
from ..problem import Bilevel
from ..validation import as_key
from . import mlp
from .task import Task, sizes_of

VISCOSITY = 0.01 / np.pi
TERMS = ("residual", "boundary", "data")
SOLVER = Descent(optax.adam(1e-2), num_steps=50)


def network(w: PyTree, x: Array) -> Array:
    """``[n, d] -> [n]``."""
    return mlp.apply(w, x)[:, 0]


def derivative(f: Callable[[Array], Array], axis: int) -> Callable[[Array], Array]:
    """``df/dx_axis`` at every point, one tangent for all."""

    def slope(x: Array) -> Array:
        along = jnp.broadcast_to(jnp.eye(x.shape[1], dtype=x.dtype)[axis], x.shape)
        return jax.jvp(f, (x,), (along,))[1]

    return slope


def poisson_solution(x: Array) -> Array:
    """``u(x) = sin(pi x) + sin(4 pi x) / 2`` on [0, 1]."""
    return jnp.sin(jnp.pi * x[:, 0]) + 0.5 * jnp.sin(4 * jnp.pi * x[:, 0])


def poisson_residual(w: PyTree, x: Array) -> Array:
    """``u_xx - f`` with the f of `poisson_solution`."""
    curvature = derivative(derivative(functools.partial(network, w), 0), 0)
    one, four = jnp.sin(jnp.pi * x[:, 0]), jnp.sin(4 * jnp.pi * x[:, 0])
    return curvature(x) + jnp.pi**2 * (one + 8 * four)


def burgers_residual(w: PyTree, x: Array) -> Array:
    """``u_t + u u_x - (0.01 / pi) u_xx`` at points ``(x, t)``."""
    u = functools.partial(network, w)
    slope = derivative(u, 0)
    diffusion = VISCOSITY * derivative(slope, 0)(x)
    return derivative(u, 1)(x) + u(x) * slope(x) - diffusion


def control_residual(w: PyTree, x: Array) -> Array:
    """``y'' - 2``."""
    return derivative(derivative(functools.partial(network, w), 0), 0)(x) - 2.0


def terms(
    residual: Callable[[PyTree, Array], Array], w: PyTree, batch: PyTree
) -> dict[str, Array]:
    """Mean squares of residual, boundary and data."""
    return {
        "residual": jnp.mean(residual(w, batch["inside"]) ** 2),
        "boundary": misfit(w, None, batch["boundary"]),
        "data": misfit(w, None, batch["data"]),
    }


def misfit(w: PyTree, alpha: PyTree, batch: PyTree) -> Array:
    """``mean |u(x) - u|²`` at the points in use; of held-out sensors the outer loss."""
    del alpha
    error = network(w, batch["x"]) - batch["u"]
    return jnp.average(error**2, weights=batch.get("use"))


def weighted_loss(
    residual: Callable[[PyTree, Array], Array], w: PyTree, alpha: PyTree, batch: PyTree
) -> Array:
    """``sum_k alpha_k L_k(w)``."""
    each = terms(residual, w, batch)
    return sum((alpha[name] * each[name] for name in TERMS), jnp.zeros(()))


poisson_loss = functools.partial(weighted_loss, poisson_residual)
burgers_loss = functools.partial(weighted_loss, burgers_residual)


def control_loss(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """``mean |y'' - 2|² + |y(0) - alpha_0|² + |y(1) - alpha_1|²``."""
    residual = control_residual(w, batch["inside"])
    ends = network(w, batch["ends"]) - alpha
    return jnp.mean(residual**2) + jnp.sum(ends**2)


def control_cost(w: PyTree, alpha: Array, batch: PyTree) -> Array:
    """``J = integral over [0, 1] of (y - x²)²``, by Gauss and Legendre."""
    del alpha
    distance = network(w, batch["x"]) - batch["x"][:, 0] ** 2
    return jnp.sum(batch["weight"] * distance**2)


def exact_control(alpha: Array) -> Array:
    """``dJ/dalpha`` where ``y = x² + (t1 - t0 - 1) x + t0`` for ``alpha = (t0, t1)``.

    ``J = (t0² + t1² + t0 t1 - 2 t1 - t0 + 1) / 3``, least at (0, 1).
    """
    t0, t1 = alpha
    return jnp.stack([2 * t0 + t1 - 1, t0 + 2 * t1 - 2]) / 3


def relative_error(truth: PyTree, w: PyTree, alpha: PyTree, key: Array) -> Array:
    """``|u - u*| / |u*|`` over the points of a grid."""
    del alpha, key
    error = network(w, truth["x"]) - truth["u"]
    return jnp.linalg.norm(error) / jnp.linalg.norm(truth["u"])


def cole_hopf(x: np.ndarray, t: np.ndarray, num_nodes: int = 500) -> np.ndarray:
    """Burgers' solution from ``-sin(pi x)``; ``x``, ``t`` and the result alike.

    ``u = -E[sin(pi y) f(y)] / E[f(y)]`` with ``log f(y) = -cos(pi y) / (2 pi nu)`` and
    ``y ~ N(x, 2 nu t)`` (Basdevant et al. 1986), by the trapezoidal rule.
    """
    z = np.linspace(-14.0, 14.0, num_nodes)
    y = x[:, None] - np.sqrt(2 * VISCOSITY * t)[:, None] * z
    log = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY) - z**2 / 2
    weight = np.exp(log - log.max(axis=1, keepdims=True))
    return -(np.sin(np.pi * y) * weight).sum(axis=1) / weight.sum(axis=1)


@functools.cache
def quadrature() -> dict[str, np.ndarray]:
    """``{"x", "t", "u"}`` by `cole_hopf`, at the places and times of the file."""
    x, t = np.linspace(-1, 1, 256), np.linspace(0, 0.99, 100)
    places, times = np.meshgrid(x, t, indexing="ij")
    u = cole_hopf(places.ravel(), times.ravel()).reshape(256, 100)
    return {"x": x, "t": t, "u": u}


def burgers_reference(data_dir: str | None) -> tuple[str, dict[str, np.ndarray]]:
    """``(where from, {"x", "t", "u"})``: the file where it is kept, else quadrature."""
    try:
        found = datasets.load("burgers", data_dir)
        return "Burgers' equation, the file of Raissi et al. 2019", found
    except FileNotFoundError:
        return "Burgers' equation, by the quadrature of Cole and Hopf", quadrature()


def data_name(variant: str = "poisson", data_dir: str | None = None) -> str:
    """Which data the task uses."""
    if variant == "burgers":
        return burgers_reference(data_dir)[0]
    return "simulated, with the exact solution"


def poisson_data(sizes: dict[str, int], key: Array) -> dict[str, PyTree]:
    """Even collocation points, both ends, sensors at random, and a grid to test on."""
    points = lambda n: jnp.linspace(0.0, 1.0, n)[:, None]
    at = lambda x: {"x": x, "u": poisson_solution(x)}
    sensors = at(jax.random.uniform(key, (sizes["sensors"] + sizes["held_out"], 1)))
    return {
        "inside": points(sizes["inside"]),
        "boundary": at(points(2)),
        "sensors": sensors,
        "test": at(points(500)),
    }


def burgers_data(
    sizes: dict[str, int], key: Array, data_dir: str | None
) -> dict[str, PyTree]:
    """Random collocation points, the start and both ends, sensors from the reference.

    Every fourth place and time of the reference is for testing, sensors are elsewhere.
    """
    keys = jax.random.split(key, 4)
    found = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, float), burgers_reference(data_dir)[1]
    )
    grid = jnp.stack(jnp.meshgrid(found["x"], found["t"], indexing="ij"), axis=-1)
    is_test = np.zeros(grid.shape[:2], bool)
    is_test[::4, ::4] = True
    at = lambda where: {"x": grid[where], "u": found["u"][where]}
    rest = at(~is_test)
    chosen = jax.random.choice(
        keys[0], len(rest["u"]), (sizes["sensors"] + sizes["held_out"],), replace=False
    )
    low, high = jnp.array([-1.0, 0.0]), jnp.array([1.0, 1.0])
    inside = jax.random.uniform(keys[1], (sizes["inside"], 2), minval=low, maxval=high)
    start = jax.random.uniform(keys[2], (sizes["boundary"],), minval=-1.0)
    times = jax.random.uniform(keys[3], (sizes["boundary"],))
    ends = jnp.where(jnp.arange(len(times)) % 2 == 0, -1.0, 1.0)
    edge = jnp.concatenate(
        [
            jnp.stack([start, jnp.zeros_like(start)], axis=1),
            jnp.stack([ends, times], axis=1),
        ]
    )
    value = jnp.where(edge[:, 1] == 0, -jnp.sin(jnp.pi * edge[:, 0]), 0.0)
    return {
        "inside": inside,
        "boundary": {"x": edge, "u": value},
        "sensors": jax.tree.map(lambda leaf: leaf[chosen], rest),
        "test": at(is_test),
    }


def make_weights(
    key: Array,
    variant: str,
    sizes: dict[str, Any],
    data_dir: str | None,
    hold_out: Array | bool,
) -> Task:
    """One positive weight a term, all 1 at first."""
    data_key, noise_key, net_key = jax.random.split(key, 3)
    if variant == "poisson":
        parts, loss = poisson_data(sizes, data_key), poisson_loss
    else:
        parts, loss = burgers_data(sizes, data_key, data_dir), burgers_loss
    sensors = parts["sensors"]
    noise = sizes["noise"] * jax.random.normal(noise_key, sensors["u"].shape)
    sensors = sensors | {"u": sensors["u"] + noise}
    count = sizes["sensors"]
    seen = jax.tree.map(lambda leaf: leaf[:count], sensors)
    held_out = jax.tree.map(lambda leaf: leaf[count:], sensors)
    third = jnp.arange(sizes["held_out"]) % 3 == 0
    held_out["use"] = jnp.where(third & jnp.asarray(hold_out), 0.0, 1.0)
    train = {"inside": parts["inside"], "boundary": parts["boundary"], "data": seen}
    error = jax.tree_util.Partial(relative_error, parts["test"])
    num_inputs = parts["inside"].shape[1]
    return Task(
        name="physics",
        paradigm="physics-informed",
        source="McClenny & Braga-Neto 2023 (arXiv 2009.04544)",
        problem=Bilevel(loss, misfit, train, held_out),
        solver=SOLVER,
        w=mlp.init(net_key, (num_inputs, *sizes["hidden"], 1)),
        alpha={name: jnp.ones(()) for name in TERMS},
        space={name: spaces.Interval(1e-3, 1e3, log=True) for name in TERMS},
        metrics={"relative_error": error},
    )


def make_control(key: Array, sizes: dict[str, Any]) -> Task:
    """``y'' = 2`` from the boundary values (1, 1)."""
    points = lambda n: jnp.linspace(0.0, 1.0, n)[:, None]
    nodes, weights = np.polynomial.legendre.leggauss(10)
    quadrature = {"x": (nodes[:, None] + 1) / 2, "weight": weights / 2}
    batch = {"inside": points(sizes["inside"]), "ends": points(2)}
    quadrature = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.result_type(float)), quadrature
    )
    return Task(
        name="physics",
        paradigm="physics-informed",
        source="Hao et al. 2023 (arXiv 2209.07075)",
        problem=Bilevel(control_loss, control_cost, batch, quadrature),
        solver=LBFGS(max_steps=2000),
        w=mlp.init(key, (1, *sizes["hidden"], 1)),
        alpha=jnp.ones(2),
        space=spaces.Real(),
        metrics={"cost": jax.tree_util.Partial(metric_cost, quadrature)},
        exact=exact_control,
    )


def metric_cost(batch: PyTree, w: PyTree, alpha: PyTree, key: Array) -> Array:
    """J."""
    del key
    return control_cost(w, alpha, batch)


SCALES = {
    "poisson": {
        "small": {
            **{"inside": 64, "sensors": 20, "held_out": 40, "noise": 0.01},
            "hidden": (20, 20),
        },
        "paper": {
            **{"inside": 256, "sensors": 50, "held_out": 50, "noise": 0.1},
            "hidden": (50,) * 4,
        },
    },
    "burgers": {
        "small": {
            **{"inside": 256, "boundary": 50, "sensors": 50, "held_out": 40},
            **{"noise": 0.01, "hidden": (20, 20)},
        },
        "paper": {
            **{"inside": 10_000, "boundary": 100, "sensors": 100, "held_out": 100},
            **{"noise": 0.1, "hidden": (20,) * 8},
        },
    },
    "control": {
        "small": {"inside": 16, "hidden": (8,)},
        "paper": {"inside": 64, "hidden": (50,) * 4},
    },
}


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    variant: str = "poisson",
    hold_out: Array | bool = False,
    **sizes: Any,
) -> Task:
    """A differential equation and a network that solves it.

    Args:
      key: of the network, the sensors, their noise and random collocation points.
      scale: 'small', at which `hypergrad run physics` makes its table, or 'paper'.
      data_dir: where Burgers' reference lies; see `hypergrad.data.load`. Without the
        file it is made by quadrature.
      variant: 'poisson', 'burgers' or 'control'.
      hold_out: keep a third of the held-out sensors out of the outer loss, to choose
        by; not read by 'control'.
      sizes: in place of the scale's, as `SCALES` names them.

    Raises:
      ValueError: another scale or variant.
      TypeError: a size that `SCALES` does not name.
    """
    if variant not in SCALES:
        raise ValueError(f"variant must be one of {sorted(SCALES)}; got {variant!r}")
    if scale not in SCALES[variant]:
        raise ValueError(f"scale must be 'small' or 'paper'; got {scale!r}")
    key, chosen = as_key(key), sizes_of("physics", SCALES[variant][scale], sizes)
    if variant == "control":
        return make_control(key, chosen)
    return make_weights(key, variant, chosen, data_dir, hold_out)
