"""The order of items as a pure function of (seed, epoch, position), in memory bounded by a window of shards.

An epoch visits the shards in the order of a keyed permutation, `window_shards` of them at a time, and shuffles the
items of each window. Nothing here knows of ranks, workers or batches, and nothing is as large as the data set.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from d2v_scale.data2vec.stateless import key, numpy_generator

_ROUNDS = 6
# Fewer bits leave so few round functions that small permutations are visibly uneven.
_LEAST_HALF_BITS = 4


class KeyedPermutation:
    """A permutation of range(size) that is evaluated, not stored: a Feistel network with cycle walking."""

    def __init__(self, size: int, *key_parts: int | str) -> None:
        assert size > 0
        self._size = size
        self._half_bits = max(_LEAST_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
        self._round_keys = [key(*key_parts, turn) for turn in range(_ROUNDS)]

    def __call__(self, position: int) -> int:
        """Where `position` goes. O(1) expected: the walked domain is less than four times `size`, or 256."""
        assert 0 <= position < self._size
        half, mask = self._half_bits, (1 << self._half_bits) - 1
        value = position
        while True:
            left, right = value >> half, value & mask
            for round_key in self._round_keys:
                left, right = right, left ^ (key(round_key, right) & mask)
            value = left << half | right
            if value < self._size:
                return value


@dataclass
class WindowOrder:
    """The items of one source, epoch by epoch and window by window."""

    shard_count: int
    count_of: Callable[[int], int]
    """Items in a shard."""
    window_shards: int
    seed: int
    source: str

    @property
    def windows(self) -> int:
        """Windows per epoch; the last may be smaller."""
        return -(-self.shard_count // self.window_shards)

    def shards(self, epoch: int, window: int) -> list[int]:
        """The shards of a window."""
        permuted = KeyedPermutation(self.shard_count, "shards", self.seed, self.source, epoch)
        start = window * self.window_shards
        return [permuted(position) for position in range(start, min(start + self.window_shards, self.shard_count))]

    def items(self, epoch: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The window's items in their order: shard and number within the shard, each (n,)."""
        shards = self.shards(epoch, window)
        counts = [self.count_of(shard) for shard in shards]
        shard_n = np.repeat(np.asarray(shards, dtype=np.int64), counts)
        item_n = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
        shuffled = numpy_generator("window", self.seed, self.source, epoch, window).permutation(len(shard_n))
        return shard_n[shuffled], item_n[shuffled]
