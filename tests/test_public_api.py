"""What the package promises as a whole: names, docstrings, imports, house rules."""

import ast
import doctest
import functools
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import lineax as lx
import optax
import optimistix as optx
import pytest

import hypergrad as hg

ROOT = Path(hg.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PUBLIC = [name for name in hg.__all__ if not inspect.ismodule(getattr(hg, name))]
CONTRACT = {
    "Bilevel", "Batches", "Descent", "LBFGS", "Newton", "ClosedForm", "from_jaxopt",
    "from_optimistix", "Estimate", "Implicit", "Unrolled", "CG", "Neumann", "Nystrom",
    "NystromCG", "Identity", "hypergradient", "minimize", "search", "Trace", "argmin",
    "citation", "cost", "testing", "spaces", "tasks", "certify", "Certificate",
    "Forward", "FixedPoint", "FiniteDifference", "Penalty", "Evolution",
    "PersistentEvolution", "surrogates", "objectives",
}  # fmt: skip


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imported(path: Path) -> set[str]:
    """Absolute names of all modules and names that a file imports, at any depth."""
    package = ["hypergrad", *path.relative_to(ROOT).with_suffix("").parts][:-1]
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            names.add(module)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def attributes(path: Path) -> set[str]:
    """Dotted names such as ``jax.config`` that a file uses, imports resolved."""
    found, aliases = set(), {}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            aliases |= {a.asname or a.name: a.name for a in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level:
            aliases |= {
                a.asname or a.name: f"{node.module}.{a.name}" for a in node.names
            }
    for node in ast.walk(tree_of(path)):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            parts.append(aliases.get(node.id, node.id))
            found.add(".".join(reversed(parts)))
    return found


# Names and docstrings.


def test_all_names_exist():
    """`__all__` has no repetition and nothing that is not there."""
    assert len(set(hg.__all__)) == len(hg.__all__)
    for name in hg.__all__:
        assert hasattr(hg, name), name


def test_the_contract_is_public():
    """The names that others rely on."""
    assert set(hg.__all__) >= CONTRACT


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_object_has_a_docstring_with_a_doctest(name: str):
    """Its own, not one inherited; a protocol has nothing to run."""
    thing = getattr(hg, name)
    own = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert own, f"{name} has no docstring"
    protocol = inspect.isclass(thing) and Protocol in thing.__mro__[1:]
    if not protocol:
        assert ">>> " in own, f"{name} has no doctest"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_method_has_a_docstring(name: str):
    """Methods and properties without an underscore, written in this package."""
    thing = getattr(hg, name)
    if not inspect.isclass(thing):
        return
    for method, value in vars(thing).items():
        function = value.fget if isinstance(value, property) else value
        if method.startswith("_") or not inspect.isfunction(function):
            continue
        if not function.__module__.startswith("hypergrad"):
            continue
        assert function.__doc__, f"{name}.{method} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_says_what_it_is(path: Path):
    """A docstring at the top of each file."""
    assert ast.get_docstring(tree_of(path)), name_of(path)


# Citations.

SOLVER = hg.Descent(optax.sgd(0.1), 1)
CITED = {
    "Implicit": hg.Implicit(SOLVER),
    "Unrolled": hg.Unrolled(SOLVER),
    "Descent": SOLVER,
    "Newton": hg.Newton(),
    "LBFGS": hg.LBFGS(),
    "from_optimistix": hg.from_optimistix(optx.BFGS(rtol=1e-6, atol=1e-6)),
    "CG": hg.CG(),
    "Neumann": hg.Neumann(5),
    "Nystrom": hg.Nystrom(5),
    "NystromCG": hg.NystromCG(5),
    "Identity": hg.Identity(),
    "Forward": hg.Forward(SOLVER),
    "FixedPoint": hg.FixedPoint(SOLVER, 1),
    "FiniteDifference": hg.FiniteDifference(SOLVER),
    "Penalty": hg.Penalty(SOLVER, 1.0),
    "Evolution": hg.Evolution(SOLVER),
    "PersistentEvolution": hg.PersistentEvolution(SOLVER),
    "Reversible": hg.Reversible(0.1, 0.9, 1),
    "SOBA": hg.SOBA(optax.sgd(0.1)),
    "SABA": hg.SABA(optax.sgd(0.1)),
    "SRBA": hg.SRBA(optax.sgd(0.1), 5),
    "FSLA": hg.FSLA(optax.sgd(0.1)),
    "StocBiO": hg.StocBiO(optax.sgd(0.1), 1, 1, step_size=0.1),
    "AmIGO": hg.AmIGO(optax.sgd(0.1), 1, 1),
    "TTSA": hg.TTSA(optax.sgd(0.1), 1, step_size=0.1),
    "MRBO": hg.MRBO(optax.sgd(0.1), 1, step_size=0.1),
    "SUSTAIN": hg.SUSTAIN(optax.sgd(0.1), 1, step_size=0.1),
    "VRBO": hg.VRBO(optax.sgd(0.1), 1, 1, period=5, step_size=0.1),
    "F2SA": hg.F2SA(optax.sgd(0.1), 1, penalty=1.0),
    "BOME": hg.BOME(optax.sgd(0.1), 1, step_size=0.1),
    "PZOBO": hg.PZOBO(optax.sgd(0.1), 1, 1),
    "DARTS": hg.DARTS(optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", CITED)
def test_every_method_carries_citations_that_resolve(name: str):
    """Each key that it carries is an entry of what hg.citation prints."""
    thing = CITED[name]
    assert isinstance(type(thing).citations, tuple)
    assert type(thing).citations
    text = hg.citation(thing)
    for key in type(thing).citations:
        assert f"{{{key}," in text


def test_no_method_is_left_out_above():
    """Every public class with a solve, compute or estimate, but formulas and means."""
    methods = {
        name
        for name in PUBLIC
        if inspect.isclass(getattr(hg, name))
        and Protocol not in getattr(hg, name).__mro__[1:]
        and any(
            hasattr(getattr(hg, name), method)
            for method in ("solve", "compute", "estimate")
        )
    }
    assert methods - {"Average", "ClosedForm", "CentralDifference"} <= set(CITED)


def test_a_combination_cites_its_parts():
    """An estimator with a linear solver of ours and one of lineax's."""
    text = hg.citation(hg.Implicit(SOLVER, hg.Neumann(3)))
    assert all(key in text for key in ("{pedregosa2016,", "{lorraine2020,"))
    assert "{lineax2023," in hg.citation(hg.Implicit(SOLVER, lx.LU()))


# Imports.


def test_importing_loads_no_optional_package():
    """In a fresh process; warnings are errors, so jaxopt's would be seen too."""
    code = (
        "import sys, hypergrad; heavy = {'jaxopt', 'optimistix', 'matplotlib', "
        "'sklearn', 'flax', 'chex', 'rich', 'tyro', 'optuna', 'cmaes', 'evosax', "
        "'codecarbon', 'submitit'}; "
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {"jaxopt", "optimistix", "matplotlib"}
    assert not loaded, f"loaded without need: {loaded}"


OUTSIDE = (
    *("tasks", "studies", "runs", "terminal.py", "cli.py", "plots.py"),
    *("__init__.py", "__main__.py"),
)
CORE = [path for path in FILES if path.relative_to(ROOT).parts[0] not in OUTSIDE]


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_imports_no_task_and_no_command_line(path: Path):
    """Arrows run one way."""
    for outside in ("tasks", "studies", "runs", "terminal", "cli", "plots"):
        name = f"hypergrad.{outside}"
        assert not any(
            found == name or found.startswith(f"{name}.") for found in imported(path)
        ), f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_imports_the_command_line(path: Path):
    """Not even the package itself."""
    if path.name != "__main__.py":
        assert "hypergrad.cli" not in imported(path)


# Arrows within the core: a module may import those before it, never those after.
LAYERS = [
    {"products", "spaces", "trees", "citation", "data", "guide", "shown"},
    {"problem"},
    {"cost", "checks"},
    {"linear", "surrogates"},
    {"inner"},
    {"estimators", "argmin"},
    {"gradient", "trace"},
    {"minimize", "searchers"},
    {"search", "testing", "choose", "objectives"},
]


def test_the_core_is_layered():
    """products <- inner, linear <- estimators <- minimize, search; others between."""
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in CORE:
        mine = path.relative_to(ROOT).with_suffix("").parts[0]
        for found in imported(path):
            package, _, rest = found.partition(".")
            theirs = rest.partition(".")[0]
            if package == "hypergrad" and {mine, theirs} <= set(level):
                message = f"{name_of(path)} imports hypergrad.{theirs}"
                assert level[theirs] <= level[mine], message


# House rules.

SECOND = {"jax.jvp", "jax.hessian", "jax.linearize", "jax.jacfwd", "jax.jacrev"}
SECOND |= {"jax.experimental.jet.jet", "jax.jacobian", "jax.linear_transpose"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_second_derivatives_come_from_products_only(path: Path):
    """jax.jvp (of a jax.grad), jax.hessian and the like, under any alias.

    A differential equation has derivatives too, of a network by its inputs.
    """
    used = attributes(path) & SECOND
    if path in (ROOT / "products.py", ROOT / "tasks/physics.py"):
        assert "jax.jvp" in used
    else:
        assert not used, f"{name_of(path)} uses {sorted(used)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_jax_configuration_is_left_alone(path: Path):
    """No jax.config, no environment, no warning filters, no seeds of NumPy's."""
    if path.name in ("cli.py", "__main__.py"):
        return
    forbidden = (
        *("jax.config", "os.environ", "os.putenv", "numpy.random.seed"),
        *("warnings.simplefilter", "warnings.filterwarnings", "logging.basicConfig"),
    )
    for name in attributes(path):
        assert not name.startswith(forbidden), f"{name_of(path)} uses {name}"


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_neither_prints_nor_calls_back_to_the_host(path: Path):
    """print, jax.debug, pure_callback and io_callback."""
    names = attributes(path)
    calls = {
        node.func.id
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "print" not in calls
    names = {name for name in names if name.startswith("jax")}
    assert not any("callback" in name or name.startswith("jax.debug") for name in names)


LOOPS = ("estimators", "minimize.py", "searchers", "search.py")


def test_estimators_and_solvers_are_not_told_apart_by_class():
    """No isinstance on our own classes in the estimators and outer loops."""
    ours = {name for name in PUBLIC if inspect.isclass(getattr(hg, name))}
    for path in CORE:
        if path.relative_to(ROOT).parts[0] not in LOOPS:
            continue
        for node in ast.walk(tree_of(path)):
            called = isinstance(node, ast.Call) and getattr(node.func, "id", "")
            if called == "isinstance":
                named = {
                    n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)
                }
                assert not named & ours, (
                    f"{name_of(path)}: isinstance of {named & ours}"
                )


def test_the_first_example_is_short():
    """The module docstring is the example; it ends with the promise of no change."""
    assert hg.__doc__.count(">>> ") <= 15
    assert "minimize" in hg.__doc__
    assert isinstance(hg.__version__, str)


def test_estimate_and_trace_are_pytrees():
    """So that results pass through vmap, jit and tree.map."""
    known = hg.Estimate(jnp.zeros(()), jnp.ones(2), jnp.ones(3), {"a": jnp.zeros(())})
    assert len(jax.tree.leaves(known)) == 4


def test_the_example_in_the_readme_is_the_doctest():
    """The same statements, apart from the last, which shows."""
    readme = (ROOT.parent / "README.md").read_text()
    block = readme.split("```python\n")[1].split("```")[0]
    examples = doctest.DocTestParser().get_examples(hg.__doc__)
    statements = lambda source: [ast.dump(node) for node in ast.parse(source).body]
    expected = statements("".join(example.source for example in examples))
    assert statements(block)[:-1] == expected[:-1]


def test_results_print_their_scalars():
    """Numbers, not the shapes of numbers; larger arrays by shape, and under jit all."""
    inner = lambda w, alpha, batch: 0.5 * (w - alpha) ** 2
    problem = hg.Bilevel(inner, lambda w, alpha, batch: 0.5 * jnp.sum(w**2))
    certificate = hg.certify(problem, jnp.float32(1.5), jnp.float32(1.0))
    assert "error_estimate=0.5," in repr(certificate)
    assert "trusted=False" in repr(certificate)
    alpha = jnp.ones(3, jnp.float32)
    known = hg.Estimate(jnp.float32(2.0), alpha, alpha, {"trusted": jnp.array(True)})
    assert "value=2.0" in repr(known)
    assert "hypergradient=f32[3]" in repr(known)
    traced = []
    jax.jit(lambda x: traced.append(repr(hg.Estimate(x, x, x, {}))))(alpha[0])
    assert "value=f32[]" in traced[0]


def test_the_api_page_lists_every_task():
    """How each is made."""
    page = (ROOT.parent / "docs/api.md").read_text()
    for name in hg.tasks.TASKS:
        assert f"\n::: hypergrad.tasks.{name}.make\n" in page
