"""`progress=True`: what the bar shows, and that it changes nothing."""

import contextlib
import math
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hypergrad as hg
from hypergrad.progress import ProgressUpdate, make_timer, open_progress
from hypergrad.runtime.progress_bar import progress_bar, tenth_printer
from tests.loops import TO_ONE, ExactEstimator, assert_same_bits, run_loop
from tests.processes import run_in_terminal, run_python

TRUSTED = np.arange(40) % 4 > 0


def run(num_steps=20, **options) -> hg.Trace:
    estimator = ExactEstimator(trusted=TRUSTED)
    return run_loop(
        TO_ONE, estimator, optax.sgd(0.1), 0.0, 3.0, num_steps=num_steps, **options
    )


def search(searcher=None, **options) -> hg.Trace:
    searcher = searcher or hg.searchers.Random()
    space = hg.spaces.Unit()
    return hg.search(
        TO_ONE, hg.Descent(optax.sgd(0.1), 4), searcher, 0.0, space=space, budget=50,
        **options,
    )  # fmt: skip


def with_arrays(trace: hg.Trace) -> hg.Trace:
    """Returns the trace with ``first_step`` as an array, even after a search."""
    return jax.tree.map(jnp.asarray, trace)


@pytest.fixture
def bar(monkeypatch) -> list[tuple[float, float, str]]:
    """Collects the updates of a bar instead of showing them."""
    updates = []

    @contextlib.contextmanager
    def progress_bar(*, is_percentage):
        assert is_percentage
        yield lambda *update: updates.append(update)
        updates.append("closed")

    monkeypatch.setattr("hypergrad.progress.progress_bar", progress_bar)
    return updates


def test_the_bar_of_a_run_shows_step_value_and_trusted_steps(bar):
    trace = run(progress=True)
    *updates, end = bar
    assert end == "closed"
    assert [(done, total) for done, total, _ in updates] == [
        (pytest.approx(5.0 * (i + 1)), 100) for i in range(20)
    ]
    for i, (_, _, label) in enumerate(updates):
        num_trusted = int(TRUSTED[: i + 1].sum())
        text = f"step {i + 1}, value {float(trace.value[i]):.6g}, "
        text += f"trusted {num_trusted} of {i + 1}"
        assert label.startswith(text)
    assert "left" not in updates[0][2]
    assert re.search(r", \d+:\d\d:\d\d left$", updates[-2][2])


def test_a_bar_changes_no_bit_and_is_open_for_one_run(bar):
    assert_same_bits(with_arrays(run(progress=True)), with_arrays(run()))
    assert bar.count("closed") == 1
    run(progress=False)
    assert bar.count("closed") == 1


def test_the_bar_of_a_budget_shows_the_fraction_that_is_spent(bar):
    """With a number of steps, whichever is nearer to its end counts."""
    run(num_steps=None, budget=30.0, progress=True)
    *updates, _ = bar
    assert [done for done, _, _ in updates] == [
        pytest.approx(10.0 * (i + 1)) for i in range(len(updates))
    ]
    assert updates[-1][2].startswith("step 10, ")
    bar.clear()
    run(num_steps=20, budget=15.0, progress=True)
    *updates, _ = bar
    assert [done for done, _, _ in updates] == pytest.approx([20, 40, 60, 80, 100])


def test_the_bar_of_several_losses_shows_their_values(bar):
    outer = (TO_ONE.outer_loss, lambda w, a, b: w**2)
    run_loop(
        hg.Bilevel(TO_ONE.inner_loss, outer), hg.Implicit(hg.Newton()),
        optax.sgd(0.1), 0.0, 3.0, num_steps=1, progress=True,
        aggregator=hg.objectives.WeightedSum(jnp.array([0.5, 0.5])),
    )  # fmt: skip
    assert "value [4, 9], " in bar[0][2]


def test_a_continued_run_with_checkpoints_counts_its_saved_steps(bar, tmp_path):
    checkpoints = hg.Checkpoints(tmp_path / "run", every=2)
    run(num_steps=4, checkpoints=checkpoints)
    run(num_steps=6, checkpoints=checkpoints, progress=True)
    assert [label.split(", value")[0] for _, _, label in bar[:-1]] == [
        "step 5",
        "step 6",
    ]
    assert "trusted 4 of 6" in bar[-2][2]


@pytest.mark.parametrize("unit", ["trial", "round"])
def test_the_bar_of_a_search_shows_the_best_value(bar, unit):
    searcher = None if unit == "trial" else hg.searchers.SuccessiveHalving(4)
    trace = search(searcher, progress=True)
    *updates, end = bar
    assert end == "closed"
    fractions = [done for done, _, _ in updates]
    assert fractions == sorted(fractions)
    assert 50 < fractions[-1] <= 100
    best = f"{float(trace.value.min()):.6g}"
    assert updates[-1][2].startswith(f"{unit} {len(updates)}, best value {best}")
    assert_same_bits(with_arrays(trace), with_arrays(search(searcher)))


def test_the_bar_is_closed_if_a_run_fails(monkeypatch):
    """It would else go on to draw below the traceback."""
    events = []

    @contextlib.contextmanager
    def progress_bar(*, is_percentage):
        try:
            yield lambda *update: 1 / 0
        finally:
            events.append("closed")

    monkeypatch.setattr("hypergrad.progress.progress_bar", progress_bar)
    with pytest.raises(ZeroDivisionError):
        run(progress=True)
    assert events == ["closed"]


@pytest.mark.parametrize("function", [run, search])
def test_a_missing_rich_names_the_extra(monkeypatch, function):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=r"hypergrad-jax\[display\]"):
        function(progress=True)


def test_the_time_left_ignores_what_came_before_the_first_update():
    seconds = iter([100.0, 101.0, 104.0, 104.0])
    estimate_remaining = make_timer(lambda: next(seconds))
    fractions = (0.5, 0.5, 0.75, 1.0)
    assert [estimate_remaining(x) for x in fractions] == [None, None, 4.0, 0.0]


@pytest.mark.parametrize(
    ("seconds", "fractions"),
    [((100.0, 101.0), (1e-30, 2e-30)), ((100.0, 100.0), (0.1, 0.2))],
    ids=["of a budget that is out of reach", "of a coarse clock"],
)
def test_no_time_left_is_shown_that_cannot_be_estimated(seconds, fractions):
    estimate_remaining = make_timer(iter(seconds).__next__)
    assert [estimate_remaining(x) for x in fractions] == [None, None]


def test_lines_are_printed_for_each_tenth():
    lines = []
    update = tenth_printer(lines.append, is_percentage=True)
    for percent in (5.0, 12.0, 19.0, 40.0, 100.0):
        update(percent, 100, "value 1")
    assert lines == ["12%: value 1", "40%: value 1", "100%: value 1"]


def test_a_line_without_a_label_is_the_amount():
    lines = []
    tenth_printer(lines.append)(4, 4, "")
    assert lines == ["4 of 4"]


def test_a_cost_that_is_nan_shows_no_progress(bar):
    """As in a search, where a solver may report a number of calls that is unknown."""
    with open_progress(True, "trial") as show:
        show(ProgressUpdate(1, 0.5, math.nan))
    assert bar[0][:2] == (0.0, 100)


def test_a_notebook_shows_one_bar_that_changes(monkeypatch):
    """IPython is replaced by a module that collects what it would display."""
    module, markup = types.ModuleType("IPython.display"), []
    module.HTML = str
    handle = types.SimpleNamespace(display=markup.append, update=markup.append)
    module.DisplayHandle = lambda: handle
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    run(num_steps=2, progress=True)
    assert len(markup) == 3
    start = '<progress value="50" max="100"></progress> 50%: step 1, value 4, trusted 0'
    assert markup[1].startswith(start)
    with progress_bar() as update:
        update(1, 4, "<b>")
    assert markup[-1] == '<progress value="1" max="4"></progress> 1 of 4: &lt;b&gt;'


SCRIPT = """
    import optax, hypergrad as hg

    problem = hg.Bilevel(lambda w, a, b: (w - a) ** 2, lambda w, a, b: (w - 1.0) ** 2)
    loop = hg.OuterLoop(problem, hg.Implicit(hg.Newton()), optax.sgd(0.25))
    loop.run(loop.init(0.0, 3.0), num_steps=20, progress=True)
"""


def test_a_run_in_a_terminal_shows_a_bar_and_otherwise_ten_lines():
    text, status = run_in_terminal(SCRIPT, env={"COLUMNS": "120"})
    assert status == 0
    assert "━" in text
    assert re.search(r"100%.*step 20, value .*, trusted \d+ of 20", text)
    # Systems for tests often set this variable, which is no terminal.
    result = run_python(SCRIPT, env={"FORCE_COLOR": "1"})
    lines = result.stderr.splitlines()
    assert len(lines) == 10
    assert result.stdout == ""
    assert lines[0].startswith("10%: step 2, value ")
    assert lines[-1].startswith("100%: step 20, value ")


def test_the_first_of_several_processes_shows_the_bar(bar, monkeypatch):
    """Every process counts the trusted steps, so that all make the same transfers."""
    counts = []
    monkeypatch.setattr(
        "hypergrad.outer_loop.run._HostRun._count_trusted",
        lambda run: counts.append(run.num_steps_made) or (0, 0),
    )
    monkeypatch.setattr("hypergrad.progress.jax.process_index", lambda: 1)
    run(num_steps=3, progress=True)
    assert bar == []
    assert counts == [1, 2, 3]
