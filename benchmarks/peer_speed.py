"""Time and memory of a hypergradient beside other libraries, at the same accuracy.

`make peers` installs the PyTorch libraries, each in an environment of its own; `python
-m benchmarks.peers.tuning` chooses what *w1-whole* leaves open, and `hypergrad
run peer_speed` measures, both with nothing else running; `python -m
benchmarks.peers.page docs/other_libraries.md` writes the section of that page.

*Measured again* as a whole, with the settings of w1-whole chosen again, since an
estimate by defaults includes the estimate of its own error. Two things were stated
otherwise in an earlier run: *w4* at rate 0.1, after which float32 was 11% and more from
float64 for all contenders but one, where 5% is allowed; and the examples of *w1* for
PyTorch by rows, which is slow for its products by a vector (*w1-solve* by hand took
0.071 s, and 0.032 s by columns, as all JAX contenders have them). *w1* is bound by
memory, whose speed on the machine drifts by minutes.

*Question.* At the same work and the same accuracy, how many times as long as the inner
run alone does a hypergradient take, and what fraction of the time and memory of other
libraries?

*Works.* `peers/work.py` states each in NumPy, with the error above which a result is
wrong. *w1* is logistic regression: 10,000 examples for training and as many for
validation, 500 log-penalties, 500 full-batch steps of heavy-ball descent. Its
hypergradient is computed in reverse mode (*unrolled*), along ones (*forward*), at a
given `w` by 20 products of conjugate gradients (*solve*), and from 0 by any solver to
an error of 1e-4 (*whole*). *w2* is hyper-cleaning: a 784-300-10 ReLU network, 5,000
weights of examples, 100 full-batch steps; in reverse mode (*unrolled*), the same in
little memory (*lowmem*), and at a given `w` by 10 products (*implicit*). *w3* is a
784-128-10 tanh network on batches of 128 in turn with three hyperparameters: 1,000 and
10,000 steps in reverse mode, 1,000 in forward mode. *w4* is MAML: 16 five-way five-shot
tasks, four convolutions of 64 channels. *overhead* is w1 with 32 examples and 8
features, which leaves nothing but overhead. *w6* is a training of the table `trainings`
with its hypergradient by 30 products, compared with the training alone. Four works are
of hypergrad alone, compared with a *base*: *dispatch*, a call of the function that
`hypergradient` returns, with its program under `jax.jit`; *eight*, w1-solve for eight
validation losses in one estimate, with one; *compile*, overhead traced and compiled
again in every call, with 100 times the steps and with plain JAX; and *w2-indefinite*,
w2-implicit at the initial parameters, where the Hessian has negative eigenvalues: the
result must be finite, untrusted, and report negative curvature, which Gauss-Newton
products do not have.

*Contenders* (`peers/contenders/`). *inner*: the inner run alone, in plain JAX. *plain*:
plain JAX by hand. *ours*: hypergrad by its public names, where a jitted function
returns the hypergradient alone, so that the other fields of an estimate are not
computed; in *w3-forward* the estimator is the choice of `hg.unrolled_estimator`.
*defaults*: `hg.hypergradient` as in the README, with all fields of an estimate and its
error estimate. JAXopt with `unroll=True` and `custom_root`, Optimistix with checkpoints
of every step and `ImplicitAdjoint(CG)`, and in w1-whole the L-BFGS of both. PyTorch by
hand and `torch.func`, higher, TorchOpt, hypertorch, Betty, BOAT, moskomule's hypergrad,
and learn2learn. Each library does a work as its documentation recommends, in the layout
that is fastest for it. Data, layout and compilation are not timed. Where the work is a
number of products, `CG` of hypergrad has no preconditioner. `Unrolled` of *ours* stores
all steps, except in *w2-lowmem* and in *w3* in reverse mode, where checkpoints are set
by hand. A work that a library does not offer has no row.

*Settings of w1-whole*, which prescribes an error and not a method. `peers/tuning.py`
tries all combinations of a grid for each contender on the data of seeds 100 and 101:
tolerances or numbers of steps of the inner solver, tolerances or numbers of products of
the adjoint, rates and momenta of descent, and for *ours* Newton's method or L-BFGS.
Chosen is the fastest whose error is at most 5e-5, half of the maximum; it is in
`peers/settings.json`. The reported data are those of seed 0.

*Timing.* Each contender has a fresh process without a persistent compilation cache,
without variables that tune JAX or XLA, of at most 3/4 of the machine's memory, and with
as many OpenMP threads as there are cores. All processes of a work exist at once, and
one runs at a time. The first call, which compiles, gives *first* and *peak*, the
maximum of the resident set; *scratch* is the temporary memory of the program by XLA.
Rounds follow, in each of which every contender makes one repetition: A B C, A B C, and
so on. A repetition is one call, or as many as take half a second, and begins 0.4 s
after the previous one, whose threads may still be spinning. A repetition in which other
processes take more than 8% of a core, by `/proc/stat` less the contender's own time, is
discarded and counted. Rounds end when each contender has five clean repetitions, or
after 20.

*Errors* are relative, in the 2-norm, to the same algorithm in float64 by plain JAX; in
w1-whole to the exact implicit hypergradient, by a dense solve at the minimum. A
contender that fails, or whose error exceeds that of the work, keeps its row with the
reason and has no ratio.

*Criteria.* `peers/claims.py` lists them: ratios of medians within one work, bytes, and
microseconds. *The fastest PyTorch peer* and *the fastest peer*, of any library, are
among those with a right result; where one of these has not five clean repetitions,
there is no ratio and the check fails. Nothing is claimed of *defaults*. A claim is
*met* or *not met*, and an aim beyond it *reached* or *not reached*. The check fails
where a number of ours is missing, not where a claim is not met or no peer is right.
"""

from pathlib import Path

import numpy as np

from hypergrad.bench import Cell, MeasurementTable, Row, Stage, select
from hypergrad.bench.report import markdown_table

from .peers import harness
from .peers.claims import by_work, contenders_of, findings, hardware_text, seconds
from .peers.environments import interpreter
from .peers.work import WORKS
from .shared.plots import add_grid, make_panels, plain_ticks


def measure_work(cell: Cell, rows: list[Row]) -> Row:
    """Returns the rows of all contenders of a work, which are measured in turns."""
    del rows
    pythons = {name: interpreter(name) for name in contenders_of(cell["work"])}
    return {"contenders": harness.measure(cell["work"], pythons)}


def measure(cell: Cell, rows: list[Row]) -> Row:
    """Returns the row of one contender out of those of its work.

    Raises:
      ValueError: The work was not measured.
    """
    stage_rows = select(rows, stage="rounds", work=cell["work"])
    if not stage_rows:
        raise ValueError(f"{cell['work']} is measured as a whole; run without --only")
    return select(stage_rows[0]["contenders"], method=cell["method"])[0]


def table_cells(row: Row, inner: Row | None) -> list[str]:
    """Returns a contender's seconds, their ratio to the inner run, memory and error."""
    number = lambda x, form, scale=1.0: "" if x is None else format(x * scale, form)
    text, ratio = row["reason"] or "no clean repetition", ""
    if row["seconds"] and not row["reason"]:
        low, high = min(row["seconds"]), max(row["seconds"])
        text = f"{low:.3g} / **{seconds(row):.3g}** / {high:.3g}"
        if inner is not None and inner["seconds"]:
            ratio = f"{seconds(row) / seconds(inner):.3g}"
    return [
        row["method"],
        text,
        ratio,
        f"{len(row['seconds'])} of {len(row['seconds']) + row['discarded']}",
        number(row["first"], ".2f"),
        number(row["peak"], ".0f", 1e-6),
        number(row["scratch"], ".3g", 1e-6),
        number(row["error"], ".1e"),
    ]


def body(rows: list[Row]) -> list[str]:
    """Returns a table per work."""
    headings = (
        "contender", "seconds: min / median / max", "over inner", "clean",
        "first call, s", "peak, MB", "scratch, MB", "error",
    )  # fmt: skip
    lines = [hardware_text(rows)]
    for work, contenders in by_work(rows).items():
        inner = contenders.get("inner")
        cells = [table_cells(row, inner) for row in contenders.values()]
        lines += ["", f"**{work}**: {WORKS[work].text}", ""]
        lines += markdown_table(headings, cells)
    return lines


def plot(rows: list[Row], path: Path) -> None:
    """Plots the seconds of each contender that is right, a panel per work."""
    panels = {
        work: {
            name: row["seconds"]
            for name, row in contenders.items()
            if row["seconds"] and not row["reason"]
        }
        for work, contenders in by_work(rows).items()
    }
    panels = {work: methods for work, methods in panels.items() if methods}
    num_columns = 3
    num_rows = -(-len(panels) // num_columns)
    figure, axes = make_panels(
        num_rows, num_columns, (13, 2.4 * num_rows), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (work, methods) in zip(axes.flat, panels.items(), strict=False):
        for position, (name, values) in enumerate(methods.items()):
            color = "C3" if name == "ours" else "C0"
            height = [position] * len(values)
            axis.plot(values, height, ".", ms=5, color=color, alpha=0.5)
            median = [np.median(values)] * 2
            axis.plot(median, [position - 0.38, position + 0.38], color, lw=2)
        axis.set_title(work)
        axis.set_xlabel("seconds")
        axis.set_xscale("log")
        plain_ticks(axis.xaxis)
        axis.tick_params(axis="x", labelsize=7)
        add_grid(axis, alpha=0.25, axis="x")
        axis.set_yticks(range(len(methods)), list(methods), fontsize=8)
        axis.invert_yaxis()
    figure.savefig(path, dpi=120)


table = MeasurementTable(
    cells=lambda scale, seeds: [
        {"work": work, "method": name, "seed": 0}
        for work in WORKS
        for name in contenders_of(work)
    ],
    measure_cell=measure,
    earlier_stages=(
        Stage(
            "rounds",
            lambda scale, seeds: [
                {"work": work, "method": "all contenders", "seed": 0} for work in WORKS
            ],
            measure_work,
        ),
    ),
    findings=findings,
    body=body,
    plot=plot,
    seeds=1,
    minutes=60,
    paradigm="speed",
    source="each library by its own documentation",
    data="simulated, stated in benchmarks/peers/work.py",
)
