# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own two losses
#
# The library needs a training loss and a validation loss, both
# `(w, alpha, batch) -> scalar`, and a starting point for `w` and for `alpha`, each any
# pytree of float arrays. It returns the derivative of the validation loss with respect
# to every hyperparameter, including the effect of retraining, and reports whether the
# derivative can be trusted.
#
# The example is a small network on handwritten digits with four hyperparameters: a
# label smoothing, one weight decay per layer, and the learning rate.

# %%
import jax
import jax.numpy as jnp
import lineax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import hypergrad as hg

jax.config.update("jax_enable_x64", True)  # section 3 gives the reason

# %%
digits = hg.datasets.load("digits")
order = jax.random.permutation(jax.random.key(0), len(digits["y"]))
parts = {"train": order[:300], "val": order[300:600], "test": order[600:]}
data = {
    name: {"x": jnp.asarray(digits["x"][rows], float), "y": digits["y"][rows]}
    for name, rows in parts.items()
}
for name, part in data.items():
    print(f"{name:5} {part['x'].shape}")

# %% [markdown]
# ## 1. A model is a pytree
#
# The library has no model class. `nnx.split` splits a flax model into its structure,
# which is static, and its parameters, which are the `w` of the losses. Models of
# equinox, haiku and linen work in the same way.


# %%
class Network(nnx.Module):
    def __init__(self, rngs):
        options = {"use_bias": False, "param_dtype": float, "rngs": rngs}
        self.hidden = nnx.Linear(64, 16, **options)
        self.out = nnx.Linear(16, 10, **options)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


graph, w = nnx.split(Network(nnx.Rngs(0)))


def scores(w, batch):
    return nnx.merge(graph, w)(batch["x"])


# %% [markdown]
# ## 2. Two losses and a solver
#
# With class scores $s(w)$, one-hot labels $y$ and smoothing $\varepsilon$, the training
# loss is
#
# $$
# L(w, \alpha) = \mathrm{CE}\big(s(w), (1 - \varepsilon)\, y + \varepsilon / 10\big)
# + \frac12 \sum_{\ell} e^{\mathrm{decay}_\ell} \lVert w_\ell \rVert^2,
# \qquad
# \varepsilon = \sigma(\mathrm{smoothing}),
# $$
#
# and the validation loss is the plain cross-entropy. Positive numbers are represented
# by logarithms and $\varepsilon \in (0, 1)$ by a logit, so that every real `alpha` is
# valid.


# %%
def train_loss(w, alpha, batch):
    labels = jax.nn.one_hot(batch["y"], 10)
    labels = optax.smooth_labels(labels, jax.nn.sigmoid(alpha["smoothing"]))
    fit = jnp.mean(optax.softmax_cross_entropy(scores(w, batch), labels))
    decay = sum(
        jnp.exp(alpha["decay"][layer]) * optax.tree.norm(w[layer], squared=True)
        for layer in ("hidden", "out")
    )
    return fit + 0.5 * decay


def val_loss(w, alpha, batch):
    labels = batch["y"]
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(scores(w, batch), labels)
    )


alpha = {
    "smoothing": -2.0,
    "decay": {"hidden": -4.0, "out": -4.0},
    "log_rate": -1.5,
}
problem = hg.Bilevel(train_loss, val_loss, data["train"], data["val"])

# %% [markdown]
# The learning rate appears in neither loss. It belongs to the optimizer, so `Descent`
# receives a function `alpha -> optimizer`:

# %%
sgd = lambda alpha: optax.sgd(jnp.exp(alpha["log_rate"]), momentum=0.9)
solver = hg.Descent(sgd, num_steps=100)

# %% [markdown]
# ## 3. Hyperparameters that an estimator can differentiate
#
# `Unrolled` differentiates the hundred steps and therefore all four leaves.

# %%
unrolled = hg.Unrolled(solver, warm_start=False)  # each run starts at the given w
estimate = hg.hypergradient(problem, unrolled)(w, alpha)


def print_estimate(estimate):
    leaves = jax.tree.leaves_with_path(estimate.hypergradient)
    for path, leaf in leaves:
        print(f"  {jax.tree_util.keystr(path):20} {leaf:+.4f}")
    for name in (
        "inner_grad_norm",
        "adjoint_residual",
        "ritz_min",
        "gradient_equivalents",
    ):
        print(f"  {name:20} {estimate.stats[name]:.4g}")
    print(f"  {'trusted':20} {estimate.trusted}")
    for reason in estimate.reasons:
        print(f"  - {reason}")


print(f"Unrolled, validation loss {estimate.value:.4f}")
print_estimate(estimate)

# %% [markdown]
# `Implicit` differentiates the condition $\nabla_w L(w^*, \alpha) = 0$. A learning rate
# does not move the minimum, but it does change the result of a hundred steps, so a
# derivative of zero would be misleading. The library raises an error instead.

# %%
try:
    hg.hypergradient(problem, hg.Implicit(solver))(w, alpha)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# `Implicit` therefore receives the leaves that enter the losses. Its target is the
# derivative at the *minimum*, which a hundred steps of momentum do not reach. With
# `tolerance=1.0` Newton's method stops as soon as the gradient is at most as large as
# at the start, so that it makes no step, and the formula is evaluated at the parameters
# where the hundred steps of `Unrolled` stopped:

# %%
loss_alpha = {"smoothing": alpha["smoothing"], "decay": alpha["decay"]}
cg = hg.CG(rtol=1e-3)
implicit_after = hg.Implicit(hg.Newton(tolerance=1.0), cg)
print("Implicit after 100 steps")
print_estimate(hg.hypergradient(problem, implicit_after)(estimate.w, loss_alpha))

# %% [markdown]
# The estimate is not trusted. `inner_grad_norm` is the norm of the training gradient at
# the point where the steps stopped. At such a point the Hessian of a network need not
# be positive definite. Conjugate gradients met negative curvature (`ritz_min` is not
# above 0) and stopped, so that `adjoint_residual` is large. A solver that reaches a
# minimum removes both problems. The smallest curvature is tiny even there, which is the
# reason for float64 in this notebook. A tolerance is data, so this estimate is made by
# the same compiled program.

# %%
implicit = hg.Implicit(hg.Newton(tolerance=1e-7), cg)
estimate = hg.hypergradient(problem, implicit)(w, loss_alpha)
print(f"Implicit at the minimum, validation loss {estimate.value:.4f}")
print_estimate(estimate)

# %% [markdown]
# The two hypergradients differ, and both are correct. One is the derivative of a
# hundred steps of momentum, the other is the derivative of training to convergence.
# Their costs differ too.
#
# ## 4. Admissible values of alpha
#
# `hg.spaces` declares the admissible values of each leaf, in a pytree structured like
# `alpha`. The optimizer then moves an unconstrained variable, and no step leaves the
# space. `hg.search` samples from the same declaration.

# %%
space = {
    "smoothing": hg.spaces.Interval(-8.0, 0.0),
    "decay": {
        "hidden": hg.spaces.Interval(-9.0, -1.0),
        "out": hg.spaces.Interval(-9.0, -1.0),
    },
    "log_rate": hg.spaces.Interval(-6.0, -0.5),
}
try:
    hg.spaces.check(space, alpha | {"log_rate": 0.0})
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# ## 5. Minimise
#
# A metric takes `(w, alpha, key)`, need not be differentiable, and is not counted as
# cost. Arrays that it uses are data, bound by `jax.tree_util.Partial`. The run records
# the exact accuracies on validation and test data, and minimizes the validation *loss*.
# `hg.OuterLoop` is the form of `hg.minimize` with further options, such as
# `eval_every`. A run is one compiled program.


# %%
def accuracy(batch, w, alpha, key):
    return jnp.mean(jnp.argmax(scores(w, batch), axis=-1) == batch["y"])


metrics = {
    "accuracy": jax.tree_util.Partial(accuracy, data["val"]),
    "test_accuracy": jax.tree_util.Partial(accuracy, data["test"]),
}
loop = hg.OuterLoop(
    problem, unrolled, optax.adam(0.1), space=space, metrics=metrics, eval_every=10
)
trace = loop.run(loop.init(w, alpha, jax.random.key(0)), num_steps=31)

# %% [markdown]
# `trace.rows()` is a list of dictionaries, one per step, for a data frame or a log. A
# row contains the metrics that were evaluated at its step. `trace.w` contains the
# parameters of the last step, trained with the `alpha` before it, and
# `nnx.merge(graph, trace.w)` is that model. For one of `trace.alpha`, train once more.

# %%
print(f"Unrolled: {trace.status}, {int(trace.stats['trusted'].sum())} steps trusted")
for row in trace.rows():
    if "accuracy" in row:
        print(
            f"  step {row['step']:2}  cost {row['cost']:6.0f}  "
            f"value {row['value']:.4f}  validation {row['accuracy']:.3f}  "
            f"test {row['test_accuracy']:.3f}"
        )
print("learned:")
for path, leaf in jax.tree.leaves_with_path(trace.alpha):
    print(f"  {jax.tree_util.keystr(path):20} {leaf:+.2f}")

# %% [markdown]
# A loop of your own needs no more than estimates. The one below makes the same steps
# with `Implicit`, by the program that section 3 compiled: `hg.spaces.inverse` and
# `hg.spaces.forward` map `alpha` to the unconstrained variable and back, and each
# training starts at the result of the one before. With `rtol=1e-3` conjugate gradients
# often stop while their steps may still change the hypergradient by more than 1%. Such
# an estimate is not trusted, but its direction is good enough for a step.

# %%
loss_space = {"smoothing": space["smoothing"], "decay": space["decay"]}
adam = optax.adam(0.1)


@jax.jit
def move(u, state, hypergradient):
    """Returns the unconstrained variable, the state of Adam and alpha, one step on."""
    to_alpha = lambda u: hg.spaces.forward(loss_space, u)
    _, pull_back = jax.vjp(to_alpha, u)
    (gradient,) = pull_back(hypergradient)
    updates, state = adam.update(gradient, state)
    u = optax.apply_updates(u, updates)
    return u, state, to_alpha(u)


estimate_fn, accuracy_fn = hg.hypergradient(problem, implicit), jax.jit(accuracy)
u = hg.spaces.inverse(loss_space, jax.tree.map(jnp.asarray, loss_alpha))
state, next_w, next_alpha, estimates = adam.init(u), w, loss_alpha, []
for _ in range(31):
    estimate = estimate_fn(next_w, next_alpha)
    u, state, next_alpha = move(u, state, estimate.hypergradient)
    next_w = estimate.w
    estimates.append(estimate)

costs = np.cumsum([float(e.stats["gradient_equivalents"]) for e in estimates])
print(f"Implicit: {sum(bool(e.trusted) for e in estimates)} steps trusted")
for step in range(0, 31, 10):
    estimate = estimates[step]
    on_val, on_test = (
        accuracy_fn(data[part], estimate.w, None, None) for part in ("val", "test")
    )
    print(
        f"  step {step:2}  cost {costs[step]:6.0f}  "
        f"value {estimate.value:.4f}  validation {on_val:.3f}  test {on_test:.3f}"
    )

# %% [markdown]
# ## 6. Without gradients
#
# `hg.search` evaluates the same problem at values from the same space and returns the
# kind of trace that `hg.OuterLoop` returns. Random search receives the budget that
# `Unrolled` spent.

# %%
search = hg.search(
    problem,
    solver,
    hg.searchers.Random(),
    w,
    space=space,
    budget=float(trace.cost[-1]),
    key=jax.random.key(0),
)

# %%
curves = {
    "Unrolled": (trace.cost, np.asarray(trace.value)),
    "Implicit": (costs, np.array([float(e.value) for e in estimates])),
    # The best so far.
    "random search": (search.cost, np.fmin.accumulate(np.asarray(search.value))),
}
figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
for name, (cost, value) in curves.items():
    axis.step(cost, value, where="post", label=name)
axis.set(
    xscale="log",
    xlabel="gradient-equivalents spent",
    ylabel="validation loss",
    title="Value against cost",
)
axis.legend(frameon=False)
plt.show()

for name, (cost, value) in curves.items():
    print(
        f"{name:13} {len(value):3} rows, cost {float(cost[-1]):6.0f}, "
        f"lowest validation loss {np.nanmin(value):.4f}"
    )

# %% [markdown]
# All three are counted in one unit of cost: a gradient of the training loss on all of
# its data counts 1, and a Hessian-vector product counts 2. With four hyperparameters
# and a cheap model random search is far ahead of `Unrolled` early on, and level with it
# at the end. Its cost grows with the number of hyperparameters, while the cost of a
# hypergradient hardly does. The values of `Implicit` are those at the
# minimum, the others those after a hundred steps.
#
# ## 7. The solution as a function
#
# `hg.argmin` returns $w^*(\alpha)$ as a function that JAX differentiates to any order,
# for outer problems that you write yourself. The example computes the Hessian of the
# validation loss with respect to two log-penalties of a logistic regression of zeros
# against ones, one penalty for each half of the image. With 64 parameters the linear
# systems are small enough for a factorization:


# %%
def logistic(w, batch):
    signs = 2.0 * batch["y"] - 1.0
    return jnp.mean(jax.nn.softplus(-signs * (batch["x"] @ w)))


def penalized(w, alpha, batch):
    return logistic(w, batch) + 0.5 * jnp.sum(jnp.repeat(jnp.exp(alpha), 32) * w**2)


binary = {
    name: jax.tree.map(lambda leaf, keep=part["y"] < 2: leaf[keep], part)
    for name, part in data.items()
}
solution = hg.argmin(penalized, hg.Newton(), lineax.Cholesky())
value = lambda alpha: logistic(
    solution(jnp.zeros(64), alpha, binary["train"]), binary["val"]
)
point = jnp.array([-4.0, -4.0])
derivatives = jax.jit(lambda alpha: (jax.grad(value)(alpha), jax.hessian(value)(alpha)))
gradient, hessian = map(np.asarray, derivatives(point))

gradient_fn = lambda alpha: derivatives(alpha)[0]
central = np.stack(
    [(gradient_fn(point + s) - gradient_fn(point - s)) / 2e-4 for s in 1e-4 * np.eye(2)]
)
error = np.linalg.norm(hessian - central) / np.linalg.norm(central)
print("gradient", gradient)
print("Hessian ", hessian.tolist())
print(f"relative error to central differences of the gradient {error:.1e}")
