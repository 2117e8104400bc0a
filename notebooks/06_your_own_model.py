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
# # Your own model
#
# A network of flax with dropout and batch normalization is trained for 100 steps. Its
# hyperparameters are the weight decay of each layer, the rate of the dropout, the
# smoothing of the labels, and the learning rate. They enter the loss and the optimizer,
# and the training does not converge, so the training itself is differentiated, by
# `hg.Unrolled`.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import hypergrad as hg

# %% [markdown]
# ## The data
#
# Handwritten digits: 150 to train, 300 to validate, and the other 1,347 to test.

# %%
digits = hg.datasets.load("digits")
order = np.random.default_rng(0).permutation(len(digits["y"]))
x, y = digits["x"][order], digits["y"][order]
parts = {"train": slice(150), "val": slice(150, 450), "test": slice(450, None)}
train, val, test = ((x[rows], y[rows]) for rows in parts.values())

# %% [markdown]
# ## The model
#
# The rate $p$ of the dropout is a hyperparameter, and whether an entry is dropped has
# no derivative by $p$. Gaussian dropout multiplies each entry by
# $1 + \sqrt{p / (1 - p)} \, \varepsilon$ with a normal $\varepsilon$: the mean and the
# variance are the same, and it has a derivative. A layer that needs random numbers
# keeps a stream of keys, as `nnx.Dropout` does.


# %%
class GaussianDropout(nnx.Module):
    def __init__(self, rngs):
        self.rngs = rngs.fork()
        self.deterministic = False

    def __call__(self, x, rate):
        if self.deterministic:
            return x
        noise = jax.random.normal(self.rngs(), x.shape)
        return x * (1 + jnp.sqrt(rate / (1 - rate)) * noise)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = GaussianDropout(rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x, rate=0.0):
        x = jnp.tanh(self.norm(self.hidden(x)))
        return self.out(self.dropout(x, rate))


# %% [markdown]
# ## Two losses
#
# `nnx.split` separates the parameters, which are `w`, from the rest of the model, and
# `nnx.merge` puts both together in the loss. With `copy=True` the running averages of
# the batch normalization, which a forward pass updates, are those of the copy; both
# losses normalize by the averages of their own batch. `Batches(..., with_key=True)`
# passes a fresh key with each batch, and `nnx.reseed` gives it to the dropout.

# %%
graph, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)


def train_loss(params, alpha, batch):
    (x, y), key = batch
    model = nnx.merge(graph, params, rest, copy=True)
    model.set_attributes(deterministic=False, use_running_average=False)
    nnx.reseed(model, default=key)
    logits = model(x, jax.nn.sigmoid(alpha["dropout"]))
    smoothing = jax.nn.sigmoid(alpha["smoothing"])
    targets = (1 - smoothing) * jax.nn.one_hot(y, 10) + smoothing / 10
    fit = jnp.mean(optax.softmax_cross_entropy(logits, targets))
    decay = 0.0
    for layer in ("hidden", "out"):
        squares = jnp.sum(params[layer]["kernel"][...] ** 2)
        decay += jnp.exp(alpha[f"decay_{layer}"]) * squares
    return fit + decay


def val_loss(params, alpha, batch):
    x, y = batch
    model = nnx.merge(graph, params, rest, copy=True)
    model.set_attributes(deterministic=True, use_running_average=False)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(x), y))


problem = hg.Bilevel(train_loss, val_loss, hg.Batches(train, 50, with_key=True), val)

# %% [markdown]
# ## One hypergradient
#
# The optimizer is a function of `alpha`, because the learning rate is learned. Adam
# divides by the root of a mean of squared gradients, which has no derivative at zero.
# Without `eps_root`, a gradient that is zero would make the hypergradient infinite or
# NaN.


# %%
def optimizer(alpha):
    return optax.adam(jnp.exp(alpha["log_rate"]), eps_root=1e-8)


solver = hg.Descent(optimizer, num_steps=100)
estimator = hg.Unrolled(solver, warm_start=False)
alpha = {
    "decay_hidden": jnp.array(-7.0),
    "decay_out": jnp.array(-7.0),
    "dropout": jnp.array(-3.0),
    "smoothing": jnp.array(-4.0),
    "log_rate": jnp.array(-5.0),
}
hypergradient = hg.hypergradient(problem, estimator)
estimate = hypergradient(params, alpha)
print(estimate)

# %% [markdown]
# The derivative says how the validation loss after 100 steps changes with each
# hyperparameter. `error_estimate` is 0 because `Unrolled` differentiates the run
# exactly: it measures neither rounding, nor the noise of batches, nor the distance from
# a minimum. Central differences repeat the whole training with the same batches and the
# same noise; both must agree, up to the error of the differences. An estimate contains
# the validation loss, and the same key gives the same batches, so the program that is
# compiled already makes the differences too. `hg.CentralDifference` is an estimator
# that makes the same ones.


# %%
def difference(name):
    step = np.cbrt(jnp.finfo(jnp.float32).eps) * abs(float(alpha[name]))
    up, down = (alpha | {name: alpha[name] + s} for s in (step, -step))
    change = hypergradient(params, up).value - hypergradient(params, down).value
    return float(change) / (2 * step)


print(f"{'hyperparameter':14} {'hypergradient':>14} {'difference':>12}")
for name in alpha:
    exact = float(estimate.hypergradient[name])
    print(f"{name:14} {exact:14.5f} {difference(name):12.5f}")

# %% [markdown]
# Four of the five agree within three per cent. For the dropout they differ by 14%: in
# float32 a difference of two trainings has few correct digits.
#
# ## Learning
#
# `w` starts from the same random parameters in each step, because the model that will
# be used is trained from there. `hg.minimize` makes an `hg.OuterLoop`, which has more
# options, such as `record_alphas`.

# %%
loop = hg.OuterLoop(problem, estimator, optax.adam(0.1), record_alphas=True)
trace = loop.run(loop.init(params, alpha), num_steps=60)
print(trace)

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
axes[0].plot(trace.value)
axes[0].set(xlabel="outer step", ylabel="validation loss")
for name in ("decay_hidden", "decay_out", "log_rate"):
    axes[1].plot(np.exp(trace.alphas[name]), label=name.replace("log_", ""))
for name in ("dropout", "smoothing"):
    axes[1].plot(jax.nn.sigmoid(trace.alphas[name]), label=name)
axes[1].set(xlabel="outer step", ylabel="hyperparameter", yscale="log")
axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# The learning rate grows sixfold and the decay of the output layer nearly doubles,
# while dropout, smoothing and the decay of the hidden layer fall. Why they do was not
# tested. The left curve is noisy because each step has other batches.
#
# ## The model that is kept
#
# For predictions, the running averages are set once, by a pass of the training data
# without dropout. A pass moves them by `1 - momentum`, so the momentum is zero in it.
# The test data was not used until here. Training is noisy: the accuracy is the mean
# over ten trainings with other batches.


# %%
def test_accuracy(alpha, key):
    model = nnx.merge(graph, hypergradient(params, alpha, key).w, rest, copy=True)
    model.norm.momentum = 0.0
    model.set_attributes(deterministic=True, use_running_average=False)
    model(train[0])
    model.eval()
    return float(jnp.mean(jnp.argmax(model(test[0]), 1) == test[1]))


keys = jax.random.split(jax.random.key(1), 10)
for name, values in {"at the start": alpha, "learned": trace.alpha}.items():
    accuracies = 100 * np.array([test_accuracy(values, key) for key in keys])
    print(f"{name:14} {accuracies.mean():.1f} % ± {accuracies.std(ddof=1):.1f}")
