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
# # Can this hypergradient be trusted?
#
# A wrong hypergradient looks like a right one: an array of plausible numbers. This
# notebook makes wrong ones on purpose and shows what the estimates say about
# themselves.
#
# The problem has one hyperparameter, so that the truth can be drawn.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import hypergrad as hg

jax.config.update("jax_enable_x64", True)  # the truth should be exact

# %%
cancer = hg.datasets.load("breast_cancer")
x = (cancer["x"] - cancer["x"].mean(0)) / cancer["x"].std(0)
y = np.where(cancer["y"] == 1, 1.0, -1.0)
order = np.random.default_rng(0).permutation(len(y))
train, val = ((x[rows], y[rows]) for rows in (order[:60], order[60:]))


def val_loss(w, alpha, batch):
    return jnp.mean(jax.nn.softplus(-batch[1] * (batch[0] @ w)))


def train_loss(w, alpha, batch):
    return val_loss(w, alpha, batch) + 0.5 * jnp.exp(alpha) * jnp.sum(w**2)


problem = hg.Bilevel(train_loss, val_loss, train, val)
w = jnp.zeros(x.shape[1])

# %% [markdown]
# ## The truth
#
# Newton's method finds the minimum of the training loss to the last digit, for each
# value of the penalty. The curve is the validation loss there. The truth needs no
# estimate of its error.

# %%
exact = hg.hypergradient(problem, hg.Implicit(hg.Newton(), estimate_error=False))
alphas = jnp.linspace(-6.0, 1.0, 71)
truth = jax.vmap(exact, (None, 0))(w, alphas)

# %% [markdown]
# ## Training that stops early
#
# The implicit formula holds at the minimum. After a few steps of gradient descent with
# momentum `w` is not there, and the formula gives a slope that belongs to no minimum.
# The number of steps of `hg.Descent` is a part of the compiled program. Here the steps
# are a loop of JAX, and `hg.Descent` makes none, so that the formula is evaluated where
# the loop stops: one program makes the estimates for all numbers of steps and
# penalties.

# %%
momentum = optax.sgd(0.3, momentum=0.9)
formula = hg.hypergradient(problem, hg.Implicit(hg.Descent(momentum, num_steps=0)))


def estimate_after(num_steps, alpha):
    def step(_, carry):
        w, state = carry
        updates, state = momentum.update(jax.grad(train_loss)(w, alpha, train), state)
        return optax.apply_updates(w, updates), state

    w_end, _ = jax.lax.fori_loop(0, num_steps, step, (w, momentum.init(w)))
    return formula(w_end, alpha)


counts, some = np.array([3, 20, 30, 300, 2000, 3000]), alphas[::3]
over_alphas = jax.vmap(estimate_after, (None, 0))
estimates = jax.jit(jax.vmap(over_alphas, (0, None)))(counts, some)

# %% [markdown]
# Each line below has the slope that an estimate states at $\alpha = -3$. Twenty steps
# are worse than three: the momentum carries $w$ past the minimum, and after twenty
# steps it is on its way back and no nearer to it than after three.

# %%
middle = 10  # some[middle] is -3, as is alphas[3 * middle]
alpha, height = float(some[middle]), float(truth.value[3 * middle])
true_slope = float(truth.hypergradient[3 * middle])
chosen = {
    num_steps: jax.tree.map(lambda leaf, i=i: leaf[i, middle], estimates)
    for i, num_steps in enumerate(counts)
}
near = alpha + np.array([-2.0, 2.0])
fig, ax = plt.subplots(figsize=(7, 4))
ax.plot(alphas, truth.value, color="black", label="validation loss at the minimum")
for num_steps, color in ((3, "tab:red"), (20, "tab:orange"), (2000, "tab:green")):
    estimate = chosen[num_steps]
    slope = float(estimate.hypergradient)
    word = "trusted" if estimate.trusted else "not trusted"
    label = f"{num_steps} steps: slope {slope:+.4f}, {word}"
    ax.plot(near, height + slope * (near - alpha), color=color, label=label)
    print(f"{num_steps:5} steps, error {abs(slope / true_slope - 1):8.1e}", end=", ")
    print(f"estimated {float(estimate.stats['error_estimate']):8.1e}", estimate.reasons)
ax.plot(alpha, height, "o", color="black")
ax.set(xlabel="log of the penalty", ylabel="validation loss")
ax.legend()
plt.show()

# %% [markdown]
# ## Is the estimated error right?
#
# `error_estimate` is relative to the estimate itself, and of first order: a large one
# says only that the error is large. The figure shows it beside the true one, for
# all numbers of steps and penalties. An estimate below the diagonal is worse than it
# says; the errors of the trusted ones should be small.

# %%
expected = np.asarray(truth.hypergradient)[::3]
true = abs(np.asarray(estimates.hypergradient) / expected - 1).ravel()
estimated = np.asarray(estimates.stats["error_estimate"]).ravel()
trusted = np.asarray(estimates.stats["trusted"]).ravel()
print(f"{trusted.sum()} of {len(true)} are trusted; largest error among them", end=" ")
print(f"{true[trusted].max():.1e}")
hg.plots.plot_reliability(estimated, true, trusted)

# %% [markdown]
# ## A certificate corrects what it doubts
#
# `hg.certify` takes any hypergradient, from wherever it comes. It moves `w` towards the
# minimum by Newton steps and solves the adjoint system again.

# %%
estimate = chosen[20]
certificate = hg.certify(problem, estimate.w, alpha, estimate.hypergradient)
print(certificate)
print("given    ", estimate.hypergradient)
print("corrected", certificate.corrected_hypergradient)
print("true     ", true_slope)

# %% [markdown]
# ## A saddle
#
# Where the gradient is zero there need not be a minimum. This training loss has a
# saddle at $(0, \alpha)$ and minima at $(\pm 1, \alpha)$; training that starts with
# `w[0] = 0` ends in the saddle.


# %%
def two_valleys(w, alpha, batch):
    return w[0] ** 4 / 4 - w[0] ** 2 / 2 + (w[1] - alpha) ** 2


def distance(w, alpha, batch):
    return jnp.sum((w - jnp.array([1.0, 0.5])) ** 2)


saddle = hg.hypergradient(
    hg.Bilevel(two_valleys, distance), hg.Implicit(hg.Descent(optax.sgd(0.1), 200))
)(jnp.zeros(2), jnp.array(1.0))
print(saddle.w, saddle.reasons)

# %% [markdown]
# ## Derivatives that are lost on the way
#
# A derivative through `sign` is zero wherever it exists. Such a loss is refused before
# anything runs; where only a part of the derivative is lost, the estimate is not
# trusted.


# %%
def partly_lost(w, alpha, batch):
    hits = jnp.mean(jnp.sign(batch[0] @ w) == batch[1])
    return val_loss(w, alpha, batch) - 0.1 * hits


def error_rate(w, alpha, batch):
    return jnp.mean(jnp.sign(batch[0] @ w) != batch[1])


newton = hg.Implicit(hg.Newton())
lost = hg.hypergradient(hg.Bilevel(train_loss, partly_lost, train, val), newton)
print(lost(w, alpha).reasons)
try:
    hg.hypergradient(hg.Bilevel(train_loss, error_rate, train, val), newton)(w, alpha)
except ValueError as error:
    print(str(error).split(" (")[0])

# %% [markdown]
# ## What no check of one run sees
#
# A certificate speaks of the minimum that training ended in, not of others. And the
# hypergradient is the slope at one point: where the validation loss is a rough function
# of `alpha`, as after a training with `relu` that crosses kinks, a right slope says
# little about the next step. [Trust](../docs/trust.md) lists what the checks can miss.
