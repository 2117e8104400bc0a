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
# # Finding wrong labels
#
# Half of the labels of a training set are wrong, and nobody knows which. A few examples
# are clean. Each training example gets a weight $\sigma(\alpha_i)$, and the weights are
# the hyperparameters: they are moved so that the model that is trained with them has a
# low loss on the clean examples,
#
# $$
# \min_\alpha M(w^*(\alpha)), \qquad
# w^*(\alpha) = \operatorname{argmin}_w \sum_i \sigma(\alpha_i)\, \ell(w; x_i, y_i) / n
#   + \tfrac{\lambda}{2} \|w\|^2 .
# $$
#
# A thousand hyperparameters are out of reach of a search. One hypergradient has the
# derivatives by all of them, and its cost does not grow with their number.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import hypergrad as hg

# %% [markdown]
# ## The data
#
# 1,797 handwritten digits of 8 by 8 pixels: 1,000 to train, 150 clean ones to validate,
# and the rest to test. The labels of 500 training images are replaced by other ones.

# %%
digits = hg.datasets.load("digits")
rng = np.random.default_rng(0)
order = rng.permutation(len(digits["y"]))
rows = {"train": order[:1000], "val": order[1000:1150], "test": order[1150:]}
data = {name: (digits["x"][r], digits["y"][r]) for name, r in rows.items()}
x, clean = data["train"]
wrong = np.zeros(1000, bool)
wrong[rng.choice(1000, 500, replace=False)] = True
given = np.where(wrong, (clean + rng.integers(1, 10, 1000)) % 10, clean)

# %% [markdown]
# ## The problem
#
# The model is multinomial logistic regression with a bias.


# %%
def cross_entropy(w, images, labels):
    scores = images @ w["kernel"] + w["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels)


def train_loss(w, alpha, batch):
    losses = cross_entropy(w, *batch)
    squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
    return jnp.mean(jax.nn.sigmoid(alpha) * losses) + 0.5e-3 * squares


def val_loss(w, alpha, batch):
    return jnp.mean(cross_entropy(w, *batch))


problem = hg.Bilevel(train_loss, val_loss, (x, given), data["val"])
w = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
alpha = jnp.zeros(1000)

# %% [markdown]
# ## One hypergradient
#
# Where it is positive, a smaller weight of this example would help. At equal weights
# the derivative separates most of the wrong labels from the right ones already.

# %%
estimator = hg.Implicit(hg.LBFGS(max_steps=200))
estimate = hg.hypergradient(problem, estimator)(w, alpha)
print(estimate)

# %%
fig, ax = plt.subplots(figsize=(6, 3))
bins = np.linspace(*np.percentile(estimate.hypergradient, [1, 99]), 41)
ax.hist(estimate.hypergradient[~wrong], bins, alpha=0.7, label="label is right")
ax.hist(estimate.hypergradient[wrong], bins, alpha=0.7, label="label is wrong")
ax.set(xlabel="derivative with respect to the entry of alpha", ylabel="examples")
ax.legend()
plt.show()

# %% [markdown]
# ## Learning the weights
#
# The steps leave out the error estimate, which takes products and makes the program
# about twice as large. Another estimate, by the program above, judges the end of the
# run.

# %%
quick = hg.Implicit(hg.LBFGS(max_steps=200), estimate_error=False)
trace = hg.minimize(problem, quick, optax.adam(0.3), w, alpha, num_steps=60)
print(trace)
print(hg.hypergradient(problem, estimator)(trace.w, trace.alpha))


# %%
def accuracy(w, part):
    images, labels = data[part]
    scores = images @ w["kernel"] + w["bias"]
    return float(jnp.mean(jnp.argmax(scores, 1) == labels))


train = jax.jit(hg.argmin(train_loss, hg.LBFGS(max_steps=200)))
models = {
    "given labels, equal weights": train(w, alpha, (x, given)),
    "given labels, learned weights": train(w, trace.alpha, (x, given)),
    "all labels clean": train(w, alpha, (x, clean)),
}
results = {name: accuracy(model, "test") for name, model in models.items()}
for name, value in results.items():
    print(f"{name:30} {100 * value:.1f} %")

# %% [markdown]
# The validation images themselves are a baseline that is easily forgotten: a model that
# is trained on these 150 alone. One split decides nothing. The table
# `benchmarks/results/cleaning.md` has ten, and they show no significant gain of learned
# weights, neither over the validation images alone nor over equal weights.

# %%
w_alone = train(w, jnp.full(150, 8.0), data["val"])
print(f"{'150 clean images alone':30} {100 * accuracy(w_alone, 'test'):.1f} %")

# %% [markdown]
# ## What the weights say
#
# The weights are a detector of wrong labels.

# %%
weights = np.asarray(jax.nn.sigmoid(trace.alpha))
found = weights < 0.5
precision, recall = np.mean(wrong[found]), np.mean(found[wrong])
f1 = 2 * precision * recall / (precision + recall)
print(f"precision {precision:.3f}, recall {recall:.3f}, F1 {f1:.3f}")

# %%
fig, axes = plt.subplots(2, 10, figsize=(10, 2.8))
for axs, examples, color in (
    (axes[0], np.argsort(weights)[:10], "tab:red"),
    (axes[1], np.argsort(-weights)[:10], "tab:green"),
):
    for ax, i in zip(axs, examples, strict=True):
        ax.imshow(x[i].reshape(8, 8), cmap="gray_r")
        ax.set(xticks=[], yticks=[])
        ax.set_title(f'"{given[i]}"', color=color)
fig.suptitle("lowest weights (top) and highest weights (bottom), with the given labels")
plt.show()
