"""TTSA, two-timescale stochastic approximation (Hong, Wai, Wang & Yang 2023)."""

import equinox as eqx
from jaxtyping import Array, PyTree

from ...method_summary import MethodSummary
from ...number_checks import check_positive_int, positive
from ...problem import Bilevel, EstimateData
from .base import SingleLoop, SingleLoopState, Step
from .inner_loops import StochasticNeumann
from .stocbio import stocbio_step


class TTSA(SingleLoop):
    """Makes one step of ``w`` and approximates the adjoint by a random-length series.

    The direction for ``alpha`` is ``dM/dalpha - J' v`` after the step, with

        v = K step_size prod_{i <= p} (I - step_size H_i) b,   b = dM/dw,

    ``p`` uniform on ``{0, ..., K - 1}`` and each ``H_i`` on a fresh batch. In
    expectation, ``v`` is the Neumann series of K terms.

    Args:
      optimizer: Optax transformation for ``w``, on the faster timescale. The optimizer
        of `minimize` is on the slower one.
      num_terms: K.
      step_size: Step size of the series, at most ``1 / lambda_max``.

    Cost: one gradient, ``(K + 1) / 2`` Hessian-vector products on average (the cross
      term counts as one) and one outer gradient; each on one batch.
    Memory: two vectors like ``w``.
    Bias: the lag of ``w`` behind ``alpha``, and the part ``(1 - step_size lambda)^K``
      of the adjoint along each eigenvector of ``H``. The random length adds noise.
      Target: argmin.

    Source: Hong, Wai, Wang & Yang 2023 (arXiv 2007.05170), with the series of
    Ghadimi & Wang 2018.

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.TTSA(optax.sgd(0.5), 10, step_size=0.5),
    ...     optax.sgd(0.02), 0.0, 3.0, num_steps=1000,
    ... )
    >>> round(float(trace.alpha), 2)
    1.0
    """

    num_terms: int = eqx.field(static=True)
    step_size: Array | float = eqx.field(kw_only=True, converter=positive("step_size"))

    citations = ("hong2023",)
    summary = (
        MethodSummary(
            "TTSA(optimizer, K)",
            num_grads="1",
            num_hvps="(K + 1) / 2",
            memory="2 w and the optimizer's",
            bias="what w lags behind, q^K",
            alpha_in=("losses",),
            recommended_for="a baseline: the first single loop with a proven rate",
            not_recommended_for="anything else: its series is noisy",
            reason="two timescales, no state besides w",
        ),
    )

    def __check_init__(self):
        check_positive_int("num_terms", self.num_terms)

    def step(
        self,
        problem: Bilevel,
        state: SingleLoopState,
        alpha: PyTree,
        data: EstimateData,
    ) -> tuple[Step, SingleLoopState]:
        """Makes a step of stocBiO with one inner step and a series of random length."""
        series = StochasticNeumann(
            self.step_size, self.num_terms, has_random_length=True
        )
        return stocbio_step(self, 1, series, problem, state, alpha, data)
