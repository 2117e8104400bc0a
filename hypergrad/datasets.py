"""Real data by name: bundled with scikit-learn, or from files that a user keeps."""

import bz2
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
VARIABLE = "HYPERGRAD_DATA_DIR"


def _digits(folder: Path | None) -> Arrays:
    del folder
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return {
        "x": (bunch.data / 16.0).astype(np.float32),
        "y": bunch.target.astype(np.int32),
    }


def _breast_cancer(folder: Path | None) -> Arrays:
    del folder
    from sklearn.datasets import load_breast_cancer

    bunch: Any = load_breast_cancer()
    return {"x": bunch.data.astype(np.float32), "y": bunch.target.astype(np.int32)}


MNIST = {
    "mnist.npz": "06af5dfe73b70e3bc1c36439982b18a8d76803db9b544f6fdf838a37fbb01b64",
}
MNIST_SOURCE = (
    "https://github.com/rasbt/mnist-pngs, commit "
    "d26bd33bf1e454dd15bd4fe8b8ba64c76308f91c, repacked in the original order as the "
    "arrays x_train, y_train, x_test, y_test"
)


def _mnist(folder: Path | None) -> Arrays:
    import io

    (content,) = _files("mnist", folder, MNIST, MNIST_SOURCE)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        train, test = ((arrays[f"x_{n}"], arrays[f"y_{n}"]) for n in ("train", "test"))
    x, y = (np.concatenate(pieces) for pieces in zip(train, test, strict=True))
    return {
        "x": (x.reshape(len(x), -1) / np.float32(255)).astype(np.float32),
        "y": y.astype(np.int32),
        "test": np.arange(len(y)) >= len(train[1]),
    }


def _iris(folder: Path | None) -> Arrays:
    del folder
    from sklearn.datasets import load_iris

    return _classes(load_iris())


def _wine(folder: Path | None) -> Arrays:
    del folder
    from sklearn.datasets import load_wine

    return _classes(load_wine())


def _classes(bunch: Any) -> Arrays:
    return {"x": bunch.data.astype(np.float32), "y": bunch.target.astype(np.int32)}


OMNIGLOT = {
    "omniglot_105_packbits.npz": (
        "0603ccaa1a5c6e1705f653ebf0215f39287ad6705279bd2331a764ac5dee39d1"
    ),
}
OMNIGLOT_SOURCE = (
    "the images of https://github.com/brendenlake/omniglot, ink as bits: `images` of "
    "np.packbits over 105 by 105 pixels, `char_id`"
)
OMNIGLOT_SIZE = 28


def _omniglot(folder: Path | None) -> Arrays:
    (content,) = _files("omniglot", folder, OMNIGLOT, OMNIGLOT_SOURCE)
    with np.load(io.BytesIO(content)) as file:
        bits, characters = file["images"], file["char_id"]
    shrink = _area(105, OMNIGLOT_SIZE)
    found = np.empty((characters.max() + 1, 20, OMNIGLOT_SIZE, OMNIGLOT_SIZE), "f4")
    for i in range(len(found)):
        ink = np.unpackbits(bits[characters == i], axis=1)[:, : 105 * 105]
        found[i] = shrink @ ink.reshape(20, 105, 105) @ shrink.T
    return {"x": np.minimum(found, 1)}  # rounding may leave a full pixel above


def _area(size: int, smaller: int) -> np.ndarray:
    """``[smaller, size]``: each row is the mean over the pixels that one covers."""
    edges = np.arange(smaller + 1) * size / smaller
    pixels = np.arange(size)
    low = np.maximum(edges[:-1, None], pixels)
    high = np.minimum(edges[1:, None], pixels + 1)
    return (np.maximum(high - low, 0) * smaller / size).astype(np.float32)


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


def _reuters(folder: Path | None) -> Arrays:
    train, test = (
        _svmlight(bz2.decompress(content), REUTERS_FEATURES)
        for content in _files("reuters", folder, REUTERS, REUTERS_SOURCE)
    )
    starts = np.concatenate([train["starts"], train["starts"][-1] + test["starts"][1:]])
    joined = {
        name: np.concatenate([train[name], test[name]])
        for name in ("values", "columns", "y")
    }
    is_test = np.arange(len(joined["y"])) >= len(train["y"])
    return joined | {"starts": starts, "test": is_test}


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


def _ijcnn1(folder: Path | None) -> Arrays:
    parts = [
        _svmlight(bz2.decompress(content), 22)
        for content in _files("ijcnn1", folder, IJCNN1, IJCNN1_SOURCE)
    ]
    y = np.concatenate([part["y"] for part in parts])
    x = np.concatenate([_dense(part, 22) for part in parts])
    return {"x": x, "y": y, "test": np.arange(len(y)) >= len(parts[0]["y"])}


def _dense(rows: Arrays, num_features: int) -> np.ndarray:
    """Compressed sparse rows written out."""
    x = np.zeros((len(rows["y"]), num_features), np.float32)
    x[np.repeat(np.arange(len(x)), np.diff(rows["starts"])), rows["columns"]] = rows[
        "values"
    ]
    return x


def _svmlight(content: bytes, num_features: int) -> Arrays:
    """Lines ``label index:value ...`` as compressed sparse rows."""
    from sklearn.datasets import load_svmlight_file

    x, y = load_svmlight_file(io.BytesIO(content), n_features=num_features)
    return {
        "values": x.data.astype(np.float32),
        "columns": x.indices.astype(np.int32),
        "starts": x.indptr.astype(np.int64),
        "y": (y > 0).astype(np.int32),
    }


def _files(
    name: str, folder: Path | None, digests: dict[str, str], source: str
) -> list[bytes]:
    """The files' contents, once their SHA-256 is found right."""
    if folder is None:
        raise FileNotFoundError(
            f"{name} needs files that do not come with the package: put "
            f"{' and '.join(digests)} ({source}) into a folder {name}/, and name the "
            f"folder above it by data_dir or the variable {VARIABLE}"
        )
    contents = []
    for file, digest in digests.items():
        path = folder / name / file
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing; {name} is in {source}. The folder above {name}/ "
                f"is what data_dir or the variable {VARIABLE} names"
            )
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise ValueError(
                f"{path} has SHA-256 {found}, not {digest}: it is another file, or "
                f"damaged; take it anew from {source}"
            )
        contents.append(content)
    return contents


BURGERS = {
    "burgers_shock.mat": (
        "f4d11e6798b8d29b6829984952b04adcc470d9bf70dd7e56c7985cd8e316c4bf"
    ),
}
BURGERS_SOURCE = (
    "appendix/Data of https://github.com/maziarraissi/PINNs, commit "
    "932f50a2d8ef4e80d1456bbae6887a73ff5166ef"
)


def _burgers(folder: Path | None) -> Arrays:
    import io

    from scipy.io import loadmat

    (content,) = _files("pde", folder, BURGERS, BURGERS_SOURCE)
    found = loadmat(io.BytesIO(content))
    return {"x": found["x"][:, 0], "t": found["t"][:, 0], "u": found["usol"]}


LOADERS: dict[str, Callable[[Path | None], Arrays]] = {
    "breast_cancer": _breast_cancer,
    "burgers": _burgers,
    "digits": _digits,
    "ijcnn1": _ijcnn1,
    "iris": _iris,
    "mnist": _mnist,
    "omniglot": _omniglot,
    "reuters": _reuters,
    "wine": _wine,
}


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Arrays:
    """The named data set as NumPy arrays.

    ``digits``: 1,797 handwritten digits of 8 by 8 pixels in [0, 1], ``x`` ``[1797,
    64]`` float32 and ``y`` ``[1797]`` int32 in 0..9; bundled with scikit-learn
    (originally UCI's, by Alpaydin and Kaynak).

    ``breast_cancer``: 569 tumours by 30 measured features, ``x`` ``[569, 30]`` float32
    as measured and ``y`` in {0, 1}, 1 for benign; bundled with scikit-learn
    (originally UCI's, by Wolberg, Street and Mangasarian).

    ``mnist``: 70,000 handwritten digits of 28 by 28 pixels in [0, 1], ``x`` ``[70000,
    784]`` and ``y`` in 0..9; ``test``, boolean, marks the last 10,000. From files:
    LeCun, Cortes and Burges.
    ``ijcnn1``: 141,691 moments of an engine's ignition, 22 numbers each, ``x``
    ``[141691, 22]`` float32 and ``y`` in {0, 1}, 9.7% of them 1; ``test``, boolean,
    marks the last 91,701. From files: Prokhorov 2001, as LIBSVM prepared it.

    ``iris``: 150 flowers of 3 species, 4 lengths in cm; ``wine``: 178 wines of 3
    growers, 13 measurements. ``x`` float32 and ``y`` int32; bundled with scikit-learn
    (Fisher 1936; UCI's, by Forina et al.).

    ``omniglot``: 20 drawings of each of 1,623 characters, ``x`` ``[1623, 20, 28, 28]``
    float32 in [0, 1], the share of ink. From a file: Lake et al. 2015, MIT licence.

    ``reuters``: 11,069 news stories, of which 3,299 are for testing; is a story about
    money-fx (6.5% are)? Sparse rows of 8,315 features: those of story i are
    ``columns[starts[i] : starts[i + 1]]``, with ``values`` alike, as in
    ``scipy.sparse.csr_array((values, columns, starts))``; ``y`` in {0, 1}, and
    ``test``, boolean. From files: Reuters-21578, for research, as LASVM prepared it.

    ``burgers``: ``u`` ``[256, 100]`` at ``x`` in [-1, 1) and ``t`` in [0, 0.99] with
    ``u_t + u u_x = (0.01 / pi) u_xx``, ``u = -sin(pi x)`` at first and zero at the
    ends; float64. From the file in ``pde/`` that came with Raissi et al. 2019.

    Args:
      name: of the data set.
      data_dir: the folder with a folder ``name/`` of its files; None means what the
        variable HYPERGRAD_DATA_DIR holds. Not read for what is bundled.

    Raises:
      ValueError: an unknown name, or a file whose SHA-256 is another.
      FileNotFoundError: files that are not there, with where they come from.

    >>> import hypergrad as hg
    >>> hg.data.load("digits")["x"].shape
    (1797, 64)
    """
    if name not in LOADERS:
        raise ValueError(f"no data set {name!r}; known are {sorted(LOADERS)}")
    data_dir = data_dir or os.getenv(VARIABLE)
    return LOADERS[name](None if data_dir is None else Path(data_dir))
