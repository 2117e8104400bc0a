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
# # Three more paradigms: clients, experience, an equation
#
# The tasks of [an earlier notebook](03_few_labels.ipynb) have one training set and one
# model. Here the inner problem is an average over clients (federated learning),
# temporal-difference learning without a loss (reinforcement learning), or a
# differential equation (physics-informed learning). The loop is the same. Every system
# is a task of the library, on data that comes with scikit-learn or is simulated, and
# `hypergrad run NAME` makes its table (that of `physics` has other equations).
#
# - `federated`: the inner loss is the mean over clients of a cross-entropy with a
#   weight, a scale and an offset per class, the outer loss the cross-entropy on
#   balanced validation examples.
# - `reinforcement`: an actor and a critic learn to balance a pole. The outer loss is
#   minus the mean return of new episodes, as a fraction of the longest.
# - `physics`: the inner loss is the residual of `y'' = 2` and of two boundary values,
#   the outer loss the squared distance of `y` from `x²`.

# %%
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import hypergrad as hg

# %% [markdown]
# ## Systems and estimators
#
# `reinforcement` follows a semi-gradient, which is the gradient of no loss: the run
# itself is differentiated, with the experience taken as given. The derivative is exact
# for this target. It is not trusted, because the semi-gradient stops derivatives on
# purpose, and the library reports that they are lost. `federated` and `physics` use an
# implicit derivative. At most twenty steps of conjugate gradients with a loose
# tolerance give a direction for a step of `alpha`, and not a number to quote: the
# estimates of `federated` are never trusted, and those of `physics` not always.
#
# `physics` is an optimal control, whose `alpha` are the two boundary values. The
# minimum is known: it is 0 and lies at `alpha = (0, 1)`.


# %%
class System(NamedTuple):
    alpha: str
    estimator: object
    rate: float
    metric: str


def implicit(solver):
    return hg.Implicit(solver, hg.CG(rtol=1e-2, max_steps=20))


# Each update of the agent goes on where the previous one ended.
warm_started = lambda solver: hg.Unrolled(solver, warm_start=True)
SYSTEMS = {
    "federated": System("a loss per class", implicit, 0.1, "accuracy"),
    "reinforcement": System("discount, entropy", warm_started, 0.03, "return"),
    "physics": System("two boundary values", implicit, 0.1, "tracking_error"),
}


key = jax.random.key(0)
tasks = {
    "federated": hg.tasks.federated.make(key=key),
    "reinforcement": hg.tasks.reinforcement.make(key=key),
    "physics": hg.tasks.physics.make(key=key, variant="control"),
}
count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
print(f"{'task':16} {'paradigm':17} {'w':>6} {'alpha':>6}  meaning of alpha")
for name, task in tasks.items():
    row = f"{name:16} {task.paradigm:17} {count(task.w):6} {count(task.alpha):6}"
    print(f"{row}  {SYSTEMS[name].alpha}")

# %% [markdown]
# ## Twenty steps of each
#
# All systems are learned by the same call. The space keeps each `alpha` admissible. The
# metric is exact, without a surrogate, and not counted as cost. It is evaluated on data
# that neither loss uses, except in `physics`, where it is the outer loss. The cost is
# that of one hypergradient, the first one, and `trusted` counts the steps whose
# hypergradient was trusted. Most of the time is compilation.


# %%
def learn(name):
    system, task = SYSTEMS[name], tasks[name]
    loop = hg.OuterLoop(
        task.problem,
        system.estimator(task.solver),
        optax.adam(system.rate),
        space=task.space,
        metrics={system.metric: task.metrics[system.metric]},
        eval_every=19,
    )
    state = loop.init(task.w, task.alpha, jax.random.key(2))
    return loop.run(state, num_steps=20)


traces = {name: learn(name) for name in SYSTEMS}
print(
    f"{'task':16} {'outer value':>20}  {'metric':14} {'before':>8} {'after':>8} "
    f"{'cost':>6}  {'trusted':8}"
)
for name, trace in traces.items():
    value, metric = trace.value, SYSTEMS[name].metric
    recorded = trace.metrics[metric]
    num_trusted = int(trace.stats["trusted"].sum())
    print(
        f"{name:16} {float(value[0]):9.4f} ->{float(value[-1]):9.4f}  {metric:14} "
        f"{float(recorded[0]):8.3f} {float(recorded[-1]):8.3f} "
        f"{float(trace.cost[0]):6.0f}  {num_trusted:2} of {len(value)}  {trace.status}"
    )

# %%
figure, panels = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
for axes, (name, trace) in zip(panels, traces.items(), strict=True):
    axes.plot(np.asarray(trace.cost), np.asarray(trace.value), ".-")
    axes.set(title=f"{name}: {SYSTEMS[name].alpha}", xlabel="gradient-equivalents")
    axes.title.set_fontsize(9)
panels[0].set_ylabel("outer value")
plt.show()

# %% [markdown]
# Twenty steps are a beginning; the [earlier notebook](03_few_labels.ipynb) says what
# the tables add.
