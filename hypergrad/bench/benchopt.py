"""Single-loop methods as solvers of benchopt, for the benchmark ``benchmark_bilevel``.

The files need benchopt and this package where they run, and nothing here imports
benchopt.
"""

from pathlib import Path

from ..runtime import atomic_io

#: How each method is made, of the rate of ``w`` and the steps between full passes.
#: As in the benchmark's own solvers, the rates of SOBA fall as ``(1 + step)^-1/2`` and
#: those of the others are constant. Its series of `n_shia_steps = 10` has 11 terms.
METHODS = {
    "SOBA": "hg.SOBA(optax.sgd(rate))",
    "SABA": "hg.SABA(optax.sgd(rate))",
    "SRBA": "hg.SRBA(optax.sgd(rate), period=period)",
    "StocBiO": "hg.StocBiO(optax.sgd(rate), 10, 11, step_size=self.step_size)",
    "AmIGO": "hg.AmIGO(optax.sgd(rate), 10, 10)",
}
EXPONENTS = {"SOBA": 0.5}  # 0 for the others

TEMPLATE = '''\
"""{name} of hypergrad, written by `hypergrad write-solvers`.

Blocks of examples are drawn independently; the benchmark's own solvers visit them in
shuffled passes. Large rates that are stable in passes may diverge here.
"""

from benchopt import BaseSolver, safe_import_context
from benchopt.stopping_criterion import SufficientProgressCriterion

with safe_import_context() as import_ctx:
    import jax
    import jax.numpy as jnp
    import optax

    import hypergrad as hg


def loss_of_rows(loss):
    """The benchmark's losses take the first row and the size of a batch."""
    return lambda w, alpha, rows: loss(w, alpha, rows[0], batch_size=len(rows))


def falling(rate):
    return lambda step: rate / (1 + step) ** {exponent}


class Solver(BaseSolver):
    name = "hypergrad-{name}"
    requirements = ["pip::hypergrad-jax"]
    # The benchmark's own solvers have parameters of the same names.
    parameters = {{
        "step_size": [0.1],
        "outer_ratio": [1.0],
        "batch_size": [64],
        "eval_freq": [128],
        "random_state": [1],
    }}
    sampling_strategy = "callback"
    stopping_criterion = SufficientProgressCriterion(patience=100, strategy="callback")

    @staticmethod
    def get_next(stop_val):
        return stop_val + 1

    def set_objective(
        self, f_inner, f_outer, n_inner_samples, n_outer_samples, inner_var0, outer_var0
    ):
        def batches(n):
            size = n if self.batch_size == "full" else self.batch_size
            return hg.Batches(jnp.arange(n), size, order="blocks")

        inner, outer = batches(n_inner_samples), batches(n_outer_samples)
        problem = hg.Bilevel(loss_of_rows(f_inner), loss_of_rows(f_outer), inner, outer)
        rate = falling(self.step_size)
        outer_rate = falling(self.step_size / self.outer_ratio)
        # The benchmark's period of SRBA: half of all batches.
        period = max(1, (inner.num_blocks + outer.num_blocks) // 2)  # noqa: F841
        method = {make}
        self.loop = hg.OuterLoop(problem, method, optax.sgd(outer_rate))
        key = jax.random.key(self.random_state)
        self.start = self.loop.init(inner_var0, outer_var0, key)
        self.inner_var, self.outer_var = inner_var0, outer_var0
        jax.block_until_ready(self.steps(self.start).alpha)  # compiles

    def steps(self, state):
        steps = self.eval_freq
        return self.loop.run(state, num_steps=steps, record_every=steps)

    def run(self, callback):
        state = self.start
        while callback():
            trace = self.steps(state)
            state, self.inner_var, self.outer_var = trace.state, trace.w, trace.alpha

    def get_result(self):
        return dict(inner_var=self.inner_var, outer_var=self.outer_var)
'''


def write_solvers(folder: Path) -> list[Path]:
    """Writes one solver per method into a folder and returns the paths.

    Args:
      folder: The folder ``solvers`` of a checkout of benchmark_bilevel.
    """
    atomic_io.make_directory(folder)
    paths = []
    for name, make in METHODS.items():
        path = folder / f"hypergrad_{name.lower()}.py"
        exponent = EXPONENTS.get(name, 0.0)
        text = TEMPLATE.format(name=name, make=make, exponent=exponent)
        atomic_io.atomic_write(path, text)
        paths.append(path)
    return paths
