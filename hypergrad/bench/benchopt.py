"""Single-loop methods as solvers of benchopt, for the benchmark ``benchmark_bilevel``.

The files need benchopt and this package where they run, and nothing here imports
benchopt.
"""

from pathlib import Path

from ..runtime import atomic_io

#: How each method is made, and the exponent by which its rates fall. As in the
#: benchmark's own solvers, those of SOBA fall as ``(1 + step)^-1/2`` and the others are
#: constant, a series of ``n_shia_steps = 10`` has 11 terms, and SRBA makes a full pass
#: after half of all batches.
METHODS = {
    "SOBA": ("hg.SOBA(optax.sgd(rate))", 0.5),
    "SABA": ("hg.SABA(optax.sgd(rate))", 0),
    "SRBA": (
        "hg.SRBA(optax.sgd(rate), period=(inner.num_blocks + outer.num_blocks) // 2)",
        0,
    ),
    "StocBiO": ("hg.StocBiO(optax.sgd(rate), 10, 11, step_size=self.step_size)", 0),
    "AmIGO": ("hg.AmIGO(optax.sgd(rate), 10, 10)", 0),
}

TEMPLATE = '''\
"""{name} of hypergrad, written by `hypergrad write-solvers`.

Blocks of examples are visited in shuffled passes, as by the benchmark's own solvers.
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


def make_schedule(rate):
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
            return hg.Batches(jnp.arange(n), size, order="epoch_blocks")

        inner, outer = batches(n_inner_samples), batches(n_outer_samples)
        problem = hg.Bilevel(loss_of_rows(f_inner), loss_of_rows(f_outer), inner, outer)
        rate = make_schedule(self.step_size)
        outer_rate = make_schedule(self.step_size / self.outer_ratio)
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
    for name, (make, exponent) in METHODS.items():
        path = folder / f"hypergrad_{name.lower()}.py"
        text = TEMPLATE.format(name=name, make=make, exponent=exponent)
        atomic_io.atomic_write(path, text)
        paths.append(path)
    return paths
