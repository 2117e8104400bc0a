"""Digests of the source files that determine the rows of a table."""

import ast
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import hypergrad


def digest_sources(table_file: Path) -> dict[str, str]:
    """Returns digests of the package, and of a table with the files that it imports.

    Files count as imported by a table if they lie in its folder or below.
    """
    package = Path(hypergrad.__file__).parent
    files = sorted(local_imports(table_file.resolve()))
    return {
        "package": digest_files(package_files(package), package),
        "table": digest_files(files, table_file.resolve().parent),
    }


def package_files(package: Path) -> list[Path]:
    """Returns the files of the package that may determine a row: code and data."""
    return sorted(
        path
        for path in package.rglob("*")
        if path.suffix in (".py", ".json", ".jsonl") and path.is_file()
    )


def digest_files(paths: Sequence[Path], root: Path) -> str:
    """Returns 16 hexadecimal digits for names and contents of files."""
    sha256 = hashlib.sha256()
    for path in paths:
        sha256.update(path.resolve().relative_to(root.resolve()).as_posix().encode())
        sha256.update(path.read_bytes())
    return sha256.hexdigest()[:16]


def local_imports(path: Path) -> set[Path]:
    """Returns a file and all files of its folder that it imports, also indirectly."""
    folder, files, pending = path.parent, {path}, [path]
    while pending:
        for file in _imports_of(pending.pop(), folder):
            if file not in files:
                files.add(file)
                pending.append(file)
    return files


def _imports_of(path: Path, folder: Path) -> Iterator[Path]:
    """Yields the files in a folder that one file names in its import statements."""
    # `import benchmarks.x` starts above the folder if the folder is a package.
    roots = (folder, folder.parent)
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names, bases = [alias.name for alias in node.names], roots
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module, *(f"{module}.{x.name}" for x in node.names)]
            parent = path.parents[node.level - 1] if node.level else None
            bases = roots if parent is None else (parent,)
        else:
            continue
        for base in bases:
            for name in names:
                path_stem = base.joinpath(*filter(None, name.split(".")))
                for file in (path_stem.with_suffix(".py"), path_stem / "__init__.py"):
                    if file.is_file() and file.is_relative_to(folder):
                        yield file
