import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.data2vec.masking import collate, draw, replace_tokens
from d2v_scale.errors import ConfigError

KINDS = ["spans", "bert", "blockwise", "block1d", "block2d", "random", "blocks"]


def config_and_place(kind: str, side: int, prob: float, length: int, inverse: bool, clones: int) -> tuple:
    config = MaskingConfig(
        kind=kind,  # type: ignore[arg-type]
        prob=prob,
        length=length,
        inverse=inverse,
        clones=clones,
        target_count=max(1, int(side * side * prob * 0.9)),
        min_block=4,
    )
    place = {"grid": (side, side)} if kind in ("blockwise", "block2d") else {"length": side * side}
    return config, place


any_case = st.builds(
    config_and_place,
    st.sampled_from(KINDS),
    st.integers(2, 9),
    st.floats(0.05, 0.95),
    st.integers(1, 12),
    st.booleans(),
    st.integers(1, 3),
)


@given(any_case, st.integers(0, 2**40), st.integers(0, 10**6), st.data())
@settings(max_examples=200, deadline=None)
def test_every_row_shows_a_valid_position_and_fixed_counts_are_equal(case: tuple, seed: int, step: int, data) -> None:  # type: ignore[no-untyped-def]
    config, place = case
    positions = place["length"] if "length" in place else place["grid"][0] * place["grid"][1]
    valid = data.draw(st.lists(st.integers(1, positions), min_size=1, max_size=5))
    if config.kind == "blockwise":
        valid = [positions] * len(valid)
    masks = collate(config, sample_ids=range(len(valid)), valid_lengths=valid, seed=seed, step=step, **place)
    assert masks.masked_rt.shape == (len(valid) * config.clones, positions)
    for row, length in zip(masks.masked_rt, np.repeat(valid, config.clones), strict=True):
        assert not row[:length].all()
        if config.kind in ("spans", "bert"):
            assert not row[length:].any()
    if config.kind in ("block1d", "block2d", "random", "blocks"):
        assert len(set(masks.masked_rt.sum(1).tolist())) == 1
        assert masks.masked_rt.any(1).all()


@given(any_case, st.integers(0, 2**40), st.integers(0, 10**6), st.permutations(range(40, 46)))
@settings(max_examples=100, deadline=None)
def test_a_rows_mask_does_not_depend_on_the_rows_beside_it(case: tuple, seed: int, step: int, ids: list[int]) -> None:
    config, place = case
    together = collate(config, sample_ids=ids, seed=seed, step=step, **place)
    for index, sample in enumerate(ids):
        for clone in range(config.clones):
            alone = draw(config, seed=seed, step=step, sample_id=sample, clone=clone, **place)
            np.testing.assert_array_equal(together.masked_rt[index * config.clones + clone], alone)


def test_seed_step_sample_and_clone_each_change_the_mask() -> None:
    config = MaskingConfig(kind="random", prob=0.5, clones=2)
    base = {"seed": 1, "step": 1, "sample_id": 1, "clone": 0}
    first = draw(config, length=64, **base)
    for name in base:
        other = draw(config, length=64, **{**base, name: base[name] + 1 if name != "clone" else 1})
        assert (first != other).any(), name


def test_masks_of_different_samples_and_clones_are_independent() -> None:
    config = MaskingConfig(kind="random", prob=0.5, clones=4)
    masked_rt = collate(config, length=64, sample_ids=range(100), seed=0, step=0).masked_rt.astype(float)
    correlation = np.corrcoef(masked_rt)
    off_diagonal = correlation[~np.eye(400, dtype=bool)]
    assert abs(off_diagonal.mean()) < 0.01
    assert abs(off_diagonal.std() - 1 / 8) < 0.02


@pytest.mark.parametrize("kind", ["spans", "bert", "block1d", "random", "blocks"])
@pytest.mark.parametrize("length", [1, 2, 3, 9, 10, 11])
def test_very_short_sequences_are_masked_without_error(kind: str, length: int) -> None:
    config = MaskingConfig(kind=kind, prob=0.65, length=10)  # type: ignore[arg-type]
    masked_rt = collate(config, length=length, sample_ids=range(50), seed=0, step=0).masked_rt
    assert not masked_rt.all(1).any()


def test_a_short_row_of_a_padded_batch_keeps_its_fixed_count_and_a_visible_valid_position() -> None:
    config = MaskingConfig(kind="random", prob=0.5)
    masked_rt = collate(config, length=64, sample_ids=range(500), valid_lengths=[2] * 500, seed=0, step=0).masked_rt
    assert set(masked_rt.sum(1).tolist()) == {32}
    assert (~masked_rt[:, :2]).any(1).all()


def test_bert_masks_four_fifths_of_the_chosen_and_swaps_a_tenth_for_ordinary_words() -> None:
    config = MaskingConfig(kind="bert", prob=0.15, length=1)
    masks = collate(config, length=512, sample_ids=range(400), seed=0, step=0)
    assert masks.swapped_rt is not None
    swapped_rt = masks.swapped_rt >= 0
    assert not (swapped_rt & masks.masked_rt).any()
    assert masks.masked_rt.mean() == pytest.approx(0.8 * 0.15, abs=0.002)
    assert swapped_rt.mean() == pytest.approx(0.1 * 0.15, abs=0.001)
    tokens = np.full((400, 512), 7)
    student = replace_tokens(tokens, masks, vocab_size=100, mask_id=99, special_ids=[0, 1, 2, 3])
    np.testing.assert_array_equal(student == 99, masks.masked_rt)
    words = student[swapped_rt]
    assert words.min() == 4
    assert words.max() == 98
    assert (student[~swapped_rt & ~masks.masked_rt] == 7).all()


@pytest.mark.parametrize(
    ("config", "place", "key"),
    [
        (MaskingConfig(kind="block2d"), {"length": 64}, "objective.masking.kind"),
        (MaskingConfig(kind="blockwise", target_count=16), {"grid": (4, 4)}, "objective.masking.target_count"),
    ],
)
def test_a_kind_that_does_not_fit_its_input_is_a_config_error(config: MaskingConfig, place: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        collate(config, sample_ids=[0], seed=0, step=0, **place)


@pytest.mark.parametrize(("place", "axes"), [({"length": 16}, 1), ({"grid": (2, 2, 4)}, 3)])
def test_masks_of_rectangles_say_which_axes_there_are_and_what_fits(place: dict, axes: int) -> None:
    """They blamed speech and text, whatever the stem was, and named no remedy."""
    with pytest.raises(ConfigError, match=rf"lie along {axes}\. Give random, block1d or blocks"):
        collate(MaskingConfig(kind="block2d"), sample_ids=[0], seed=0, step=0, **place)


def plain_spans(generator: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Row by row, as one would write it first."""
    masked = np.zeros((rows, length), dtype=bool)
    for row in masked:
        count = max(1, int(0.65 * length / 10 + generator.random()))
        starts = generator.choice(length - 10, count, replace=False)
        row[np.concatenate([np.arange(s, s + 10) for s in starts])] = True
    return masked


def plain_block2d(generator: np.random.Generator, rows: int, side: int) -> np.ndarray:
    selected = np.zeros((rows, side, side), dtype=bool)
    for grid in selected:
        for place in generator.integers(side * side, size=5):
            r = np.clip(place // side + np.arange(-1, 2), 0, side - 1)
            c = np.clip(place % side + np.arange(-1, 2), 0, side - 1)
            grid[np.ix_(r, c)] = True
        flat = grid.reshape(-1)
        excess = int(flat.sum()) - 39
        if excess > 0:
            flat[generator.choice(np.flatnonzero(flat), excess, replace=False)] = False
        elif excess < 0:
            flat[generator.choice(np.flatnonzero(~flat), -excess, replace=False)] = True
    return ~selected.reshape(rows, -1)


def plain_blockwise(generator: np.random.Generator, rows: int, side: int) -> np.ndarray:
    masked = np.zeros((rows, side, side), dtype=bool)
    for grid in masked:
        count, failed = 0, 0
        while count < 120 and failed < 10:
            failed += 1
            area = 16 + generator.random() * (120 - count - 16)
            aspect = np.exp(generator.uniform(np.log(0.3), np.log(1 / 0.3)))
            h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if h >= side or w >= side:
                continue
            top, left = generator.integers(side - h + 1), generator.integers(side - w + 1)
            new = h * w - grid[top : top + h, left : left + w].sum()
            if 0 < new <= 120 - count:
                grid[top : top + h, left : left + w] = True
                count, failed = count + new, 0
    return masked.reshape(rows, -1)


def fastest(run, repeats: int = 7) -> float:  # type: ignore[no-untyped-def]
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(5):
            run()
        times.append(time.perf_counter() - begin)
    return min(times)


@pytest.mark.parametrize(
    ("name", "config", "place", "plain"),
    [
        ("spans", MaskingConfig(kind="spans"), {"length": 499}, lambda g: plain_spans(g, 16, 499)),
        (
            "block2d",
            MaskingConfig(kind="block2d", prob=0.8, adjust=0.07, length=3, inverse=True),
            {"grid": (14, 14)},
            lambda g: plain_block2d(g, 16, 14),
        ),
        ("blockwise", MaskingConfig(kind="blockwise"), {"grid": (14, 14)}, lambda g: plain_blockwise(g, 16, 14)),
    ],
)
def test_drawing_a_batch_is_not_slower_than_plain_numpy(name: str, config: MaskingConfig, place: dict, plain) -> None:  # type: ignore[no-untyped-def]
    generator = np.random.default_rng(0)
    ids = range(16)
    ours = fastest(lambda: collate(config, sample_ids=ids, seed=0, step=0, **place))
    theirs = fastest(lambda: plain(generator))
    print(f"{name}: {theirs / ours:.2f}x")
    assert ours < 1.2 * theirs
