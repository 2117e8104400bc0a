"""Reinforcement learning: discounts and an entropy weight by meta-gradients.

Xu, van Hasselt & Silver 2018 (arXiv 1805.09801). An update ``w + f(w, alpha, tau)``
(their equation 1) learns from experience tau; its settings alpha are moved along the
derivative of how well the updated w does on experience that follows (equation 3).
``mrp`` is the system of `random_walk`, ``cartpole`` that of `cartpole`.
"""

from typing import Any

from jaxtyping import Array

from ..validation import as_key
from .cartpole import make_cartpole
from .random_walk import make_mrp
from .task import Task, sizes_of

DATA_NAME = "simulated"

SCALES = {
    "mrp": {
        "small": {"num_train": 20, "num_val": 20, "horizon": 400},
        "paper": {"num_train": 200, "num_val": 200, "horizon": 1000},
    },
    "cartpole": {
        "small": {"num_episodes": 16, "horizon": 500, "num_steps": 5, "rate": 0.5},
        "paper": {"num_episodes": 256, "horizon": 500, "num_steps": 5, "rate": 0.5},
    },
}


def make(
    *,
    key: Array,
    scale: str = "small",
    data_dir: str | None = None,
    variant: str = "cartpole",
    **sizes: Any,
) -> Task:
    """A Markov reward process or CartPole; both make their own experience.

    CartPole asks for `Unrolled` or `Forward`: its update is the gradient of no loss,
    and what `Implicit` takes for the Hessian is indefinite. Its hypergradients are not
    trusted, and zero where `CG` stops at once, as at the start: ``adjoint_residual`` 1.

    Args:
      key: of the episodes (``mrp``), or of the networks (``cartpole``).
      scale: 'small', at which `hypergrad run reinforcement` makes its table, or
        'paper'.
      data_dir: not read.
      variant: 'mrp' or 'cartpole'.
      sizes: in place of the scale's, as `SCALES` names them.

    Raises:
      ValueError: another scale or variant.
      TypeError: a size that `SCALES` does not name.
    """
    del data_dir
    if variant not in SCALES:
        raise ValueError(f"variant must be one of {sorted(SCALES)}; got {variant!r}")
    if scale not in SCALES[variant]:
        raise ValueError(f"scale must be 'small' or 'paper'; got {scale!r}")
    build = {"mrp": make_mrp, "cartpole": make_cartpole}[variant]
    chosen = sizes_of("reinforcement", SCALES[variant][scale], sizes)
    return build(as_key(key), **chosen)
