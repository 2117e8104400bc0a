"""The random numbers of PyTorch on the CPU, without PyTorch.

`torch.manual_seed` seeds the Mersenne twister of `numpy.random.RandomState`, whose raw
32-bit numbers both libraries turn into samples in their own ways.
"""

import math

import numpy as np

BLOCK = 16  # numbers per block of the transform of Box and Muller
HALF = BLOCK // 2


class TorchGenerator:
    """Samples of PyTorch on the CPU after `torch.manual_seed`.

    Args:
      seed: Seed, below 2^32.
    """

    def __init__(self, seed: int):
        self._bits = np.random.RandomState(seed)
        self._has_half_a_pair = False

    def randn(self, *shape: int) -> np.ndarray:
        """Returns ``torch.randn(*shape)``, a float32 array.

        Arrays of 16 numbers or more are made from single uniform numbers in blocks of
        16. If 16 does not divide their size, the last 16 numbers are sampled anew.
        Smaller arrays are made from pairs of uniform numbers in double precision;
        PyTorch keeps the second number of an incomplete pair for the next small array,
        which this class refuses to make.

        Raises:
          ValueError: A small array of an odd size came before this small array.
        """
        size = math.prod(shape)
        if size < BLOCK:
            if self._has_half_a_pair:
                raise ValueError("a small array after one of an odd size is not made")
            self._has_half_a_pair = size % 2 == 1
            numbers = np.concatenate([self._pair() for _ in range(-(-size // 2))])
            return numbers[:size].astype(np.float32).reshape(shape)
        numbers = self._uniform(size)
        num_whole = size // BLOCK * BLOCK
        numbers[:num_whole] = box_muller(numbers[:num_whole])
        if size > num_whole:
            numbers[-BLOCK:] = box_muller(self._uniform(BLOCK))
        return numbers.astype(np.float32).reshape(shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """Returns ``torch.empty(*shape).uniform_(low, high)``, a float32 array."""
        numbers = self._uniform(math.prod(shape)) * (high - low) + low
        return numbers.astype(np.float32).reshape(shape)

    def randint(self, high: int, size: int) -> np.ndarray:
        """Returns ``torch.randint(high, (size,))``, for ``high`` below 2^32."""
        return (self._raw(size) % high).astype(np.int64)

    def randperm(self, size: int) -> np.ndarray:
        """Returns ``torch.randperm(size)``, for sizes below 2^32 / 20."""
        distances = self._raw(size - 1) % np.arange(size, 1, -1)
        order = list(range(size))
        for i, distance in enumerate(distances.tolist()):
            order[i], order[i + distance] = order[i + distance], order[i]
        return np.array(order)

    def _raw(self, size: int) -> np.ndarray:
        """Returns 32-bit integers."""
        return self._bits.randint(0, 2**32, size=size, dtype=np.uint32)

    def _uniform(self, size: int) -> np.ndarray:
        """Returns numbers in [0, 1) with 24 bits."""
        return (self._raw(size) & (2**24 - 1)) / 2**24

    def _pair(self) -> np.ndarray:
        """Returns two normal numbers from two uniform ones with 53 bits."""
        high, low = self._raw(4).astype(np.uint64).reshape(2, 2).T
        integers = (high << np.uint64(32)) | low
        angle, radius = (integers & np.uint64(2**53 - 1)) / 2**53
        return polar_to_normal(radius, angle)


def polar_to_normal(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Returns cosines and sines of the transform of Box and Muller."""
    length, angle = np.sqrt(-2 * np.log1p(-radius)), 2 * np.pi * angle
    return np.stack([length * np.cos(angle), length * np.sin(angle)])


def box_muller(uniform: np.ndarray) -> np.ndarray:
    """Returns normal numbers from blocks of eight radii and eight angles."""
    radius, angle = uniform.reshape(-1, 2, HALF).transpose(1, 0, 2)
    return polar_to_normal(radius, angle).transpose(1, 0, 2).ravel()
