"""Limits of size, and the direction of imports."""

import ast
import graphlib
import importlib
import inspect
import tomllib
from typing import Protocol

import hypergrad as hg
from tests.house.source import (
    FILES,
    MODULES,
    ROOT,
    definitions,
    imports,
    module_name,
    parse,
)

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 450, 80, 12
#: Functions whose docstrings are too long, with their present length.
LONG_FUNCTIONS = {
    "tasks.few_shot.make": 86,
}
#: Classes that only the library instantiates.
RESULTS = {"Certificate", "Estimate", "Trace"}
#: A module imports from its own layer and the layers before it. A module that is in no
#: layer, such as `cost`, imports neither tasks nor what follows them.
LAYERS = (
    {"products"},
    {"batches", "jaxprs"},
    {"problem"},
    {"checks"},
    {"linear"},
    {"inner"},
    {"estimators", "argmin", "certificate", "implicit"},
    {"minimize", "outer_loop", "search", "searchers", "trials", "objectives"},
    {"tasks"},
    {"bench"},
    {"cli", "__main__"},
)


def top_level_name(module: str) -> str:
    """Returns ``linear`` for ``hypergrad.linear.cg``."""
    return [*module.split("."), ""][1]


def test_files_are_short():
    errors = [
        f"{path.relative_to(ROOT)} must have at most {MAX_FILE_LINES} lines; got {num}."
        for path in FILES
        if (num := len(path.read_text().splitlines())) > MAX_FILE_LINES
    ]
    assert not errors, "\n".join(errors)


def test_only_tested_operating_systems_are_named():
    """Locks of files need POSIX, and the tests run on Linux."""
    metadata = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    prefix = "Operating System :: "
    systems = [x for x in metadata["classifiers"] if x.startswith(prefix)]
    assert systems == [f"{prefix}POSIX :: Linux"]


def test_functions_are_short():
    """The lines of a docstring count."""
    errors = []
    for path in FILES:
        for node in definitions(path):
            name = f"{module_name(path)}.{node.name}".removeprefix("hypergrad.")
            limit = LONG_FUNCTIONS.get(name, MAX_FUNCTION_LINES)
            num_lines = node.end_lineno - node.lineno + 1
            if isinstance(node, ast.FunctionDef) and num_lines > limit:
                errors.append(
                    f"{name} must have at most {limit} lines; got {num_lines}."
                )
    assert not errors, "\n".join(errors)


def test_constructors_have_few_arguments():
    """Ruff checks the arguments of functions (PLR0913)."""
    public = (getattr(hg, name) for name in hg.__all__)
    modules = [hg, *filter(inspect.ismodule, public)]
    classes = {
        value
        for module in modules
        if module.__name__.startswith("hypergrad")
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__.startswith("hypergrad")
    }
    assert len(classes) > 50
    errors = [
        f"{cls.__name__} must have at most {MAX_ARGUMENTS} arguments; got {num}."
        for cls in classes
        if not (issubclass(cls, Exception) or Protocol in cls.__mro__)
        if cls.__name__ not in RESULTS
        if (num := len(inspect.signature(cls).parameters)) > MAX_ARGUMENTS
    ]
    assert not errors, "\n".join(errors)


def test_imports_have_no_circle():
    """``static_order`` raises an error that names the modules of a circle."""
    graph = {module_name(path): imports(path) for path in FILES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


def test_imports_follow_the_layers():
    """products <- linear, inner <- estimators <- minimize, search <- tasks <- runs."""
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    last_core_rank = rank["tasks"] - 1
    errors = []
    for path in FILES:
        importer = top_level_name(module_name(path))
        for module in imports(path):
            imported = top_level_name(module)
            if rank.get(imported, -1) > rank.get(importer, last_core_rank):
                errors.append(f"{path.relative_to(ROOT)} must not import {module}.")
    assert not errors, "\n".join(errors)


def test_estimators_and_solvers_are_not_distinguished_by_class():
    """No estimator and no outer loop checks the class of a solver or an estimator."""
    public = {name for name in hg.__all__ if inspect.isclass(getattr(hg, name))}
    loops = {"estimators", "minimize", "outer_loop", "searchers", "search", "trials"}
    errors = [
        f"{path.relative_to(ROOT)}:{node.lineno} must not depend on {sorted(names)}."
        for path in FILES
        if top_level_name(module_name(path)) in loops
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
        if (names := public & {getattr(x, "id", "") for x in ast.walk(node.args[1])})
    ]
    assert not errors, "\n".join(errors)


def test_names_that_tables_and_tests_import_exist():
    """They are read and not run, as some need packages that are not installed."""
    # This file imports another library of the same name.
    files = {
        path
        for folder in ("benchmarks", "tests", "docs")
        for path in (ROOT.parent / folder).rglob("*.py")
        if path.name != "moskomule.py"
    }
    nodes = [node for path in files for node in ast.walk(parse(path))]
    names = {
        (node.module, alias.name)
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if node.module.split(".")[0] == "hypergrad"
    }
    assert len(names) > 100
    errors = [
        f"{module} has no {name}"
        for module, name in sorted(names)
        if not hasattr(importlib.import_module(module), name)
        and f"{module}.{name}" not in MODULES
    ]
    assert not errors
