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
# # Several objectives
#
# A diagnosis should be right, and it should need few measurements. These two objectives
# conflict, and there is no best model but a *front*: the models that no other model
# beats in both. Each of the 30 measurements gets a gate between 0 and 1. The gates are
# hyperparameters, and the objectives are functions of them; the penalty on $w$ keeps a
# small gate from being undone by a large weight,
#
# $$
# M_1 = \text{validation loss of the model on gated inputs}, \qquad
# M_2 = \tfrac{1}{30} \sum_j g_j .
# $$

# %%
import jax
import jax.numpy as jnp
import lineax
import matplotlib.pyplot as plt
import numpy as np
import optax

import hypergrad as hg

# %%
cancer = hg.datasets.load("breast_cancer")
order = np.random.default_rng(0).permutation(len(cancer["y"]))
x = (cancer["x"] - cancer["x"].mean(0)) / cancer["x"].std(0)
y = np.where(cancer["y"] == 1, 1.0, -1.0)
train, val = ((x[rows], y[rows]) for rows in (order[:280], order[280:]))


def error(w, alpha, batch):
    margins = batch[1] * (batch[0] @ (alpha * w))
    return jnp.mean(jax.nn.softplus(-margins))


def train_loss(w, alpha, batch):
    return error(w, alpha, batch) + 0.005 * jnp.sum(w**2)


def measurements(w, alpha, batch):
    return jnp.mean(alpha)


problem = hg.Bilevel(train_loss, (error, measurements), train, val)
estimator = hg.Implicit(hg.Newton())
w, alpha = jnp.zeros(30), jnp.full(30, 0.5)
space = hg.spaces.Unit((30,))

# %% [markdown]
# ## Two hypergradients at once
#
# With a tuple of outer losses, an estimate has a value per loss, and a hypergradient
# per loss. The model is trained once, and one linear solve serves all losses. The
# second loss does not depend on the model at all, so that its hypergradient is its own
# derivative.

# %%
estimate = hg.hypergradient(problem, estimator)(w, alpha)
print(estimate)
fig, ax = plt.subplots(figsize=(8, 3))
ax.bar(np.arange(30) - 0.2, estimate.hypergradient[0], 0.4, label="validation loss")
ax.bar(np.arange(30) + 0.2, estimate.hypergradient[1], 0.4, label="measurements")
ax.set(xlabel="measurement", ylabel="derivative by its gate")
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# ## A front
#
# `pareto_front` makes a run per preference, all of them in one program. The aggregator
# makes one direction of the two hypergradients. `EPO` looks for the point of the front
# where the weighted losses are equal: a preference is a ray from the origin, which
# meets the front at one point. The default is the weighted sum. The hypervolume is the
# area that the points dominate, up to the point `worst`; larger is better. Newton's
# method reaches the minimum in each step, as above, so the runs leave out the estimate
# of the error. With 30 parameters the linear systems are small enough for a
# factorization. Both make the programs smaller.

# %%
quick = hg.Implicit(hg.Newton(), lineax.LU(), estimate_error=False)
angles = np.linspace(0.06, 1.5, 9)
preferences = np.stack([np.cos(angles), np.sin(angles)], axis=1)
front = hg.objectives.pareto_front(
    problem,
    quick,
    optax.adam(0.1),
    w,
    alpha,
    preferences,
    aggregator_fn=hg.objectives.EPO,
    num_steps=100,
    space=space,
)
sums = hg.objectives.pareto_front(
    problem, quick, optax.adam(0.1), w, alpha, preferences,
    num_steps=100, space=space,
)  # fmt: skip
points = {"EPO": front.value[:, -1], "weighted sum": sums.value[:, -1]}
worst = jnp.array([0.7, 1.0])
for name, values in points.items():
    volume = float(hg.objectives.hypervolume(values, worst))
    count = int(hg.objectives.non_dominated(values).sum())
    print(f"{name:13} {count} points on the front, hypervolume {volume:.4f}")

# %%
hg.plots.plot_front(points["EPO"], names=("validation loss", "share of measurements"))

# %% [markdown]
# Every row below is a point of the front, from many measurements to few. The darker
# a square, the more open the gate; white is a measurement that is not needed.

# %%
order = np.argsort(points["EPO"][:, 0])
fig, ax = plt.subplots(figsize=(9, 3.6))
ax.imshow(front.alpha[order], cmap="Blues", vmin=0, vmax=1, aspect="auto")
losses = [f"{float(value):.3f}" for value in points["EPO"][order, 0]]
ax.set(yticks=range(len(order)), yticklabels=losses, xlabel="measurement")
ax.set(ylabel="validation loss")
plt.show()

# %% [markdown]
# ## A limit instead of a preference
#
# Often one objective has a limit: the gates may sum to a tenth of the measurements. The
# augmented Lagrangian lowers the first loss within limits on the others, and finds the
# multiplier that a person would have to guess for a weighted sum.

# %%
loop = hg.OuterLoop(
    problem,
    quick,
    optax.adam(0.05),
    space=space,
    aggregator=hg.objectives.AugmentedLagrangian(0.1),
)
trace = loop.run(loop.init(w, alpha), num_steps=400)
print(f"validation loss {float(trace.value[-1, 0]):.4f}", end=", ")
print(f"measurements {30 * float(trace.value[-1, 1]):.2f} of 30")
kept = np.argsort(-np.asarray(trace.alpha))[:5]
print("largest gates:", {int(j): round(float(trace.alpha[j]), 2) for j in kept})

# %% [markdown]
# The run ends below the limit, with two gates nearly open and the others nearly closed.
# In measurements and in loss it lies between two neighbouring points of the front
# above, and no point of that front is better in both. The problem is not convex, so
# that another start may end elsewhere. A single run gives one point; the front shows
# what a higher or a lower limit would cost.
