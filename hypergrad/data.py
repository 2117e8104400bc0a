"""Real data by name: bundled with scikit-learn, or from files that a user keeps."""

import bz2
import hashlib
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


def _svmlight(content: bytes, num_features: int) -> Arrays:
    """Lines ``label index:value ...`` as compressed sparse rows."""
    import io

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
    "burgers": _burgers,
    "digits": _digits,
    "reuters": _reuters,
}


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Arrays:
    """The named data set as NumPy arrays.

    ``digits``: 1,797 handwritten digits of 8 by 8 pixels in [0, 1], ``x`` ``[1797,
    64]`` float32 and ``y`` ``[1797]`` int32 in 0..9; bundled with scikit-learn
    (originally UCI's, by Alpaydin and Kaynak).

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
