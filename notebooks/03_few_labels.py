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
# # Three paradigms with few labels or none
#
# The paradigms of learning differ in the inner problem and in the meaning of `alpha`.
# The way in which `alpha` is learned is the same: a `Bilevel` problem, an inner solver,
# an estimator, and an outer loop. This notebook takes semi-supervised, self-supervised
# and unsupervised learning. [Another one](12_more_paradigms.ipynb) takes federated,
# reinforcement and physics-informed learning. Supervised learning is the subject of
# [wrong labels](04_wrong_labels.ipynb) and others, and few-shot learning has
# [a notebook of its own](11_few_shot.ipynb). Every system is a task of the library, on
# data that comes with scikit-learn, and `hypergrad run NAME` makes its table.
#
# - `semi_supervised`: the inner loss is the cross-entropy on 50 labels, plus that on
#   the guesses of a first model for 1,000 other examples, each with a weight. The outer
#   loss is the cross-entropy on labeled validation examples.
# - `self_supervised`: the inner loss is InfoNCE of two random views of each image, the
#   outer loss the squared error of a linear classifier on the features.
# - `unsupervised`: the inner problem is a kernel density estimate with one bandwidth
#   per feature, the outer loss the mean of `-log p` of other examples.

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
# The inner solver determines the estimator. A solution of the inner problem, in closed
# form or approximately by descent, has an implicit derivative. `self_supervised` stops
# its inner run after 100 steps, far from a solution, so that the run itself is
# differentiated. The derivative of a run is exact for its own target. An implicit
# derivative is right at the solution of the inner problem, and its estimator also
# estimates the error of each estimate, which is the subject of [another
# notebook](05_trust.ipynb). At most twenty steps of conjugate gradients with a loose
# tolerance give a direction for a step of `alpha`, and not a number to quote: most of
# the implicit estimates below are not trusted.


# %%
class System(NamedTuple):
    alpha: str
    estimator: object
    rate: float
    metric: str


def implicit(solver):
    return hg.Implicit(solver, hg.CG(rtol=1e-2, max_steps=20))


SYSTEMS = {
    "semi_supervised": System("a weight per guess", implicit, 0.3, "test_accuracy"),
    "self_supervised": System("temperature, views", hg.Unrolled, 0.1, "test_error"),
    "unsupervised": System("a bandwidth per feature", implicit, 0.1, "test_nll"),
}


key = jax.random.key(0)
tasks = {name: getattr(hg.tasks, name).make(key=key) for name in SYSTEMS}
count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
print(f"{'task':16} {'paradigm':17} {'w':>6} {'alpha':>6}  meaning of alpha")
for name, task in tasks.items():
    row = f"{name:16} {task.paradigm:17} {count(task.w):6} {count(task.alpha):6}"
    print(f"{row}  {SYSTEMS[name].alpha}")

# %% [markdown]
# ## Ten steps of each
#
# All systems are learned by the same call. The space keeps each `alpha` admissible. The
# metric is exact, without a surrogate; it is evaluated on data that neither loss uses,
# and not counted as cost. The cost is that of one hypergradient, the first one, and
# `trusted` counts the steps whose hypergradient was trusted. Most of the time is
# compilation.


# %%
def learn(name):
    system, task = SYSTEMS[name], tasks[name]
    loop = hg.OuterLoop(
        task.problem,
        system.estimator(task.solver),
        optax.adam(system.rate),
        space=task.space,
        metrics={system.metric: task.metrics[system.metric]},
        eval_every=9,
    )
    state = loop.init(task.w, task.alpha, jax.random.key(2))
    return loop.run(state, num_steps=10)


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
# Ten steps are a beginning. The tables run to a budget, tune a baseline without
# learned hyperparameters by the same rule, give random search the same cost, and report
# claims that were not supported next to those that were. They are in
# `benchmarks/results`.
