"""The promises of the package as a whole: names, docstrings, citations and examples."""

import ast
import doctest
import inspect
import subprocess
import sys
from typing import Protocol

import jax
import jax.numpy as jnp
import lineax as lx
import optax
import optimistix as optx

import hypergrad as hg
from tests.house.source import ROOT

PUBLIC = {
    name: getattr(hg, name)
    for name in hg.__all__
    if not inspect.ismodule(getattr(hg, name))
}
CONTRACT = {
    "Bilevel", "Batches", "Descent", "LBFGS", "Newton", "ClosedForm", "from_jaxopt",
    "from_optimistix", "Estimate", "Implicit", "Unrolled", "CG", "Neumann", "Nystrom",
    "NystromCG", "MINRES", "Identity", "hypergradient", "minimize", "OuterLoop",
    "search", "Trace", "argmin", "citation", "cost", "testing", "spaces", "tasks",
    "certify", "Certificate", "Forward", "FixedPoint", "FiniteDifference", "Penalty",
    "Evolution", "PersistentEvolution", "surrogates", "objectives",
}  # fmt: skip


def is_protocol(value):
    return inspect.isclass(value) and Protocol in value.__mro__[1:]


def test_public_names_exist_once():
    assert len(set(hg.__all__)) == len(hg.__all__)
    assert not [name for name in hg.__all__ if not hasattr(hg, name)]
    assert not CONTRACT - set(hg.__all__)


def test_completion_offers_public_names_alone():
    names = {*hg.__all__, "__version__"}
    assert names - {"tasks"} <= set(dir(hg)) <= names


def test_every_public_object_has_a_docstring_with_a_doctest():
    """The docstring is the object's own; a protocol needs no doctest."""
    errors = []
    objects = PUBLIC | {
        f"objectives.{name}": getattr(hg.objectives, name)
        for name in hg.objectives.__all__
    }
    for name, value in objects.items():
        own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        if not own:
            errors.append(f"{name} must have a docstring.")
        elif ">>> " not in own and not is_protocol(value):
            errors.append(f"The docstring of {name} must have a doctest.")
    assert not errors, "\n".join(errors)


SOLVER = hg.Descent(optax.sgd(0.1), 1)
SGD = optax.sgd(0.1)
METHODS = [
    *(hg.Implicit(SOLVER), hg.Unrolled(SOLVER), hg.Forward(SOLVER)),
    *(hg.FixedPoint(SOLVER, 1), hg.FiniteDifference(SOLVER), hg.Penalty(SOLVER, 1.0)),
    *(hg.Evolution(SOLVER), hg.PersistentEvolution(SOLVER)),
    *(hg.Reversible(0.1, 0.9, 1), hg.SOBA(SGD), hg.SABA(SGD), hg.SRBA(SGD, 5)),
    *(hg.FSLA(SGD), hg.StocBiO(SGD, 1, 1, step_size=0.1), hg.AmIGO(SGD, 1, 1)),
    *(hg.TTSA(SGD, 1, step_size=0.1), hg.MRBO(SGD, 1, step_size=0.1)),
    *(hg.SUSTAIN(SGD, 1, step_size=0.1), hg.BOME(SGD, 1, step_size=0.1)),
    *(hg.VRBO(SGD, 1, 1, period=5, step_size=0.1), hg.F2SA(SGD, 1, penalty=1.0)),
    *(hg.PZOBO(SGD, 1, 1), hg.DARTS(SGD)),
    *(SOLVER, hg.Newton(), hg.LBFGS(), hg.from_optimistix(optx.BFGS(1e-6, 1e-6))),
    *(hg.CG(), hg.MINRES(), hg.Neumann(5), hg.Nystrom(5), hg.NystromCG(5)),
    hg.Identity(),
]
#: Methods without a paper of their own.
UNCITED = {"Average", "ClosedForm", "CentralDifference"}


def test_every_method_cites_its_source():
    """Each key of a method is an entry of the text of `hg.citation`."""
    for method in METHODS:
        keys = type(method).citations
        assert isinstance(keys, tuple)
        assert keys, method
        text = hg.citation(method)
        assert not [key for key in keys if f"{{{key}," not in text], method


def test_every_public_method_is_checked_above():
    methods = {
        name
        for name, value in PUBLIC.items()
        if inspect.isclass(value) and not is_protocol(value)
        if any(hasattr(value, method) for method in ("solve", "compute", "estimate"))
    }
    assert methods - UNCITED <= {type(method).__name__ for method in METHODS}


def test_a_combination_cites_its_parts():
    text = hg.citation(hg.Implicit(SOLVER, hg.Neumann(3)))
    assert all(key in text for key in ("{pedregosa2016,", "{lorraine2020,"))
    assert "{lineax2023," in hg.citation(hg.Implicit(SOLVER, lx.LU()))


def test_importing_loads_four_packages_and_no_other():
    """The process is a fresh one, in which warnings such as jaxopt's are errors."""
    code = """if True:
        import sys, equinox, jax, lineax, optax
        allowed = {name.partition(".")[0] for name in sys.modules}
        import hypergrad
        loaded = {name.partition(".")[0] for name in sys.modules}
        others = loaded - allowed - sys.stdlib_module_names
        assert others == {"hypergrad"}, others
    """
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_first_example_is_short():
    """The docstring of the package and the README begin with the same statements."""
    assert hg.__doc__.count(">>> ") <= 15
    assert "minimize" in hg.__doc__
    assert isinstance(hg.__version__, str)
    readme = (ROOT.parent / "README.md").read_text()
    block = readme.split("```python\n")[1].split("```")[0]
    examples = doctest.DocTestParser().get_examples(hg.__doc__)
    statements = lambda source: [ast.dump(node) for node in ast.parse(source).body]
    expected = statements("".join(example.source for example in examples))
    # The last statement shows the result.
    assert statements(block)[:-1] == expected[:-1]


def test_results_are_pytrees():
    estimate = hg.Estimate(
        jnp.zeros(()), jnp.ones(2), jnp.ones(3), {"a": jnp.zeros(())}
    )
    assert len(jax.tree.leaves(estimate)) == 4


def test_the_api_page_lists_every_task():
    page = (ROOT.parent / "docs/api.md").read_text()
    tasks = [f"hypergrad.tasks.{name}.make" for name in hg.tasks.TASKS]
    assert not [task for task in tasks if f"\n::: {task}\n" not in page]
