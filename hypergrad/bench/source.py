"""Digests of the source files that determine the rows of a table."""

import ast
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import hypergrad


def digest_sources(table_file: Path) -> dict[str, str]:
    """Returns digests of the package, and of a table with the files that it imports."""
    return {"package": digest_package(), "table": digest_imports(table_file)}


def digest_package() -> str:
    """Returns the digest of the files of hypergrad."""
    package = Path(hypergrad.__file__).parent
    return digest_files(package_files(package), package)


def digest_imports(path: Path) -> str:
    """Returns the digest of a file of a table or method and of its `local_imports`."""
    path = path.resolve()
    return digest_files(sorted(local_imports(path)), package_root(path))


def package_root(path: Path) -> Path:
    """Returns the outermost package of a file, or its folder if it is in none."""
    root = path.parent
    while (root / "__init__.py").is_file() and (root.parent / "__init__.py").is_file():
        root = root.parent
    return root


def package_files(package: Path) -> list[Path]:
    """Returns the files of the package that may determine a row: code and data."""
    return sorted(
        path
        for path in package.rglob("*")
        if path.suffix in (".py", ".json", ".jsonl") and path.is_file()
    )


def digest_files(paths: Sequence[Path], root: Path) -> str:
    """Returns 16 hexadecimal digits for names and contents of files.

    Args:
      paths: Files in `root`, or links in it.
      root: The folder to which the names are relative.
    """
    sha256 = hashlib.sha256()
    for path in paths:
        sha256.update(path.relative_to(root).as_posix().encode())
        sha256.update(path.read_bytes())
    return sha256.hexdigest()[:16]


def local_imports(path: Path) -> set[Path]:
    """Returns a file and all files that it imports from its folder or package.

    Indirect imports count, and so does each ``__init__.py`` with code that runs before.
    Packages are those of Python: folders with an ``__init__.py``.
    """
    folder, files, pending = package_root(path), {path}, [path]
    # `import benchmarks.x` starts above the folder if the folder is a package.
    roots = tuple(dict.fromkeys((path.parent, folder, folder.parent)))
    while pending:
        file = pending.pop()
        for imported in (*_imports_of(file, folder, roots), *_init_files(file, folder)):
            if imported not in files:
                files.add(imported)
                pending.append(imported)
    return files


def _init_files(path: Path, root: Path) -> Iterator[Path]:
    """Yields each ``__init__.py`` above a file that has more than a docstring."""
    for folder in path.parents:
        file = folder / "__init__.py"
        is_inside = folder.is_relative_to(root) and file.is_file()
        if is_inside and _has_code(file.read_bytes()):
            yield file


def _imports_of(path: Path, folder: Path, roots: Sequence[Path]) -> Iterator[Path]:
    """Yields the files in a folder that one file names in its import statements.

    Args:
      path: The file.
      folder: The folder, at any depth.
      roots: Where names that are not relative are looked up.
    """
    for level, names in _import_statements(path.read_bytes()):
        for base in (path.parents[level - 1],) if level else roots:
            for name in names:
                path_stem = base.joinpath(*filter(None, name.split(".")))
                for file in (path_stem.with_suffix(".py"), path_stem / "__init__.py"):
                    if file.is_file() and file.is_relative_to(folder):
                        yield file


@functools.cache
def _import_statements(content: bytes) -> list[tuple[int, list[str]]]:
    """Returns the number of leading dots and the names of each import statement."""
    statements = []
    for node in ast.walk(_parse(content)):
        if isinstance(node, ast.Import):
            statements.append((0, [alias.name for alias in node.names]))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module, *(f"{module}.{x.name}" for x in node.names)]
            statements.append((node.level, names))
    return statements


@functools.cache
def _has_code(content: bytes) -> bool:
    """Returns whether a file has more than a docstring."""
    return not all(
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        for statement in _parse(content).body
    )


def _parse(content: bytes) -> ast.Module:
    """Returns the statements of a file; none if it is not valid Python."""
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError):
        return ast.Module([], [])
