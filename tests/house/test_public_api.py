"""The promises of the package as a whole: names, docstrings, citations and examples."""

import ast
import doctest
import inspect
from typing import Protocol

import hypergrad as hg
from tests.house.source import ROOT
from tests.processes import run_python

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


#: Classes without a paper: a strategy of `EvolutionStrategy` is cited by its package,
#: and three classes are bases of surrogates.
UNCITED = {
    "Average", "CentralDifference", "ClosedForm", "EvolutionStrategy", "Grid",
    "AreaRatio", "RankingSurrogate", "Surrogate",
}  # fmt: skip
#: What estimators, solvers, searchers, surrogates and aggregators define.
METHOD_NAMES = [
    *("estimate", "solve", "compute", "ask", "round", "exact", "compute_weights")
]


def test_every_method_has_a_source():
    """The keys are those of an entry each (`tests/core/test_citation.py`)."""
    packages = (hg, hg.searchers, hg.surrogates, hg.objectives)
    objects = [getattr(package, x) for package in packages for x in package.__all__]
    uncited = {
        value.__name__
        for value in objects
        if inspect.isclass(value) and not is_protocol(value)
        if any(hasattr(value, name) for name in METHOD_NAMES)
        if not getattr(value, "citations", ())
    }
    assert uncited == UNCITED


def test_importing_loads_four_packages_and_no_other():
    """The process is a fresh one, in which warnings such as jaxopt's are errors."""
    code = """
        import sys, equinox, jax, lineax, optax
        allowed = {name.partition(".")[0] for name in sys.modules}
        import hypergrad
        loaded = {name.partition(".")[0] for name in sys.modules}
        others = loaded - allowed - sys.stdlib_module_names
        assert others == {"hypergrad"}, others
    """
    run_python(code, env={"PYTHONWARNINGS": "error"})


def test_the_package_and_the_readme_begin_with_the_same_example():
    readme = (ROOT.parent / "README.md").read_text()
    block = readme.split("```python\n")[1].split("```")[0]
    examples = doctest.DocTestParser().get_examples(hg.__doc__)
    statements = lambda source: [ast.dump(node) for node in ast.parse(source).body]
    expected = statements("".join(example.source for example in examples))
    # The last statement shows the result.
    assert statements(block)[:-1] == expected[:-1]


def test_the_api_page_lists_every_task():
    page = (ROOT.parent / "docs/api.md").read_text()
    tasks = [f"hypergrad.tasks.{name}.make" for name in hg.tasks.TASKS]
    assert not [task for task in tasks if f"\n::: {task}\n" not in page]
