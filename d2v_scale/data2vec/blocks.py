"""Masks of blocks over any number of axes: one policy for images, recordings, texts and whatever lies on a grid.

A row draws blocks of one size at random places, which may reach over the borders, so that every position is covered by
equally many places. Positions belong to the first block that covers them, and the first blocks are taken until the
count is met; the last one taken is cut. The count is met exactly, and only where an unlucky row has too few blocks it
is filled up with random single positions. Along a tube's axes a mask is constant: it is drawn over the other axes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2v_scale.data2vec.row_draws import Bools, Ints, Keys, lowest, random_ranks, stream

_SPARE = 1.3
"""Blocks drawn, as a multiple of what a row needs on average."""
_MORE = 6
"""And so many beside."""
_INDICES_AT_ONCE = 1 << 21
"""Indices of covered positions held at once."""
_LAST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Blocks:
    """How much is masked, and in what pieces. n axes."""

    sizes: tuple[int | float, ...]
    """Size of a block along each axis: an int is positions, a float a share of the row's own extent."""
    tubes: tuple[bool, ...]
    """True: the mask is constant along this axis."""
    prob: float
    """Fraction of the positions to mask."""
    inverse: bool = False
    """Blocks are what stays visible."""


def draw(blocks: Blocks, shape: tuple[int, ...], extents_rn: Ints, keys_r: Keys, *, equal_counts: bool) -> Bools:
    """Masks (R, T) over positions of this shape, row-major, of which those within a row's extents are real.

    In every row int(prob * real) of the real positions are masked (`inverse`: int((1 - prob) * real) are visible), but
    at least one on either side where there are two; along the axes of tubes, of their places. With `equal_counts`
    all rows mask as many as one that is real throughout: what a padded row lacks is masked of its padding. Without, no
    padding is masked. A row's mask depends on its key, its extents, and with `equal_counts` on `shape`.
    """
    across = [axis for axis, tube in enumerate(blocks.tubes) if not tube]
    assert across, "a mask that is constant along every axis has nothing to draw"
    kept = tuple(shape[axis] for axis in across)
    kept_rn = np.minimum(extents_rn, np.array(shape))[:, across]
    real_rt, whole = _real(kept, kept_rn), math.prod(kept)
    places_r = kept_rn.prod(axis=1)
    masked_r, of_all = _masked_counts(blocks, places_r), int(_masked_counts(blocks, np.array([whole]))[0])
    if equal_counts:
        masked_r = masked_r.clip(of_all - (whole - places_r), np.minimum(of_all, np.maximum(places_r - 1, 0)))
    sizes_rn = _sizes(tuple(blocks.sizes[axis] for axis in across), kept_rn)
    if blocks.inverse:
        masked_rt = real_rt & ~_selected(sizes_rn, kept, kept_rn, real_rt, places_r - masked_r, keys_r)
    else:
        masked_rt = _selected(sizes_rn, kept, kept_rn, real_rt, masked_r, keys_r)
    if equal_counts and not real_rt.all():
        from_the_end_t = np.arange(whole)[::-1]
        masked_rt |= lowest(np.where(real_rt, _LAST, from_the_end_t), of_all - masked_r)
    if len(across) == len(shape):
        return masked_rt
    folded = [1 if tube else extent for extent, tube in zip(shape, blocks.tubes, strict=True)]
    masked_rt = np.broadcast_to(masked_rt.reshape(-1, *folded), (len(masked_rt), *shape)).reshape(len(masked_rt), -1)
    return masked_rt if equal_counts else masked_rt & _real(shape, extents_rn)


def _real(shape: tuple[int, ...], extents_rn: Ints) -> Bools:
    """(R, T): True within a row's extents."""
    if (extents_rn >= np.array(shape)).all():
        return np.ones((len(extents_rn), math.prod(shape)), dtype=bool)
    real = np.ones((len(extents_rn), 1), dtype=bool)
    for axis, extent in enumerate(shape):
        inside_re = np.arange(extent) < extents_rn[:, axis, None]
        real = (real[:, :, None] & inside_re[:, None]).reshape(len(extents_rn), -1)
    return real


def _masked_counts(blocks: Blocks, places_r: Ints) -> Ints:
    """How many of so many places are masked."""
    # Written so that floating-point truncation gives the published counts, such as int(196 * (1 - 0.8)) = 39.
    if blocks.inverse:
        wanted_r = places_r - (places_r * (1 - blocks.prob)).astype(np.int64)
    else:
        wanted_r = (places_r * blocks.prob).astype(np.int64)
    return np.minimum(np.maximum(wanted_r, 1), np.maximum(places_r - 1, 0))


def _sizes(sizes: Sequence[int | float], extents_rn: Ints) -> Ints:
    """(R, n): sizes of blocks in positions, none larger than the row."""
    columns = [
        np.full(len(extents_rn), size) if isinstance(size, int) else np.floor(size * extents_rn[:, axis] + 0.5)
        for axis, size in enumerate(sizes)
    ]
    return np.clip(np.stack(columns, axis=1).astype(np.int64), 1, np.maximum(extents_rn, 1))


def _selected(
    sizes_rn: Ints, shape: tuple[int, ...], extents_rn: Ints, real_rt: Bools, counts_r: Ints, keys_r: Keys
) -> Bools:
    """(R, T): True at `counts_r` positions of each row, in blocks."""
    blocks_r = _blocks_needed(sizes_rn, extents_rn, counts_r)
    largest = int(sizes_rn.max(axis=0, initial=1).prod())
    rows = max(1, _INDICES_AT_ONCE // max(1, int(blocks_r.max(initial=0)) * largest))
    selected_rt = np.zeros(real_rt.shape, dtype=bool)
    for first in range(0, len(keys_r), rows):
        some = slice(first, first + rows)
        ranks_rt = _ranks(sizes_rn[some], shape, extents_rn[some], blocks_r[some], keys_r[some])
        covered_r = (ranks_rt < _LAST).sum(axis=1)
        selected_rt[some] = lowest(ranks_rt, np.minimum(counts_r[some], covered_r))
    lacking_r = counts_r - selected_rt.sum(axis=1)
    lacking = np.flatnonzero(lacking_r > 0)
    if len(lacking):
        free_rt = real_rt[lacking] & ~selected_rt[lacking]
        scores_rt = np.where(free_rt, random_ranks(keys_r[lacking], "singles", real_rt.shape[1]), _LAST)
        selected_rt[lacking] |= lowest(scores_rt, lacking_r[lacking])
    return selected_rt


def _blocks_needed(sizes_rn: Ints, extents_rn: Ints, counts_r: Ints) -> Ints:
    """How many blocks are drawn for each row: more than enough nearly always. Of one position: none."""
    places_r = np.maximum(extents_rn.prod(axis=1), 1)
    area_r = (extents_rn * sizes_rn / np.maximum(extents_rn + sizes_rn - 1, 1)).prod(axis=1)
    # N blocks cover about 1 - exp(-N * area / places).
    left_r = np.maximum(1 - counts_r / places_r, 0.5 / places_r)
    needed_r = np.ceil(-_SPARE * np.log(left_r) * places_r / np.maximum(area_r, 1e-9)) + _MORE
    return np.where((sizes_rn.prod(axis=1) > 1) & (counts_r > 0), needed_r, 0).astype(np.int64)


def _ranks(sizes_rn: Ints, shape: tuple[int, ...], extents_rn: Ints, blocks_r: Ints, keys_r: Keys) -> Ints:
    """(R, T): places in the order in which positions are taken, unique in a row; the last of all where no block is."""
    rows, blocks, length = len(keys_r), int(blocks_r.max(initial=0)), math.prod(shape)
    first_rt = _first_blocks(sizes_rn, shape, extents_rn, blocks_r, keys_r)
    # Within a block, row-major from either end: what is left of the one that is cut is in one piece.
    along_t = np.arange(length)
    backwards_r = stream(keys_r, "direction", 1) < 0.5
    order_rt = np.where(backwards_r, along_t[::-1], along_t)
    assert first_rt.shape == (rows, length)
    return np.where(first_rt < blocks, (first_rt << length.bit_length()) | order_rt, _LAST)


def _first_blocks(sizes_rn: Ints, shape: tuple[int, ...], extents_rn: Ints, blocks_r: Ints, keys_r: Keys) -> Ints:
    """(R, T): which block is the first to cover a position; the number of blocks where none does."""
    rows, blocks, axes, length = len(keys_r), int(blocks_r.max(initial=0)), len(shape), math.prod(shape)
    # Positions outside of a row have a place behind its end, which is then cut off.
    first_rt = np.full((rows, length + 1), blocks)
    uniform_rkn = stream(keys_r, "blocks", blocks * axes).reshape(rows, blocks, axes)
    before_rn = sizes_rn - 1
    starts_rkn = (uniform_rkn * (extents_rn + before_rn)[:, None]).astype(np.int64) - before_rn[:, None]
    drawn_rk = np.arange(blocks) < blocks_r[:, None]
    flat = np.zeros((rows, blocks), dtype=np.int64)
    for axis in range(axes):
        steps = np.arange(int(sizes_rn[:, axis].max(initial=1)))
        at_rks = starts_rkn[:, :, axis, None] + steps
        inside_rks = (at_rks >= 0) & (at_rks < extents_rn[:, axis, None, None]) & drawn_rk[..., None]
        inside_rks &= steps < sizes_rn[:, axis, None, None]
        index_rks = np.where(inside_rks, at_rks * math.prod(shape[axis + 1 :]), length)
        flat = flat[..., None] + index_rks.reshape(rows, blocks, *[1] * axis, len(steps))
    flat = np.minimum(flat, length) + (np.arange(rows) * (length + 1)).reshape(-1, *[1] * (axes + 1))
    # The last to be written stays: the first block is written last.
    numbers = np.arange(blocks).reshape(-1, *[1] * axes)
    first_rt.reshape(-1)[flat[:, ::-1].reshape(-1)] = np.broadcast_to(numbers[::-1], flat.shape).reshape(-1)
    return first_rt[:, :length]
