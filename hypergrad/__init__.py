"""Hypergradients in JAX, with an estimate of their error and a count of their cost.

    min_alpha M_val(w*(alpha), alpha)  s.t.  w*(alpha) = argmin_w L_train(w, alpha)

The example learns one L2 penalty per feature, so that the validation loss falls:

>>> import jax, jax.numpy as jnp, optax
>>> import hypergrad as hg
>>> x = jax.random.normal(jax.random.key(0), (200, 20))
>>> y = jnp.sign(x[:, 0] + x[:, 1] + 0.5 * jax.random.normal(jax.random.key(1), (200,)))
>>> train, val = (x[:100], y[:100]), (x[100:], y[100:])
>>> def val_loss(w, alpha, batch):
...     return jnp.mean(jax.nn.softplus(-batch[1] * (batch[0] @ w)))
>>> def train_loss(w, alpha, batch):
...     return val_loss(w, alpha, batch) + 0.5 * jnp.sum(jnp.exp(alpha) * w**2)
>>> w, alpha = jnp.zeros(20), jnp.full(20, -2.0)
>>> problem = hg.Bilevel(train_loss, val_loss, train, val)
>>> solver = hg.Descent(optax.sgd(0.1, momentum=0.9), num_steps=500)
>>> estimator = hg.Implicit(solver)
>>> trace = hg.minimize(problem, estimator, optax.adam(0.1), w, alpha, num_steps=50)
>>> bool(trace.value[-1] < trace.value[0]), bool(trace.stats["trusted"].all())
(True, True)

Any other estimator can take the place of ``hg.Implicit(solver)``, such as
``hg.Unrolled(solver)`` or ``hg.Implicit(solver, hg.Neumann(num_terms=20))``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import (
    cost,
    datasets,
    extend,
    models,
    objectives,
    plots,
    searchers,
    spaces,
    surrogates,
    testing,
)
from .argmin import argmin
from .batches import Batches
from .certificate import Certificate, certify
from .checkpoint import Checkpoints
from .citation import citation
from .composite_loss import CompositeLoss
from .diagnosis import diagnose
from .estimators import (
    BOME,
    DARTS,
    F2SA,
    FSLA,
    MRBO,
    PZOBO,
    SABA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    VRBO,
    AmIGO,
    Average,
    CentralDifference,
    Estimate,
    Estimator,
    Evolution,
    FiniteDifference,
    FixedPoint,
    Forward,
    Implicit,
    Penalty,
    PersistentEvolution,
    Reversible,
    StocBiO,
    Unrolled,
    unrolled_estimator,
)
from .hypergradient import hypergradient
from .inner import (
    LBFGS,
    ClosedForm,
    Descent,
    InnerSolver,
    IterativeSolver,
    Newton,
    from_jaxopt,
    from_optimistix,
    piecewise_constant_schedule,
)
from .linear import CG, MINRES, Identity, Neumann, Nystrom, NystromCG
from .minimize import minimize
from .outer_loop.loop import OuterLoop
from .problem import Bilevel
from .profile import Profile, profile
from .search import search
from .trace import Trace
from .trials.trial import Parallel

if TYPE_CHECKING:
    from . import tasks

__version__ = "0.1.0"

__all__ = [  # in reading order
    "BOME",
    "CG",
    "DARTS",
    "F2SA",
    "FSLA",
    "LBFGS",
    "MINRES",
    "MRBO",
    "PZOBO",
    "SABA",
    "SOBA",
    "SRBA",
    "SUSTAIN",
    "TTSA",
    "VRBO",
    "AmIGO",
    "Average",
    "Batches",
    "Bilevel",
    "CentralDifference",
    "Certificate",
    "Checkpoints",
    "ClosedForm",
    "CompositeLoss",
    "Descent",
    "Estimate",
    "Estimator",
    "Evolution",
    "FiniteDifference",
    "FixedPoint",
    "Forward",
    "Identity",
    "Implicit",
    "InnerSolver",
    "IterativeSolver",
    "Neumann",
    "Newton",
    "Nystrom",
    "NystromCG",
    "OuterLoop",
    "Parallel",
    "Penalty",
    "PersistentEvolution",
    "Profile",
    "Reversible",
    "StocBiO",
    "Trace",
    "Unrolled",
    "argmin",
    "certify",
    "citation",
    "cost",
    "datasets",
    "diagnose",
    "extend",
    "from_jaxopt",
    "from_optimistix",
    "hypergradient",
    "minimize",
    "models",
    "objectives",
    "piecewise_constant_schedule",
    "plots",
    "profile",
    "search",
    "searchers",
    "spaces",
    "surrogates",
    "tasks",
    "testing",
    "unrolled_estimator",
]


def __dir__() -> list[str]:
    """Returns the public names, for completion, which must not import `tasks`."""
    return ["__version__", *(name for name in __all__ if name in globals())]


def __getattr__(name: str):
    """Tasks are imported when first asked for: their networks need flax."""
    if name == "tasks":
        return import_module(".tasks", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
