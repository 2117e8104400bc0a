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
# A model with parameters $w$ is trained at hyperparameters $\alpha$ and judged on other
# data:
#
# $$
# f(\alpha) = M\big(w^*(\alpha)\big), \qquad w^*(\alpha) = \arg\min_w L(w, \alpha).
# $$
#
# The *hypergradient* $\nabla f(\alpha)$ says how the validation loss changes when a
# hyperparameter changes, **given that the model will be retrained**. This notebook
# computes it in two ways with plain JAX, checks both against a closed form, and then
# stops the training early to see what each way does.
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

jax.config.update("jax_enable_x64", True)  # to tell errors of method from rounding

# %% [markdown]
# ## Data
#
# scikit-learn's diabetes data: ten features of each patient, and how far the disease
# had progressed a year later. Half of the patients train, half validate; both are
# standardised by the training half.

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
# Both losses take `(w, alpha, batch)`: parameters, hyperparameters, data. `jax` does
# not need it; the library will.


# %%
def val_loss(w, alpha, batch):
    inputs, targets = batch
    return 0.5 * jnp.mean((inputs @ w - targets) ** 2)


def train_loss(w, alpha, batch):
    return val_loss(w, alpha, batch) + 0.5 * jnp.sum(jnp.exp(alpha) * w**2)


w0 = jnp.zeros(10)
alpha = jnp.full(10, -3.0)

# %% [markdown]
# ## The answer
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


def error(found, truth=exact):
    return float(jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth))


print(exact)
print(f"central differences: relative error {error(central):.1e}")

# %% [markdown]
# ## From scratch
#
# **The inner solution** by $T$ steps of gradient descent,
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
# One linear system whatever the number of hyperparameters, solved by conjugate
# gradients from products $Hv$, each about the price of two gradients; no matrix is ever
# formed. The loop that found $w^*$ is not differentiated, so nothing of it is stored.

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
    found = jax.jit(method, static_argnums=1)(alpha, 3000)
    print(
        f"{method.__name__}: relative error {error(found):.1e} to the closed form, "
        f"{error(found, central):.1e} to central differences"
    )

# %% [markdown]
# After 3,000 steps the procedure and the minimum agree, and so do the two derivatives.
#
# ## With the library
#
# The same losses and data, in five lines.

# %%
problem = hg.Bilevel(train_loss, val_loss, train, val)
solver = hg.Descent(optax.sgd(rate), num_steps=3000)
by_unrolling = hg.hypergradient(problem, hg.Unrolled(solver))(w0, alpha)
by_theorem = hg.hypergradient(problem, hg.Implicit(solver))(w0, alpha)
trace = hg.minimize(
    problem, hg.Implicit(hg.Newton()), optax.adam(0.1), w0, alpha, num_steps=100
)

# %%
for name, estimate in (("Unrolled", by_unrolling), ("Implicit", by_theorem)):
    stats = {key: float(number) for key, number in estimate.stats.items()}
    print(
        f"{name}: relative error {error(estimate.hypergradient):.1e}, "
        f"trusted {bool(stats['trusted'])}, {stats['num_grads']:.0f} gradients and "
        f"{stats['num_hvps']:.0f} Hessian-vector products"
    )
print(
    f"minimize: {trace.status}, all steps trusted {trace.stats['trusted'].all()}, "
    f"validation loss {trace.value[0]:.4f} -> {trace.value[-1]:.4f}"
)
print("log-penalties:", np.round(trace.alpha, 1))

# %% [markdown]
# `Unrolled` counts each gradient of the loop twice: by default it stores some
# $2\sqrt{T}$ of the $w_t$ and runs the steps once more on the way back
# (`checkpoint=True`).
#
# `minimize` gets another inner solver: a fixed step size $\eta < 2 / \lambda_{\max}(H)$
# would have to hold for every $\alpha$ on the way, and $H$ grows with the penalties.
# `hg.Newton` has no step size.
#
# The validation loss after `minimize` is no estimate of the loss on new patients, since
# ten numbers were fitted to it; that takes a third split, as in [the next
# notebook](02_your_own_losses.ipynb).
#
# ## Stopping early
#
# What if training is stopped after $T$ steps? The error of the inner solution is
# $e_T = w_T - w^* = (I - \eta H)^T (w_0 - w^*)$, which falls as $q^T$ with
# $q = 1 - \eta \lambda_{\min}(H)$. Then
#
# - the **implicit** formula is evaluated at the wrong point: $J$ and $\nabla M$ are off
#   by $O(\lVert e_T \rVert)$, so its error falls as $q^T$;
# - the **unrolled** derivative is that of $w_T$, not of $w^*$:
#   $\partial w_T / \partial \alpha = - \eta \sum_{t<T} (I - \eta H)^{T-1-t} J(w_t)$
#   lacks the tail of a geometric series, and each of its $T$ terms reads a $w_t$ that
#   is off by $O(q^t)$: as a derivative at the minimum, its error falls as $T q^T$.

# %%
q = 1 - rate * jnp.linalg.eigvalsh(hessian(alpha))[0]
print(f"q = {q:.4f}: a factor e in {-1 / jnp.log(q):.0f} steps")

counts = [1, 3, 10, 30, 100, 300, 1000]
runs = {"implicit": [], "unrolled": []}
for num_steps in counts:
    solver = hg.Descent(optax.sgd(rate), num_steps)
    for name, estimator in (
        ("implicit", hg.Implicit(solver)),
        ("unrolled", hg.Unrolled(solver)),
    ):
        runs[name].append(hg.hypergradient(problem, estimator)(w0, alpha))

print("steps   implicit: error  trusted   unrolled: error  trusted")
for num_steps, a, b in zip(counts, runs["implicit"], runs["unrolled"], strict=True):
    print(
        f"{num_steps:5d}   {error(a.hypergradient):15.1e}  {a.stats['trusted']!s:>7}   "
        f"{error(b.hypergradient):15.1e}  {b.stats['trusted']!s:>7}"
    )

# %% [markdown]
# `Implicit` says when it was stopped too early. It cannot know $e_T$, but
# $\lVert e_T \rVert \le \lVert \nabla_w L(w_T, \alpha) \rVert / \lambda_{\min}(H)$. The
# gradient norm is reported as `inner_grad_norm`; `ritz_min`, from the conjugate
# gradients that it runs anyway, estimates $\lambda_{\min}$ (from above, so the quotient
# is an estimate and no bound). Where the quotient exceeds a hundredth of
# $\lVert w_T \rVert$, `trusted` is off. Early stopping does not show in
# `adjoint_residual`: the linear system is solved perfectly, at the wrong point.
#
# `Unrolled` is always trusted here, and rightly: its target is the derivative of the
# $T$-step procedure, and that it computes exactly.

# %%
ten = runs["unrolled"][counts.index(10)]
value_10 = lambda alpha: val_loss(descend(alpha, 10), alpha, val)
central_10 = jax.vmap(lambda s: (value_10(alpha + s) - value_10(alpha - s)) / 2e-4)(
    shifts
)
print(
    "Unrolled after 10 steps: relative error "
    f"{error(ten.hypergradient, central_10):.1e} to central differences of the 10 "
    f"steps, {error(ten.hypergradient):.1e} to the derivative at the minimum"
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for name, color in (("implicit", "#1f77b4"), ("unrolled", "#ff7f0e")):
    errors = [error(estimate.hypergradient) for estimate in runs[name]]
    trusted = np.array([bool(estimate.stats["trusted"]) for estimate in runs[name]])
    left.loglog(counts, errors, color=color, label=name)
    fill = np.where(trusted, color, "white")
    left.scatter(counts, errors, c=fill, edgecolors=color, zorder=3)
left.scatter([], [], c="white", edgecolors="black", label="not trusted")
left.set(
    xlabel="inner steps T",
    ylabel="relative error",
    title="Hypergradient, against the one at the minimum",
)
left.legend(frameon=False)

found = runs["implicit"]
norms = [float(jnp.linalg.norm(estimate.w)) for estimate in found]
estimates = [
    float(e.stats["inner_grad_norm"] / e.stats["ritz_min"]) / norm
    for e, norm in zip(found, norms, strict=True)
]
truth = [
    float(jnp.linalg.norm(e.w - w_star)) / norm
    for e, norm in zip(found, norms, strict=True)
]
adjoints = [float(estimate.stats["adjoint_residual"]) for estimate in found]
right.loglog(counts, estimates, "o-", color="#1f77b4", label="estimate from the stats")
right.loglog(counts, truth, "s--", color="#2ca02c", label="true error")
right.loglog(counts, adjoints, "^:", color="#7f7f7f", label="adjoint residual")
right.axhline(1e-2, color="black", linewidth=0.8)
right.text(1, 2e-3, "trusted below", fontsize=9)
right.set(xlabel="inner steps T", title="Inner solution of Implicit: relative error")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# Left: the implicit hypergradient of a hardly trained model is off by more than the
# whole hypergradient; with more steps it comes closer to the one at the minimum than
# the unrolled one does, and its lead grows with $T$. Right: what the library knew when
# it decided. The estimate errs on the careful side here, and `trusted` comes on where
# it crosses the line.
#
# Which of the two is wanted depends on the question. Will the model be trained to
# convergence? Then the derivative at the minimum, by `Implicit` and a solver that gets
# there. Will it be trained for exactly these $T$ steps? Then the derivative of those,
# by `Unrolled`.
