"""Ten alphabets of Omniglot with the random numbers of HIPS/hypergrad.

The functions follow `hypergrad/omniglot.py` and `hypergrad/util.py` of the authors of
Maclaurin et al. 2015. Their images, `chardata.mat`, are not at hand. A figure of their
repository (`all_alphabets.png`) contains 70 of them, whose places in the file follow
from its random numbers. The file holds the first 15 drawings of each character, five of
every character at a time, and its images are those of `shrink`, up to the rounding of
the figure.
"""

import functools
import hashlib
import os
from pathlib import Path

import numpy as np

import hypergrad as hg

#: First character of the alphabets in Omniglot, and their number of characters.
ALPHABETS = {
    "Aurek-Besh": (1036, 26),
    "Blackfoot": (226, 14),
    "Hebrew": (496, 22),
    "N'Ko": (780, 33),
    "Ojibwe": (813, 14),
}
NUM_DRAWINGS, NUM_PER_BLOCK, NUM_CLASSES = 15, 5, 55
ORIGINAL_SIZE, SIZE = 105, 28

Examples = dict[str, np.ndarray]  # x: images, y: labels


def random_state(name: object) -> np.random.RandomState:
    """Returns the generator that the authors seed with the text of ``name``."""
    digest = hashlib.md5(str(name).encode(), usedforsecurity=False).hexdigest()
    return np.random.RandomState(int(digest[:8], 16))


def cubic_weights(size: int, new_size: int) -> np.ndarray:
    """Returns the matrix of bicubic shrinking with antialiasing, as Matlab does it."""
    scale = size / new_size
    centers = (np.arange(new_size)[:, None] + 0.5) * scale - 0.5
    t = np.abs(np.arange(size) - centers) / scale
    inside = 1.5 * t**3 - 2.5 * t**2 + 1
    outside = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights = np.where(t <= 1, inside, np.where(t < 2, outside, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def shrink(ink: np.ndarray) -> np.ndarray:
    """Returns transposed images ``[n, 784]`` in [0, 1] of ``[n, 105, 105]``."""
    weights = cubic_weights(ORIGINAL_SIZE, SIZE)
    images = weights @ ink.transpose(0, 2, 1) @ weights.T
    return np.clip(images, 0.0, 1.0).reshape(len(ink), -1)


@functools.cache
def load_alphabets() -> list[Examples]:
    """Returns the five alphabets in the order of the authors' file, as float16."""
    folder = Path(os.environ[hg.datasets.VARIABLE]) / "omniglot"
    with np.load(folder / hg.datasets.OMNIGLOT.file) as file:
        bits, characters = file["images"], file["char_id"]
    alphabets = []
    for initial, count in ALPHABETS.values():
        images = []
        for character in range(initial, initial + count):
            drawings = bits[characters == character][:NUM_DRAWINGS]
            ink = np.unpackbits(drawings, axis=1)[:, : ORIGINAL_SIZE**2]
            images.append(shrink(ink.reshape(-1, ORIGINAL_SIZE, ORIGINAL_SIZE)))
        blocks = (count, NUM_DRAWINGS // NUM_PER_BLOCK, NUM_PER_BLOCK)
        x = np.array(images).reshape(*blocks, -1).swapaxes(0, 1).reshape(-1, SIZE**2)
        y = np.arange(count)[:, None, None] + np.zeros(blocks, int)
        y = y.swapaxes(0, 1).ravel()
        alphabets.append({"x": x.astype(np.float16), "y": y})
    return alphabets


def take(examples: Examples, indices: np.ndarray) -> Examples:
    """Returns some of the examples."""
    return {name: x[indices] for name, x in examples.items()}


def shuffle_rows(examples: Examples, random: np.random.RandomState) -> Examples:
    """Returns the examples in another order."""
    return take(examples, random.permutation(len(examples["y"])))


def shuffle(examples: Examples, random: np.random.RandomState) -> Examples:
    """Returns the examples in another order, with other numbers for their labels."""
    labels = np.argsort(random.permutation(NUM_CLASSES))
    return shuffle_rows({"x": examples["x"], "y": labels[examples["y"]]}, random)


def rotate(examples: Examples) -> Examples:
    """Returns the examples with images that are rotated by 90 degrees."""
    x = examples["x"].reshape(-1, SIZE, SIZE)
    x = x.swapaxes(1, 2)[:, :, ::-1].reshape(-1, SIZE**2)
    return {"x": x, "y": examples["y"]}


def subtract_mean(alphabets: list[Examples]) -> list[Examples]:
    """Returns the alphabets minus their mean image, which NumPy summed in float16."""
    x = np.concatenate([examples["x"] for examples in alphabets])
    mean = np.add.reduce(x, axis=0, dtype=x.dtype) / x.dtype.type(len(x))
    return [examples | {"x": examples["x"] - mean} for examples in alphabets]


def load_rotated_alphabets(random: np.random.RandomState) -> list[Examples]:
    """Returns five alphabets in a random order, then the same ones rotated."""
    alphabets = [shuffle(examples, random) for examples in load_alphabets()]
    return subtract_mean(alphabets + [rotate(examples) for examples in alphabets])


def split(examples: Examples, sizes: tuple[int, ...]) -> list[Examples]:
    """Returns splits with ``sizes`` examples of each label, in the same order."""
    position = np.zeros(len(examples["y"]), int)
    for label in np.unique(examples["y"]):
        rows = np.flatnonzero(examples["y"] == label)
        position[rows] = np.arange(len(rows))
    stops = np.cumsum(sizes)
    return [
        take(examples, np.flatnonzero((position >= stop - size) & (position < stop)))
        for size, stop in zip(sizes, stops, strict=True)
    ]


def partition(
    alphabets: list[Examples], random: np.random.RandomState, sizes: tuple[int, ...]
) -> list[list[Examples]]:
    """Returns random splits of each alphabet: ``[split][alphabet]``."""
    shuffled = [shuffle_rows(examples, random) for examples in alphabets]
    splits = [split(examples, sizes) for examples in shuffled]
    return [list(alphabets) for alphabets in zip(*splits, strict=True)]
