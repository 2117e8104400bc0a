"""Reinforcement learning: discounts and an entropy weight by meta-gradients.

Xu, van Hasselt & Silver 2018 (arXiv 1805.09801). An update ``w + f(w, alpha, tau)``
(their equation 1) learns from experience tau. Its hyperparameters alpha follow the
derivative of the performance of the updated w on later experience (equation 3).
The variant ``mrp`` is the problem of `random_walk`, ``cartpole`` the one of `cartpole`.
"""

from typing import Any

from jaxtyping import Array

from ..validation import as_key, is_traced
from .cartpole import make_cartpole
from .random_walk import make_mrp
from .task import Task, check_choice, sizes_of

DATA_NAME = "simulated"

CARTPOLE = {"horizon": 500, "num_steps": 5, "step_size": 0.5}
SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "mrp": {
        "small": {"num_train": 20, "num_val": 20, "horizon": 400},
        "paper": {"num_train": 200, "num_val": 200, "horizon": 1000},
    },
    "cartpole": {
        "small": {"num_episodes": 16} | CARTPOLE,
        "paper": {"num_episodes": 256} | CARTPOLE,
    },
}


def make(
    *,
    key: Array,
    scale: str = "small",
    variant: str = "cartpole",
    **sizes: Any,
) -> Task:
    """Returns a Markov reward process or CartPole, which simulate their own experience.

    CartPole needs `Unrolled` or `Forward`: its update is not the gradient of any loss,
    and the matrix that `Implicit` uses as the Hessian is indefinite. The hypergradients
    of `Implicit` are not trusted, and are zero if `CG` stops at once, as it does at
    the starting point (``adjoint_residual`` is 1).

    Args:
      key: PRNG key of the episodes (``mrp``) or of the networks (``cartpole``).
      scale: 'small', the scale of the table of `hypergrad run reinforcement`, or
        'paper'.
      variant: 'mrp' or 'cartpole'.
      sizes: Replacements of the entries of `SCALES`, by their names.

    Raises:
      ValueError: The scale or the variant is unknown, or a number of ``sizes`` is out
        of range.
      TypeError: A size is not in `SCALES`, or its type is not that of the entry.
    """
    check_choice("variant", variant, SCALES)
    check_choice("scale", scale, SCALES[variant])
    build = {"mrp": make_mrp, "cartpole": make_cartpole}[variant]
    chosen = sizes_of("reinforcement", SCALES[variant][scale], sizes)
    if is_traced(chosen):
        names = sorted(name for name, x in chosen.items() if is_traced(x))
        raise TypeError(
            f"{names[0]} must be concrete, because it is a constant of the compiled "
            "inner solver; got a traced value. Call make outside of jit and vmap, or "
            "pass a Python number."
        )
    return build(as_key(key), **chosen)
