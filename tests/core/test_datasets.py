"""Loaders of bundled data sets and of files from outside the package."""

import bz2
import hashlib
import os

import numpy as np
import pytest

import hypergrad as hg
from hypergrad import datasets

needs_files = pytest.mark.skipif(
    not os.environ.get(datasets.VARIABLE), reason=f"{datasets.VARIABLE} is not set"
)


@needs_files
@pytest.mark.data
def test_reuters_has_the_documented_sizes():
    data = datasets.load("reuters")
    starts, test = data["starts"], data["test"]
    assert (len(test), test.sum(), starts[0]) == (11_069, 3_299, 0)
    assert starts[-1] == len(data["columns"]) == len(data["values"])
    assert data["columns"].max() < 8315
    assert np.all(np.diff(starts) >= 0)
    assert abs(data["y"][~test].mean() - 0.069) < 5e-4
    assert set(data["y"]) == {0, 1}


@needs_files
@pytest.mark.data
def test_newsgroups_has_the_documented_sizes():
    """Sizes of scikit-learn's fetch_20newsgroups, which has 130,107 words."""
    data = datasets.load("newsgroups")
    starts, test = data["starts"], data["test"]
    assert (len(test), test.sum(), starts[0]) == (18_846, 7_532, 0)
    assert not test[:11_314].any()
    assert starts[-1] == len(data["columns"]) == len(data["values"])
    assert data["columns"].max() == 130_107
    assert np.bincount(data["y"][~test])[[0, 10, 19]].tolist() == [480, 600, 377]


@needs_files
@pytest.mark.data
def test_ijcnn1_has_the_documented_sizes():
    data = datasets.load("ijcnn1")
    assert data["x"].shape == (141_691, 22)
    assert data["test"].sum() == 91_701
    assert abs(data["y"][~data["test"]].mean() - 0.0971) < 5e-5
    assert set(data["y"]) == {0, 1}


@needs_files
@pytest.mark.data
def test_mnist_has_the_documented_sizes_and_order():
    """Also the mean pixel, the first labels and the counts of the test labels."""
    data = datasets.load("mnist")
    assert data["x"].shape == (70_000, 784)
    assert (data["test"].sum(), data["test"][59_999]) == (10_000, False)
    assert data["y"][:5].tolist() == [5, 0, 4, 1, 9]
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(data["y"][data["test"]]).tolist() == counts
    mean = data["x"][~data["test"]].mean(dtype=float)
    assert abs(255 * mean - 33.3184) < 1e-3
    for is_test, images_md5, labels_md5 in MNIST_FILES:
        selected = data["test"] == is_test
        images = np.round(255 * data["x"][selected]).astype(np.uint8)
        count = len(images)
        assert idx_md5(0x803, (count, 28, 28), images) == images_md5
        assert idx_md5(0x801, (count,), data["y"][selected].astype(np.uint8)) == (
            labels_md5
        )


# MD5 of the decompressed files of LeCun, Cortes and Burges: images and labels.
MNIST_FILES = (
    (False, "6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624"),
    (True, "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"),
)


def idx_md5(magic: int, shape: tuple[int, ...], array: np.ndarray) -> str:
    """Returns the MD5 of an array in the format IDX: big-endian header, then bytes."""
    header = np.array([magic, *shape], ">i4").tobytes()
    return hashlib.md5(header + array.tobytes()).hexdigest()


@needs_files
@pytest.mark.data
def test_nas_bench_201_has_every_cell_once_and_the_published_maxima():
    """Dong & Yang 2020 print the accuracies of the best cells to two digits."""
    data = datasets.load("nas_bench_201")
    assert len(data) == 10
    assert len({tuple(cell) for cell in data["cells"].tolist()}) == 5**6
    maxima = {"cifar10": 94.37, "cifar100": 73.51, "imagenet16_120": 47.31}
    best = data["cells"][data["cifar10_test_200ep"].argmax()]
    assert best.tolist() == [3, 3, 3, 1, 3, 2]
    for name, maximum in maxima.items():
        assert abs(data[f"{name}_test_200ep"].max() - maximum) < 5e-3
        assert data[f"{name}_val_12ep"].shape == (5**6,)


def test_breast_cancer_is_that_of_scikit_learn():
    """357 of 569 tumors are benign."""
    data = datasets.load("breast_cancer")
    assert (data["x"].shape, data["y"].sum()) == ((569, 30), 357)


def test_sparse_text_becomes_compressed_rows():
    """Indices count from 1 in the file and from 0 in the arrays; labels are 0 and 1."""
    texts = (b"-1 1:0.5 3:2\n+1 2:1.5\n", b"+1 3:4\n")
    x, labels = datasets._parse_svmlight([bz2.compress(text) for text in texts], 3)
    assert x.toarray().tolist() == [[0.5, 0, 2], [0, 1.5, 0], [0, 0, 4]]
    assert labels["y"].tolist() == [0, 1, 1]
    assert labels["test"].tolist() == [False, False, True]
    rows = datasets._sparse_arrays(x)
    assert rows["values"].tolist() == [0.5, 2, 1.5, 4]
    assert rows["columns"].tolist() == [0, 2, 1, 2]
    assert rows["starts"].tolist() == [0, 2, 3, 4]


def test_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv(datasets.VARIABLE, raising=False)
    with pytest.raises(FileNotFoundError, match=datasets.VARIABLE):
        hg.datasets.load("reuters")
    with pytest.raises(FileNotFoundError, match=r"reuters\.trn\.bz2"):
        hg.datasets.load("reuters", tmp_path)
    monkeypatch.setenv(datasets.VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        hg.datasets.load("reuters")


def test_a_file_with_another_digest_is_not_parsed(tmp_path):
    content = b"something else"
    (tmp_path / "reuters").mkdir()
    for name in datasets.REUTERS:
        (tmp_path / "reuters" / name).write_bytes(content)
    with pytest.raises(ValueError, match=hashlib.sha256(content).hexdigest()):
        hg.datasets.load("reuters", tmp_path)


def test_an_archive_is_known_by_its_arrays_and_not_by_its_compression(
    tmp_path, monkeypatch
):
    """Other dtypes and another order of the arrays are the same data."""
    images, labels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2), np.arange(3)
    content = images.tobytes() + labels.astype(np.uint8).tobytes()
    archive = datasets.MNIST._replace(
        arrays={"x": ("uint8", (3, 2, 2)), "y": ("uint8", (3,))},
        digest=hashlib.sha256(content).hexdigest(),
    )
    path = tmp_path / "mnist" / "mnist.npz"
    path.parent.mkdir()
    for save in (np.savez, np.savez_compressed):
        save(path, y=labels, names=np.array(["a"]), x=images)
        for actual, expected in zip(
            archive.read("mnist", tmp_path), (images, labels), strict=True
        ):
            np.testing.assert_array_equal(actual, expected)
    np.savez(path, x=images, y=labels[::-1])
    with pytest.raises(ValueError, match="SHA-256"):
        archive.read("mnist", tmp_path)


@pytest.mark.parametrize("content", ["text", "array", "other names", "other sizes"])
def test_a_file_that_is_no_archive_of_the_arrays_is_an_error(tmp_path, content):
    path = tmp_path / "mnist" / "mnist.npz"
    path.parent.mkdir()
    with path.open("wb") as file:
        match content:
            case "text":
                file.write(b"something else")
            case "array":
                np.save(file, np.zeros(3))
            case "other names":
                np.savez(file, images=np.zeros(3))
            case "other sizes":
                np.savez(file, **dict.fromkeys(datasets.MNIST.arrays, np.zeros(3)))
    with pytest.raises(ValueError, match=r"must be a NumPy archive with x_train, "):
        hg.datasets.load("mnist", tmp_path)


def test_a_folder_must_be_a_path(tmp_path):
    with pytest.raises(TypeError, match="data_dir must be the path of a folder; got 3"):
        hg.datasets.load("mnist", 3)
    with pytest.raises(FileNotFoundError, match="~nobody-of-this-name"):
        hg.datasets.load("mnist", "~nobody-of-this-name/data")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "mnist" / "mnist.npz").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz is not a file"):
        hg.datasets.load("mnist", tmp_path)
