"""Loaders: what is bundled, what a user keeps, and what is not there."""

import hashlib
import os

import numpy as np
import pytest

import hypergrad as hg
from hypergrad import datasets as datasets


@pytest.mark.data
def test_reuters_is_what_its_source_says():
    """Sizes and positives of the training part; sparse rows that are in order."""
    if not os.environ.get(datasets.VARIABLE):
        pytest.skip(f"{datasets.VARIABLE} is not set")
    found = hg.datasets.load("reuters")
    starts, test = found["starts"], found["test"]
    assert (len(test), test.sum(), starts[0]) == (11_069, 3_299, 0)
    assert starts[-1] == len(found["columns"]) == len(found["values"])
    assert found["columns"].max() < 8315
    assert np.all(np.diff(starts) >= 0)
    assert abs(found["y"][~test].mean() - 0.069) < 5e-4
    assert set(found["y"]) == {0, 1}


@pytest.mark.data
def test_ijcnn1_is_what_its_source_says():
    """Sizes, and the share of positives in the training part."""
    if not os.environ.get(datasets.VARIABLE):
        pytest.skip(f"{datasets.VARIABLE} is not set")
    found = hg.datasets.load("ijcnn1")
    assert found["x"].shape == (141_691, 22)
    assert found["test"].sum() == 91_701
    assert abs(found["y"][~found["test"]].mean() - 0.0971) < 5e-5
    assert set(found["y"]) == {0, 1}


@pytest.mark.data
def test_mnist_is_what_its_source_says():
    """Sizes, the mean pixel, and the classes of the first and the test images."""
    if not os.environ.get(datasets.VARIABLE):
        pytest.skip(f"{datasets.VARIABLE} is not set")
    found = hg.datasets.load("mnist")
    assert found["x"].shape == (70_000, 784)
    assert (found["test"].sum(), found["test"][59_999]) == (10_000, False)
    assert found["y"][:5].tolist() == [5, 0, 4, 1, 9]
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(found["y"][found["test"]]).tolist() == counts
    mean = found["x"][~found["test"]].mean(dtype=float)
    assert abs(255 * mean - 33.3184) < 1e-3


def test_breast_cancer_is_scikit_learns():
    """569 by 30, of which 357 are benign."""
    found = hg.datasets.load("breast_cancer")
    assert (found["x"].shape, found["y"].sum()) == ((569, 30), 357)


def test_sparse_text_is_read_as_written():
    """Indices count from 1 in the file, from 0 in the arrays; labels are -1 and 1."""
    found = datasets._svmlight(b"-1 1:0.5 3:2\n+1 2:1.5\n", 3)
    dense = np.zeros((2, 3))
    for row, (start, end) in enumerate(
        zip(found["starts"][:-1], found["starts"][1:], strict=True)
    ):
        dense[row, found["columns"][start:end]] = found["values"][start:end]
    assert dense.tolist() == [[0.5, 0, 2], [0, 1.5, 0]]
    assert found["y"].tolist() == [0, 1]


def test_files_that_are_not_there_are_named(tmp_path, monkeypatch):
    """With what to put where, and what to set."""
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=datasets.VARIABLE):
        hg.datasets.load("reuters")
    with pytest.raises(FileNotFoundError, match=r"reuters\.trn\.bz2 is missing"):
        hg.datasets.load("reuters", tmp_path)
    monkeypatch.setenv(datasets.VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        hg.datasets.load("reuters")


def test_another_file_is_refused_before_it_is_read(tmp_path):
    """By its SHA-256: what is in it is no svmlight, and never parsed."""
    (tmp_path / "reuters").mkdir()
    for name in datasets.REUTERS:
        (tmp_path / "reuters" / name).write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(ValueError, match=f"SHA-256 {found}"):
        hg.datasets.load("reuters", tmp_path)


def test_an_unknown_name_is_refused():
    """With those that are known."""
    with pytest.raises(ValueError, match="digits"):
        hg.datasets.load("digit")
