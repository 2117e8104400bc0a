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
# # One loop or two
#
# A *double loop* trains the model, solves for the adjoint, and only then moves `alpha`.
# A *single-loop* method moves the model $w$, the adjoint $v$ and $\alpha$ together, one
# small step each, on small batches. Its state lags behind the exact solutions, but a
# step costs almost nothing. For SOBA, with the training loss $L$ and the validation
# loss $M$, the three directions are
#
# $$
# d_w = \nabla_w L, \qquad
# d_v = \nabla^2_{ww} L\, v - \nabla_w M, \qquad
# d_\alpha = \nabla_\alpha M - \nabla^2_{\alpha w} L\, v .
# $$
#
# This notebook compares both at equal cost.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import hypergrad as hg

# %% [markdown]
# ## The problem
#
# Is a handwritten digit odd? A linear classifier with one penalty for each of the 64
# pixels, on 800 training and 800 validation images. The penalties stay within
# $[e^{-8}, e^2]$.

# %%
digits = hg.datasets.load("digits")
order = np.random.default_rng(0).permutation(len(digits["y"]))[:1600]
x = digits["x"][order] - digits["x"].mean(0)
y = np.where(digits["y"][order] % 2 == 1, 1.0, -1.0)
train, val = (x[:800], y[:800]), (x[800:], y[800:])


def val_loss(w, alpha, batch):
    return jnp.mean(jax.nn.softplus(-batch[1] * (batch[0] @ w)))


def train_loss(w, alpha, batch):
    return val_loss(w, alpha, batch) + 0.5 * jnp.sum(jnp.exp(alpha) * w**2)


w, alpha = jnp.zeros(64), jnp.full(64, -2.0)
space = hg.spaces.Interval(-8.0, 2.0, shape=(64,))
full = hg.Bilevel(train_loss, val_loss, train, val)
sampled = hg.Bilevel(train_loss, val_loss, hg.Batches(train, 16), hg.Batches(val, 16))

# %% [markdown]
# ## What is compared
#
# The loss of a run says little while `w` lags behind. The curves below show
# $h(\alpha)$, the validation loss at the solution of the training problem for this
# `alpha`, which a metric computes by Newton's method; metrics are not counted as cost.
# The reference is the value after many exact steps.

# %%
exact = hg.Implicit(hg.Newton(), estimate_error=False)


def solved_value(w, alpha, key):
    return hg.hypergradient(full, exact)(w, alpha).value


reference = hg.minimize(
    full, exact, optax.adam(0.1), w, alpha, space=space, num_steps=400
)
lowest = float(reference.value.min())
print(f"h at the start {float(reference.value[0]):.4f}, lowest {lowest:.4f}")

# %% [markdown]
# ## The runs
#
# Every run may spend the cost of 1,500 gradients of the training loss on all data. The
# double loop makes 20 steps of descent per outer step, starting from the last `w`, and
# ten steps of conjugate gradients, without a preconditioner and an estimate of its
# error, which would add to the cost of each step. The single loops see 16 examples per
# step. SABA stores a gradient for every example, which removes the noise in the limit;
# SOBA does not. The single loops move `alpha` by gradient descent and the double loop
# by Adam, with rates chosen by hand on a coarse grid. In the table `logistic`, every
# rate is tuned by a rule.

# %%
descent = hg.Descent(optax.sgd(0.5, momentum=0.9), 20)
plain_cg = hg.CG(max_steps=10, preconditioner=None)
double = hg.Implicit(descent, plain_cg, estimate_error=False)
runs = {
    "double loop": (full, double, optax.adam(0.3), 1),
    "SOBA": (sampled, hg.SOBA(optax.sgd(0.2)), optax.sgd(1.0), 2000),
    "SABA": (sampled, hg.SABA(optax.sgd(0.2)), optax.sgd(1.0), 2000),
}
traces = {}
for name, (problem, method, optimizer, eval_every) in runs.items():
    loop = hg.OuterLoop(
        problem,
        method,
        optimizer,
        space=space,
        metrics={"h": solved_value},
        eval_every=eval_every,
    )
    traces[name] = loop.run(loop.init(w, alpha), budget=1500)
    values = np.asarray(traces[name].metrics["h"])
    values = values[np.isfinite(values)]
    steps = len(traces[name].value)
    print(f"{name:12} {steps:6} steps, h - lowest: {values[-1] - lowest:.1e}")

# %%
fig, ax = plt.subplots(figsize=(7, 4))
for name, trace in traces.items():
    h, cost = np.asarray(trace.metrics["h"]), np.asarray(trace.cost)
    ax.semilogy(cost[np.isfinite(h)], h[np.isfinite(h)] - lowest, ".-", label=name)
ax.set(xlabel="cost in gradients on all training data", ylabel="h(alpha) - lowest")
ax.legend()
plt.show()

# %% [markdown]
# Early on, the single loops are far ahead: they move `alpha` from the first gradients,
# while the double loop pays for a solution at each step. At the end the three are
# close, SABA first and the double loop last. The curves of SOBA and SABA rise once near
# the end, that of the double loop never does. A single loop has one more rate, that of
# the adjoint; here it is the rate of `w`. A single loop is never trusted by itself; a
# certificate (`certify_every=` of `OuterLoop`) can check where it ends.
