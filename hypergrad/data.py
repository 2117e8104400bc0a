"""Real data by name."""

from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return {
        "x": (bunch.data / 16.0).astype(np.float32),
        "y": bunch.target.astype(np.int32),
    }


LOADERS = {"digits": _digits}


def load(name: str) -> Arrays:
    """The named data set as NumPy arrays.

    ``digits``: 1,797 handwritten digits of 8 by 8 pixels in [0, 1], ``x`` ``[1797,
    64]`` float32 and ``y`` ``[1797]`` int32 in 0..9; bundled with scikit-learn
    (originally UCI's, by Alpaydin and Kaynak).

    Raises:
      ValueError: an unknown name.

    >>> import hypergrad as hg
    >>> hg.data.load("digits")["x"].shape
    (1797, 64)
    """
    if name not in LOADERS:
        raise ValueError(f"no data set {name!r}; known are {sorted(LOADERS)}")
    return LOADERS[name]()
