"""SUSTAIN, double momentum with a series of random length (Khanduri et al. 2021)."""

from ...method_summary import MethodSummary
from .inner_loops import StochasticNeumann
from .mrbo import StormMethod


class SUSTAIN(StormMethod):
    """Makes the steps of `MRBO` with a Neumann series of random length.

    The series is ``v = K step_size prod_{i <= p} (I - step_size H_i) b`` with ``p``
    uniform on ``{0, ..., K - 1}``. The current and the previous point use the same
    ``p`` and the same batches.

    Args:
      optimizer: Optax transformation for ``w``.
      num_terms: K.
      step_size: Step size of the series, at most ``1 / lambda_max``.
      momentum: A number in [0, 1), or a schedule of the outer step with such values.
        With 1 the error of the initial batch would remain. The paper uses
        ``1 - c (k + m)^(-2/3)``. Defaults to 0.9.

    Cost: two gradients, ``K + 1`` Hessian-vector products on average (the cross term
      counts as one) and two outer gradients; each on one batch.
    Memory: five vectors like ``w``.
    Bias: the lag of ``w`` behind ``alpha``, and the part ``(1 - step_size lambda)^K``
      of the adjoint along each eigenvector of ``H``. The random length adds noise.
      Target: argmin.

    Source: Khanduri et al. 2021 (arXiv 2102.07367).

    >>> import jax.numpy as jnp, optax, hypergrad as hg
    >>> inner = lambda w, alpha, batch: 0.5 * jnp.sum((w - alpha) ** 2)
    >>> outer = lambda w, alpha, batch: 0.5 * jnp.sum((w - 1.0) ** 2)
    >>> trace = hg.minimize(
    ...     hg.Bilevel(inner, outer), hg.SUSTAIN(optax.sgd(0.5), 5, step_size=0.5),
    ...     optax.sgd(0.05), 0.0, 3.0, num_steps=1000,
    ... )
    >>> abs(float(trace.alpha) - 1) < 0.05
    True
    """

    citations = ("khanduri2021", "cutkosky2019")
    summary = (
        MethodSummary(
            "SUSTAIN(optimizer, K)",
            num_grads="2",
            num_hvps="K + 1",
            memory="5 w and the optimizer's",
            bias="what w lags behind, q^K",
            alpha_in=("losses",),
            recommended_for="noisy batches, if the series of MRBO is too expensive",
            not_recommended_for="small noise: the random length adds its own",
            reason="MRBO with half of the products",
        ),
    )

    @property
    def series(self) -> StochasticNeumann:
        """The series of random length that approximates the adjoint."""
        return StochasticNeumann(self.step_size, self.num_terms, has_random_length=True)
