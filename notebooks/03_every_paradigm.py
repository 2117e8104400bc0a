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
# # One system of every paradigm
#
# Supervised, semi-supervised, self-supervised, unsupervised, few-shot, federated,
# reinforcement and physics-informed learning differ in what the inner problem is and
# in what `alpha` stands for. They do not differ in how `alpha` is learned: a
# `Bilevel` problem, an inner solver, an estimator, and `minimize`. Every system below
# is a task of the library, on data that comes with scikit-learn or is simulated; its
# table is one command, `hypergrad run NAME`. Of the twelve tasks eight are here, one of
# each paradigm; the other four are further supervised ones: `penalties`, `schedules`,
# `augmentation` and `architecture`.

# %%
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import hypergrad as hg

# %% [markdown]
# ## What is learned, and by which estimator
#
# The inner solver decides. A solution of the inner problem, in closed form or by
# descent that converges, has an implicit derivative. A run that is stopped after a
# few steps, or that follows no loss's gradient, as in reinforcement learning, is
# differentiated itself.


# %%
class System(NamedTuple):
    alpha: str
    estimator: object
    rate: float
    metric: str


implicit = lambda solver: hg.Implicit(solver, hg.CG(rtol=1e-2, max_steps=20))
carried_on = lambda solver: hg.Unrolled(solver, warm_start=True)
SYSTEMS = {
    "cleaning": System("a weight per example", implicit, 0.3, "test_accuracy"),
    "semi_supervised": System("a weight per guess", implicit, 0.3, "test_accuracy"),
    "self_supervised": System("temperature, views", hg.Unrolled, 0.1, "test_error"),
    "unsupervised": System("a bandwidth per feature", hg.Implicit, 0.1, "test_nll"),
    "few_shot": System("a start for all tasks", hg.Unrolled, 3e-3, "test_accuracy"),
    "federated": System("a loss per class", implicit, 0.1, "accuracy"),
    "reinforcement": System("discount, entropy", carried_on, 0.03, "return"),
    "physics": System("weights of the terms", implicit, 0.1, "relative_error"),
}
tasks = {name: getattr(hg.tasks, name).make(key=jax.random.key(0)) for name in SYSTEMS}
count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
print(f"{'task':16} {'paradigm':17} {'w':>6} {'alpha':>6}  what alpha is")
for name, task in tasks.items():
    row = f"{name:16} {task.paradigm:17} {count(task.w):6} {count(task.alpha):6}"
    print(f"{row}  {SYSTEMS[name].alpha}")

# %% [markdown]
# ## One hypergradient each
#
# One call, and the estimate says what it cost and whether it trusts itself. A
# derivative of the run itself is exact for its own target. An implicit one at an
# inner loop that has not converged is not trusted, and says so.

# %%
print(f"{'task':16} {'value':>9} {'|dM/dalpha|':>12} {'cost':>6}  trusted")
for name, task in tasks.items():
    estimator = SYSTEMS[name].estimator(task.solver)
    gradient = hg.hypergradient(task.problem, estimator)
    estimate = gradient(task.w, task.alpha, jax.random.key(1))
    length = float(optax.tree.norm(estimate.hypergradient))
    cost, trusted = (estimate.stats[key] for key in ("gradient_equivalents", "trusted"))
    print(
        f"{name:16} {float(estimate.value):9.4f} {length:12.2e} {float(cost):6.0f}  "
        f"{bool(trusted)}"
    )

# %% [markdown]
# ## How far off is one that is not trusted?
#
# `certify` corrects `w` by Newton steps to where the inner problem is solved, and takes
# the hypergradient there: the change is the error of the first one, estimated. Here it
# is the weights' of `cleaning`, whose inner descent stops early. What it found on the
# way is certified in turn.

# %%
task = tasks["cleaning"]
gradient = hg.hypergradient(task.problem, SYSTEMS["cleaning"].estimator(task.solver))
estimate = gradient(task.w, task.alpha, jax.random.key(1))
first = hg.certify(task.problem, estimate.w, task.alpha, estimate.hypergradient)
second = hg.certify(
    task.problem, first.corrected_w, task.alpha, first.corrected_hypergradient
)
for name, certificate in {"estimate": first, "corrected": second}.items():
    error, residual = certificate.error_estimate, certificate.inner_grad_norm
    print(
        f"{name:10} error {float(error):.1e}, trusted {bool(certificate.trusted)}, "
        f"where the inner gradient is {float(residual):.1e}"
    )

# %% [markdown]
# ## Twenty steps of each
#
# The same call for all: the space keeps weights in [0, 1] and rates positive, the
# metric is exact, on data that neither loss has seen, and outside the ledger.

# %%
traces = {}
for name, task in tasks.items():
    system = SYSTEMS[name]
    traces[name] = hg.minimize(
        task.problem,
        system.estimator(task.solver),
        optax.adam(system.rate),
        task.w,
        task.alpha,
        num_steps=20,
        key=jax.random.key(2),
        space=task.space,
        metrics={system.metric: task.metrics[system.metric]},
        eval_every=19,
    )
print(f"{'task':16} {'outer value':>20}  {'metric':14} {'before':>8} {'after':>8}")
for name, trace in traces.items():
    value, metric = trace.value, SYSTEMS[name].metric
    seen = trace.metrics[metric]
    print(
        f"{name:16} {float(value[0]):9.4f} ->{float(value[-1]):9.4f}  {metric:14} "
        f"{float(seen[0]):8.3f} {float(seen[-1]):8.3f}  {trace.status}"
    )

# %%
figure, panels = plt.subplots(2, 4, figsize=(13, 5.5), layout="constrained")
for axes, (name, trace) in zip(panels.flat, traces.items(), strict=True):
    axes.plot(np.asarray(trace.cost), np.asarray(trace.value), ".-")
    axes.set(title=f"{name}: {SYSTEMS[name].alpha}", xlabel="gradient-equivalents")
    axes.title.set_fontsize(9)
for axes in panels[:, 0]:
    axes.set_ylabel("outer value")
plt.show()

# %% [markdown]
# Twenty steps are a beginning. The tables run to a budget, tune a baseline without
# hyperparameters by the same rule, give random search the same cost, and print what
# did not work beside what did: `benchmarks/results`.
