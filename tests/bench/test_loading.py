"""Files of tables and methods: what is imported, and what a message names."""

import sys
from pathlib import Path

import pytest

from hypergrad.bench import loading


def write_package(folder: Path, text: str) -> Path:
    """Writes a package ``tables_of_mine`` with one file, and returns the file."""
    package = folder / "tables_of_mine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    file = package / "toy.py"
    file.write_text(text)
    return file


def test_a_file_of_a_package_whose_name_is_taken_is_refused(tmp_path, monkeypatch):
    """Its module would be that of the other file."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    file = write_package(tmp_path / "a", "value = 1\n")
    other = write_package(tmp_path / "b", "value = 2\n")
    assert loading.import_file(file).value == 1
    with pytest.raises(ValueError, match=r"tables_of_mine\.toy") as error:
        loading.import_file(other)
    assert str(file) in str(error.value)
    assert str(other) in str(error.value)
    assert loading.import_file(file).value == 1


@pytest.mark.parametrize("is_package", [False, True], ids=["file", "package"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nx.absent\n", r"AttributeError in toy.py, line 2: "),
        ("raise ValueError('too small')\n", "ValueError in toy.py, line 1: too small"),
        ("import sys\nsys.exit(3)\n", "SystemExit in toy.py, line 2: 3"),
        ("import absent_one\n", "needs absent_one, which is not .* toy.py, line 1"),
    ],
)
def test_an_error_of_the_code_of_a_file_names_its_line(
    tmp_path, monkeypatch, is_package, text, message
):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    file = tmp_path / "toy.py"
    file.write_text(text)
    if is_package:
        folder = tmp_path / f"unique_{abs(hash(text))}"
        folder.mkdir()
        (folder / "__init__.py").touch()
        file = file.rename(folder / "toy.py")
    for load in (loading.load_table, loading.load_listed_table):
        with pytest.raises(ValueError, match=f"toy.py.*{message}") as error:
            load(file)
        assert str(error.value).count(str(file)) == 1


def test_a_published_number_of_an_absent_column_is_refused(tmp_path):
    file = tmp_path / "toy.py"
    file.write_text(
        "from hypergrad.bench import Column, MeasurementTable, Published\n"
        "table = MeasurementTable(\n"
        "    cells=lambda scale, seeds: [{'method': 'a', 'seed': 0}],\n"
        "    measure_cell=lambda cell, rows: {'value': 1.0},\n"
        "    columns=(Column('value'),),\n"
        "    published={('a', 'valeu'): Published(1.0, 0.1, 'verified')},\n"
        ")\n"
    )
    with pytest.raises(ValueError, match=r"toy\.py name the columns valeu.*, value"):
        loading.load_table(file)
