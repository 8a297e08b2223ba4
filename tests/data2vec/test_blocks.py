"""Masks of blocks over any number of axes."""

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_scale.data2vec import blocks
from d2v_scale.data2vec.blocks import Blocks, draw
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.data2vec.masking import collate
from d2v_scale.data2vec.stateless import array_keys


@st.composite
def cases(draw_: st.DrawFn) -> tuple[Blocks, tuple[int, ...], np.ndarray, np.ndarray]:
    """Blocks, a shape of one to four axes, extents and keys of some rows."""
    shape = tuple(draw_(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    size = st.one_of(st.integers(1, 9), st.floats(0.05, 1.0))
    tubes = draw_(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)).filter(lambda t: not all(t)))
    spec = Blocks(
        sizes=tuple(draw_(size) for _ in shape),
        tubes=tuple(tubes),
        prob=draw_(st.floats(0.0, 1.0)),
        inverse=draw_(st.booleans()),
    )
    rows = draw_(st.integers(1, 5))
    extents_rn = np.array([[draw_(st.integers(1, extent)) for extent in shape] for _ in range(rows)])
    keys_r = array_keys(np.arange(rows), "test", draw_(st.integers(0, 2**40)))
    return spec, shape, extents_rn, keys_r


def real_places(shape: tuple[int, ...], extents: np.ndarray) -> np.ndarray:
    """(T,): within the extents."""
    inside = [index < extent for index, extent in zip(np.indices(shape), extents, strict=True)]
    return np.logical_and.reduce(inside).reshape(-1)


def wanted(spec: Blocks, places: int) -> int:
    """How many of so many places are masked."""
    count = places - int(places * (1 - spec.prob)) if spec.inverse else int(places * spec.prob)
    return min(max(count, 1), places - 1) if places > 1 else 0


@given(cases())
@settings(max_examples=300, deadline=None)
def test_counts_are_exact_and_a_real_position_stays_visible(case: tuple) -> None:
    spec, shape, extents_rn, keys_r = case
    across = [axis for axis in range(len(shape)) if not spec.tubes[axis]]
    whole = math.prod(shape[axis] for axis in across)
    equal_rt = draw(spec, shape, extents_rn, keys_r, equal_counts=True)
    own_rt = draw(spec, shape, extents_rn, keys_r, equal_counts=False)
    assert equal_rt.shape == own_rt.shape == (len(keys_r), math.prod(shape))
    assert (equal_rt.sum(axis=1) == wanted(spec, whole) * math.prod(shape) // whole).all()
    for equal_t, own_t, extents in zip(equal_rt, own_rt, extents_rn, strict=True):
        real_t = real_places(shape, extents)
        places = math.prod(int(extents[axis]) for axis in across)
        assert not (own_t & ~real_t).any()
        assert own_t.sum() == wanted(spec, places) * real_t.sum() // places
        assert (real_t & ~own_t).any()
        assert (real_t & ~equal_t).any()
        # Equal counts move a row's own by rounding alone.
        of_real = (equal_t & real_t).sum() * places // real_t.sum()
        assert abs(of_real - wanted(spec, places)) <= 1 or min(places, whole - places) <= 1


@given(cases())
@settings(max_examples=150, deadline=None)
def test_a_mask_is_constant_along_the_axes_of_tubes(case: tuple) -> None:
    spec, shape, extents_rn, keys_r = case
    masked = draw(spec, shape, extents_rn, keys_r, equal_counts=True).reshape(-1, *shape)
    for axis, tube in enumerate(spec.tubes):
        if tube:
            assert (masked == masked.take([0], axis=axis + 1)).all()


@given(cases(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_rows_mask_depends_on_no_other_row(case: tuple, equal: bool) -> None:
    spec, shape, extents_rn, keys_r = case
    together_rt = draw(spec, shape, extents_rn, keys_r, equal_counts=equal)
    for row in range(len(keys_r)):
        one = slice(row, row + 1)
        alone_rt = draw(spec, shape, extents_rn[one], keys_r[one], equal_counts=equal)
        np.testing.assert_array_equal(together_rt[one], alone_rt)


@given(cases(), st.integers(0, 16))
@settings(max_examples=150, deadline=None)
def test_inverse_masks_are_complements(case: tuple, sixteenths: int) -> None:
    """Of rows without padding; in sixteenths, of which 1 - p is exact."""
    spec, shape, extents_rn, keys_r = case
    extents_rn = np.broadcast_to(shape, extents_rn.shape)
    prob = sixteenths / 16
    inverse = Blocks(spec.sizes, spec.tubes, prob, inverse=True)
    direct = Blocks(spec.sizes, spec.tubes, 1 - prob, inverse=False)
    across = math.prod(extent for extent, tube in zip(shape, spec.tubes, strict=True) if not tube)
    if across > 1:
        visible_rt = ~draw(inverse, shape, extents_rn, keys_r, equal_counts=True)
        np.testing.assert_array_equal(visible_rt, draw(direct, shape, extents_rn, keys_r, equal_counts=True))


@pytest.mark.parametrize(("shape", "sizes"), [((40,), (5,)), ((10, 12), (3, 4)), ((4, 6, 6), (2, 3, 3))])
@pytest.mark.parametrize("inverse", [False, True])
def test_every_position_is_masked_about_equally_often(shape: tuple, sizes: tuple, inverse: bool) -> None:
    spec = Blocks(sizes, (False,) * len(shape), 0.6, inverse)
    rows = 4000
    extents_rn = np.broadcast_to(shape, (rows, len(shape)))
    often_t = draw(spec, shape, extents_rn, array_keys(np.arange(rows), "even"), equal_counts=True).mean(axis=0)
    assert often_t.mean() == pytest.approx(0.6, abs=0.02)
    assert abs(often_t - often_t.mean()).max() < 0.06


def test_blocks_are_whole_but_for_the_last_one() -> None:
    """Of 10 blocks of 4 on a line of 200 that do not touch, nine are whole."""
    masked_rt = draw(
        Blocks((4,), (False,), 0.1),
        (200,),
        np.full((300, 1), 200),
        array_keys(np.arange(300), "whole"),
        equal_counts=True,
    )
    for masked_t in masked_rt:
        edges = np.flatnonzero(np.diff(np.concatenate(([0], masked_t, [0]))))
        runs = edges[1::2] - edges[::2]
        inner = (edges[::2] > 0) & (edges[1::2] < 200)
        assert (runs[inner] < 4).sum() <= 1, "only what is left of the last one is shorter, and what a border cuts"


def test_the_first_block_is_found_as_one_by_one() -> None:
    """Assignment to repeated indices: the value that is written last stays."""
    shape, rows = (5, 6), 7
    keys_r = array_keys(np.arange(rows), "first")
    sizes_rn, extents_rn = np.tile([2, 3], (rows, 1)), np.tile(shape, (rows, 1))
    counts_r = np.full(rows, 9)
    found_rt = blocks._first_blocks(sizes_rn, shape, extents_rn, counts_r, keys_r)
    uniform_rkn = blocks.stream(keys_r, "blocks", 18).reshape(rows, 9, 2)
    for row in range(rows):
        first = np.full(shape, 9)
        for k in reversed(range(9)):
            top = int(uniform_rkn[row, k, 0] * 6) - 1
            left = int(uniform_rkn[row, k, 1] * 8) - 2
            first[max(top, 0) : top + 2, max(left, 0) : left + 3] = k
        np.testing.assert_array_equal(found_rt[row], first.reshape(-1))


def test_many_rows_at_once_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shape = Blocks((2, 0.5), (False, False), 0.7), (6, 8)
    extents_rn, keys_r = np.tile(shape, (20, 1)), array_keys(np.arange(20), "parts")
    extents_rn[::3, 1] = 5
    at_once = draw(spec, shape, extents_rn, keys_r, equal_counts=True)
    monkeypatch.setattr(blocks, "_INDICES_AT_ONCE", 1000)
    np.testing.assert_array_equal(at_once, draw(spec, shape, extents_rn, keys_r, equal_counts=True))


def test_collate_draws_blocks_of_padded_rows_and_grids() -> None:
    config = MaskingConfig(kind="blocks", prob=0.5, size={"time": 4}, clones=3)
    place = {"length": 40, "sample_ids": [1, 2], "valid_lengths": [40, 10], "seed": 0, "step": 1}
    masked_rt = collate(config, **place).masked_rt
    assert masked_rt.sum(axis=1).tolist() == [20] * 6
    assert masked_rt[3:, :10].sum(axis=1).tolist() == [5] * 3
    own_rt = collate(config, **place, equal_counts=False).masked_rt
    assert own_rt.sum(axis=1).tolist() == [20] * 3 + [5] * 3
    assert not own_rt[3:, 10:].any()
    volumes = MaskingConfig(kind="blocks", prob=0.5, size={"depth": 1, "height": 2, "width": 2}, tubes=["depth"])
    masked_rt = collate(
        volumes, grid=(3, 4, 4), sample_ids=[1, 2], valid_lengths=[[3, 4, 4], [2, 4, 3]], seed=0, step=1
    ).masked_rt
    assert masked_rt.sum(axis=1).tolist() == [24] * 2
    assert (masked_rt.reshape(2, 3, 4, 4)[1, 0, :, :3]).sum() == 6


def plain(generator: np.random.Generator, rows: int, shape: tuple[int, ...], sizes: tuple[int, ...], count: int):  # type: ignore[no-untyped-def]
    """Row by row, as one would write it first."""
    masked = np.zeros((rows, *shape), dtype=bool)
    for row in masked:
        while True:
            before = row.copy()
            place = [int(generator.integers(1 - size, extent)) for size, extent in zip(sizes, shape, strict=True)]
            row[tuple(slice(max(0, at), at + size) for at, size in zip(place, sizes, strict=True))] = True
            excess = int(row.sum()) - count
            if excess >= 0:
                new = np.flatnonzero(row & ~before)
                row.reshape(-1)[new[: min(excess, len(new))]] = False
                break
    return masked


def fastest(run: Callable[[], object], other: Callable[[], object], repeats: int = 9) -> tuple[float, float]:
    """The shortest of several times of each, taken by turns."""
    best = [math.inf, math.inf]
    for _ in range(repeats):
        for index, one in enumerate((run, other)):
            begin = time.perf_counter()
            for _ in range(3):
                one()
            best[index] = min(best[index], time.perf_counter() - begin)
    return best[0], best[1]


@pytest.mark.parametrize(
    ("shape", "sizes", "prob", "inverse"),
    [((499,), (5,), 0.5, False), ((14, 14), (3, 3), 0.8, True), ((8, 14, 14), (2, 4, 4), 0.75, False)],
)
def test_drawing_blocks_is_not_slower_than_plain_numpy(shape: tuple, sizes: tuple, prob: float, inverse: bool) -> None:
    generator = np.random.default_rng(0)
    axes = dict(zip("abc", sizes, strict=False))
    config = MaskingConfig(kind="blocks", prob=prob, size=axes, inverse=inverse)
    count = int(math.prod(shape) * (1 - prob if inverse else prob))
    ours, theirs = fastest(
        lambda: collate(config, grid=shape, sample_ids=range(16), seed=0, step=0),
        lambda: plain(generator, 16, shape, sizes, count),
    )
    print(f"{shape}: {theirs / ours:.2f}x")
    assert ours <= theirs
