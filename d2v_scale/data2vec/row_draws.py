"""What all kinds of masks are drawn with: uniforms of a row's own, and exact counts of lowest scores."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v_scale.data2vec.stateless import array_bits, array_keys, array_uniform

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]


def stream(keys_r: Keys, name: str, count: int) -> Floats:
    """`count` uniforms for each row from the named stream."""
    return array_uniform(array_keys(keys_r.view(np.int64), name), count)


def random_ranks(keys_r: Keys, name: str, count: int) -> Ints:
    """`count` random numbers for each row from the named stream, no two of a row equal, all below 2^62."""
    low = np.uint64((1 << count.bit_length()) - 1)
    bits_rn = array_bits(array_keys(keys_r.view(np.int64), name), count) >> np.uint64(2)
    return (bits_rn & ~low | np.arange(count, dtype=np.uint64)).view(np.int64)


def lowest(scores_rn: NDArray[Any], counts_r: Ints) -> Bools:
    """True at each row's `counts_r` lowest scores."""
    wanted = np.unique(counts_r)
    wanted = wanted[(wanted > 0) & (wanted <= scores_rn.shape[1])]
    if len(wanted) == 0:
        return np.zeros(scores_rn.shape, dtype=bool)
    ordered_rn = np.partition(scores_rn, wanted - 1, axis=1)
    limits_r = np.take_along_axis(ordered_rn, np.maximum(counts_r, 1)[:, None] - 1, axis=1)
    return (scores_rn <= limits_r) & (counts_r > 0)[:, None]


def exact(wanted: int, positions: int) -> int:
    """`wanted` of `positions`, but at least one on either side where there are two."""
    return min(max(wanted, 1), positions - 1) if positions > 1 else 0
