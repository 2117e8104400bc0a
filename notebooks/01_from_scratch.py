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
# # A hypergradient from scratch
#
# A model with parameters $w$ is trained at hyperparameters $\alpha$ and evaluated on
# other data:
#
# $$
# f(\alpha) = M\big(w^*(\alpha)\big), \qquad
# w^*(\alpha) = \operatorname{argmin}_w L(w, \alpha).
# $$
#
# The *hypergradient* $\nabla f(\alpha)$ is the rate at which the validation loss
# changes with a hyperparameter, **given that the model will be retrained**. This
# notebook computes it in two ways with plain JAX, checks both against a closed form,
# and then stops the training early and compares the two ways again.
#
# Ridge regression with one log-penalty per feature has a closed form for everything:
#
# $$
# L(w, \alpha) = \frac{1}{2n} \lVert Xw - y \rVert^2
# + \frac12 \sum_j e^{\alpha_j} w_j^2,
# \qquad
# M(w) = \frac{1}{2n_v} \lVert X_v w - y_v \rVert^2 .
# $$

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_diabetes

import hypergrad as hg

jax.config.update("jax_enable_x64", True)  # separates errors of a method from rounding

# %% [markdown]
# ## Data
#
# The diabetes data of scikit-learn contains ten features of each patient and the
# progression of the disease after one year. One half of the patients is used for
# training and the other for validation. Both are standardized by the training half.

# %%
x, y = load_diabetes(return_X_y=True)
order = np.random.default_rng(0).permutation(len(y))
half = len(y) // 2
x, y = x[order], y[order]
x = (x - x[:half].mean(axis=0)) / x[:half].std(axis=0)
y = (y - y[:half].mean()) / y[:half].std()
train = jnp.asarray(x[:half]), jnp.asarray(y[:half])
val = jnp.asarray(x[half:]), jnp.asarray(y[half:])
print("training", train[0].shape, "validation", val[0].shape)


# %% [markdown]
# Both losses take `(w, alpha, batch)`: parameters, hyperparameters and data. Plain JAX
# does not need this signature, but the library does.


# %%
def val_loss(w, alpha, batch):
    inputs, targets = batch
    return 0.5 * jnp.mean((inputs @ w - targets) ** 2)


def train_loss(w, alpha, batch):
    return val_loss(w, alpha, batch) + 0.5 * jnp.sum(jnp.exp(alpha) * w**2)


w0 = jnp.zeros(10)
alpha = jnp.full(10, -3.0)

# %% [markdown]
# ## The exact hypergradient
#
# With $H = X^\top X / n + \operatorname{diag}(e^\alpha)$ the best response is
# $w^* = H^{-1} X^\top y / n$. Differentiating $H w^* = X^\top y / n$ by $\alpha_j$
# gives $H \, \partial_j w^* = - e^{\alpha_j} w^*_j \, e_j$, where $e_j$ is the $j$-th
# unit vector, and so
#
# $$
# \partial_j f = - e^{\alpha_j} \, w^*_j \, \big[ H^{-1} \nabla M(w^*) \big]_j .
# $$


# %%
def hessian(alpha):
    inputs, _ = train
    return inputs.T @ inputs / half + jnp.diag(jnp.exp(alpha))


def best_response(alpha):
    inputs, targets = train
    return jnp.linalg.solve(hessian(alpha), inputs.T @ targets / half)


w_star = best_response(alpha)
adjoint = jnp.linalg.solve(hessian(alpha), jax.grad(val_loss)(w_star, alpha, val))
exact = -jnp.exp(alpha) * w_star * adjoint

value = lambda alpha: val_loss(best_response(alpha), alpha, val)
shifts = 1e-4 * jnp.eye(10)
central = jax.vmap(lambda s: (value(alpha + s) - value(alpha - s)) / 2e-4)(shifts)


def relative_error(actual, expected=exact):
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


print(exact)
print(f"central differences: relative error {relative_error(central):.1e}")

# %% [markdown]
# ## From scratch
#
# **The inner solution** is the result of $T$ steps of gradient descent,
# $w_{t+1} = w_t - \eta \, \nabla_w L(w_t, \alpha)$.
#
# **(i) Unrolling.** $w_T$ is a composition of differentiable steps, so reverse mode
# through the loop yields $\nabla_\alpha M(w_T(\alpha))$: the exact derivative of the
# *procedure*.
#
# **(ii) The implicit function theorem.** At the minimum
# $\nabla_w L(w^*(\alpha), \alpha) = 0$ for every $\alpha$. Differentiate, with
# $J = \partial^2 L / \partial w \, \partial \alpha$:
#
# $$
# H \, \frac{\partial w^*}{\partial \alpha} + J = 0
# \qquad\Longrightarrow\qquad
# \nabla f = - J^\top v, \quad H v = \nabla M(w^*) .
# $$
#
# This is one linear system for any number of hyperparameters. Conjugate gradients solve
# it with products $Hv$, each of which costs about two gradients, and no matrix is
# formed. The loop that finds $w^*$ is not differentiated, so none of its steps is
# stored.

# %%
rate = 0.2


def descend(alpha, num_steps):
    step = lambda w, _: (w - rate * jax.grad(train_loss)(w, alpha, train), None)
    return jax.lax.scan(step, w0, length=num_steps)[0]


def unrolled(alpha, num_steps):
    return jax.grad(lambda a: val_loss(descend(a, num_steps), a, val))(alpha)


def conjugate_gradients(matvec, b, tolerance=1e-12):
    def step(state):
        v, r, p = state
        Hp = matvec(p)
        length = (r @ r) / (p @ Hp)
        r_next = r - length * Hp
        return v + length * p, r_next, r_next + (r_next @ r_next) / (r @ r) * p

    unfinished = lambda state: state[1] @ state[1] > tolerance**2 * (b @ b)
    return jax.lax.while_loop(unfinished, step, (jnp.zeros_like(b), b, b))[0]


def implicit(alpha, num_steps):
    w = descend(alpha, num_steps)
    gradient = lambda w, alpha: jax.grad(train_loss)(w, alpha, train)
    hvp = lambda v: jax.jvp(lambda w: gradient(w, alpha), (w,), (v,))[1]
    v = conjugate_gradients(hvp, jax.grad(val_loss)(w, alpha, val))
    return -jax.vjp(lambda alpha: gradient(w, alpha), alpha)[1](v)[0]


for method in (unrolled, implicit):
    hypergradient = jax.jit(method, static_argnums=1)(alpha, 3000)
    print(
        f"{method.__name__}: relative error {relative_error(hypergradient):.1e} to the "
        f"closed form, {relative_error(hypergradient, central):.1e} to central "
        "differences"
    )

# %% [markdown]
# After 3,000 steps the result of the procedure is the minimum, and the two derivatives
# agree.
#
# ## With the library
#
# With the library the same losses and data need five statements. The last one already
# makes a hundred steps of `alpha`.

# %%
problem = hg.Bilevel(train_loss, val_loss, train, val)
solver = hg.Descent(optax.sgd(rate), num_steps=3000)
unrolled_estimate = hg.hypergradient(problem, hg.Unrolled(solver))(w0, alpha)
implicit_estimate = hg.hypergradient(problem, hg.Implicit(solver))(w0, alpha)
trace = hg.minimize(
    problem, hg.Implicit(hg.Newton()), optax.adam(0.1), w0, alpha, num_steps=100
)

# %%
for name, estimate in (
    ("Unrolled", unrolled_estimate),
    ("Implicit", implicit_estimate),
):
    stats = {key: float(number) for key, number in estimate.stats.items()}
    print(
        f"{name}: relative error {relative_error(estimate.hypergradient):.1e}, "
        f"trusted {bool(stats['trusted'])}, {stats['num_grads']:.0f} gradients and "
        f"{stats['num_hvps']:.0f} Hessian-vector products"
    )
print(
    f"minimize: {trace.status}, all steps trusted {trace.stats['trusted'].all()}, "
    f"validation loss {trace.value[0]:.4f} -> {trace.value[-1]:.4f}"
)
print("log-penalties:", np.round(trace.alpha, 1))

# %% [markdown]
# `Unrolled` stores the values of all steps here. Where they exceed 1.5 GB, it stores
# the $w_t$ alone. Where these exceed 1.5 GB too, it stores about $2\sqrt{T}$ of them
# and repeats the steps between them during the reverse pass, so that each gradient of
# the loop counts twice.
#
# `minimize` uses another inner solver. A fixed step size
# $\eta < 2 / \lambda_{\max}(H)$ would have to hold for every $\alpha$ of the run, and
# $H$ grows with the penalties. `hg.Newton` has no step size.
#
# The validation loss after `minimize` is not an estimate of the loss on new patients,
# because ten numbers were fitted to it. Such an estimate needs a third split, as in
# [the next notebook](02_your_own_losses.ipynb).
#
# ## Stopping early
#
# If training stops after $T$ steps, the error of the inner solution is
# $e_T = w_T - w^* = (I - \eta H)^T (w_0 - w^*)$, which falls as $q^T$ with
# $q = 1 - \eta \lambda_{\min}(H)$. This affects the two derivatives differently:
#
# - The **implicit** formula is evaluated at the wrong point. The errors of $J$ and
#   $\nabla M$ are $O(\lVert e_T \rVert)$, so the error of the hypergradient falls as
#   $q^T$.
# - The **unrolled** derivative is the derivative of $w_T$ and not of $w^*$. The sum
#   $- \eta \sum_{t<T} (I - \eta H)^{T-1-t} J(w_t)$
#   lacks the tail of a geometric series, and each of its $T$ terms uses a $w_t$ with an
#   error of $O(q^t)$. As a derivative at the minimum, its error falls as $T q^T$.
#
# `Unrolled` contains the steps, so each number of steps is a program of its own. For
# `Implicit` it matters only where the steps stopped: a solver that makes no step leaves
# `w` at any point of the path, and one program makes all estimates.

# %%
q = 1 - rate * jnp.linalg.eigvalsh(hessian(alpha))[0]
print(f"q = {q:.4f}: a factor of e in {-1 / jnp.log(q):.0f} steps")

counts = [1, 3, 10, 30, 100, 300, 1000]


@jax.jit
def descent_path(w):
    """Returns w after 1, 2, ..., 1000 steps."""

    def step(w, _):
        w = w - rate * jax.grad(train_loss)(w, alpha, train)
        return w, w

    return jax.lax.scan(step, w, length=counts[-1])[1]


path = descent_path(w0)
no_steps = hg.Implicit(hg.Descent(optax.sgd(rate), num_steps=0))
implicit_at = hg.hypergradient(problem, no_steps)
runs = {"implicit": [], "unrolled": []}
for num_steps in counts:
    runs["implicit"].append(implicit_at(path[num_steps - 1], alpha))
    unrolled_estimator = hg.Unrolled(hg.Descent(optax.sgd(rate), num_steps))
    runs["unrolled"].append(hg.hypergradient(problem, unrolled_estimator)(w0, alpha))

print("steps   implicit: error  trusted   unrolled: error  trusted")
for num_steps, a, b in zip(counts, runs["implicit"], runs["unrolled"], strict=True):
    print(
        f"{num_steps:5d}   {relative_error(a.hypergradient):15.1e}  {a.trusted!s:>7}   "
        f"{relative_error(b.hypergradient):15.1e}  {b.trusted!s:>7}"
    )

# %% [markdown]
# `Implicit` reports if it was stopped too early. It corrects $w_T$ and the adjoint by
# approximate Newton steps, which need a few products besides the conjugate gradients of
# the adjoint, and takes the change of the hypergradient as
# `error_estimate`. If it exceeds a hundredth, the estimate is not trusted, and
# `reasons` states why. Early stopping does not show in `adjoint_residual`, because the
# linear system is solved accurately, but at the wrong point.
#
# `Unrolled` is always trusted here. Its target is the derivative of the $T$-step
# procedure, which it computes exactly.

# %%
print(runs["implicit"][counts.index(10)].reasons)

unrolled_10 = runs["unrolled"][counts.index(10)]
value_10 = lambda alpha: val_loss(descend(alpha, 10), alpha, val)
central_10 = jax.vmap(lambda s: (value_10(alpha + s) - value_10(alpha - s)) / 2e-4)(
    shifts
)
print(
    "Unrolled after 10 steps: relative error "
    f"{relative_error(unrolled_10.hypergradient, central_10):.1e} to central "
    f"differences of the 10 steps, {relative_error(unrolled_10.hypergradient):.1e} to "
    "the derivative at the minimum"
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for name, color in (("implicit", "#1f77b4"), ("unrolled", "#ff7f0e")):
    errors = [relative_error(estimate.hypergradient) for estimate in runs[name]]
    trusted = np.array([bool(estimate.trusted) for estimate in runs[name]])
    left.loglog(counts, errors, color=color, label=name)
    fill = np.where(trusted, color, "white")
    left.scatter(counts, errors, c=fill, edgecolors=color, zorder=3)
left.scatter([], [], c="white", edgecolors="black", label="not trusted")
left.set(
    xlabel="inner steps T",
    ylabel="relative error",
    title="Error of the hypergradient at the minimum",
)
left.legend(frameon=False)

estimates = runs["implicit"]
estimated_errors = [float(e.stats["error_estimate"]) for e in estimates]
true_errors = [relative_error(e.hypergradient) for e in estimates]
residuals = [float(e.stats["adjoint_residual"]) for e in estimates]
right.loglog(counts, estimated_errors, "o-", color="#1f77b4", label="error_estimate")
right.loglog(counts, true_errors, "s--", color="#2ca02c", label="true error")
right.loglog(counts, residuals, "^:", color="#7f7f7f", label="adjoint residual")
right.axhline(1e-2, color="black", linewidth=0.8)
right.text(1, 2e-3, "trusted below", fontsize=9)
right.set(xlabel="inner steps T", title="Implicit: estimate and true error")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# The left panel shows that the implicit hypergradient of a barely trained model has an
# error larger than the hypergradient itself. With more steps its error at the minimum
# becomes smaller than that of the unrolled one, by a factor that grows with $T$. The
# right panel shows the estimate on which `trusted` depends beside the true error. The
# hypergradient is trusted once the estimate is below the line.
#
# The choice depends on the use of the model. If it will be trained to convergence, the
# derivative at the minimum is the right one: `Implicit` with a solver that converges.
# If it will be trained for exactly these $T$ steps, the derivative of these steps is
# the right one: `Unrolled`.
