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
# # Learning to learn from five points
#
# A network sees five points of a sine curve and should draw the whole curve. From five
# points alone it cannot; but all curves are sines, and a starting point can contain
# that. MAML ([Finn et al. 2017](https://arxiv.org/abs/1703.03400)) learns the starting
# point: the hyperparameters are the initial values of all parameters, the inner problem
# makes a few steps of gradient descent from them on the five points of a task, and the
# outer loss is the error on other points of the same task,
#
# $$
# \min_\alpha \tfrac{1}{20} \sum_t M_t(w_t^{(K)}), \qquad
# w_t^{(0)} = \alpha, \qquad w_t^{(k+1)} = w_t^{(k)} - \eta \nabla L_t(w_t^{(k)}) .
# $$

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import hypergrad as hg

# %% [markdown]
# ## Tasks
#
# `data_fn` samples the data of each estimate: 20 curves with their own amplitude and
# phase, five points of each to adapt to, and 20 to judge the adapted network. Arrays
# are `[points, curves]`, because the leading axis counts as the examples.


# %%
def sample_curves(key, num_curves, num_points):
    keys = jax.random.split(key, 3)
    amplitude = jax.random.uniform(keys[0], (num_curves, 1), minval=0.5, maxval=3.0)
    phase = jax.random.uniform(keys[1], (num_curves, 1), maxval=jnp.pi)
    x = jax.random.uniform(keys[2], (num_curves, num_points), minval=-4.0, maxval=4.0)
    return x, amplitude * jnp.sin(x - phase)


def sample_tasks(key):
    x, y = sample_curves(key, 20, 25)
    points_first = lambda a: (a[0].T, a[1].T)
    support, query = (x[:, :5], y[:, :5]), (x[:, 5:], y[:, 5:])
    return points_first(support), points_first(query)


# %% [markdown]
# ## The network, and one copy of it per task
#
# The inner loss is a sum over the tasks, so that each network makes its own steps.


# %%
def init_network(key, sizes=(1, 40, 40, 1)):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"W": jax.random.normal(k, (m, n)) / jnp.sqrt(m), "b": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def network(w, x):
    h = x[:, None]
    for layer in w[:-1]:
        h = jnp.tanh(h @ layer["W"] + layer["b"])
    return (h @ w[-1]["W"] + w[-1]["b"])[:, 0]


def error(w, x, y):
    return jnp.mean((network(w, x) - y) ** 2)


def sum_of_errors(w, alpha, batch):

    return jnp.sum(jax.vmap(error, (0, 1, 1))(w, *batch))


def mean_of_errors(w, alpha, batch):
    return sum_of_errors(w, alpha, batch) / batch[0].shape[1]


def start_from_alpha(w, alpha):
    return jax.tree.map(lambda w, a: jnp.broadcast_to(a, w.shape), w, alpha)


alpha = init_network(jax.random.key(0))
w = jax.tree.map(lambda leaf: jnp.zeros((20, *leaf.shape)), alpha)
problem = hg.Bilevel(
    sum_of_errors, mean_of_errors, init_fn=start_from_alpha, data_fn=sample_tasks
)

# %% [markdown]
# ## Learning the starting point
#
# Three steps of descent are differentiated as they are made. The `error_estimate` is 0
# because this derivative is exact: it measures neither rounding, nor how much the
# estimate depends on the sampled curves, nor the distance from a minimum.

# %%
solver = hg.Descent(optax.sgd(0.02), num_steps=3)
estimator = hg.Unrolled(solver)
estimate = hg.hypergradient(problem, estimator)(w, alpha, jax.random.key(1))
print(estimate)

# %%
loop = hg.OuterLoop(problem, estimator, optax.adam(2e-3))
state = loop.init(w, alpha, jax.random.key(2))
trace = loop.run(state, num_steps=4000)
print(trace)

# %% [markdown]
# ## What was learned
#
# The same five points and the same steps, from three starting points: random
# parameters, the parameters of one network that was trained on all curves at once, and
# the learned ones. A network that is trained on all curves learns their mean, from
# which no few steps lead to a sine.


# %%
joint_optimizer = optax.adam(2e-3)


def joint_loss(w, key):
    x, y = sample_curves(key, 20, 25)
    return error(w, x.reshape(-1), y.reshape(-1))


@jax.jit
def trained_on_all(w, keys):
    def step(carry, key):
        w, state = carry
        updates, state = joint_optimizer.update(jax.grad(joint_loss)(w, key), state)
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.lax.scan(step, (w, joint_optimizer.init(w)), keys)
    return w


joint = trained_on_all(alpha, jax.random.split(jax.random.key(3), 4000))
starts = {"random": alpha, "trained on all": joint, "learned": trace.alpha}


@jax.jit
def adapted(start, x, y, num_steps):
    step = lambda _, w: jax.tree.map(
        lambda w, g: w - 0.02 * g, w, jax.grad(error)(w, x, y)
    )
    return jax.lax.fori_loop(0, num_steps, step, start)


@jax.jit
def mean_error(start, num_steps):
    """Over 500 new curves."""
    x, y = sample_curves(jax.random.key(4), 500, 25)

    def error_of_curve(x, y):
        return error(adapted(start, x[:5], y[:5], num_steps), x[5:], y[5:])

    return jnp.mean(jax.vmap(error_of_curve)(x, y))


counts = (0, 1, 3, 10, 100)
print(f"{'steps of adaptation':20}" + "".join(f"{n:>8}" for n in counts))
for name, start in starts.items():
    numbers = [float(mean_error(start, n)) for n in counts]
    print(f"{name:20}" + "".join(f"{number:8.3f}" for number in numbers))

# %%
grid = jnp.linspace(-4, 4, 200)
amplitude, phase = 2.0, 1.0
truth = lambda x: amplitude * jnp.sin(x - phase)
x = jnp.array([-3.2, -1.0, 0.4, 1.1, 3.0])
fig, axes = plt.subplots(1, 3, figsize=(12, 3.4), sharey=True, layout="constrained")
for ax, (name, start) in zip(axes, starts.items(), strict=True):
    ax.plot(grid, truth(grid), color="black", lw=0.8)
    ax.plot(x, truth(x), "o", color="black")
    for num_steps, color in ((0, "lightgray"), (3, "tab:orange"), (10, "tab:blue")):
        w_t = adapted(start, x, truth(x), num_steps)
        ax.plot(grid, network(w_t, grid), color=color, label=f"{num_steps} steps")
    ax.set(title=f"start: {name}", xlabel="x")
axes[0].legend()
plt.show()

# %% [markdown]
# Black are the true curve and its five points. From the learned start three steps
# suffice; from the others ten do not.
