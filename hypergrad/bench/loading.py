"""Finding and importing tables and methods from files, without any registration."""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import hypergrad

from .methods import Method, MethodError, check_method
from .source import digest_imports, package_root
from .table import BaseTable, Table

FOLDER = Path("benchmarks")
#: Attribute of a module that `import_file` has imported: its digest at that time.
DIGEST = "__hypergrad_digest__"


class LoadError(ValueError):
    """The file of a table or of a method cannot be loaded."""


@dataclass(frozen=True)
class TableRef:
    """A table by its file, with further methods; a worker process loads it again.

    Attributes:
      path: The file that defines ``table``.
      methods: Further methods as ``(file, function)``.
      budget: Replaces the budget of the table.
    """

    path: Path
    methods: tuple[tuple[Path, str], ...] = ()
    budget: float | None = None

    @property
    def name(self) -> str:
        """The name of the table: that of its file."""
        return self.path.stem

    def load(self) -> BaseTable:
        """Imports the table and adds the methods.

        Raises:
          ValueError: The file has no table, or methods are given for a table that does
            not compare methods.
        """
        table = load_table(self.path)
        if not self.methods and self.budget is None:
            return table
        if not isinstance(table, Table):
            raise ValueError(
                f"{self.name} measures fixed programs; it takes no --method and no "
                "--budget. `hypergrad list` names the tables that do."
            )
        if self.budget is not None:
            table = dataclasses.replace(table, budget=self.budget)
        labels = [function for _, function in self.methods]
        if len(set(labels)) < len(labels):
            raise ValueError(
                f"--method must name different functions; got {', '.join(labels)}."
            )
        return table.with_methods(
            {function: load_method(file, function) for file, function in self.methods}
        )

    def method_sources(self) -> dict[str, str]:
        """Returns the digest of the files of each added method, by its label."""
        return {function: digest_imports(file) for file, function in self.methods}


def parse_method(text: str) -> tuple[Path, str]:
    """Returns file and function of ``mine.py:mine``.

    Raises:
      ValueError: The text has another form, or there is no such file.
    """
    file, separator, function = text.rpartition(":")
    if not (separator and file.endswith(".py") and function.isidentifier()):
        raise ValueError(f"--method must be FILE.py:FUNCTION; got {text!r}.")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--method names the file {file}, which does not exist.")
    return path.resolve(), function


def find_table(name: str, folder: Path = FOLDER) -> Path:
    """Returns the file of a table by its name or path.

    Args:
      name: ``NAME`` for ``folder/NAME.py``, or the path of a file.
      folder: Where tables are looked up by name.

    Raises:
      ValueError: There is no such table; the message has similar names, or all.
    """
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        return path.resolve()
    candidate = folder / f"{name}.py"
    if candidate.is_file():
        return candidate.resolve()
    if path.suffix == ".py":
        raise ValueError(_missing_file(path))
    names = [path.stem for path in table_files(folder)]
    close = difflib.get_close_matches(name, names)
    content = f"{folder} holds {', '.join(names) or 'no table'}"
    if close:
        content = f"did you mean {' or '.join(close)}"
    if not folder.is_dir():
        content = f"there is no folder {folder}"
    raise ValueError(
        f"no table {name!r}: {content}, seen from {Path.cwd()}. Call from the folder "
        f"above {folder}, such as a clone of hypergrad, or give the path of a file "
        "that defines `table`."
    )


def _missing_file(path: Path) -> str:
    """Returns that a file of a table does not exist, with similar names."""
    if not path.parent.is_dir():
        content = f"there is no folder {path.parent}"
    else:
        names = [file.name for file in table_files(path.parent)]
        close = difflib.get_close_matches(path.name, names)
        content = f"its folder holds {', '.join(names) or 'no table'}"
        if close:
            content = f"did you mean {' or '.join(close)}"
    return f"no file {path}: {content}, seen from {Path.cwd()}."


def table_files(folder: Path = FOLDER) -> list[Path]:
    """Returns the files of a folder that define a table, by their text."""
    return [
        path
        for path in sorted(folder.glob("*.py"))
        if path.is_file() and _defines_table(path)
    ]


def _defines_table(path: Path) -> bool:
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    return any(line.startswith("table = ") for line in lines)


def load_table(path: Path) -> BaseTable:
    """Returns ``table`` of a file, with the file's docstring as its protocol."""
    module = import_file(path)
    table = getattr(module, "table", None)
    if not isinstance(table, BaseTable):
        raise ValueError(f"{path} must define `table = hypergrad.bench.Table(...)`.")
    if not table.protocol:
        protocol = (module.__doc__ or "").strip()
        table = dataclasses.replace(table, protocol=protocol)
    if isinstance(table, Table):
        for label, method in table.methods.items():
            check_method(label, method)
    _check_labels(path, table)
    _check_columns(path, table)
    return table


def load_listed_table(path: Path) -> BaseTable:
    """Returns the table of a file that is one of several.

    Raises:
      LoadError: The file has no table or its code failed, by whatever error.
    """
    with locate_errors(path):
        return load_table(path)


@contextlib.contextmanager
def locate_errors(path: Path) -> Iterator[None]:
    """Raises a LoadError with file and line for any error of the code of a file."""
    try:
        yield
    except LoadError:
        raise
    except ModuleNotFoundError as error:
        raise LoadError(
            f"{path} needs {error.name}, which is not installed: {error} in "
            f"{error_position(error)}"
        ) from error
    except (Exception, SystemExit) as error:
        raise LoadError(
            f"{path} cannot be imported: {type(error).__name__} in "
            f"{error_position(error)}: {error}"
        ) from error


def error_position(error: BaseException) -> str:
    """Returns file and line of the innermost frame outside of installed packages."""
    frames = traceback.extract_tb(error.__traceback__)
    package = str(Path(hypergrad.__file__).parent)
    is_own = lambda frame: (
        not ("site-packages" in frame.filename or frame.filename.startswith(package))
    )
    frame = next((x for x in reversed(frames) if is_own(x)), frames[-1])
    return f"{Path(frame.filename).name}, line {frame.lineno}"


def _check_labels(path: Path, table: BaseTable) -> None:
    """Raises ValueError if a claim names a row that the table does not have."""
    labels = {cell["method"] for cell in table.stages(table.scales[0], 1)[-1]}
    named = {x for claim in table.claims for x in (claim.method, claim.baseline)}
    named |= {x for pair in table.comparisons for x in (pair.method, *pair.baselines)}
    if unknown := named - labels:
        raise ValueError(
            f"claims of {path.name} name {', '.join(sorted(unknown))}; its rows are "
            f"{', '.join(sorted(map(str, labels)))}."
        )


def _check_columns(path: Path, table: BaseTable) -> None:
    """Raises ValueError if a published number is of a column that is not printed."""
    names = {column.name for column in table.printed_columns}
    if unknown := {column for _, column in table.published} - names:
        raise ValueError(
            f"published numbers of {path.name} name the columns "
            f"{', '.join(sorted(unknown))}; its columns are {', '.join(sorted(names))}."
        )


def load_method(path: Path, function: str) -> Method:
    """Returns a checked method of a user's file."""
    module = import_file(path)
    method = getattr(module, function, None)
    if method is None:
        names = [name for name, x in vars(module).items() if hasattr(x, "grid")]
        raise MethodError(
            f"{path.name} has no function {function!r}"
            + (f"; it has {', '.join(names)}" if names else "")
            + "."
        )
    check_method(function, method)
    if getattr(method, "splits", ()):
        raise MethodError(
            f"{function}.splits must not be set, because a method of your own gets the "
            "same splits as those that it is compared with. Only a table gives an "
            "oracle further ones."
        )
    return method


def import_file(path: Path) -> ModuleType:
    """Imports a Python file once per process.

    A file in a package, that is beside an ``__init__.py``, is imported as a member of
    the package, so that it can import its neighbors relatively.

    The module keeps the digest of the file and of what it imports, see
    `imported_digest`.

    Raises:
      LoadError: The code of the file failed, or its package is hidden by another one of
        the same name.
    """
    path = path.resolve()
    root = package_root(path)
    is_in_package = (root / "__init__.py").is_file()
    if is_in_package:
        root = root.parent
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    module = sys.modules.get(name)
    if module is None or Path(module.__file__ or "").resolve() != path:
        # A name of its own, so that a file called like a library does not hide it.
        suffix = hashlib.sha256(str(path).encode()).hexdigest()[:8]
        name = name if is_in_package else f"{path.stem}_{suffix}"
        module = None if is_in_package else sys.modules.get(name)
    if module is not None and hasattr(module, DIGEST):
        return module
    with locate_errors(path):
        digest = digest_imports(path)
    if module is None:
        make = _import_member if is_in_package else _import_alone
        module = make(path, root, name)
    setattr(module, DIGEST, digest)
    return module


def imported_digest(path: Path) -> str:
    """Returns the digest that a file of a table or method had when it was imported."""
    return getattr(import_file(path), DIGEST)


def _import_member(path: Path, root: Path, name: str) -> ModuleType:
    """Imports a file of a package by the name of its module."""
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    with locate_errors(path):
        module = importlib.import_module(name)
    if Path(module.__file__ or "").resolve() != path:
        raise LoadError(
            f"{path} is the module {name}, but this name belongs to "
            f"{module.__file__}. Rename one of the two packages."
        )
    return module


def _import_alone(path: Path, root: Path, name: str) -> ModuleType:
    """Imports a file that is in no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        with locate_errors(path):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
