"""Digests of source: which files count, and that they are those that were imported."""

from pathlib import Path

import pytest

from hypergrad.bench.source import digest_imports, local_imports


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    "statement",
    ["from ..common import x", "from .. import common", "import around.common"],
    ids=["from", "module", "absolute"],
)
def test_imports_from_a_parent_package_count(tmp_path, statement):
    folder = tmp_path / "around"
    files = {"__init__.py": "", "common.py": "x = 1\n", "inner/__init__.py": ""}
    write(folder, files | {"inner/mine.py": statement + "\n"})
    file = folder / "inner" / "mine.py"
    assert local_imports(file) >= {file, folder / "common.py"}
    old = digest_imports(file)
    (folder / "common.py").write_text("x = 2\n")
    assert digest_imports(file) != old


def test_the_code_of_packages_around_a_file_counts(tmp_path):
    folder = tmp_path / "around"
    write(folder, {"__init__.py": "x = 1\n", "inner/__init__.py": '"""Nothing."""\n'})
    write(folder, {"inner/mine.py": "y = 2\n", "inner/unused.py": ""})
    file = folder / "inner" / "mine.py"
    assert local_imports(file) == {file, folder / "__init__.py"}


def test_a_link_beside_a_method_counts_by_its_content(tmp_path):
    write(tmp_path, {"lib/helper.py": "x = 1\n", "mine/mine.py": "import helper\n"})
    (tmp_path / "mine" / "helper.py").symlink_to(tmp_path / "lib" / "helper.py")
    file = tmp_path / "mine" / "mine.py"
    old = digest_imports(file)
    (tmp_path / "lib" / "helper.py").write_text("x = 2\n")
    assert digest_imports(file) != old
