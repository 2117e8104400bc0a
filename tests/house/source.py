"""The source files of the package and what they define, bind and import."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import hypergrad as hg

ROOT = Path(hg.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
Definition = ast.FunctionDef | ast.ClassDef


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def definitions(path: Path) -> Iterator[Definition]:
    """Yields the functions and classes of a file, nested ones included."""
    for node in ast.walk(parse(path)):
        if isinstance(node, Definition):
            yield node


def bindings(path: Path) -> Iterator[tuple[str, int]]:
    """Yields the names that a file binds, without leading underscores, and lines."""
    for node in ast.walk(parse(path)):
        match node:
            case ast.Name(id=name, ctx=ast.Store()):
                yield name.lstrip("_"), node.lineno
            case ast.arg(arg=name):
                yield name.lstrip("_"), node.lineno
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name.lstrip("_"), node.lineno
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)):
                yield name.lstrip("_"), node.lineno


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


@functools.cache
def imports(path: Path) -> set[str]:
    """Returns the modules of the package that a file imports at run time."""
    package = path.relative_to(ROOT.parent).parts[:-1]
    names = set()
    for node in _run_time_nodes(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*prefix, *filter(None, [node.module])])
            for alias in node.names:
                name = f"{module}.{alias.name}"
                names.add(name if name in MODULES else module)
    return (names & MODULES.keys()) - {module_name(path)}


def _run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yields all nodes except those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield child
            yield from _run_time_nodes(child)
