"""Which positions the student does not see (spec 2). NumPy: masks are drawn beside the data.

A row's mask is a pure function of (seed, step, sample id, clone) and of the row's own length, so it is the same at any
world size, in any worker and beside any other row. All kinds but `blockwise` are drawn for all rows at once.

Masks say True where a position is hidden from the student. Every row keeps at least one visible valid position.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from d2v_scale.data2vec import blocks
from d2v_scale.data2vec.config import CompatConfig, MaskingConfig
from d2v_scale.data2vec.row_draws import Bools, Floats, exact, lowest, stream
from d2v_scale.data2vec.stateless import array_keys
from d2v_scale.errors import ConfigError

_BERT_KEPT = 0.1
_BERT_SWAPPED = 0.1
_BLOCKWISE_TRIES = 10
_BLOCKWISE_LOG_ASPECT = math.log(1 / 0.3)
_BLOCKWISE_DRAWS = 48


@dataclass
class Masks:
    """The masks of B samples times M clones, rows sample-major: sample 0 clone 0, sample 0 clone 1, ..."""

    masked_rt: Bools
    """True: hidden from the student and counted in the loss."""
    swapped_rt: Floats | None = None
    """`bert` only: in [0, 1) where a random word replaces the token (not counted in the loss), -1 elsewhere."""


def collate(
    config: MaskingConfig,
    *,
    length: int | None = None,
    grid: tuple[int, ...] | None = None,
    sample_ids: Sequence[int] | NDArray[np.int64],
    valid_lengths: Sequence[int] | NDArray[np.int64] | None = None,
    seed: int,
    step: int,
    compat: CompatConfig | None = None,
    equal_counts: bool = True,
    real_bt: Bools | None = None,
) -> Masks:
    """Masks of a batch: one row for each sample and clone.

    Positions are `length` frames or tokens, or a `grid` of (rows, columns) of patches, flattened row by row; of
    `blocks`, of any number of axes, a line included. `valid_lengths` (B,) counts each sample's positions before
    padding, of `blocks` also (B, n) along each axis; None: all. 1.0 masks valid positions only. 2.0 masks a fixed
    number of the T positions in every row, padding included, since all rows must keep equally many. `blocks` serve
    both: with `equal_counts` 2.0, without it 1.0. `real_bt` (B, T): positions that hold something, wherever they lie;
    None: all. Of the others 1.0 masks none; 2.0 masks them as any, and does not count them (`Layout.counted_n`).

    Raises `ConfigError` when kind and geometry do not fit.
    """
    # One key for each row: the sample's key, then the clone's.
    ids_b = np.asarray(sample_ids, dtype=np.int64)
    sample_keys_b = array_keys(ids_b, "mask", seed, step)
    clones_m = array_keys(np.arange(config.clones), "clone")
    keys_r = array_keys((sample_keys_b[:, None] ^ clones_m).reshape(-1).view(np.int64), "row")
    masks = _collate(config, length, grid, len(ids_b), keys_r, valid_lengths, compat, equal_counts)
    if real_bt is not None:
        real_rt = np.repeat(real_bt, config.clones, axis=0)
        masks.masked_rt = _on_real(masks.masked_rt, real_rt, keys_r, keep_count=equal_counts)
    return masks


def _collate(
    config: MaskingConfig,
    length: int | None,
    grid: tuple[int, ...] | None,
    samples: int,
    keys_r: NDArray[np.uint64],
    valid_lengths: Sequence[int] | NDArray[np.int64] | None,
    compat: CompatConfig | None,
    equal_counts: bool,
) -> Masks:
    kind = config.kind
    if grid is not None:
        length = math.prod(grid)
    if length is None:
        raise ConfigError("objective.masking.kind", f"{kind!r} needs a length or a grid.")
    if kind in ("blockwise", "block2d") and (grid is None or len(grid) != 2):
        axes = 1 if grid is None else len(grid)
        raise ConfigError(
            "objective.masking.kind",
            f"is {kind!r}, which masks rectangles of a grid of two axes, but the positions lie along {axes}",
            "Give random, block1d or blocks.",
        )

    if kind == "blocks":
        shape = grid or (length,)
        extents_rn = np.repeat(_extents(shape, samples, valid_lengths), config.clones, axis=0)
        spec = _blocks_of(config, len(shape))
        return Masks(blocks.draw(spec, shape, extents_rn, keys_r, equal_counts=equal_counts))
    valid_b = np.full(samples, length) if valid_lengths is None else np.asarray(valid_lengths)
    if valid_b.ndim > 1:  # of a grid, whose padding is in no one place of its line
        valid_b = np.full(samples, length)
    valid_r = np.repeat(np.clip(valid_b, 0, length), config.clones)

    if kind == "spans":
        masked_rt = _spans(config, length, valid_r, keys_r)
        if compat is not None and compat.equalize_masks:
            masked_rt = _trim_to_smallest(masked_rt, keys_r)
        return Masks(masked_rt)
    if kind == "bert":
        return _bert(config, length, valid_r, keys_r)
    if kind == "blockwise":
        assert grid is not None
        return Masks(_blockwise(config, (grid[0], grid[1]), keys_r))
    if kind == "random":
        masked_rt = _random(config, length, keys_r)
    else:
        masked_rt = _blocks(config, grid if kind == "block2d" and grid is not None else (length,), keys_r)
    return Masks(_show_one_valid(masked_rt, valid_r, keys_r, keep_count=True))


def draw(
    config: MaskingConfig,
    *,
    length: int | None = None,
    grid: tuple[int, ...] | None = None,
    valid_length: int | None = None,
    seed: int,
    step: int,
    sample_id: int,
    clone: int = 0,
) -> Bools:
    """One row's mask (T,), the same as that row of `collate` (without `compat.equalize_masks`).

    The single-sample form, for tests and notebooks.
    """
    valid_lengths = None if valid_length is None else [valid_length]
    masks = collate(
        config, length=length, grid=grid, sample_ids=[sample_id], valid_lengths=valid_lengths, seed=seed, step=step
    )
    return masks.masked_rt[clone]


def replace_tokens(
    tokens_bt: NDArray[np.int64], masks: Masks, *, vocab_size: int, mask_id: int, special_ids: Sequence[int]
) -> NDArray[np.int64]:
    """What a 1.0 text student reads: `mask_id` at masked positions, random ordinary words at swapped ones (M = 1)."""
    assert masks.masked_rt.shape == tokens_bt.shape, "token replacement is for one clone per sample"
    student_bt = np.where(masks.masked_rt, mask_id, tokens_bt)
    if masks.swapped_rt is not None:
        words = np.setdiff1d(np.arange(vocab_size), np.append(np.asarray(special_ids), mask_id))
        chosen_bt = masks.swapped_rt >= 0
        student_bt[chosen_bt] = words[(masks.swapped_rt[chosen_bt] * len(words)).astype(np.int64)]
    return student_bt


def _blocks_of(config: MaskingConfig, axes: int) -> blocks.Blocks:
    """Of a size that is one along all axes, or of every axis in their order (`block_sizes.resolved`)."""
    given = config.length if config.size is None else config.size
    sizes = tuple(given.values()) if isinstance(given, dict) else (given,) * axes
    names = list(given) if isinstance(given, dict) else []
    tubes = config.tubes or []
    assert len(sizes) == axes, f"{axes} axes, but {len(sizes)} sizes"
    assert set(tubes) <= set(names), "tubes are of axes whose sizes have names"
    numbers = tuple(size for size in sizes if not isinstance(size, str))
    assert len(numbers) == axes, "sizes in units are resolved first"
    along = tuple(name in tubes for name in names) or (False,) * axes
    return blocks.Blocks(sizes=numbers, tubes=along, prob=config.prob, inverse=config.inverse)


def _extents(
    shape: tuple[int, ...], samples: int, valid: Sequence[int] | NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """(B, n): how far each sample reaches along each axis."""
    if valid is None:
        return np.tile(np.array(shape), (samples, 1))
    extents = np.asarray(valid, dtype=np.int64).reshape(samples, -1)
    if extents.shape[1] == len(shape):
        return extents.clip(0, np.array(shape))
    whole = extents[:, 0] == math.prod(shape)
    assert whole.all(), "of a grid, extents along each axis"
    return np.tile(np.array(shape), (samples, 1))


def _span_starts(config: MaskingConfig, length: int, valid_r: NDArray[np.int64], keys_r: NDArray[np.uint64]) -> Bools:
    """Distinct span starts of each row: int(prob * valid / span + u) of them, u uniform (spec 2.1, 2.2)."""
    span = config.length if config.kind == "spans" else 1
    rounding_r = stream(keys_r, "rounding", 1)[:, 0]
    counts_r = (config.prob * valid_r / span + rounding_r).astype(np.int64)
    places_r = valid_r
    if config.kind == "spans" and config.starts == "inside":
        counts_r = np.maximum(counts_r, 1)
        # A row too short for that many starts lets spans run over its end.
        places_r = np.where(valid_r - span <= counts_r, counts_r + 1, valid_r - span)
    places_r = np.minimum(places_r, length)
    counts_r = np.minimum(counts_r, places_r)
    scores_rt = stream(keys_r, "starts", length)
    if int(places_r.min(initial=length)) < length:
        scores_rt[np.arange(length) >= places_r[:, None]] = 2.0
    return lowest(scores_rt, counts_r)


def _spans(config: MaskingConfig, length: int, valid_r: NDArray[np.int64], keys_r: NDArray[np.uint64]) -> Bools:
    starts_rt = _span_starts(config, length, valid_r, keys_r)
    masked_rt = starts_rt.copy()
    # Doubling widens every span to its length in log2(length) steps.
    width = 1
    while width < config.length:
        shift = min(width, config.length - width)
        masked_rt[:, shift:] |= masked_rt[:, :-shift].copy()
        width += shift
    masked_rt &= np.arange(length) < valid_r[:, None]
    return _show_one_valid(masked_rt, valid_r, keys_r, keep_count=False)


def _bert(config: MaskingConfig, length: int, valid_r: NDArray[np.int64], keys_r: NDArray[np.uint64]) -> Masks:
    chosen_rt = _span_starts(config, length, valid_r, keys_r)
    fate_rt = stream(keys_r, "fate", length)
    swapped_rt = chosen_rt & (fate_rt >= _BERT_KEPT) & (fate_rt < _BERT_KEPT + _BERT_SWAPPED)
    masked_rt = chosen_rt & (fate_rt >= _BERT_KEPT + _BERT_SWAPPED)
    words_rt = np.where(swapped_rt, stream(keys_r, "words", length), -1.0)
    return Masks(_show_one_valid(masked_rt, valid_r, keys_r, keep_count=False), words_rt)


def _random(config: MaskingConfig, length: int, keys_r: NDArray[np.uint64]) -> Bools:
    visible = length - exact(length - int(length * (1 - config.prob)), length)
    counts_r = np.full(len(keys_r), length - visible)
    return lowest(stream(keys_r, "positions", length), counts_r)


def _blocks(config: MaskingConfig, shape: tuple[int, ...], keys_r: NDArray[np.uint64]) -> Bools:
    """Blocks around random centres, then an exact count by random single positions (spec 2.4)."""
    rows, length, side, dims = len(keys_r), int(np.prod(shape)), config.length, len(shape)
    # Written so that floating-point truncation gives the published counts, such as int(196 * (1 - 0.8)) = 39.
    selected_share = 1 - config.prob if config.inverse else config.prob
    centres = int(length * ((selected_share + config.adjust) / side**dims))
    selected_rt = np.zeros((rows, length), dtype=bool)
    if centres > 0:
        places_rk = (stream(keys_r, "centres", centres) * length).astype(np.int64)
        offsets = np.arange(side) - side // 2
        # Coordinates are clamped to the border, so blocks there are smaller.
        last = np.clip(places_rk[..., None] % shape[-1] + offsets, 0, shape[-1] - 1)
        if dims == 1:
            covered = last.reshape(rows, -1)
        else:
            first = np.clip(places_rk[..., None] // shape[-1] + offsets, 0, shape[0] - 1)
            covered = (first[..., :, None] * shape[-1] + last[..., None, :]).reshape(rows, -1)
        np.put_along_axis(selected_rt, covered, True, axis=1)
    wanted = int(length * selected_share)
    wanted = length - exact(length - wanted, length) if config.inverse else exact(wanted, length)
    # Selected positions come before others, each group in random order: the first `wanted` trim or top up.
    scores_rt = stream(keys_r, "singles", length) + ~selected_rt
    selected_rt = lowest(scores_rt, np.full(rows, wanted))
    return ~selected_rt if config.inverse else selected_rt


def _blockwise(config: MaskingConfig, grid: tuple[int, int], keys_r: NDArray[np.uint64]) -> Bools:
    """BEiT's rectangles until `target_count` is reached or ten tries in a row fail (spec 2.3)."""
    height, width = grid
    if not 0 < config.target_count < height * width:
        raise ConfigError(
            "objective.masking.target_count",
            f"{config.target_count} of {height * width} patches cannot be masked.",
            f"Choose 1 to {height * width - 1}.",
        )
    first_rkd = stream(keys_r, "blocks0", 4 * _BLOCKWISE_DRAWS).reshape(-1, _BLOCKWISE_DRAWS, 4).tolist()
    size = (height * width + 7) // 8
    packed = b"".join(
        _blockwise_row(config, grid, _blockwise_draws(keys_r[row : row + 1], first_kd)).to_bytes(size, "little")
        for row, first_kd in enumerate(first_rkd)
    )
    packed_rt = np.frombuffer(packed, dtype=np.uint8).reshape(-1, size)
    return np.unpackbits(packed_rt, axis=1, count=height * width, bitorder="little").astype(bool)


def _blockwise_draws(key_r: NDArray[np.uint64], first_kd: list[list[float]]) -> Iterator[list[float]]:
    """Uniforms for one try each: the first, drawn for all rows together, are enough for nearly every row."""
    yield from first_kd
    for more in itertools.count(1):
        yield from stream(key_r, f"blocks{more}", 4 * _BLOCKWISE_DRAWS).reshape(-1, 4).tolist()


@cache
def _column(height: int, width: int) -> int:
    """The first column of `height` rows of a grid `width` wide, as bits."""
    return sum(1 << (width * row) for row in range(height))


def _blockwise_row(config: MaskingConfig, grid: tuple[int, int], draws: Iterator[list[float]]) -> int:
    """One mask as an integer with bit `row * width + column` set where masked: counting is one instruction or two."""
    height, width = grid
    masked, count, failures = 0, 0, 0
    while count < config.target_count and failures < _BLOCKWISE_TRIES:
        u_area, u_aspect, u_top, u_left = next(draws)
        failures += 1
        room = config.target_count - count
        # For room < min_block the interval is reversed, as in the reference.
        area = config.min_block + u_area * (room - config.min_block)
        aspect = math.exp((2 * u_aspect - 1) * _BLOCKWISE_LOG_ASPECT)
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if h >= height or w >= width:
            continue
        top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
        block = (_column(h, width) * ((1 << w) - 1)) << (top * width + left)
        new = (block & ~masked).bit_count()
        if 0 < new <= room:
            masked |= block
            count += new
            failures = 0
    return masked


def _trim_to_smallest(masked_rt: Bools, keys_r: NDArray[np.uint64]) -> Bools:
    """Unmask random single positions until every row has as few as the smallest (the reference's equal counts)."""
    smallest = int(masked_rt.sum(1).min(initial=masked_rt.shape[1]))
    scores_rt = stream(keys_r, "trim", masked_rt.shape[1]) + ~masked_rt
    return lowest(scores_rt, np.full(len(masked_rt), smallest)) & masked_rt


def _on_real(masked_rt: Bools, real_rt: Bools, keys_r: NDArray[np.uint64], *, keep_count: bool) -> Bools:
    """What is hidden where only `real_rt` hold something: at least one of them is shown. With `keep_count` every row
    masks as many as before."""
    if not keep_count:
        masked_rt = masked_rt & real_rt
    for row in np.flatnonzero((masked_rt | ~real_rt).all(1) & real_rt.any(1)):
        u_show, u_hide = stream(keys_r[row : row + 1], "show", 2)[0]
        real, empty = np.flatnonzero(real_rt[row]), np.flatnonzero(~real_rt[row] & ~masked_rt[row])
        if keep_count and len(empty) == 0:
            continue  # none is free to be masked instead
        masked_rt[row, real[int(u_show * len(real))]] = False
        if keep_count:
            masked_rt[row, empty[int(u_hide * len(empty))]] = True
    return masked_rt


def _show_one_valid(
    masked_rt: Bools, valid_r: NDArray[np.int64], keys_r: NDArray[np.uint64], *, keep_count: bool
) -> Bools:
    """Rows whose valid positions are all masked show a random one; with `keep_count` a padded one is masked for it."""
    real_rt = np.arange(masked_rt.shape[1]) < valid_r[:, None]
    for row in np.flatnonzero((masked_rt | ~real_rt).all(1) & (valid_r > 0)):
        u_show, u_hide = stream(keys_r[row : row + 1], "show", 2)[0]
        visible = np.flatnonzero(~masked_rt[row])
        masked_rt[row, int(u_show * valid_r[row])] = False
        if keep_count and len(visible) > 0:
            masked_rt[row, visible[int(u_hide * len(visible))]] = True
    return masked_rt
